"""What a product reads: rows of activations, passed through a norm on the way.

A kernel's arguments begin with the words below. Norms: NONE; RMS (npllm.blocks.rms_norm: `x / rms * (gain + offset)`, or no
gain); LAYER (npllm.blocks.layer_norm: `(x - mean) / deviation * gain + shift`).
"""

from __future__ import annotations

import numpy as np

from npllm.backends.numba_cpu.conversions import bits_of, from_bits, narrow
from npllm.backends.numba_cpu.jit import PATH, inline
from npllm.backends.numba_cpu.memory import f32, real, u16, word
from npllm.backends.numba_cpu.team import called

# Words of a source: where the rows lie and how many bytes apart, how many there are, their width; the norm, its gain and
# shift (or 0); and, as doubles, eps and the offset.
ROWS_AT, ROW_STEP, COUNT, WIDTH, NORM, GAIN, SHIFT, EPS, OFFSET, SOURCE_WORDS = range(10)
FORM = "7q2d"
NONE, RMS, LAYER = range(3)

PAIRS = PATH.bf16


@called
def read_row(team, source, m, out):
    """Row m of a source, normed, into the float32 numbers at `out`."""
    width, norm = word(source, WIDTH), word(source, NORM)
    x, y = f32(word(source, ROWS_AT) + m * word(source, ROW_STEP), width), f32(out, width)
    if norm == NONE:
        for k in range(width):
            y[k] = x[k]
    elif norm == RMS:
        _rms(x, word(source, GAIN), real(source, EPS), np.float32(real(source, OFFSET)), y)
    else:
        _layer(x, f32(word(source, GAIN), width), f32(word(source, SHIFT), width), real(source, EPS), y)


@inline
def _rms(x, gain_at, eps, offset, y):
    total = 0.0
    for k in range(x.size):
        total += np.float64(x[k]) * np.float64(x[k])
    factor = np.float32(1.0 / np.sqrt(total / x.size + eps))
    if gain_at == 0:
        for k in range(x.size):
            y[k] = x[k] * factor
        return
    gain = f32(gain_at, x.size)
    for k in range(x.size):
        y[k] = x[k] * factor * (gain[k] + offset)


@inline
def _layer(x, gain, shift, eps, y):
    mean = 0.0
    for k in range(x.size):
        mean += np.float64(x[k])
    mean /= x.size
    total = 0.0
    for k in range(x.size):
        total += (np.float64(x[k]) - mean) * (np.float64(x[k]) - mean)
    factor = 1.0 / np.sqrt(total / x.size + eps)
    for k in range(x.size):
        y[k] = np.float32((np.float64(x[k]) - mean) * factor) * gain[k] + shift[k]


@inline
def bf16(x):
    """The bits of a float32 rounded to bf16 (ties to even; NaN stays NaN), in the lower half."""
    bits = bits_of(x)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded if x == x else np.uint32(0x7FC0)


@inline
def rounded(x):
    """A float32 rounded to bf16."""
    return from_bits(bf16(x) << np.uint32(16))


@inline
def round_row(x_at, width, out):
    """float32 numbers as bf16, in their own place as well; an odd row is filled up with a zero."""
    y = u16(out, width + 1)
    if PAIRS:
        narrow(x_at, out, width)
    else:
        x = f32(x_at, width)
        for k in range(width):
            y[k] = np.uint16(bf16(x[k]))
    y[width] = np.uint16(0)
