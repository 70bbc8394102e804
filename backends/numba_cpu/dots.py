"""Products of few tokens: rows of a matrix meet each by dot products, at the memory's speed."""

from __future__ import annotations

from npllm.backends.numba_cpu.arithmetic import BFLOAT16, FLOAT32, INT8
from npllm.backends.numba_cpu.integers import dot_q4, dot_q8, dots_q4, dots_q8, twos_q4, twos_q8
from npllm.backends.numba_cpu.jit import called, inline
from npllm.backends.numba_cpu.matrix import BF16, BLOCK_COLUMNS, COLUMNS, F8, F32, FORMAT, ORIGIN_COLUMN, Q8, ROW_BYTES
from npllm.backends.numba_cpu.memory import call, f32, word
from npllm.backends.numba_cpu.rows import dot_row, factors_at, fill_rows, row_at
from npllm.backends.numba_cpu.source import PAIRS
from npllm.backends.numba_cpu.team import function_at
from npllm.backends.numba_cpu.vectors import (
    MORE,
    SEVERAL,
    dot_f8_bf16,
    dot_f32,
    dot_pairs,
    dots_bf16,
    dots_f32,
    dots_pairs,
    more_dots_bf16,
    more_dots_f32,
    more_dots_pairs,
)

# The place of `_multiply_rows` among the functions that kernels call.
MULTIPLY_ROWS = 1

# Rows of weights that lie as pairs of bf16, beside storage formats.
PAIRED = -1


@inline
def prepared_row(width, arithmetic):
    """Bytes from one row of prepared activations to the next, whole cache lines.

    No more than they need: rows of bf16 that lie as far apart as those of float32 would share half of the cache's sets.
    """
    size = 2 if PAIRS and arithmetic == BFLOAT16 else 4
    return ((width + 1) * size + 63) // 64 * 64


@inline
def together(tokens):
    """Numbers between the rows of `multiply_rows`'s products."""
    if tokens == 1:
        return 1
    return SEVERAL if tokens <= SEVERAL else (tokens + MORE - 1) // MORE * MORE


@inline
def multiply_rows(team, matrix, begin, end, x, x_row, tokens, arithmetic, room, out):
    """Rows begin..end of a matrix times few rows of prepared activations, `x_row` bytes apart.

    The products go to `out`, float32 [end - begin + 1, together(tokens)]; `room` has space for TOGETHER rows of float32.
    """
    call(function_at(team, MULTIPLY_ROWS), (matrix, begin, end, x, x_row, tokens, arithmetic, room, out))


@called(MULTIPLY_ROWS, 9)
def _multiply_rows(matrix, begin, end, x, x_row, tokens, arithmetic, room, out):
    """Two rows meet SEVERAL tokens at once, one of each half: each is read ahead where no other lies on its page."""
    if tokens == 1:
        y = f32(out, end - begin)
        for n in range(begin, end):
            y[n - begin] = dot(matrix, n, x, arithmetic, room)
        return
    width, out_row, half = word(matrix, COLUMNS), together(tokens) * 4, (end - begin + 1) // 2
    if arithmetic == INT8:
        for n in range(begin, end):
            _multiply_integers(matrix, n, x, x_row, tokens, out + (n - begin) * out_row)
    elif tokens <= SEVERAL:
        for n in range(begin, begin + half):
            last, to = 1 if n + half < end else 0, out + (n - begin) * out_row
            row, step, kind = _ready(matrix, n, half, last, arithmetic, room)
            if PAIRS and kind == PAIRED:
                dots_pairs(row, step, last, x, x_row, tokens - 1, width, to, half * out_row)
            elif kind == BF16:
                dots_bf16(row, step, last, x, x_row, tokens - 1, width, to, half * out_row)
            else:
                dots_f32(row, step, last, x, x_row, tokens - 1, width, to, half * out_row)
    else:
        for n in range(begin, end):
            row, _, kind = _ready(matrix, n, 0, 0, arithmetic, room)
            _multiply_more(row, x, x_row, tokens, width, kind, out + (n - begin) * out_row)


@inline
def _multiply_more(row, x, x_row, tokens, width, kind, out):
    """A row of weights, ready, times more than SEVERAL tokens."""
    for first in range(0, tokens, MORE):
        at, to, rest = x + first * x_row, out + 4 * first, tokens - first - 1
        if PAIRS and kind == PAIRED:
            more_dots_pairs(row, 0, 0, at, x_row, rest, width, to, 0)
        elif kind == BF16:
            more_dots_bf16(row, 0, 0, at, x_row, rest, width, to, 0)
        else:
            more_dots_f32(row, 0, 0, at, x_row, rest, width, to, 0)


@inline
def _multiply_integers(matrix, n, x, x_row, tokens, out):
    row, factors, width, kind = row_at(matrix, n), factors_at(matrix, n), word(matrix, COLUMNS), word(matrix, FORMAT)
    for first in range(0, tokens, SEVERAL):
        at, to, rest = x + first * x_row, out + 4 * first, tokens - first - 1
        if kind == Q8:
            if rest < 2:
                twos_q8(row, factors, at, x_row, rest, width, to)
            else:
                dots_q8(row, factors, at, x_row, rest, width, to)
        elif rest < 2:
            twos_q4(row, factors, at, x_row, rest, width, to)
        else:
            dots_q4(row, factors, at, x_row, rest, width, to)


@inline
def _ready(matrix, n, step, last, arithmetic, room):
    """Where row n, and if `last` is 1 row n + step, lie as the arithmetic multiplies them: in their place, or widened in
    `room`; how many bytes apart; and as what: float32 (F32), bf16 (BF16), or pairs that meet pairs of activations (PAIRED).
    """
    kind, pairs = word(matrix, FORMAT), PAIRS and arithmetic == BFLOAT16
    if (kind == F32 and arithmetic != BFLOAT16) or kind == BF16:
        return row_at(matrix, n), step * word(matrix, ROW_BYTES), PAIRED if pairs else kind
    room_row = prepared_row(word(matrix, COLUMNS), FLOAT32)
    for i in range(last + 1):
        at = n + i * step
        fill_rows(matrix, at, at + 1, 0, word(matrix, COLUMNS), arithmetic == BFLOAT16, room + i * room_row, 0)
    return room, room_row, PAIRED if pairs else F32


@inline
def dot(matrix, n, x, arithmetic, room):
    """Row n of a matrix times prepared activations; `room` has space for a row."""
    kind, width, row = word(matrix, FORMAT), word(matrix, COLUMNS), row_at(matrix, n)
    if arithmetic == INT8:
        if kind == Q8:
            return dot_q8(row, factors_at(matrix, n), x, width)
        return dot_q4(row, factors_at(matrix, n), x, width)
    if arithmetic != BFLOAT16 or (not PAIRS and kind in (BF16, F8)):
        return dot_row(matrix, n, x, room)
    if PAIRS and kind == F8:
        block, origin = word(matrix, BLOCK_COLUMNS), word(matrix, ORIGIN_COLUMN)
        return dot_f8_bf16(row, x, width, factors_at(matrix, n), block, origin)
    row, _, _ = _ready(matrix, n, 0, 0, arithmetic, room)
    return dot_pairs(row, x, width) if PAIRS else dot_f32(row, x, width)
