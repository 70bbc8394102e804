"""Prepared matrices: a weight's bytes on the device as they are stored, and the structure that kernels know them by."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from npllm.arrays import Array
from npllm.backends.cupy_gpu.device import Device, Structure
from npllm.grouped import GROUP
from npllm.handles import Scale, Weight

# Storage formats by the numbers that kernels know them by (common.cuh).
FORMATS = {"f32": 0, "f16": 1, "bf16": 2, "f8_e4m3": 3, "q8": 4, "q4": 5}

# Bytes that a kernel reads at once: rows begin at a multiple, and what is behind their end is zero.
VECTOR = 16

# Numbers in a vector.
PER_VECTOR = {"f32": 4, "f16": 8, "bf16": 8, "f8_e4m3": 16, "q8": 16, "q4": 32}

# The type of factors in memory.
FACTORS_OF = {"f8_e4m3": np.float32, "q8": np.float16, "q4": np.float16}


class Matrix:
    """A weight [F, D] on the device, or a stack of E of them [E, F, D], whose rows kernels read.

    `structure` is the argument of a kernel (struct Matrix of matrix.cuh); `stack[e]` is one matrix of a stack.
    CheckpointError if a factor is not a finite number, or, of FP8, not above zero.
    """

    def __init__(
        self, shape: tuple[int, ...], format: str, data: Array, factors: Array | None, words: tuple[int, ...]
    ) -> None:
        self.shape, self.format = shape, format
        self._data, self._factors, self._words = data, factors, words

    @classmethod
    def of(cls, device: Device, weights: Sequence[Weight], *, stacked: bool = False, mapped: bool = False) -> Matrix:
        """One weight, or a stack of such of one shape. `mapped`: it stays in the host's memory, where kernels read it."""
        stored = [each if is_readable(each) else each.widened() for each in weights]
        if len({(each.format, _layout(each)) for each in stored}) > 1:
            stored = [each if each.scale is None and each.format == "f32" else each.widened() for each in stored]
        first = stored[0]
        (rows, columns), pitch = first.shape, _pitch(first.data.shape[1] * first.data.itemsize)
        if mapped:
            data = device.mapped(_padded(first.data, pitch))
        else:
            data = device.empty((len(stored), rows, pitch), "uint8")
            for place, weight in zip(data, stored, strict=True):
                device.write(place, _padded(weight.data, pitch))
        factors, layout = None, (0, 0, 0, 0, 0)
        if first.scale is not None:
            made = np.stack([_factors(each, each.scale) for each in stored if each.scale is not None])
            factors = device.upload(made)
            (block_rows, block_columns), per = first.scale.block, PER_VECTOR[first.format]
            shift = 31 if block_columns >= columns else (block_columns // per).bit_length() - 1
            layout = (made.strides[1], made.strides[0], block_rows, first.scale.origin[0], shift)
        where = 0 if factors is None else device.address(factors)
        words = (device.address(data), rows, columns, pitch, rows * pitch, where, *layout)
        return cls((len(stored), rows, columns) if stacked else (rows, columns), first.format, data, factors, words)

    @property
    def structure(self) -> Structure:
        arrays = (self._data,) if self._factors is None else (self._data, self._factors)
        return Structure(struct.pack(f"{len(self._words)}q", *self._words), arrays)

    @property
    def address(self) -> int:
        """Of the first row, on the device."""
        return self._words[0]

    @property
    def pitch(self) -> int:
        """Bytes between two rows; those behind a row's end are zero."""
        return self._words[3]

    @property
    def rows_of_bytes(self) -> Array:
        """The device's bytes of a single matrix, [F, bytes of a row with what is behind its end]."""
        return self._data.reshape(-1, self._words[3])

    @property
    def nbytes(self) -> int:
        return int(self._data.nbytes) + (0 if self._factors is None else int(self._factors.nbytes))

    def alike(self, other: Matrix) -> bool:
        """Whether a kernel reads a row of the other as it reads one of this."""
        return (self.format, self.shape, self._words[-1]) == (other.format, other.shape, other._words[-1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Matrix:
        """One matrix of a stack, in its memory."""
        index = range(self.shape[0])[index]
        address, rows, columns, pitch, stack_pitch, factors, factor_pitch, factor_stack, *rest = self._words
        words = (
            address + index * stack_pitch, rows, columns, pitch, stack_pitch,
            factors + index * factor_stack, factor_pitch, factor_stack, *rest,
        )  # fmt: skip
        return Matrix(self.shape[1:], self.format, self._data, self._factors, words)


def is_readable(weight: Weight) -> bool:
    """Whether kernels read it as it is stored: its factors may not lie across the vectors of a row."""
    if weight.scale is None:
        return weight.format in FORMATS
    (_, columns), per = weight.scale.block, PER_VECTOR[weight.format]
    if weight.format == "f8_e4m3":
        whole = columns >= weight.shape[1] or (columns % per == 0 and (columns // per).bit_count() == 1)
        return whole and weight.scale.origin[1] == 0
    return weight.scale.block == (1, GROUP) and weight.scale.origin == (0, 0)


def device_bytes(weights: Sequence[Weight]) -> int:
    """What `Matrix.of` takes of the device for these: what it widens takes four bytes a number."""
    (rows, columns), one = weights[0].shape, weights[0]
    if len({(each.format, _layout(each)) for each in weights}) > 1 or not is_readable(one):
        return len(weights) * rows * _pitch(4 * columns)
    factors = one.scale.weight.data.size * np.dtype(FACTORS_OF[one.format]).itemsize if one.scale else 0
    return len(weights) * (rows * _pitch(one.data.shape[1] * one.data.itemsize) + factors)


def _pitch(row_bytes: int) -> int:
    return -(-row_bytes // VECTOR) * VECTOR


def _layout(weight: Weight) -> tuple[object, ...]:
    scale = weight.scale
    return weight.data.dtype, *((scale.block, scale.origin, scale.weight.shape) if scale else ())


def _factors(weight: Weight, scale: Scale) -> Array:
    """Factors of a matrix in the type that kernels read, contiguous."""
    checked = scale.array(np.float32, signed=weight.format != "f8_e4m3")
    kind = FACTORS_OF[weight.format]
    return np.ascontiguousarray(scale.weight.data if scale.weight.data.dtype == kind else checked, dtype=kind)


def _padded(data: Array, pitch: int) -> Array:
    """The rows' bytes, each row `pitch` long."""
    rows = np.ascontiguousarray(data).view(np.uint8)
    if rows.shape[1] == pitch:
        return rows
    wide = np.zeros((len(rows), pitch), np.uint8)
    wide[:, : rows.shape[1]] = rows
    return wide
