"""Handles on stored tensors: what a weight is, where it lies and in which format; never a copy of it."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from npllm.arrays import Array, DTypeLike
from npllm.errors import CheckpointError
from npllm.fp8 import TABLES, dequantise
from npllm.grouped import PACKED, ungrouped

# Formats by their name in a safetensors header: (npllm's name, NumPy dtype of the stored bytes).
REALS = {"F64": ("f64", "<f8"), "F32": ("f32", "<f4"), "F16": ("f16", "<f2"), "BF16": ("bf16", "<u2")}
FORMATS = REALS | {"F8_E4M3": ("f8_e4m3", "|u1")}
SCALE_FORMATS = REALS | {"F8_E8M0": ("f8_e8m0", "|u1")}

# Bytes that the system is asked to read at a time.
READ_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False)
class Weight:
    """One stored tensor: what it is, where it lies and how.

    `format` is the storage format (f64, f32, f16, bf16, f8_e4m3; q8, q4 of npllm.grouped), `data` the mapped bytes as a
    NumPy array of the storage type (bf16 as uint16, f8 as uint8, q8 as int8, q4 as uint8, half as many as a row has
    elements), `scale` the factors of f8, q8 and q4, `source` the file, for errors. `axes` and `part` are those of the
    model's spec (npllm.weights.Tensor): a backend may treat an embedding, a matrix and a gain differently.
    `quantisable`: quantize= means this one (npllm.grouped.marked).
    """

    name: str
    shape: tuple[int, ...]
    format: str
    data: Array
    source: str = ""
    mapping: mmap.mmap | None = field(default=None, repr=False)
    axes: str = ""
    part: str = ""
    scale: Scale | None = None
    quantisable: bool = False

    @classmethod
    def of(cls, name: str, array: Array) -> Weight:
        """A handle on an array in memory (float16, float32 or float64), for tests and random weights."""
        formats = {"float64": "f64", "float32": "f32", "float16": "f16"}
        return cls(name, tuple(array.shape), formats[array.dtype.name], array, "memory")

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (self.scale.weight.nbytes if self.scale else 0)

    def array(self, dtype: DTypeLike) -> Array:
        """The values in `dtype` (float32 or float64): the mapped bytes themselves where the type matches, else a copy.

        Widening bf16 is exact: its bits are the upper half of a float32, and so are the products of q8 and q4 with their
        factors. FP8 is multiplied by its factors and rounded once, in `dtype`. CheckpointError if a factor is not a number,
        or, of FP8, not above zero.
        """
        if self.scale is not None and (axis := self._grouped_axis) is not None:
            return ungrouped(self.data, self.scale.array(dtype, signed=True), self.format, axis, dtype)
        if self.scale is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                return dequantise(self.data, self.scale.array(dtype), self.scale.block, self.scale.origin, dtype)
        stored = TABLES[self.format][self.data] if self.format in TABLES else self.data
        if self.format == "bf16":
            # blocks.dtypes.widen_bfloat16 in one pass, an eighth faster where weights are widened at each use.
            stored = np.empty_like(self.data, np.float32)
            np.left_shift(self.data, 16, out=stored.view(np.uint32), dtype=np.uint32, casting="unsafe")
        if stored.dtype == dtype and stored.flags.aligned:
            return stored
        with np.errstate(over="ignore", invalid="ignore"):  # generation reports what a damaged weight leads to
            return stored.astype(dtype)

    def marked(self) -> Weight:
        """The same, `quantisable`."""
        return replace(self, quantisable=True)

    def widened(self) -> Weight:
        """A handle on a copy in float32."""
        return replace(self, format="f32", data=self.array("float32"), scale=None, mapping=None)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> Weight:
        """A handle on one entry, or on a range of entries without gaps, of the first axis."""
        if not isinstance(index, slice):
            return self._entry(index)
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"{self.name}: a slice of a weight has no step ({step})")
        if self._grouped_axis == 0:
            raise ValueError(f"{self.name}: its groups lie along the axis that is to be cut")
        data = self.data[start:stop]
        scale = self.scale and self.scale.between(start, stop)
        return replace(self, shape=(len(data), *self.shape[1:]), data=data, scale=scale)

    def _entry(self, index: int) -> Weight:
        if self._grouped_axis == 0:
            raise ValueError(f"{self.name}: its groups lie along the axis that is to be cut")
        scale = self.scale and self.scale.entry(range(len(self))[index])
        return replace(self, shape=self.shape[1:], data=self.data[index], axes=self.axes[1:], scale=scale)

    @property
    def _grouped_axis(self) -> int | None:
        """The axis that the groups of q8 and q4 lie along: the last, or, of a transposed matrix, the one before it."""
        if self.scale is None or self.format not in PACKED:
            return None
        return len(self.shape) - (1 if self.scale.block[-1] > 1 else 2)

    def rows(self, index_M: Array) -> Weight:
        """Copies of the entries `index_M` (integers [M]) of the first axis, in their stored format: nothing else is read."""
        self._check()
        data = self.data[index_M]
        scale = self.scale and self.scale.gather(index_M % len(self))
        return replace(self, shape=(len(data), *self.shape[1:]), data=data, mapping=None, scale=scale)

    def transposed(self) -> Weight:
        """The same bytes seen with the last two axes exchanged."""
        rank = len(self.shape)
        order = (*range(rank - 2), rank - 1, rank - 2)
        data, axes = self.data.transpose(order), "".join(self.axes[i] for i in order) if self.axes else ""
        shape = tuple(self.shape[i] for i in order)
        return replace(self, shape=shape, data=data, axes=axes, scale=self.scale and self.scale.transposed(order))

    def equals(self, other: Weight) -> bool:
        """Whether both hold the same values in the same format."""
        if (self.shape, self.format) != (other.shape, other.format) or not _same_scale(self.scale, other.scale):
            return False
        # Row by row: neither file need be in memory as a whole.
        return all(np.array_equal(mine, theirs) for mine, theirs in zip(self.data, other.data, strict=True))

    def will_need(self) -> None:
        """Have the system read the bytes of this handle, and no others."""
        self._advise("MADV_WILLNEED")

    def will_look_up(self) -> None:
        """Rows will be asked for here and there: the system shall not read what follows them in the file."""
        self._advise("MADV_RANDOM")

    def _advise(self, advice: str) -> None:
        self._check()
        if self.mapping is None or not self.data.flags.c_contiguous or not hasattr(mmap, advice):
            return
        begin = self.data.ctypes.data - np.frombuffer(self.mapping, np.uint8).ctypes.data
        # Linux reads only a part of what it is asked for at once.
        for at in range(begin - begin % mmap.PAGESIZE, begin + self.data.nbytes, READ_AT_ONCE):
            self.mapping.madvise(getattr(mmap, advice), at, min(READ_AT_ONCE, begin + self.data.nbytes - at))

    def _check(self) -> None:
        """CheckpointError if the file has become shorter: reading what is gone would kill the process."""
        if self.mapping is not None and self.mapping.size() < len(self.mapping):
            raise CheckpointError(f"{self.source}: has become shorter since it was loaded; load the model again")

    def release(self) -> None:
        """Tell the system that the file's pages are not needed: a widened copy has taken their place."""
        if self.mapping is not None and hasattr(self.mapping, "madvise"):
            self.mapping.madvise(mmap.MADV_DONTNEED)
        if self.scale is not None:
            self.scale.weight.release()


