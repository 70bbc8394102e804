"""A truth case whose files can be changed."""

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

import npllm
from npllm.arrays import Array
from npllm.backend import Backend
from npllm.testing.compare import norm
from tests.compare import LIMITS
from tests.export import TRUTH
from tests.models import ABSENT

# Errors of what is computed: below the first, it is what transformers computes; above the second, it is not.
RIGHT, WRONG = LIMITS["truth"].relative, 0.01

Tensors = dict[str, Array]


class Case:
    """A copy of a truth case whose files can be changed, and the error of what is then computed."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, source = folder, TRUTH / "models" / name
        self.config: dict[str, Any] = json.loads((source / "config.json").read_text())
        self.tensors: Tensors = load_file(source / "model.safetensors")
        self.truth: Tensors = load_file(source / "trace.safetensors")

    def load(self, backend: Backend | None = None) -> npllm.LLM:
        """The model, with the files as they now are."""
        (self.folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, self.folder / "model.safetensors")
        llm = npllm.load(self.folder, backend="numpy", dtype="float32")
        llm.backend = backend or llm.backend
        return llm

    def logits(self, backend: Backend | None = None) -> Array:
        return self.load(backend).forward(self.truth["tokens"])

    def error(self, backend: Backend | None = None, **changes: Any) -> float:
        """||logits - truth|| / ||truth||, with `changes` of config.json (ABSENT takes a key away)."""
        kept = self.config
        changed = kept | changes
        self.config = {key: value for key, value in changed.items() if value is not ABSENT}
        got, want = self.logits(backend), self.truth["logits"]
        self.config = kept
        return norm(got - want) / norm(want)
