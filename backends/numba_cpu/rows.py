"""Rows of stored matrices, and their numbers widened."""

from __future__ import annotations

import numpy as np

from npllm.backends.numba_cpu.conversions import (
    fill_f8,
    fill_f8_pairs,
    fill_q4,
    fill_q4_pairs,
    fill_q8,
    fill_q8_pairs,
    from_bits,
    widen_f16,
)
from npllm.backends.numba_cpu.jit import inline
from npllm.backends.numba_cpu.matrix import (
    BF16,
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    DATA,
    F8,
    F32,
    FACTOR_ROW,
    FACTORS,
    FORMAT,
    ORIGIN_COLUMN,
    ORIGIN_ROW,
    Q8,
    ROW_BYTES,
)
from npllm.backends.numba_cpu.memory import f32, u16, word
from npllm.backends.numba_cpu.source import PAIRS, bf16, round_row, rounded
from npllm.backends.numba_cpu.team import called


@inline
def row_at(matrix, n):
    return word(matrix, DATA) + n * word(matrix, ROW_BYTES)


@inline
def factors_at(matrix, n):
    """Where the factors of row n lie."""
    row = n if word(matrix, BLOCK_ROWS) == 1 else (n + word(matrix, ORIGIN_ROW)) // word(matrix, BLOCK_ROWS)
    return word(matrix, FACTORS) + row * word(matrix, FACTOR_ROW)


@called
def fill_rows(team, matrix, begin, end, first, last, rounds, out, out_row):
    """Rows begin..end, columns first..last, widened to float32; where they are to be rounded to bf16 and this CPU has
    products of pairs, as pairs (an odd last column is paired with 0).

    The rows go to `out`, so many bytes apart. `first` is a multiple of 32.
    """
    kind = word(matrix, FORMAT)
    for n in range(begin, end):
        place = out + (n - begin) * out_row
        if kind >= F8:
            _fill_blocks(matrix, n, first, last, rounds and PAIRS, place)
        elif rounds and PAIRS:
            _fill_pairs(matrix, n, first, last, place)
        else:
            _fill(matrix, n, first, last, place)
        if rounds and not PAIRS and kind != BF16:
            y = f32(place, last - first)
            for k in range(y.size):
                y[k] = rounded(y[k])


@inline
def _fill_blocks(matrix, n, first, last, pairs, place):
    """Of a format with factors: block by block."""
    row, kind, factors = row_at(matrix, n), word(matrix, FORMAT), factors_at(matrix, n)
    block, origin, size = word(matrix, BLOCK_COLUMNS), word(matrix, ORIGIN_COLUMN), 2 if pairs else 4
    if PAIRS and pairs:
        u16(place, last - first + 1)[last - first] = np.uint16(0)
    i, k = (first + origin) // block, first
    while k < last:
        end = min(last, (i + 1) * block - origin)
        factor = f32(factors, i + 1)[i] if kind == F8 else widen_f16(u16(factors, i + 1)[i])
        to, count = place + (k - first) * size, end - k
        if PAIRS and pairs:
            if kind == F8:
                fill_f8_pairs(row, k, to, count, factor)
            elif kind == Q8:
                fill_q8_pairs(row, k, to, count, factor)
            else:
                fill_q4_pairs(row, k, to, count, factor)
        elif kind == F8:
            fill_f8(row, k, to, count, factor)
        elif kind == Q8:
            fill_q8(row, k, to, count, factor)
        else:
            fill_q4(row, k, to, count, factor)
        i, k = i + 1, end


@inline
def _fill(matrix, n, first, last, place):
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
def _fill_pairs(matrix, n, first, last, place):
    y, row, kind = u16(place, last - first + 1), word(matrix, DATA) + n * word(matrix, ROW_BYTES), word(matrix, FORMAT)
    width = last - first
    y[width] = np.uint16(0)
    if kind == F32:
        round_row(row + 4 * first, width, place)
        return
    bits = u16(row + 2 * first, width)
    if kind == BF16:
        for k in range(width):
            y[k] = bits[k]
    else:
        for k in range(width):
            y[k] = np.uint16(bf16(widen_f16(bits[k])))
