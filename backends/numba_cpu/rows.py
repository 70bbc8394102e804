"""Rows of stored matrices: their dot product with a vector, and their numbers widened for the register tiles."""

from __future__ import annotations

import numpy as np

from npllm.backends.numba_cpu.jit import PATH, inline
from npllm.backends.numba_cpu.matrix import BF16, COLUMNS, DATA, F16, F32, FORMAT, ROW_BYTES
from npllm.backends.numba_cpu.memory import f32, u16, word
from npllm.backends.numba_cpu.source import bf16, rounded
from npllm.backends.numba_cpu.vectors import dot_bf16, dot_f16, dot_f32, dot_pairs, from_bits, widen_f16


@inline
def dot_row(matrix, n, x):  # type: ignore[no-untyped-def]
    """Row n times the float32 numbers at `x`."""
    row, width, kind = word(matrix, DATA) + n * word(matrix, ROW_BYTES), word(matrix, COLUMNS), word(matrix, FORMAT)
    if kind == BF16:
        return dot_bf16(row, x, width)
    if kind == F16:
        return dot_f16(row, x, width)
    return dot_f32(row, x, width)


@inline
def fill_rows(matrix, begin, end, first, last, rounds, out, out_row):  # type: ignore[no-untyped-def]
    """Rows begin..end, columns first..last, widened to float32; where they are to be rounded to bf16 and this CPU has
    products of pairs, as pairs (an odd last column is paired with 0).

    The rows go to `out`, so many bytes apart.
    """
    for n in range(begin, end):
        place = out + (n - begin) * out_row
        if rounds and PATH.bf16:
            _fill_pairs(matrix, n, first, last, place)
        else:
            _fill(matrix, n, first, last, place)
            if rounds:
                y = f32(place, last - first)
                for k in range(y.size):
                    y[k] = rounded(y[k])


@inline
def _fill(matrix, n, first, last, place):  # type: ignore[no-untyped-def]
    y, row, kind = f32(place, last - first), word(matrix, DATA) + n * word(matrix, ROW_BYTES), word(matrix, FORMAT)
    if kind == F32:
        x = f32(row + 4 * first, y.size)
        for k in range(y.size):
            y[k] = x[k]
        return
    bits = u16(row + 2 * first, y.size)
    if kind == BF16:
        for k in range(y.size):
            y[k] = from_bits(np.uint32(bits[k]) << np.uint32(16))
    else:
        for k in range(y.size):
            y[k] = widen_f16(bits[k])


@inline
def _fill_pairs(matrix, n, first, last, place):  # type: ignore[no-untyped-def]
    y, row, kind = u16(place, last - first + 1), word(matrix, DATA) + n * word(matrix, ROW_BYTES), word(matrix, FORMAT)
    width = last - first
    y[width] = np.uint16(0)
    if kind == F32:
        x = f32(row + 4 * first, width)
        for k in range(width):
            y[k] = np.uint16(bf16(x[k]))
        return
    bits = u16(row + 2 * first, width)
    if kind == BF16:
        for k in range(width):
            y[k] = bits[k]
    else:
        for k in range(width):
            y[k] = np.uint16(bf16(widen_f16(bits[k])))
