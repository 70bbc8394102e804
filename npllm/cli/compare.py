"""`npllm compare`: architectures side by side, from config.json alone; no weights are read.

A table of facts goes to stdout, those that differ marked; `--html` writes a page with diagrams of the blocks, the table,
and curves of memory and arithmetic over the context; `--svg` and `--curves` write these pictures alone. With `--json` one
document:

    schema    "npllm.compare/1"
    models    [{...}]: of each what `npllm inspect --json` says, without its schema
    facts     [{section, name: str, differs: bool, cells: [str], values: [number or null]}]: the table
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from npllm.cli import inspect, output
from npllm.cli.options import UsageError, filled

if TYPE_CHECKING:
    from npllm.describing.comparison import Row
    from npllm.describing.description import Description

HELP = "architectures side by side: a table of what differs, pictures"
OPERANDS = "MODEL MODEL [MODEL ...]"

EXAMPLES = """\
examples:
  npllm compare deepseek-v3 llama-4-maverick
  npllm compare olmo-2-7b ./config.json --context 4096 --markdown
  npllm compare gemma-3-27b mistral-small-3.1 --html comparison.html --svg comparison.svg
"""

BOLD = "\033[1m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL", type=filled, help=inspect.MODEL)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON document (python -m pydoc npllm.cli.compare)")
    form.add_argument("--markdown", action="store_true", help="the table in Markdown")
    parser.add_argument("--html", type=_path, metavar="OUT", help="write a page with diagrams, curves and the table")
    parser.add_argument("--svg", type=_path, metavar="OUT", help="write the diagrams")
    parser.add_argument("--curves", type=_path, metavar="OUT", help="write the curves, memory and work over context, as SVG")
    inspect.add_conditions(parser)


def _path(text: str) -> Path:
    return Path(filled(text))


def run(args: argparse.Namespace) -> int:
    if len(args.models) < 2:
        raise UsageError("compare needs at least two models: npllm compare deepseek-v3 qwen3-235b-a22b")
    outs = [out for out in (args.html, args.svg, args.curves) if out is not None]
    if len(set(outs)) < len(outs):
        raise UsageError(f"two of --html, --svg and --curves name {max(outs, key=outs.count)}")
    from npllm.describing import describe
    from npllm.describing.comparison import markdown, rows_of, text
    from npllm.describing.document import document

    described = [describe(model, args.revision) for model in args.models]
    context = inspect.context_of(args, *described)
    conditions = context, args.kv_dtype, args.weights, inspect.machine_of(args)
    rows, names = rows_of(described, *conditions), [each.name for each in described]
    draw(args, described, rows)
    if args.json:
        facts = [row._asdict() | {"differs": row.differs} for row in rows]
        models = [document(each, *conditions) for each in described]
        output.write_json({"schema": "npllm.compare/1", "models": models, "facts": facts})
    elif args.markdown:
        output.write(markdown(names, rows))
    else:
        _warn(described, context)
        colours = (BOLD, output.DIM, output.RESET) if output.has_colours(sys.stdout) else ()
        output.write(text(names, rows, *colours))
    return 0


def _warn(described: Sequence[Description], context: int) -> None:
    for each in described:
        if context > each.context:
            output.note(f"{each.name} was made for {each.context:,} tokens, {context:,} are beyond it", output.YELLOW)


def draw(args: argparse.Namespace, described: Sequence[Description], rows: Sequence[Row]) -> None:
    """Write the pictures that were asked for, all or none."""
    from npllm import pictures
    from npllm.saving import write_texts

    makers: dict[Path | None, Callable[[], str]] = {
        args.html: lambda: pictures.page_html(described, [pictures.Row(row.name, row.cells, row.section) for row in rows]),
        args.svg: lambda: pictures.diagram_svg(described),
        args.curves: lambda: pictures.curves_svg(described),
    }
    write_texts({out: make() for out, make in makers.items() if out is not None})
