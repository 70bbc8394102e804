"""FP8 as published checkpoints store it: codes of 8 bits, and one factor for each block of them.

e4m3 (sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity, 0x7F and 0xFF are NaN, 448 is the largest number):
Micikevicius et al. 2022, "FP8 Formats for Deep Learning". e8m0 (powers of two, 0xFF is NaN): OCP Microscaling Formats 1.0.
Blocks: DeepSeek-V3 technical report, section 3.3. `element = e4m3(code) * factor of its block`, although the factors are
called `weight_scale_inv`; blocks are counted from the tensor's first element, and the last ones may be partial.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from npllm.arrays import Array, DTypeLike

# Elements that are widened at a time: looking up so many codes takes 0.5 MB besides the result.
PANEL = 1 << 16


def _e4m3() -> Array:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    size[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -size, size).astype(np.float32)


def _e8m0() -> Array:
    powers = np.ldexp(np.ones(256), np.arange(256) - 127)
    powers[255] = np.nan
    return powers.astype(np.float32)


# Code -> number, by the format's name in npllm.handles. Float32 holds each of them exactly.
TABLES = {"f8_e4m3": _e4m3(), "f8_e8m0": _e8m0()}


def dequantise(codes: Array, factors: Array, block: tuple[int, ...], origin: tuple[int, ...], dtype: DTypeLike) -> Array:
    """e4m3 codes times the factors of their blocks -> an array in `dtype`, laid out in memory as `codes` is.

    codes    uint8 [..., M, N]; fewer axes are allowed.
    factors  one per block, with as many axes: element [i, j] takes factor [(i + origin[0]) // block[0],
             (j + origin[1]) // block[1]]. They cover the codes exactly.
    """
    if codes.ndim < 2:
        more = 2 - codes.ndim
        grown, ones, zeros = (np.newaxis,) * more, (1,) * more, (0,) * more
        return dequantise(codes[grown], factors[grown], ones + block, zeros + origin, dtype)[zeros]
    out = np.empty_like(codes, dtype)
    factors = factors.astype(dtype, copy=False)
    for index in np.ndindex(codes.shape[:-2]):
        place = tuple((i + o) // b for i, o, b in zip(index, origin, block, strict=False))
        _fill(out[index], codes[index], factors[place], block[-2:], origin[-2:])
    return out


def _fill(out: Array, codes: Array, factors: Array, block: tuple[int, ...], origin: tuple[int, ...]) -> None:
    """One matrix, in panels of rows that lie within one row of blocks (or have a factor for each of their rows)."""
    if abs(codes.strides[0]) < abs(codes.strides[1]):
        _fill(out.T, codes.T, factors.T, block[::-1], origin[::-1])
        return
    table = TABLES["f8_e4m3"].astype(out.dtype, copy=False)
    rows, columns = codes.shape
    edges = np.clip(np.arange(factors.shape[1] + 1) * block[1] - origin[1], 0, columns)
    for start, stop in _panels(rows, block[0], origin[0], max(1, PANEL // max(1, columns))):
        first, last = (start + origin[0]) // block[0], (stop - 1 + origin[0]) // block[0]
        panel = out[start:stop]
        np.take(table, codes[start:stop], out=panel, mode="clip")
        panel *= np.repeat(factors[first : last + 1], np.diff(edges), axis=1)


def _panels(rows: int, block: int, origin: int, most: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < rows:
        end_of_block = rows if block == 1 else start + block - (start + origin) % block
        stop = min(rows, end_of_block, start + most)
        yield start, stop
        start = stop
