"""`npllm warmup`: compile now what would be compiled at the first use, so that the first answer need not wait for it.

Several compile at once: everything that the backend may ever need, or with a model, what that one needs; it then
answers a few prompts, to see that nothing is left.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from npllm.cli import options, output

if TYPE_CHECKING:
    from npllm.backend import Backend
    from npllm.llm import LLM

HELP = "compile kernels ahead, so that the first answer need not wait"
OPERANDS = "[MODEL]"

EXAMPLES = """\
examples:
  npllm warmup
  npllm warmup Qwen/Qwen3-0.6B --quantize q8
"""

# Lengths of prompts that a model answers: a token, a few, a long prompt and its remainder.
PROMPTS = (1, 5, 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", metavar="MODEL", type=options.filled, help="only what this one needs")
    options.add_model(parser)


def run(args: argparse.Namespace) -> int:
    from npllm import get_backend

    if args.folder is not None and args.model is not None:
        raise options.UsageError("give one model: as an argument or with --model")
    args.model = args.folder or args.model
    start = time.perf_counter()
    if args.model is None:
        be = get_backend(args.backend, dtype=args.dtype, threads=args.threads)
        count = be.warm_up(_show)
        _show(0, 0)
    else:
        llm = options.load_model(args)
        be, before = llm.backend, _kept(llm.backend)
        be.warm_up(_show, llm.model)
        _show(0, 0)
        answer(llm)
        count = _kept(be) - before
    output.write(f"{_outcome(be, count, time.perf_counter() - start)}\n")
    return 0


def answer(llm: LLM) -> None:
    """Have a model compute steps of every kind: prompts of several lengths, decoding, several rows."""
    longest = max(1, min(max(PROMPTS), llm.max_context - 3))
    prompts = [[0] * min(length, longest) for length in PROMPTS]
    for batch in [*([prompt] for prompt in prompts), prompts]:
        llm.generate(batch, max_tokens=min(3, llm.max_context), temperature=0, ignore_eos=True)


def _kept(be: Backend) -> int:
    kernels: dict[str, Any] = be.facts().get("kernels", {})
    return int(kernels.get("compiled", 0))


def _outcome(be: Backend, count: int, seconds: float) -> str:
    kernels: dict[str, Any] = be.facts().get("kernels", {})
    if not kernels:
        return f"nothing to compile: {be.name} has no kernels ({be.why})"
    if not count:
        return f"nothing to compile: {kernels['compiled']} kernels are in {kernels['folder']}"
    return f"compiled {count} kernels in {seconds:.1f} s; kept in {kernels['folder']}"


def _show(done: int, total: int) -> None:
    """How far it is, in one line of a terminal; nothing of nothing clears the line."""
    if output.is_terminal(sys.stderr):
        text = f"compiling {done} of {total}" if total else ""
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
