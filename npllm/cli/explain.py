"""`npllm explain`: the forward pass with a model's numbers, step by step; from config.json alone, no weights are read.

Each step has its equation as the code documents it, shapes without the axis of tokens, parameters, FLOPs of one decoded
token that sees `--context` tokens, bytes that it reads, and the lines of npllm that ask for it and define it. Layers that do
the same are told once. With `--json`, one document:

    schema      "npllm.explain/1"
    name, model_type    str
    context     int
    weights, kv_dtype   str: storage formats
    flops, bytes        int: of the whole pass, all layers
    sections    [{title: str, layers: [int] (those that it stands for, from 0; none outside), steps: [{operation, meaning:
                str, weights: [str], reads: [[int]], gives: [int], numbers: {name: value}, parameters, active, flops, bytes:
                int, place: {file: str, line: int, function: str}, block: the same or null}]}]
"""

from __future__ import annotations

import argparse

from npllm.cli import inspect, output

HELP = "the forward pass, step by step, with a model's numbers"
OPERANDS = "[MODEL]"

EXAMPLES = """\
examples:
  npllm explain deepseek-v3
  npllm explain qwen3-0.6b --context 4096 --weights q4
  npllm explain ./config.json --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{inspect.MODEL} (default: the shipped model)")
    parser.add_argument("--json", action="store_true", help="one JSON document (python -m pydoc npllm.cli.explain)")
    inspect.add_conditions(parser, machine=False)


def run(args: argparse.Namespace) -> int:
    from npllm.describing import describe
    from npllm.describing.explaining import document, explanation

    described = describe(args.model, args.revision)
    conditions = inspect.context_of(args, described), args.kv_dtype, args.weights
    if args.json:
        output.write_json({"schema": "npllm.explain/1"} | document(described, *conditions))
    else:
        output.write(explanation(described, *conditions))
    return 0
