"""Handles on stored tensors: what a weight is, where it lies and in which format; never a copy of it."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from npllm.arrays import Array, DTypeLike

# Formats by their name in a safetensors header: (npllm's name, NumPy dtype of the stored bytes).
FORMATS = {"F64": ("f64", "<f8"), "F32": ("f32", "<f4"), "F16": ("f16", "<f2"), "BF16": ("bf16", "<u2")}


@dataclass(frozen=True, eq=False)
class Weight:
    """A handle: one stored tensor, what it is, where it lies and how; never a copy of it.

    `format` is the storage format (f64, f32, f16, bf16), `data` the mapped bytes as a NumPy array of the storage type
    (bf16 as uint16), `source` the file, for errors. `axes` and `part` are those of the model's spec (npllm.weights.Tensor):
    a backend may treat an embedding, a matrix and a gain differently.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    data: Array
    source: str = ""
    mapping: mmap.mmap | None = field(default=None, repr=False)
    axes: str = ""
    part: str = ""

    @classmethod
    def of(cls, name: str, array: Array) -> Weight:
        """A handle on an array in memory (float16, float32 or float64), for tests and random weights."""
        formats = {"float64": "f64", "float32": "f32", "float16": "f16"}
        return cls(name, tuple(array.shape), formats[array.dtype.name], array, "memory")

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def array(self, dtype: DTypeLike) -> Array:
        """The values in `dtype` (float32 or float64): the mapped bytes themselves where the type matches, else a copy.

        Widening bf16 is exact: its bits are the upper half of a float32.
        """
        stored = self.data
        if self.format == "bf16":
            stored = np.empty_like(self.data, np.float32)
            np.left_shift(self.data, 16, out=stored.view(np.uint32), dtype=np.uint32, casting="unsafe")
        if stored.dtype == dtype and stored.flags.aligned:
            return stored
        with np.errstate(over="ignore", invalid="ignore"):  # generation reports what a damaged weight leads to
            return stored.astype(dtype)

    def transposed(self) -> Weight:
        """The same bytes seen as the transposed matrix."""
        return replace(self, shape=self.shape[::-1], data=self.data.T, axes=self.axes[::-1])

    def equals(self, other: Weight) -> bool:
        """Whether both hold the same values in the same format."""
        if (self.shape, self.format) != (other.shape, other.format):
            return False
        # Row by row: neither file need be in memory as a whole.
        return all(np.array_equal(mine, theirs) for mine, theirs in zip(self.data, other.data, strict=True))

    def release(self) -> None:
        """Tell the system that the file's pages are not needed: a widened copy has taken their place."""
        if self.mapping is not None and hasattr(self.mapping, "madvise"):
            self.mapping.madvise(mmap.MADV_DONTNEED)


def fingerprint(handles: Mapping[str, Weight]) -> str:
    """32 hexadecimal digits that tell one model's weights from another's.

    A digest of names, shapes, formats and of both ends of each tensor's bytes: it need not read the whole checkpoint.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(handles):
        weight = handles[name]
        ends = weight.data.ravel()
        digest.update(f"{name} {weight.shape} {weight.format}".encode())
        digest.update(ends[:64].tobytes() + ends[-64:].tobytes())
    return digest.hexdigest()
