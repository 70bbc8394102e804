"""`npllm diff`: where a dump of another engine's activations leaves what this model computes.

Every operation is fed with the dump's own inputs, so an error counts where it arises. The first name that leaves the
budget of its format is named, with the convention that explains it. A table of each layer's worst comparison goes to
stdout, then the verdict. All rows of `tokens` are prompts of one length from position 0 on: of a batch with padding, the
attention of the padded rows diverges. With `--json` one document:

    schema       "npllm.diff/1"
    ok           bool: no divergence
    model, dump  str: as given
    format       str: the format whose rounding is allowed for: bf16, f16, f32 or f64
    first        {name: str, layer: int or null, operation: str, problem: str, error: float (roundings of the format, of
                 experts the tokens that have others), excess: float (times the budget; null for what is beyond measure)}:
                 the first divergence, or null
    convention   str: what explains it, "" if nothing known does
    explained    float: which part of its squared error, from 0 to 1
    points       every comparison, each like `first`, in the order in which the model computes
    ties         [{name, layer, token, ours: [int], theirs: [int]}]: experts that lie too near to be told apart; [] for
                 theirs where the dump does not tell them: what rests on that choice is not compared
    unused       [str]: names of the dump that nothing was compared with

Exit status: 0 no divergence, 1 divergence (or an error), 2 wrong usage.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from npllm.cli import options, output

if TYPE_CHECKING:
    from npllm.testing.divergence.finder import Divergence

HELP = "find where another engine's activations leave this model's"
OPERANDS = "MODEL DUMP"

# Ties that the table lists.
TIES = 10

EXAMPLES = """\
examples:
  npllm diff --exporter > dump.py     # for transformers: dump(model, tokens, path)
  npllm diff Qwen/Qwen3-0.6B dump.safetensors
  npllm diff ./my-model dump.safetensors --dtype bf16 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", type=options.filled, help="folder or hub id")
    parser.add_argument("dump", nargs="?", metavar="DUMP", type=options.filled, help="activations, a safetensors file")
    parser.add_argument("--exporter", action="store_true", help="print a script that dumps a transformers model")
    parser.add_argument("--dtype", help="what the engine computed in: bf16, f16, f32 (default: as the numbers tell)")
    parser.add_argument("--tokens", metavar="IDS", help="token ids with commas between (default: the dump's own)")
    parser.add_argument("--all", action="store_true", help="list every comparison, not the worst of each layer")
    parser.add_argument("--json", action="store_true", help="one JSON document (python -m pydoc npllm.cli.diff)")


def run(args: argparse.Namespace) -> int:
    from npllm.testing.divergence.exporter import EXPORTER
    from npllm.testing.divergence.finder import diff

    if args.exporter:
        output.write(EXPORTER)
        return 0
    if args.model is None or args.dump is None:
        raise options.UsageError("give a model and a dump: npllm diff MODEL DUMP")
    found = diff(args.model, args.dump, _ids(args.tokens), dtype=args.dtype)
    if args.json:
        output.write_json({"schema": "npllm.diff/1"} | found.as_dict())
    else:
        output.write(table(found, every=args.all))
    return 0 if found.ok else 1


def _ids(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise options.UsageError(f"--tokens {text!r}: give integers with commas between, such as 1,15,7") from None


def table(found: Divergence, every: bool = False) -> str:
    """The worst comparison of each layer (or every one), the ties, and the verdict in the last line."""
    points = found.points if every else found.worst
    lines = [f"{'layer':>5}  {'of budget':>9}  {'roundings':>9}  name"]
    for point in points:
        layer = "" if point.layer is None else str(point.layer)
        mark = f"  <- {point.problem}" if point.problem else ""
        lines.append(f"{layer:>5}  {point.excess:>9.3g}  {point.error:>9.3g}  {point.name}{mark}")
    for tie in found.ties[:TIES]:
        theirs = f"experts {list(tie.theirs)} for" if tie.theirs else "not compared, others are as near as experts"
        lines.append(f"tie: {tie.name}, token {tie.token}: {theirs} {list(tie.ours)}")
    if len(found.ties) > TIES:
        lines.append(f"and {len(found.ties) - TIES} ties more (--json lists them)")
    if found.unused:
        more = "" if len(found.unused) <= 3 else " ..."
        lines.append(f"not compared: {len(found.unused)} names ({', '.join(found.unused[:3])}{more})")
    return "\n".join([*lines, str(found)]) + "\n"
