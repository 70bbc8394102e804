"""Products of few tokens: rows of a matrix meet each by dot products, at the memory's speed."""

from __future__ import annotations

from npllm.backends.numba_cpu.arithmetic import BFLOAT16, FLOAT32, INT8
from npllm.backends.numba_cpu.integers import abreast_q4, abreast_q8, dots_q4, dots_q8, twos_q4, twos_q8
from npllm.backends.numba_cpu.jit import inline
from npllm.backends.numba_cpu.matrix import (
    BF16,
    BLOCK_COLUMNS,
    COLUMNS,
    F8,
    F16,
    F32,
    FACTOR_ROW,
    FORMAT,
    ORIGIN_COLUMN,
    Q8,
    ROW_BYTES,
)
from npllm.backends.numba_cpu.memory import f32, word
from npllm.backends.numba_cpu.rows import factors_at, fill_rows, row_at
from npllm.backends.numba_cpu.source import PAIRS
from npllm.backends.numba_cpu.team import called
from npllm.backends.numba_cpu.vectors import (
    ABREAST,
    MORE,
    SEVERAL,
    abreast_bf16,
    abreast_f16,
    abreast_f32,
    abreast_pairs,
    dot_f8,
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
    if tokens == 1:
        apart = (end - begin + ABREAST - 1) // ABREAST
        multiply_places(team, matrix, begin, end, apart, apart, x, arithmetic, room, out, apart * 4)
    else:
        multiply_few_rows(team, matrix, begin, end, x, x_row, tokens, arithmetic, room, out)


@called
def multiply_places(team, matrix, begin, end, apart, count, x, arithmetic, room, out, out_apart):
    """Rows of a matrix in ABREAST places, `count` of each, times one row of prepared activations.

    Place p begins with row `begin + p apart`, of which there are none from `end` on; its products lie side by side at
    `out + p out_apart`. A token meets a row of each place at once; or one row, where that has to be widened first, for which
    `room` has space.
    """
    kind = word(matrix, FORMAT)
    if kind == F8 or (kind >= Q8 and arithmetic != INT8) or (kind in (F32, F16) and arithmetic == BFLOAT16):
        for place in range(ABREAST):
            first = begin + place * apart
            y = f32(out + place * out_apart, count)
            for i in range(min(count, end - first)):
                y[i] = _dot(team, matrix, first + i, x, arithmetic, room)
        return
    i = 0
    while i < min(count, end - begin):
        last = min(ABREAST - 1, (end - 1 - begin - i) // apart)
        times = min(count, end - begin - last * apart) - i
        _multiply_abreast(matrix, begin + i, times, apart, last, x, arithmetic, out + i * 4, out_apart)
        i += times


@called
def multiply_few_rows(team, matrix, begin, end, x, x_row, tokens, arithmetic, room, out):
    """Two rows meet SEVERAL tokens at once, one of each half: each is read ahead where no other lies on its page."""
    width, out_row, half = word(matrix, COLUMNS), together(tokens) * 4, (end - begin + 1) // 2
    if arithmetic == INT8:
        for n in range(begin, end):
            _multiply_integers(matrix, n, x, x_row, tokens, out + (n - begin) * out_row)
    elif tokens <= SEVERAL:
        for n in range(begin, begin + half):
            last, to = 1 if n + half < end else 0, out + (n - begin) * out_row
            row, step, kind = _ready(team, matrix, n, half, last, arithmetic, room)
            if PAIRS and kind == PAIRED:
                dots_pairs(row, step, last, x, x_row, tokens - 1, width, to, half * out_row)
            elif kind == BF16:
                dots_bf16(row, step, last, x, x_row, tokens - 1, width, to, half * out_row)
            else:
                dots_f32(row, step, last, x, x_row, tokens - 1, width, to, half * out_row)
    else:
        for n in range(begin, end):
            row, _, kind = _ready(team, matrix, n, 0, 0, arithmetic, room)
            _multiply_more(row, x, x_row, tokens, width, kind, out + (n - begin) * out_row)


@inline
def _multiply_abreast(matrix, n, times, apart, last, x, arithmetic, out, out_apart):
    """Rows n, n + apart, ... up to n + last apart, and as many of those that follow each, times one row."""
    kind, width = word(matrix, FORMAT), word(matrix, COLUMNS)
    row, row_bytes = row_at(matrix, n), word(matrix, ROW_BYTES)
    rows_apart = apart * row_bytes
    if kind >= Q8:
        factors, factor_row = factors_at(matrix, n), word(matrix, FACTOR_ROW)
        apart_too = apart * factor_row
        if kind == Q8:
            abreast_q8(row, rows_apart, factors, apart_too, last, row_bytes, factor_row, times, x, width, out, out_apart)
        else:
            abreast_q4(row, rows_apart, factors, apart_too, last, row_bytes, factor_row, times, x, width, out, out_apart)
    elif PAIRS and arithmetic == BFLOAT16:
        abreast_pairs(row, rows_apart, last, row_bytes, times, x, width, out, out_apart)
    elif kind == BF16:
        abreast_bf16(row, rows_apart, last, row_bytes, times, x, width, out, out_apart)
    elif kind == F16:
        abreast_f16(row, rows_apart, last, row_bytes, times, x, width, out, out_apart)
    else:
        abreast_f32(row, rows_apart, last, row_bytes, times, x, width, out, out_apart)


@inline
def _dot(team, matrix, n, x, arithmetic, room):
    """Row n of a matrix times prepared activations, where rows are widened first; `room` has space for one."""
    kind, width, row = word(matrix, FORMAT), word(matrix, COLUMNS), row_at(matrix, n)
    if kind == F8:
        factors, block, origin = factors_at(matrix, n), word(matrix, BLOCK_COLUMNS), word(matrix, ORIGIN_COLUMN)
        if PAIRS and arithmetic == BFLOAT16:
            return dot_f8_bf16(row, x, width, factors, block, origin)
        return dot_f8(row, x, width, factors, block, origin)
    row, _, _ = _ready(team, matrix, n, 0, 0, arithmetic, room)
    return dot_pairs(row, x, width) if PAIRS and arithmetic == BFLOAT16 else dot_f32(row, x, width)


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
def _ready(team, matrix, n, step, last, arithmetic, room):
    """Where row n, and if `last` is 1 row n + step, lie as the arithmetic multiplies them: in their place, or widened in
    `room`; how many bytes apart; and as what: float32 (F32), bf16 (BF16), or pairs that meet pairs of activations (PAIRED).
    """
    kind, pairs = word(matrix, FORMAT), PAIRS and arithmetic == BFLOAT16
    if (kind == F32 and arithmetic != BFLOAT16) or kind == BF16:
        return row_at(matrix, n), step * word(matrix, ROW_BYTES), PAIRED if pairs else kind
    room_row = prepared_row(word(matrix, COLUMNS), FLOAT32)
    for i in range(last + 1):
        at = n + i * step
        width, rounds = word(matrix, COLUMNS), arithmetic == BFLOAT16
        fill_rows(team, matrix, at, at + 1, 0, width, rounds, room + i * room_row, 0)
    return room, room_row, PAIRED if pairs else F32
