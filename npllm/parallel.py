"""Threads of the NumPy backend: BLAS brings its own; elementwise work runs in ours, as NumPy frees the interpreter."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from npllm.arrays import Array

# Below this many elements, handing work to a thread costs more than it saves.
SMALL = 1 << 16


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="npllm")


def each(work: Callable[[Any], Any], items: Sequence[Any], threads: int) -> None:
    """`work` on every item, over threads; returns when all are done. NumPy's `errstate` of the caller holds in them."""
    if threads <= 1 or len(items) <= 1:
        for item in items:
            work(item)
        return
    contexts = [contextvars.copy_context() for _ in items]
    for _ in _pool(threads).map(lambda context, item: context.run(work, item), contexts, items):
        pass


def split(length: int, parts: int) -> list[slice]:
    """`parts` slices of about equal size that cover 0..length."""
    return [slice(i * length // parts, (i + 1) * length // parts) for i in range(parts)]


def rowwise(block: Callable[..., Array], threads: int, *arrays: Array) -> Array:
    """`block(*arrays)` for a block that treats each index of the first axis apart and keeps the first array's shape."""
    if arrays[0].size < SMALL:
        return block(*arrays)
    out = np.empty_like(arrays[0], order="C")

    def part(rows: slice) -> None:
        out[rows] = block(*(array[rows] for array in arrays))

    # One part per thread: smaller ones would have the threads wait for the interpreter's lock in turns.
    each(part, split(len(out), threads), threads)
    return out


# mallopt's parameters, and bytes: freed memory that the process keeps, and blocks that are always mapped anew.
TRIM_THRESHOLD, KEPT = -1, 256 << 20
MMAP_THRESHOLD, MAPPED = -3, 32 << 20


@functools.cache
def keep_freed_memory() -> bool:
    """Let the C library keep up to 256 MiB of freed arrays for the next ones -> whether it could be told (glibc only).

    By default it returns them to the system, which clears every page again before its next use: about 2,000 pages, and
    5 % of the time, per layer of a 512-token prompt.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(TRIM_THRESHOLD, KEPT)) and bool(mallopt(MMAP_THRESHOLD, MAPPED))


class _BlasThreads:
    """How many threads BLAS uses is one number per process: overlapping limits are kept in one list, under one lock.

    While several hold, the latest rules; when the last one ends, the number found at the beginning returns.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.limits: list[int] = []
        self.before: list[int] = []

    @functools.cached_property
    def libraries(self) -> list[Any]:
        from threadpoolctl import ThreadpoolController

        return list(ThreadpoolController().select(user_api="blas").lib_controllers)

    @contextlib.contextmanager
    def limited(self, threads: int | None) -> Iterator[None]:
        """A block in which BLAS uses `threads` threads; None leaves it alone."""
        if threads is None:
            yield
            return
        with self.lock:
            if not self.limits:
                self.before = [library.num_threads for library in self.libraries]
            self.limits.append(threads)
            self._apply([threads] * len(self.libraries))
        try:
            yield
        finally:
            with self.lock:
                self.limits.remove(threads)
                self._apply([self.limits[-1]] * len(self.libraries) if self.limits else self.before)

    def _apply(self, numbers: Sequence[int]) -> None:
        for library, number in zip(self.libraries, numbers, strict=True):
            library.set_num_threads(number)

    def alone(self) -> bool:
        """Whether BLAS is kept to one thread just now."""
        return self.limits[-1:] == [1]

    def forget(self) -> None:
        """In the child of a fork: its threads, and so their limits, are gone."""
        self.lock, self.limits = threading.Lock(), []


_blas = _BlasThreads()
blas_threads, blas_is_alone = _blas.limited, _blas.alone

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
    os.register_at_fork(after_in_child=_blas.forget)
