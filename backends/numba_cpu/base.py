"""What the operations of the Numba backend stand on: how weights are prepared, arrays made and kernels run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np

from npllm import parallel
from npllm.arrays import Array
from npllm.backend import RMS, Backend, Norm
from npllm.backends.numba_cpu import quantise, source, tape
from npllm.backends.numba_cpu.arithmetic import BFLOAT16, FLOAT32, INT8
from npllm.backends.numba_cpu.matrix import FORMATS, WIDEST, Matrix
from npllm.backends.numba_cpu.recording import Recorded, Recorder
from npllm.backends.numba_cpu.source import PAIRS
from npllm.backends.numba_cpu.stack import stacked
from npllm.backends.numba_cpu.team import aligned, team
from npllm.cache import Keys, Rows
from npllm.handles import Handle, Stack, Weight
from npllm.machine import default_threads
from npllm.weights import Tensor

# Parts of a model whose tensors are vectors or small factors: they are widened to float32, whatever they are stored in.
WIDENED = ("norm", "buffer")

# Numbers that a thread passes over at a time: where there are no more, a decode step's, others would only wait.
PORTION = 1 << 14

# Tokens from which the arrays of a step are worth keeping for the next.
PROMPT = 64

# Of each row, in a plan: its slot, how many keys it sees, the position of the first and where it lies in storage; the row's
# first query among the packed ones, the last one's successor, the first one's position and where its key is stored.
PLAN = 8


def planned(keys: Keys, rows: Rows) -> Array:
    """The plan of a step over these keys."""
    size = max(1, keys.k_BSGK.shape[1])
    seen = zip(rows, keys.slots, keys.counts, keys.firsts, keys.begins, strict=True)
    plan = [
        (slot, count, first, begin, query, end, start, start % size)
        for (_, start, query, end), slot, count, first, begin in seen
    ]
    return np.array(plan, np.int64).reshape(len(plan), PLAN)


def at(array: Array | None) -> int:
    """The address of an array's first number; 0 for None."""
    return 0 if array is None else array.ctypes.data


