"""What the operations of the CuPy backend stand on: how weights are prepared, arrays made and kernels launched."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from npllm.arrays import Array, DTypeLike
from npllm.backend import RMS, Backend, Norm, widened_parts
from npllm.backends.cupy_gpu.device import Argument, Device, Fixed, Grid, InOut, Out
from npllm.backends.cupy_gpu.matrix import FORMATS, Matrix, device_bytes
from npllm.cache import Keys, Rows
from npllm.errors import MemoryLimitError
from npllm.handles import Handle, Stack, Weight
from npllm.weights import Linear, Tensor

# Parts of a model whose tensors are vectors or small factors: they are widened to float32, whatever they are stored in.
WIDENED = ("norm", "buffer")

# Activations by the numbers of activations.cuh, under every name that a config.json may give them.
ACTIVATIONS = {
    "silu": 0, "swish": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "gelu_python_tanh": 1, "gelu_fast": 1, "gelu_accurate": 1,
    "gelu": 2, "gelu_python": 2, "relu": 3,
}  # fmt: skip

# Of each row, in a plan (keys.cuh): its slot, how many keys it sees, the position of the first and where it lies in storage;
# its first query among the packed ones, the last one's successor, the first one's position and where its key is stored.
PLAN = 8

# Numbers of a matrix that are looked at together: enough to keep a GPU busy, and 20 MB.
LOOKED_AT = 1 << 22

# Threads of kernels that treat every number alike.
THREADS = 256


def planned(keys: Keys, rows: Rows) -> Array:
    """The plan of a step over these keys, on the host."""
    size = max(1, keys.k_BSGK.shape[1])
    seen = zip(rows, keys.slots, keys.counts, keys.firsts, keys.begins, strict=True)
    plan = [
        (slot, count if slot >= 0 else 0, first, begin, query, end, start, start % size)
        for (_, start, query, end), slot, count, first, begin in seen
    ]
    return np.array(plan, np.int64).reshape(len(plan), PLAN)


def groups(count: int, size: int) -> int:
    """How many groups of `size` hold `count`."""
    return -(-count // size)


class Base(Backend):
    """Services for the operations, and for the canon where an operation is not overridden."""

    name: ClassVar[str] = "cupy"
    dtypes: ClassVar[tuple[str, ...]] = ("stored", "float32", "bfloat16", "float64")
    quantizations: ClassVar[tuple[str, ...]] = ("q8", "q4")
    on_disk: ClassVar[bool] = False
    prompt_tokens: ClassVar[int | None] = 4096

    def __init__(self, dtype: str | None = None, **options: Any) -> None:
        super().__init__(dtype, **options)
        self.device = self.open_device()
        # The last one is used; graphs may know the others by their addresses.
        self._tickets: list[Array] = []
        self.looks_ahead = os.environ.get("NPLLM_LOOKAHEAD") != "0"
        self.xp = self.device.xp  # type: ignore[misc]  # a class cannot know it: CuPy is imported with the first GPU

    @classmethod
    def open_device(cls) -> Device:
        """The GPU, opened once per process; BackendError says why there is none, and what to do."""
        from npllm.backends.cupy_gpu.cuda import gpu

        return gpu()

    @classmethod
    def check(cls) -> None:
        cls.open_device()

    # -- weights ------------------------------------------------------------------------------------------------------

    def prepare(self, bundle: Any) -> Any:
        """Matrices go to the GPU as they are stored (Matrix), vectors as float32 arrays; a lookup table to pinned memory."""
        if isinstance(bundle, Stack) and self.dtype != "float64":
            return Matrix.of(self.device, [self._chosen(weight) for weight in bundle.weights], stacked=True)
        if not isinstance(bundle, Weight):
            return super().prepare(bundle)
        weight = self._chosen(bundle)
        if weight.part == "lookup":
            return Matrix.of(self.device, [weight], mapped=True)
        if self.dtype != "float64" and len(weight.shape) == 2 and weight.part not in WIDENED:
            return Matrix.of(self.device, [weight])
        return self.device.upload(np.ascontiguousarray(weight.array(self.array_dtype)))

    def _chosen(self, weight: Weight) -> Weight:
        """The weight in the format that it is kept in."""
        if weight.quantisable and self.quantize is not None:
            return self.quantised(weight, self.quantize)
        return weight if weight.format in FORMATS or self.dtype == "float64" else weight.widened()

    def mapped(self, bundle: Any) -> Any:
        raise MemoryLimitError("the cupy backend keeps weights in the GPU's memory, not on disk: use backend='numba'")

    def dense(self, weight: Any) -> Array:
        """A prepared weight as an array in `array_dtype` on the GPU."""
        return self.widened(weight) if isinstance(weight, Matrix) else weight

    def is_finite(self, weight: Any) -> bool:
        if not isinstance(weight, Matrix):
            return super().is_finite(weight)
        matrices = [weight[e] for e in range(len(weight))] if len(weight.shape) == 3 else [weight]
        with self.device.guarded():
            parts = ((each, part) for each in matrices for part in widened_parts(each, LOOKED_AT))
            return all(self.xp.isfinite(self.widened(each, part)).all() for each, part in parts)

    def widened(self, matrix: Matrix, part: slice = slice(None)) -> Array:
        """A matrix, or some of its rows, or a stack of matrices, as float32."""
        if len(matrix.shape) == 3:
            return self.xp.stack([self.widened(matrix[e]) for e in range(len(matrix))])
        first, end, _ = part.indices(len(matrix))
        rows, columns = end - first, matrix.shape[1]
        out = self.empty(rows, columns)
        if out.size:
            blocks = min(groups(out.size, THREADS), 16 * self.device.multiprocessors)
            arguments = (matrix.structure, first, rows, 0, Out(out))
            self.launch("widen.cu", "widen_matrix", {"FORMAT": FORMATS[matrix.format]}, (blocks, 1, 1), THREADS, arguments)
        return out

    def bytes_needed(self, tensors: Iterable[Tensor | Handle]) -> int:
        """Stored bytes; of what kernels do not read as it is stored, four a number."""
        if self.dtype == "float64":
            return super().bytes_needed(tensors)
        return sum(self._bytes_of(tensor) for tensor in tensors if tensor.part != "lookup")

    def pinned_bytes(self, tensors: Iterable[Tensor | Handle]) -> int:
        return sum(self._bytes_of(tensor) for tensor in tensors if tensor.part == "lookup")

    def _bytes_of(self, handle: Tensor | Handle) -> int:
        if isinstance(handle, Tensor):
            return 4 * handle.size
        weights = handle.weights if isinstance(handle, Stack) else (handle,)
        size, one = int(np.prod(handle.shape)), weights[0]
        if len(one.shape) != 2 or one.part in WIDENED:
            return 4 * size
        if one.quantisable and self.quantize is not None:
            return size * {"q8": 34, "q4": 18}[self.quantize] // 32
        return device_bytes(weights)

    def available_memory(self) -> int:
        return self.device.memory().free

    def limited(self, tokens: int, parameters: int) -> contextlib.AbstractContextManager[None]:
        return self.device.guarded()

    # -- arrays and kernels -------------------------------------------------------------------------------------------

    def asarray(self, x: Any, dtype: DTypeLike | None = None) -> Array:
        return self.xp.asarray(x, dtype=dtype)

    def to_numpy(self, x: Array) -> Array:
        return x if isinstance(x, np.ndarray) and type(x) is np.ndarray else self.device.download(x)

    def empty(self, *shape: int, dtype: str = "float32") -> Array:
        """An uninitialised array for the result of a kernel."""
        return self.device.empty(shape, dtype)

    def plain(self, x: Array) -> Array:
        """`x` as kernels take it: float32 and contiguous; itself where it is."""
        return x if x.dtype == np.float32 and x.flags.c_contiguous else x.astype("float32", order="C")

    def integers(self, x: Array) -> Array:
        """`x` as kernels take whole numbers: int64 and contiguous; itself where it is."""
        return x if x.dtype == np.int64 and x.flags.c_contiguous else x.astype("int64", order="C")

    def launch(
        self, file: str, name: str, defines: Mapping[str, int], grid: Grid, block: int, args: Iterable[Argument],
        shared: int = 0,
    ) -> None:  # fmt: skip
        """Run a kernel of kernels/`file`, compiled with these macros, after all that was launched before."""
        self.device.launch(self.device.kernel(file, name, defines), grid, block, args, shared)

    def plan(self, keys: Keys, rows: Rows) -> Array:
        """What kernels need to know of each row of a step: int64 [rows, PLAN]."""
        return self.device.upload(planned(keys, rows))

    def tickets(self, count: int) -> InOut:
        """So many counters at zero; the kernels that use them leave them so."""
        if not self._tickets or len(self._tickets[-1]) < count:
            self._tickets.append(self.device.upload(np.zeros(max(count, 4096), np.uint32)))
        return InOut(self._tickets[-1])

    def source(self, x_MD: Array, norm: Norm | None = None) -> tuple[Argument, ...]:
        """The arguments SOURCE of gemv.cuh: contiguous float32 rows, read through a norm."""
        rows = (x_MD, len(x_MD), x_MD.shape[1], x_MD.shape[1])
        if norm is None:
            return *rows, 0, None, None, 0.0, 0.0
        if isinstance(norm, RMS):
            return *rows, 1, self.vector(norm.params, "weight"), None, float(norm.eps), float(norm.offset)
        return *rows, 2, self.vector(norm.params, "weight"), self.vector(norm.params, "bias"), float(norm.eps), 0.0

    def vector(self, params: Linear | None, field: str) -> Argument:
        """A gain or bias as an argument, or None."""
        vector = None if params is None else getattr(params, field)
        return None if vector is None else Fixed(self.plain(vector))
