"""Memory that the arrays of a recorded step take in turn, as they would while it runs.

What one layer leaves, the next one takes: a token's activations then stay in the caches, wherever weights stream by.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import defaultdict

import numpy as np

from npllm.arrays import Array
from npllm.backends.numba_cpu.team import aligned


class Pool:
    """Blocks that come back when the last array over them is gone; they live as long as their pool."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Array]] = defaultdict(list)
        self._blocks: list[Array] = []

    def take(self, size: int) -> Array:
        """So many bytes, uninitialised, on a cache line."""
        free = self._free[size]
        if not free:
            free.append(aligned(size, np.uint8))
            self._blocks += free
        block = free.pop()
        # NumPy's views of views know the array that owns the memory, and nothing in between; a buffer they all keep.
        lent = (ctypes.c_ubyte * size).from_buffer(block.data)
        weakref.finalize(lent, free.append, block).atexit = False
        return np.frombuffer(memoryview(lent), np.uint8)