class Base(Backend):
    """Services for the operations, and for the canon where an operation is not overridden."""

    name: ClassVar[str] = "numba"
    dtypes: ClassVar[tuple[str, ...]] = ("stored", "float32", "bfloat16", "float64")
    quantizations: ClassVar[tuple[str, ...]] = ("q8", "q4")

    def __init__(self, dtype: str | None = None, **options: Any) -> None:
        super().__init__(dtype, **options)
        self.team_size = min(self.threads or default_threads(), team().size)
        self.recorder: Recorder | None = None

    # -- weights ------------------------------------------------------------------------------------------------------

    def prepare(self, bundle: Any) -> Any:
        """Matrices stay as they are stored, where they lie (Matrix); vectors become contiguous float32 arrays."""
        if isinstance(bundle, Stack):
            return stacked([self.prepare(weight) for weight in bundle.weights])
        if isinstance(bundle, Weight) and bundle.quantisable and self.quantize is not None:
            bundle = self.quantised(bundle, self.quantize)
        if isinstance(bundle, Weight) and self.dtype != "float64" and self._stays(bundle):
            return Matrix(bundle)
        made = super().prepare(bundle)
        return np.require(made, requirements=("C_CONTIGUOUS", "ALIGNED")) if isinstance(made, np.ndarray) else made

    def quantised(self, weight: Weight, format: str) -> Weight:
        if weight.shape[1] > WIDEST:
            return super().quantised(weight, format)
        return quantise.quantised(weight, format, self.run)

    @staticmethod
    def _stays(weight: Weight) -> bool:
        return weight.format in FORMATS and len(weight.shape) == 2 and weight.part not in WIDENED

    def mapped(self, bundle: Any) -> Any:
        """The same as `prepare`: matrices are read where they lie, in memory or on disk."""
        return self.prepare(bundle)

    def bytes_needed(self, tensors: Iterable[Tensor | Handle]) -> int:
        """Stored bytes: nothing is widened."""
        if self.dtype == "float64":
            return super().bytes_needed(tensors)
        kept = [tensor for tensor in tensors if tensor.part != "lookup"]
        return sum(4 * tensor.size if isinstance(tensor, Tensor) else tensor.nbytes for tensor in kept)

    def dense(self, weight: Any) -> Array:
        return super().dense(weight.weight if isinstance(weight, Matrix) else weight)

    def is_finite(self, weight: Any) -> bool:
        return super().is_finite(weight.weight if isinstance(weight, Matrix) else weight)

    def arithmetic(self, matrix: Matrix) -> int:
        """What products with a matrix are computed in: FLOAT32, BFLOAT16, INT8 (npllm.backends.numba_cpu.linear)."""
        if self.dtype == "stored":
            if matrix.format in ("q8", "q4"):
                return INT8
            return BFLOAT16 if PAIRS and matrix.format in ("bf16", "f8_e4m3") else FLOAT32
        return BFLOAT16 if self.dtype == "bfloat16" else FLOAT32

    def limited(self, tokens: int, parameters: int) -> contextlib.AbstractContextManager[None]:
        """The canon's products, where it serves, keep to our threads; a prompt's arrays take each other's memory."""
        if tokens >= PROMPT:
            parallel.keep_freed_memory()
        return parallel.blas_threads(self.team_size)

    # -- arrays and kernels -------------------------------------------------------------------------------------------

    def empty(self, *shape: int, dtype: str = "float32") -> Array:
        """An uninitialised array for the result of a kernel."""
        if self.recorder is None:
            return np.empty(shape, dtype)
        return self.recorder.lent(math.prod(shape) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)

    def plain(self, x: Array) -> Array:
        """`x` as kernels take it: float32, contiguous and aligned; itself where it is."""
        if isinstance(x, Recorded):
            return x if x.flags.c_contiguous and x.dtype == np.float32 else x.astype(np.float32, order="C")
        return np.require(x, np.float32, ("C_CONTIGUOUS", "ALIGNED"))

    def room(self, size: int) -> Array:
        """So many bytes, on a cache line, that the kernels of one operation hand to each other."""
        return aligned(size, np.uint8) if self.recorder is None else self.recorder.lent(size)

    def run(self, *entries: tape.Entry, numbers: int | None = None) -> None:
        """Run kernels, one after the other, on all threads; or on one, where they only pass over a few `numbers`."""
        if numbers is not None and numbers <= PORTION:
            entries = tuple(each._replace(small=True) for each in entries)
        if self.recorder is not None:
            self.recorder.kernels(entries)
        tape.run(self.team_size, *entries)

    def called(self, function: Callable[..., Any], *arrays: Array) -> Any:
        """`function(*arrays)`, where it is a function of the interpreter that looks into arrays."""
        if self.recorder is None:
            return function(*arrays)
        return self.recorder.repeat(function, arrays, {})

    def plan(self, keys: Keys, rows: Rows) -> Array:
        """What kernels need to know of each row of a step: int64 [rows, PLAN]."""
        if self.recorder is None:
            return planned(keys, rows)
        return self.recorder.plan(keys, rows)

    def source(self, x_MD: Array, norm: Norm | None = None) -> tuple[float, ...]:
        """The first arguments of a kernel that reads `x_MD` through a norm (npllm.backends.numba_cpu.source)."""
        rows = (at(x_MD), x_MD.strides[0], *x_MD.shape)
        if norm is None:
            return *rows, source.NONE, 0, 0, 0.0, 0.0
        if isinstance(norm, RMS):
            gain = None if norm.params is None else norm.params.weight
            return *rows, source.RMS, at(gain), 0, norm.eps, norm.offset
        return *rows, source.LAYER, at(norm.params.weight), at(norm.params.bias), norm.eps, 0.0
