"""`npllm convert`: pickled weights to safetensors, in a process that runs no code from them (npllm.convert).

The folder that it made goes to stdout.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from npllm.cli import options, output

HELP = "pickled weights to safetensors, without running their code"
OPERANDS = "SOURCE OUT"

EXAMPLES = """\
examples:
  npllm convert ./old-model ./old-model-safetensors
  npllm convert owner/name ./name --dtype bfloat16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = "a folder with pickled weights, one such file, or a hub id"
    parser.add_argument("source", type=options.filled, metavar="SOURCE", help=source)
    parser.add_argument("out", type=options.filled, metavar="OUT", help="the folder to make; SOURCE itself is allowed")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="cast floating-point tensors")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--overwrite", action="store_true", help="replace safetensors that OUT already has")


def run(args: argparse.Namespace) -> int:
    from npllm.convert import convert

    source = _locate(args.source, args.revision)
    with output.progress("Converting") as progress:
        out = Path(os.path.expanduser(args.out))
        made = convert(source, out, dtype=args.dtype, overwrite=args.overwrite, progress=progress)
    output.write(f"{made}\n")
    return 0


def _locate(source: str, revision: str | None) -> Path:
    """The folder or file named, else the pickles of a hub id, downloaded."""
    from npllm import hub

    path = Path(os.path.expanduser(source))
    if path.exists() or not hub.looks_like_hub_id(source):
        return path
    return hub.fetch(source, revision=revision, pickles=True)
