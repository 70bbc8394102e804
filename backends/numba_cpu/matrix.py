"""Prepared matrices: the bytes of a weight as they lie in its file, and a description that kernels read them by."""

from __future__ import annotations

import numpy as np

from npllm.handles import Weight

# Storage formats by the numbers that kernels know them by.
F32, F16, BF16, F8, Q8, Q4 = range(6)
FORMATS = {"f32": F32, "f16": F16, "bf16": BF16, "f8_e4m3": F8, "q8": Q8, "q4": Q4}

# Words of a description: where the bytes lie and in which format, the matrix's size, the bytes of a row; then, of F8, Q8 and
# Q4, where the factors lie, how many a row of factors has, how many elements a factor covers and where the first one begins.
DATA, FORMAT, ROWS, COLUMNS, ROW_BYTES, FACTORS, FACTOR_ROW, BLOCK_ROWS, BLOCK_COLUMNS, ORIGIN_ROW, ORIGIN_COLUMN = range(11)
WORDS = 12


class Matrix:
    """A weight [F, D] whose rows kernels read where they lie; `address` is that of its description."""

    def __init__(self, weight: Weight) -> None:
        self.weight, self.shape, self.format = weight, weight.shape, weight.format
        data = weight.data
        if not (data.flags.c_contiguous and data.flags.aligned):
            data = np.ascontiguousarray(data)
        self._data = data
        self._words = np.zeros(WORDS, np.int64)
        self._words[:5] = data.ctypes.data, FORMATS[weight.format], *weight.shape, data.strides[0]
        self.address: int = self._words.ctypes.data

    def __len__(self) -> int:
        return self.shape[0]
