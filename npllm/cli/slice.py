"""`npllm slice`: a smaller Gemma 3n out of a bigger one (npllm.matformer), as a checkpoint of its own.

The folder that it made goes to stdout, or with `--json` one document:

    schema           "npllm.slice/1"
    model            str: folder or hub id as given
    out              str: the folder that it made
    layers           [int]: the layers of the model that were kept
    ffn              [int]: the width of the FFN in each of them
    parameters       int
    bytes            int: of all tensors written, other towers included
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from npllm.cli import options, output
from npllm.cli.options import UsageError

HELP = "cut a smaller model out of a MatFormer (Gemma 3n)"
OPERANDS = "MODEL OUT"

EXAMPLES = """\
examples:
  npllm slice google/gemma-3n-E4B-it ./e2b --preset e2b
  npllm slice ./gemma-3n-E4B ./between --layers 0-19,25-34 --ffn 16384x10,8192x20
"""

# Longer lists are a slip of the keyboard.
MOST_LAYERS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub id")
    parser.add_argument("out", type=options.filled, metavar="OUT", help="the folder to make, new or empty")
    parser.add_argument("--preset", metavar="NAME", help="a published size: e2b")
    parser.add_argument("--layers", type=_layers, metavar="LIST", help="layers to keep, such as 0-19,25-34 (default: all)")
    ffn = "width of the FFNs: one for all, or one per layer that is kept; 8192x3 is three of 8192 (default: as they are)"
    parser.add_argument("--ffn", type=_widths, metavar="WIDTHS", help=ffn)
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--json", action="store_true", help="one JSON document (python -m pydoc npllm.cli.slice)")


def _layers(text: str) -> list[int]:
    """0-2,5 -> 0, 1, 2, 5."""
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        named = range(int(found[1]), int(found[2] or found[1]) + 1) if found else ()
        if not named:
            raise argparse.ArgumentTypeError(f"{part!r} is neither a layer nor a range of them, such as 0-19")
        numbers += named
    return _bounded(numbers)


def _widths(text: str) -> int | list[int]:
    """8192 -> 8192 for all; 16384x2,8192 -> 16384, 16384, 8192."""
    widths: list[int] = []
    for part in text.split(","):
        if (found := re.fullmatch(r"(\d{1,9})(?:x0*([1-9]\d{0,3}))?", part)) is None:
            raise argparse.ArgumentTypeError(
                f"{part!r} is no width, nor a width and how many layers have it, such as 8192x20"
            )
        widths += [int(found[1])] * int(found[2] or 1)
    return widths[0] if text.isdigit() else _bounded(widths)


def _bounded(values: list[int]) -> list[int]:
    if len(values) > MOST_LAYERS:
        raise argparse.ArgumentTypeError(f"{len(values)} layers are more than any model has")
    return values


def run(args: argparse.Namespace) -> int:
    from npllm.loading import locate
    from npllm.matformer import slice_folder

    wanted = _wanted(args)
    with output.progress("Slicing") as progress:
        made = slice_folder(locate(args.model, args.revision), Path(os.path.expanduser(args.out)), wanted, progress=progress)
    if args.json:
        sizes = {"parameters": made.parameters, "bytes": made.nbytes}
        document = {"schema": "npllm.slice/1", "model": args.model, "out": str(made.folder)}
        output.write_json(document | {"layers": made.layers, "ffn": made.ffn} | sizes)
    else:
        output.write(f"{made.folder}\n")
    return 0


def _wanted(args: argparse.Namespace) -> str | dict[str, Any]:
    given = {key: value for key, value in (("layers", args.layers), ("ffn", args.ffn)) if value is not None}
    if (args.preset is None) == (not given):
        raise UsageError("say what to cut: --preset, or --layers and --ffn (or one of them)")
    return args.preset if args.preset is not None else given
