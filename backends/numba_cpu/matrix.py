"""Prepared matrices: the bytes of a weight as they lie in its file, and a description that kernels read them by."""

from __future__ import annotations

import numpy as np

from npllm.arrays import Array
from npllm.grouped import GROUP
from npllm.handles import Scale, Weight

# Storage formats by the numbers that kernels know them by.
F32, F16, BF16, F8, Q8, Q4 = range(6)
FORMATS = {"f32": F32, "f16": F16, "bf16": BF16, "f8_e4m3": F8, "q8": Q8, "q4": Q4}

# Words of a description: where the bytes lie and in which format, the matrix's size, the bytes of a row; then, of F8, Q8 and
# Q4, where the factors lie, the bytes of a row of them, how many elements a factor covers and where the first one begins.
DATA, FORMAT, ROWS, COLUMNS, ROW_BYTES, FACTORS, FACTOR_ROW, BLOCK_ROWS, BLOCK_COLUMNS, ORIGIN_ROW, ORIGIN_COLUMN = range(11)
WORDS = 12


# Numbers of a row at most: several rows lie in a thread's scratch memory.
WIDEST = (1 << 16) - 1

# The types of factors in memory.
FACTORS_OF = {"f8_e4m3": np.float32, "q8": np.float16, "q4": np.float16}


class Matrix:
    """A weight [F, D] whose rows kernels read where they lie; `address` is that of its description.

    CheckpointError if a factor is not a finite number, or, of FP8, not above zero.
    """

    def __init__(self, weight: Weight) -> None:
        self.weight, self.shape = weight, weight.shape
        stored = weight.widened() if weight.format in ("q8", "q4") and not _grouped_by_row(weight) else weight
        self.format = stored.format
        self._data = _plain(stored.data)
        self._words = np.zeros(WORDS, np.int64)
        self._words[:FACTORS] = self._data.ctypes.data, FORMATS[self.format], *self.shape, row_bytes(self._data)
        if stored.scale is not None:
            self._describe(stored.scale)
        self.address: int = self._words.ctypes.data

    def _describe(self, scale: Scale) -> None:
        kind = FACTORS_OF[self.format]
        checked = scale.array(np.float32, signed=self.format != "f8_e4m3")
        self._factors = _plain(checked if scale.weight.data.dtype != kind else scale.weight.data)
        self._words[FACTORS:] = self._factors.ctypes.data, row_bytes(self._factors), *scale.block, *scale.origin, 0

    def __len__(self) -> int:
        return self.shape[0]


def _grouped_by_row(weight: Weight) -> bool:
    return weight.scale is not None and weight.scale.block == (1, GROUP) and weight.scale.origin == (0, 0)


def _plain(data: Array) -> Array:
    return np.require(data, requirements=("C_CONTIGUOUS", "ALIGNED"))


def row_bytes(data: Array) -> int:
    """Of contiguous rows."""
    return data.shape[1] * data.itemsize
