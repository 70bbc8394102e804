"""`npllm quantize`: a model in 8 or 4 bits (npllm.quantise), as a checkpoint of its own that loads at once.

The folder that it made goes to stdout, or with `--json` one document:

    schema           "npllm.quantize/1"
    model            str: folder or hub id as given
    out              str: the folder that it made
    quantize         str: "q8" or "q4"
    matrices         int: how many are quantised
    bytes            int: of all tensors written
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from npllm.cli import options, output

HELP = "write a model in 8 or 4 bits"
OPERANDS = "MODEL OUT"

EXAMPLES = """\
examples:
  npllm quantize Qwen/Qwen3-0.6B ./qwen3-q4 --quantize q4
  npllm quantize ./qwen3 ./qwen3-q8 --quantize q8 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=options.filled, metavar="MODEL", help="folder or hub id")
    parser.add_argument("out", type=options.filled, metavar="OUT", help="the folder to make, new or empty")
    formats = "q8: 8.5 bits per weight; q4: 4.5 bits (see npllm/grouped.py)"
    parser.add_argument("--quantize", required=True, choices=("q8", "q4"), help=formats)
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--json", action="store_true", help="one JSON document (python -m pydoc npllm.cli.quantize)")


def run(args: argparse.Namespace) -> int:
    from npllm.loading import locate
    from npllm.quantise import quantise_folder

    source, out = locate(args.model, args.revision), Path(os.path.expanduser(args.out))
    with output.progress("Quantising") as progress:
        made = quantise_folder(source, out, args.quantize, progress=progress)
    if args.json:
        about = {"schema": "npllm.quantize/1", "model": args.model, "out": str(made.folder), "quantize": args.quantize}
        output.write_json(about | {"matrices": made.matrices, "bytes": made.nbytes})
    else:
        output.write(f"{made.folder}\n")
    return 0