@dataclass(frozen=True, eq=False)
class Scale:
    """The factors of an FP8, q8 or q4 tensor: its element [i, j] is its code's number times the factor of the block that
    holds it, `weight[(i + origin[0]) // block[0], (j + origin[1]) // block[1]]`.

    weight   handle on the factors, with as many axes as the tensor; exactly those that the tensor needs.
    block    elements that a factor covers, per axis: (128, 128); (1, N) where each row has its own; (M, N) for one factor;
             (1, 32) of q8 and q4.
    origin   where the tensor begins in its first block, per axis: not 0 in a slice that cuts a block.
    """

    weight: Weight
    block: tuple[int, ...]
    origin: tuple[int, ...]

    def array(self, dtype: DTypeLike, *, signed: bool = False) -> Array:
        """The factors, if all are finite and, unless they may be `signed`, above zero; else CheckpointError."""
        factors = self.weight.array(dtype)
        bad = factors[~(np.isfinite(factors) & (signed | (factors > 0)))]
        if bad.size:
            where, problem = f"{self.weight.source}: scale {self.weight.name}", f"holds {bad[0]}"
            above = "" if signed else " above zero"
            raise CheckpointError(f"{where} {problem}, not a finite number{above}; download it again")
        return factors

    def between(self, start: int, stop: int) -> Scale:
        """For the entries start..stop of the tensor's first axis."""
        begin, end = self.origin[0] + start, self.origin[0] + max(start, stop)
        covering = self.weight[begin // self.block[0] : -(-end // self.block[0])]
        return replace(self, weight=covering, origin=(begin % self.block[0], *self.origin[1:]))

    def entry(self, index: int) -> Scale:
        """For one entry of the tensor's first axis."""
        return Scale(self.weight[(self.origin[0] + index) // self.block[0]], self.block[1:], self.origin[1:])

    def gather(self, index_M: Array) -> Scale:
        """For copies of the entries `index_M`, all of them at least 0."""
        gathered = self.weight.rows((self.origin[0] + index_M) // self.block[0])
        return Scale(gathered, (1, *self.block[1:]), (0, *self.origin[1:]))

    def transposed(self, order: tuple[int, ...]) -> Scale:
        block, origin = (tuple(each[i] for i in order) for each in (self.block, self.origin))
        return Scale(self.weight.transposed(), block, origin)


def _same_scale(mine: Scale | None, other: Scale | None) -> bool:
    if mine is None or other is None:
        return mine is other
    return (mine.block, mine.origin) == (other.block, other.origin) and mine.weight.equals(other.weight)


@dataclass(frozen=True, eq=False)
class Stack:
    """A handle on tensors of one shape that belong together and may lie apart: the experts of a layer, [E, ...]."""

    name: str
    weights: tuple[Weight, ...]
    axes: str = ""
    part: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.weights), *self.weights[0].shape)

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    @property
    def format(self) -> str:
        """That of the first tensor."""
        return self.weights[0].format

    def marked(self) -> Stack:
        """The same, every tensor `quantisable`."""
        return replace(self, weights=tuple(weight.marked() for weight in self.weights))

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: int) -> Weight:
        return self.weights[index]


Handle = Weight | Stack


def fingerprint(handles: Mapping[str, Handle]) -> str:
    """32 hexadecimal digits that tell one model's weights from another's.

    A digest of names, shapes, formats and of both ends of each tensor's bytes: it need not read the whole checkpoint. Of
    experts it reads nothing: most of them may stay on disk for good.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(handles):
        handle = handles[name]
        for weight in handle.weights if isinstance(handle, Stack) else (handle,):
            for part in (weight, weight.scale.weight) if weight.scale else (weight,):
                digest.update(f"{name} {part.shape} {part.format}".encode())
                if handle is weight:
                    # A flat iterator copies what is asked for; ravel would copy all of an array that is not contiguous.
                    digest.update(part.data.flat[:64].tobytes() + part.data.flat[-64:].tobytes())
    return digest.hexdigest()
