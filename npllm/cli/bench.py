"""`npllm bench`: tokens per second of a model, or of random weights of a published shape (npllm.bench).

`pp512` is a prompt of 512 tokens up to the first token of its answer, `tg128` is 128 tokens generated one by one; mean and
standard deviation over the repetitions. The first run of each, where a backend compiles, is apart, and so is loading. A
table goes to stdout as markdown or csv, or with `--json` one document:

    schema           "npllm.bench/1"
    model            str: folder, hub id or shape; "npllm-shipped" for the default
    backend          str: its name
    chosen           str: why this backend
    dtype            str: the arithmetic, such as "float32"; "stored" goes by the weights' format (npllm doctor)
    kv_dtype         str: how keys and values were cached
    parameters       int
    threads          int: of the backend and of BLAS
    load_seconds     float: until the model was ready
    results          [{test: str, tokens: int, tokens_per_second: float, deviation: float, repetitions: int,
                     first_run_seconds: float}]
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from npllm.cli import options, output
from npllm.cli.options import UsageError

if TYPE_CHECKING:
    from npllm.llm import LLM

HELP = "prompt and generation tokens per second"
OPERANDS = ""

EXAMPLES = """\
examples:
  npllm bench -m Qwen/Qwen3-0.6B --prompt-tokens 512 --new-tokens 128
  npllm bench --shape qwen3-0.6b --threads 4 --format csv > results.csv
"""

# Options that mean nothing to random weights, with their defaults.
OF_CHECKPOINTS: dict[str, str | None] = dict.fromkeys(("model", "revision", "quantize", "kv_dtype", "max_context"))
OF_CHECKPOINTS["weights"] = "auto"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", metavar="NAME", help="random weights of this shape, such as qwen3-0.6b")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="default 512; 0 leaves the test out")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N", help="default 128; 0 leaves the test out")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="default 3")
    parser.add_argument("--format", choices=("markdown", "csv", "json"), default="markdown", help="default markdown")
    parser.add_argument("--json", dest="format", action="store_const", const="json", help="the same as --format json")
    options.add_model(parser)


def run(args: argparse.Namespace) -> int:
    from npllm import bench

    start = time.perf_counter()
    llm = _random(args) if args.shape is not None else options.load_model(args)
    about = describe(llm) | {"load_seconds": round(time.perf_counter() - start, 3)}
    if args.format == "markdown":
        del about["chosen"]  # too long for a column
    results = bench.measure(llm, args.prompt_tokens, args.new_tokens, args.repetitions, _progress)
    output.write(bench.render(results, args.format, about) + "\n")
    return 0


def _random(args: argparse.Namespace) -> LLM:
    from npllm import bench, get_backend

    given = [name for name, default in OF_CHECKPOINTS.items() if getattr(args, name) != default]
    if given:
        raise UsageError(f"--shape has random weights; leave --{given[0].replace('_', '-')} out")
    return bench.random_llm(args.shape, get_backend(args.backend, dtype=args.dtype, threads=args.threads))


def describe(llm: LLM) -> dict[str, Any]:
    """What is measured: the first fields of the document."""
    from npllm.machine import default_threads

    return {**options.about(llm), "parameters": llm.parameters, "threads": llm.backend.threads or default_threads()}


def _progress(text: str) -> None:
    if output.is_terminal(sys.stderr):
        output.note(text)
