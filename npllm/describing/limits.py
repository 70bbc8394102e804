"""How fast a machine could be at best: what has to be read and computed over its rates (roofline, Williams et al. 2009)."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from npllm import parallel
from npllm.describing.description import Description
from npllm.errors import ArgumentError
from npllm.machine import available_memory, cpu_name, default_threads

PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
RATE = re.compile(r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*([kMGTP]?)(B/s|FLOP/s|FLOPS|FLOPs)")
EXAMPLE = "3350GB/s,989TFLOP/s"

# Seconds for each of both measurements; an array far beyond any cache; a product that BLAS is at its best with.
SECONDS, READ_BYTES, SIDE = 0.9, 256 << 20, 1536


@dataclass(frozen=True)
class Machine:
    """`bandwidth` in bytes per second, `flops` in floating-point operations per second; `name` says where they are from."""

    bandwidth: float
    flops: float
    name: str


@dataclass(frozen=True)
class Limit:
    """Tokens per second at best for one row, and whether "memory" or "arithmetic" is what bounds it."""

    decode: float
    decode_bound: str
    prefill: float
    prefill_bound: str


def parse_machine(text: str) -> Machine:
    """ "3350GB/s,989TFLOP/s", or "here": measured."""
    if text.strip().lower() == "here":
        return measure()
    found = RATE.findall(text)
    rates = {unit: float(value) * PREFIXES[prefix] for value, prefix, unit in found}
    bandwidth, flops = rates.get("B/s"), next((rates[unit] for unit in rates if unit != "B/s"), None)
    left = re.sub(r"[\s,;]", "", RATE.sub("", text))
    if left or len(found) != 2 or not bandwidth or not flops or not math.isfinite(bandwidth * flops):
        raise ArgumentError(f"--machine {text!r}: give bandwidth and arithmetic, such as {EXAMPLE}, or here to measure")
    return Machine(bandwidth, flops, text.strip())


def measure(threads: int | None = None) -> Machine:
    """This machine, in about two seconds: reading an array with all threads, and float32 products of BLAS."""
    threads = threads or default_threads()
    size = max(1 << 20, min(READ_BYTES, available_memory() // 4))
    array = np.ones(size // 4, np.float32)
    parts = [array[part] for part in parallel.split(len(array), threads)]
    read = array.nbytes / _best(lambda: parallel.each(np.max, parts, threads))
    square = np.ones((SIDE, SIDE), np.float32)
    with parallel.blas_threads(threads):
        product = 2 * SIDE**3 / _best(lambda: square @ square)
    return Machine(read, product, f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}, measured")


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest run, of as many as fit into SECONDS."""
    work()
    best, end = math.inf, time.perf_counter() + SECONDS
    while True:
        start = time.perf_counter()
        work()
        done = time.perf_counter()
        best = min(best, done - start)
        if done > end:
            return best


def limit(d: Description, machine: Machine, context: int, weights: str, kv_dtype: str = "bfloat16") -> Limit:
    """One row: a token after `context` others, and a prompt of `context` tokens whose weights are read once."""
    decode = d.decode_bytes(context, weights, kv_dtype) / machine.bandwidth, d.decode_flops(context) / machine.flops
    read = min(dict(d.weight_bytes)[weights], context * d.weights_read(weights)) + d.kv_bytes(context, kv_dtype)
    prefill = read / machine.bandwidth, d.prefill_flops(context) / machine.flops
    bounds = ["memory" if memory > arithmetic else "arithmetic" for memory, arithmetic in (decode, prefill)]
    return Limit(1 / max(decode), bounds[0], context / max(prefill), bounds[1])
