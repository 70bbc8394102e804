"""The NumPy backend against what the machine can do, on the same matrices and interleaved in one run.

prefill   tokens per second of a 512-token prompt, against the time of its matrix products alone (np.matmul);
decode    bytes of weights per second, against the read bandwidth (np.max over the largest matrix, on all cores);
memory    the process's peak, against the float32 weights;
import    seconds of `import npllm`, and of what its first use imports, in a fresh interpreter.

Other work on the machine disturbs both sides of a ratio alike only if it lasts: take the best of several rounds.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from npllm import __version__, parallel
from npllm.arrays import Array
from npllm.bench import measure, random_llm
from npllm.machine import cores, cpu_name
from npllm.registry import get_backend
from npllm.weights import leaves

PROMPT, NEW = 512, 64


def run(shape: str, rounds: int) -> dict[str, Any]:
    """All figures of one run."""
    llm = random_llm(shape, get_backend("numpy"))
    measure(llm, PROMPT, 2, repetitions=1)
    peak = peak_memory()
    matrices = list(weight_matrices(llm.model.weights))
    inputs = {n: np.random.default_rng(0).standard_normal((PROMPT, n), dtype=np.float32) for n in widths(matrices)}
    head = llm.model.weights.lm_head.weight
    largest = max(matrices, key=lambda w: w.nbytes)
    blocks = [w for w in matrices if w is not head]
    best: dict[str, float] = {}
    for _ in range(rounds):
        pp, tg = measure(llm, PROMPT, NEW, repetitions=1)
        keep(best, "prefill_tokens_per_second", pp.tokens_per_second)
        keep(best, "decode_tokens_per_second", tg.tokens_per_second)
        seconds = timed(lambda: products(blocks, inputs)) + timed(lambda: inputs[head.shape[1]][:1] @ head.T)
        keep(best, "matmul_tokens_per_second", PROMPT / seconds)
        keep(best, "read_bytes_per_second", largest.nbytes / min(timed(lambda: read(largest)) for _ in range(5)))
    weights = 4 * llm.parameters
    return {
        "schema": "npllm.bench.canon/1",
        "shape": shape,
        **about(),
        **best,
        "decode_bytes_per_second": best["decode_tokens_per_second"] * weights,
        "prefill_ratio": best["prefill_tokens_per_second"] / best["matmul_tokens_per_second"],
        "decode_ratio": best["decode_tokens_per_second"] * weights / best["read_bytes_per_second"],
        "peak_memory_ratio": peak / weights,
        "import_seconds": import_seconds(),
    }


def about() -> dict[str, Any]:
    """What was measured where, and when."""
    return {
        "machine": f"{cpu_name()}, {cores()} cores",
        "versions": {"npllm": __version__, "numpy": np.__version__, "python": platform.python_version()},
        "date": date.today().isoformat(),
    }


def keep(best: dict[str, float], name: str, value: float) -> None:
    best[name] = max(value, best.get(name, 0.0))


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def weight_matrices(tree: Any) -> Iterator[Array]:
    """Every distinct matrix of a model's weight tree (a tied head is the embedding)."""
    distinct = {id(weight): weight for _, weight in leaves(tree) if weight.ndim == 2}
    return iter(distinct.values())


def widths(matrices: list[Array]) -> set[int]:
    return {w.shape[1] for w in matrices}


def products(matrices: list[Array], inputs: dict[int, Array]) -> None:
    for w in matrices:
        inputs[w.shape[1]] @ w.T


def read(matrix: Array) -> None:
    """Read a matrix once, on all cores, doing as little as can be done with it."""

    def part(piece: Array) -> None:
        np.max(piece)

    flat = matrix.reshape(-1)
    parallel.each(part, [flat[each] for each in parallel.split(flat.size, cores())], cores())


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process's peak memory")


def import_seconds() -> float:
    code = "import time; t = time.perf_counter(); import npllm; npllm.load; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    return min(float(each.stdout) for each in runs)


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = [
        ("prefill 512, tokens/s", "prefill_tokens", "np.matmul alone", "matmul_tokens", "prefill_ratio"),
        ("decode, GB of weights/s", "decode_bytes", "read bandwidth", "read_bytes", "decode_ratio"),
    ]
    lines = ["| figure | npllm | limit | ratio |", "|---|---|---|---|"]
    for name, mine, limit, theirs, ratio in rows:
        unit = 1e9 if "bytes" in mine else 1.0
        value, bound = figures[f"{mine}_per_second"] / unit, figures[f"{theirs}_per_second"] / unit
        lines.append(f"| {name} | {value:.1f} | {bound:.1f} ({limit}) | {figures[ratio]:.2f} |")
    lines.append(f"| peak memory / float32 weights | {figures['peak_memory_ratio']:.2f} | | |")
    lines.append(f"| import npllm, seconds | {figures['import_seconds']:.2f} | | |")
    return "\n".join(lines)
