"""What the operations of the Numba backend stand on: how weights are prepared, arrays made and kernels run."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from npllm.arrays import Array
from npllm.backend import RMS, Backend, Norm
from npllm.backends.numba_cpu import source, tape
from npllm.backends.numba_cpu.linear import BFLOAT16, FLOAT32
from npllm.backends.numba_cpu.matrix import FORMATS, Matrix
from npllm.backends.numba_cpu.team import aligned, team
from npllm.handles import Stack, Weight
from npllm.machine import default_threads

# Parts of a model whose tensors are vectors or small factors: they are widened to float32, whatever they are stored in.
WIDENED = ("norm", "buffer")


def at(array: Array | None) -> int:
    """The address of an array's first number; 0 for None."""
    return 0 if array is None else array.ctypes.data


class Base(Backend):
    """Services for the operations, and for the canon where an operation is not overridden."""

    name: ClassVar[str] = "numba"
    dtypes: ClassVar[tuple[str, ...]] = ("stored", "float32", "bfloat16", "float64")

    def __init__(self, dtype: str | None = None, **options: Any) -> None:
        super().__init__(dtype, **options)
        self.team_size = min(self.threads or default_threads(), team().size)

    # -- weights ------------------------------------------------------------------------------------------------------

    def prepare(self, bundle: Any) -> Any:
        """Matrices stay as they are stored, where they lie (Matrix); vectors become float32 arrays."""
        if isinstance(bundle, Stack):
            return [self.prepare(weight) for weight in bundle.weights]
        if isinstance(bundle, Weight) and self.dtype != "float64" and self._stays(bundle):
            return Matrix(bundle)
        return super().prepare(bundle)

    @staticmethod
    def _stays(weight: Weight) -> bool:
        return weight.format in FORMATS and len(weight.shape) == 2 and weight.part not in WIDENED

    def dense(self, weight: Any) -> Array:
        return super().dense(weight.weight if isinstance(weight, Matrix) else weight)

    def arithmetic(self, matrix: Matrix) -> int:
        """What products with a matrix are computed in: FLOAT32, BFLOAT16 (npllm.backends.numba_cpu.linear)."""
        if self.dtype == "stored":
            return BFLOAT16 if matrix.format in ("bf16", "f8_e4m3") else FLOAT32
        return BFLOAT16 if self.dtype == "bfloat16" else FLOAT32

    # -- arrays and kernels -------------------------------------------------------------------------------------------

    def empty(self, *shape: int, dtype: str = "float32") -> Array:
        """An uninitialised array for the result of a kernel."""
        return np.empty(shape, dtype)

    def plain(self, x: Array) -> Array:
        """`x` as kernels take it: float32, contiguous and aligned; itself where it is."""
        return np.require(x, np.float32, ("C_CONTIGUOUS", "ALIGNED"))

    def room(self, size: int) -> Array:
        """So many bytes, on a cache line, that the kernels of one operation hand to each other."""
        return aligned(size, np.uint8)

    def run(self, *entries: tape.Entry) -> None:
        """Run kernels, one after the other, on all threads."""
        tape.run(self.team_size, *entries)

    def source(self, x_MD: Array, norm: Norm | None = None) -> tuple[float, ...]:
        """The first arguments of a kernel that reads `x_MD` through a norm (npllm.backends.numba_cpu.source)."""
        rows = (at(x_MD), x_MD.strides[0], *x_MD.shape)
        if norm is None:
            return *rows, source.NONE, 0, 0, 0.0, 0.0
        if isinstance(norm, RMS):
            gain = None if norm.params is None else norm.params.weight
            return *rows, source.RMS, at(gain), 0, norm.eps, norm.offset
        return *rows, source.LAYER, at(norm.params.weight), at(norm.params.bias), norm.eps, 0.0
