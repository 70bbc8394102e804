"""Pinned memory of the host: what goes to the GPU through it, and what a step's results come back to."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backends.cupy_gpu.device import Graph
from npllm.errors import MemoryLimitError
from npllm.machine import available_memory, gibibytes

# Pieces of pinned memory that copies to the GPU go through, and bytes of each: of weights, and of what a step is told. The
# small ones are many, so that the host finds one free whatever steps are under way.
LARGE = 2, 32 << 20
SMALL = 8, 1 << 16

# Bytes of pinned memory for what a step gives, at least.
LANDING = 4096


def pinned(cupy: Any, nbytes: int) -> Any:
    """Memory of the host that the GPU can reach, until nobody knows it; MemoryLimitError.

    Not from CuPy's pool, which takes the next power of two and gives nothing back: 8 GiB for a table of 5.
    """
    cuda = cupy.cuda
    try:
        return cuda.PinnedMemoryPointer(cuda.PinnedMemory(nbytes, cuda.runtime.hostAllocPortable), 0)
    except cuda.runtime.CUDARuntimeError as error:
        if "cudaErrorMemoryAllocation" not in str(error):
            raise
        raise MemoryLimitError(
            f"the host has no {gibibytes(nbytes)} that the GPU could reach (pinned memory; {gibibytes(available_memory())} "
            "is available): free some memory of the host"
        ) from None


class Staging:
    """Copies to the GPU through a few pieces of pinned memory: one is filled while others travel."""

    def __init__(self, cupy: Any, count: int, size: int) -> None:
        self.cupy, self.count, self.size = cupy, count, size
        self.pieces: list[tuple[Any, Any]] = []
        self.turn = 0
        self.lock = threading.Lock()

    def copy(self, target: Any, values: Array) -> None:
        """`values`, contiguous, into contiguous `target`, in the order of the current stream."""
        flat = values.reshape(-1).view(np.uint8) if values.size else np.empty(0, np.uint8)
        runtime, stream = self.cupy.cuda.runtime, self.cupy.cuda.get_current_stream()
        with self.lock:
            for begin in range(0, flat.size, self.size):
                memory, event = self._piece()
                part = flat[begin : begin + self.size]
                event.synchronize()
                pointer = int(memory.ptr)
                np.frombuffer(memory, np.uint8, part.size)[:] = part
                try:
                    runtime.memcpyAsync(target.data.ptr + begin, pointer, part.size, runtime.memcpyHostToDevice, stream.ptr)
                finally:
                    # Also where Ctrl-C comes between: the copy is on its way.
                    event.record(stream)

    def _piece(self) -> tuple[Any, Any]:
        while len(self.pieces) < self.count:
            self.pieces.append((pinned(self.cupy, self.size), self.cupy.cuda.Event(block=False, disable_timing=True)))
        self.turn = (self.turn + 1) % self.count
        return self.pieces[self.turn]


class Landing:
    """Pinned memory that a result comes back to, and the events of when its launch began and when it had come."""

    def __init__(self, cupy: Any, nbytes: int) -> None:
        self.nbytes = nbytes
        self.memory = pinned(cupy, nbytes)
        self.began, self.came = cupy.cuda.Event(), cupy.cuda.Event()


class CudaTurn:
    """A graph's launch, with a landing of its own until it has been waited for or nobody knows it any more.

    A landing is used again only when its copy has come, so that no copy on its way meets another's.
    """

    def __init__(self, cupy: Any, landings: list[Landing], graph: Graph, results: Sequence[Any]) -> None:
        self.cupy, self.landings = cupy, landings
        self.landing = self._free(sum(each.nbytes for each in results))
        runtime, stream = cupy.cuda.runtime, cupy.cuda.get_current_stream()
        self.landing.began.record(stream)
        self.places: list[tuple[int, np.dtype[Any], tuple[int, ...]]] = []
        offset = 0
        try:
            graph.launch()
            for each in results:
                to = int(self.landing.memory.ptr) + offset
                runtime.memcpyAsync(to, each.data.ptr, each.nbytes, runtime.memcpyDeviceToHost, stream.ptr)
                self.places.append((offset, np.dtype(each.dtype), each.shape))
                offset += each.nbytes
        finally:
            # Also where Ctrl-C comes between: the landing is given back while a copy may be on its way to it.
            self.landing.came.record(stream)

    def _free(self, nbytes: int) -> Landing:
        for each in tuple(self.landings):
            if each.nbytes >= nbytes and each.came.done:
                # Another thread may have been faster. No lock: what gives a landing back may run at any time.
                with contextlib.suppress(ValueError):
                    self.landings.remove(each)
                    return each
        return Landing(self.cupy, max(LANDING, nbytes))

    def wait(self) -> tuple[list[Array], float]:
        landing = self.landing
        landing.came.synchronize()
        copies = [
            np.frombuffer(landing.memory, dtype, math.prod(shape), offset).reshape(shape).copy()
            for offset, dtype, shape in self.places
        ]
        seconds = self.cupy.cuda.get_elapsed_time(landing.began, landing.came) / 1e3
        self._give_back()
        return copies, float(seconds)

    def _give_back(self) -> None:
        self.landings.append(self.landing)
        del self.landing

    def __del__(self) -> None:
        if hasattr(self, "landing"):
            self._give_back()
