"""Exports the reference outputs under `tests/truth/` from PyTorch. This module needs neither torch nor transformers.

    pip install -r tests/export/requirements.txt
    python -m tests.export                          # everything, from the root of the repository
    python -m tests.export --only llama3-yarn       # one model case; may be given several times
    python -m tests.export --only blocks            # the operations
    python -m tests.export --list                   # the cases and what each is for

`cases/` declares the model cases, a file per family, and `models.py` runs them: `fp8.py` stores their weights in FP8,
`matformer.py` cuts them out of another case, `float64.py` makes transformers compute in float64 throughout. `blocks/` runs
single operations. `chat_templates.py` and `pickles.py` are programs of their own. `tests/truth/README.md` describes the
files.
"""

import json
from pathlib import Path
from typing import Any

from .cases import CASES, digest

FORMAT = 1
"""Version of the layout of the truth files. Raise it with every change of their names, shapes or meaning."""

TRUTH = Path(__file__).resolve().parent.parent / "truth"

MODELS = dict.fromkeys(case.model for case in CASES.values())
ONE_OF_EACH = [next(name for name, case in CASES.items() if case.model == model) for model in MODELS]
"""The first case of each architecture: where every case would take too long for every run, these run."""


def command(case: str) -> str:
    """The command that regenerates one case (or "blocks"), from the root of the repository."""
    return f"python -m tests.export --only {case}"


def stale(provenance: dict[str, Any], case: str) -> str | None:
    """Why the files of `case` must be made anew, in one line with the command that does it; None if they are current.

    provenance: the content of the case's `provenance.json`, or of a block file's header entry of that name.
    case: a key of `CASES`, or "blocks".
    """
    if provenance.get("format") != FORMAT:
        return f"truth of {case} has format {provenance.get('format')}, not {FORMAT}; run: {command(case)}"
    if case in CASES and provenance.get("declaration") != digest(CASES[case]):
        return f"truth of {case} was made from another declaration; run: {command(case)}"
    return None


def read_provenance(case: str) -> dict[str, Any]:
    """The content of `tests/truth/models/<case>/provenance.json`. FileNotFoundError if the case was never exported."""
    content: dict[str, Any] = json.loads((TRUTH / "models" / case / "provenance.json").read_text())
    return content
