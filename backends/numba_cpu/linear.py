"""`linear`: products with the rows of stored matrices, for few tokens at the memory's speed, for many at the arithmetic's.

Several matrices that read the same input (q, k and v) are one kernel's work: an output list says what they are.

Few tokens meet every row of the weights by a dot product. Many are packed into panels of 64 or 16, the tokens side by side
([K, P] numbers, or [K/2, P] pairs of bf16): a number of a weight, read where it lies, is spread over a vector and meets as
many tokens at once, so nothing of the weight needs to be packed. Only formats that no instruction multiplies are widened,
a block of rows at a time.
"""

from __future__ import annotations

import numpy as np

from npllm.backends.numba_cpu.jit import PATH, inline, kernel
from npllm.backends.numba_cpu.matrix import BF16, COLUMNS, DATA, F32, FORMAT, ROW_BYTES, ROWS
from npllm.backends.numba_cpu.memory import f32, word
from npllm.backends.numba_cpu.rows import dot_row, fill_rows
from npllm.backends.numba_cpu.source import COUNT, FORM, SOURCE_WORDS, WIDTH, read_row, round_row, rounded
from npllm.backends.numba_cpu.team import next_chunk, scratch
from npllm.backends.numba_cpu.vectors import (
    LANES,
    dot_f32,
    dot_pairs,
    tile_narrow,
    tile_narrow_pairs,
    tile_wide,
    tile_wide_pairs,
    turn,
)

# An output, OUTPUT_WORDS in a list: a matrix's description; where its product goes and how many bytes apart its rows are;
# bias [F], or 0; residual and how many bytes apart its rows are, or 0.
MATRIX, OUT, OUT_ROW, BIAS, RESIDUAL, RESIDUAL_ROW, OUTPUT_WORDS = range(7)

# Arithmetic: float32 products and sums; products of bf16, float32 sums.
FLOAT32, BFLOAT16 = range(2)

# Tokens of a wide and of a narrow panel, and the widths and heights of the tiles.
WIDE, NARROW = 64, 16
TILE_ROWS, TILE_WIDTH = PATH.tile[0], PATH.tile[1] * LANES
PAIRS = PATH.bf16

# Rows of weights that a thread takes at a time, numbers (or pairs) of them, and tokens: what meets stays in a core's cache.
BLOCK, STEPS, TOKENS = 48, 1024, 512

# Bytes between the rows of a block of products: not a power of two, or they would fall into a few sets of the cache.
PRODUCT_ROW = 4 * TOKENS + 64

# Where a thread's scratch memory holds products, a block of widened weights, and rows of activations.
PRODUCTS, WIDENED = 0, BLOCK * PRODUCT_ROW
ACTIVATIONS = WIDENED + BLOCK * STEPS * 4 + 64

# Bytes of weights that a thread takes at a time where memory is the limit.
STREAM = 1 << 16

# -- panels -----------------------------------------------------------------------------------------------------------


@inline
def steps_of(width, arithmetic):  # type: ignore[no-untyped-def]
    """Rows of a panel: a number of each token, or a pair."""
    return (width + 1) // 2 if PAIRS and arithmetic == BFLOAT16 else width


def panel_bytes(tokens: int, width: int) -> int:
    """Memory that the panels of so many tokens take at most."""
    return -(-tokens // NARROW) * NARROW * width * 4


@inline
def panel_width(token, tokens):  # type: ignore[no-untyped-def]
    """Of the panel that begins with a token."""
    return WIDE if token + WIDE <= tokens else NARROW


@kernel(FORM + "2q")
def pack(args, team, thread, threads):  # type: ignore[no-untyped-def]
    """The rows of a source as panels. Arguments: a source; panels, arithmetic."""
    panels, arithmetic = word(args, SOURCE_WORDS), word(args, SOURCE_WORDS + 1)
    tokens, width = word(args, COUNT), word(args, WIDTH)
    steps, space = steps_of(width, arithmetic), scratch(team, thread)
    row_bytes = (width + 1) * 4
    while True:
        begin = next_chunk(team) * NARROW
        if begin >= tokens:
            break
        for i in range(NARROW):
            place = space + i * row_bytes
            if begin + i < tokens:
                read_row(args, begin + i, place)
                _prepare_row(place, width, arithmetic)
            else:
                clear(place, width)
        start = begin // WIDE * WIDE
        wide = panel_width(start, tokens)
        panel = start if wide == WIDE else begin
        turned(space, row_bytes, NARROW, steps, panels + panel * steps * 4 + (begin - panel) * 4, wide * 4)


@inline
def _prepare_row(place, width, arithmetic):  # type: ignore[no-untyped-def]
    """Round float32 numbers in place as the arithmetic asks."""
    if arithmetic == BFLOAT16:
        if PAIRS:
            round_row(place, width, place)
        else:
            x = f32(place, width)
            for k in range(width):
                x[k] = rounded(x[k])


@inline
def clear(place, width):  # type: ignore[no-untyped-def]
    x = f32(place, width)
    for k in range(width):
        x[k] = np.float32(0)


@inline
def turned(x, x_row, rows, columns, y, y_row):  # type: ignore[no-untyped-def]
    """y[k, i] = x[i, k] for `rows` of x, a multiple of LANES, with `columns` numbers of 32 bits."""
    for i in range(0, rows, LANES):
        whole = columns // LANES * LANES
        for k in range(0, whole, LANES):
            turn(x + i * x_row + k * 4, x_row, y + k * y_row + i * 4, y_row)
        for k in range(whole, columns):
            for j in range(i, i + LANES):
                f32(y + k * y_row, rows)[j] = f32(x + j * x_row, columns)[k]


@inline
def multiply(matrix, begin, end, panels, tokens, first, last, arithmetic, space, out, out_row):  # type: ignore[no-untyped-def]
    """Rows begin..end of a matrix (at most BLOCK) times tokens first..last of the panels (at most TOKENS).

    `out` takes them as [BLOCK, TOKENS] float32 with rows `out_row` bytes apart; `space` holds BLOCK x STEPS widened numbers.
    """
    width, kind = word(matrix, COLUMNS), word(matrix, FORMAT)
    pairs = PAIRS and arithmetic == BFLOAT16
    direct = (kind == BF16 and width % 2 == 0) if pairs else (kind == F32 and arithmetic == FLOAT32)
    steps = steps_of(width, arithmetic)
    for step in range(0, steps, STEPS):
        count = min(STEPS, steps - step)
        a, a_row = word(matrix, DATA) + begin * word(matrix, ROW_BYTES) + step * 4, word(matrix, ROW_BYTES)
        if not direct:
            a, a_row = space, STEPS * 4
            per = 2 if pairs else 1
            fill_rows(matrix, begin, end, step * per, min(width, (step + count) * per), arithmetic == BFLOAT16, space, a_row)
        token = first
        while token < last:
            wide = panel_width(token, tokens)
            b = panels + token * steps * 4 + step * wide * 4
            _multiply_panel(a, a_row, end - begin, b, wide, count, out + (token - first) * 4, out_row, step, pairs)
            token += wide


@inline
def _multiply_panel(a, a_row, rows, b, wide, count, c, c_row, add, pairs):  # type: ignore[no-untyped-def]
    if wide == WIDE or TILE_WIDTH <= NARROW:
        for column in range(0, wide, TILE_WIDTH):
            for n in range(0, rows, TILE_ROWS):
                at, to = a + n * a_row, c + n * c_row + column * 4
                if pairs:
                    tile_wide_pairs(at, a_row, 4, rows - n - 1, b + column * 4, wide * 4, count, to, c_row, add)
                else:
                    tile_wide(at, a_row, 4, rows - n - 1, b + column * 4, wide * 4, count, to, c_row, add)
        return
    for n in range(0, rows, 2 * TILE_ROWS):
        if pairs:
            tile_narrow_pairs(a + n * a_row, a_row, 4, rows - n - 1, b, wide * 4, count, c + n * c_row, c_row, add)
        else:
            tile_narrow(a + n * a_row, a_row, 4, rows - n - 1, b, wide * 4, count, c + n * c_row, c_row, add)


# -- many tokens ------------------------------------------------------------------------------------------------------


@kernel("4q")
def multiply_packed(args, team, thread, threads):  # type: ignore[no-untyped-def]
    """Products of packed tokens. Arguments: panels, tokens, arithmetic, the number of outputs; outputs."""
    panels, tokens, arithmetic, count = word(args, 0), word(args, 1), word(args, 2), word(args, 3)
    space, blocks = scratch(team, thread), 0
    outputs, base, chunk = args + 32, 0, next_chunk(team)
    for i in range(count):
        output = outputs + i * OUTPUT_WORDS * 8
        matrix = word(output, MATRIX)
        rows = word(matrix, ROWS)
        blocks = (rows + BLOCK - 1) // BLOCK
        while chunk - base < blocks:
            begin = (chunk - base) * BLOCK
            end = min(rows, begin + BLOCK)
            for first in range(0, tokens, TOKENS):
                last = min(tokens, first + TOKENS)
                multiply(matrix, begin, end, panels, tokens, first, last, arithmetic, space + WIDENED, space, PRODUCT_ROW)
                _hand_out(output, begin, end, first, last, space)
            chunk = next_chunk(team)
        base += blocks


@inline
def _hand_out(output, begin, end, first, last, products):  # type: ignore[no-untyped-def]
    """Products [features, tokens] of a block go to their rows, with bias and residual."""
    count = end - begin
    row = products + BLOCK * PRODUCT_ROW
    for token in range(first, last, NARROW):
        turned(products + (token - first) * 4, PRODUCT_ROW, (count + LANES - 1) // LANES * LANES, NARROW, row, BLOCK * 4)
        for m in range(token, min(last, token + NARROW)):
            _finish(output, m, begin, f32(row + (m - token) * BLOCK * 4, count))


@inline
def _finish(output, m, begin, products):  # type: ignore[no-untyped-def]
    """Add bias and residual to the features from `begin` on of token m, and store them."""
    y = f32(word(output, OUT) + m * word(output, OUT_ROW) + begin * 4, products.size)
    bias_at, residual_at = word(output, BIAS), word(output, RESIDUAL)
    if bias_at:
        bias = f32(bias_at + begin * 4, products.size)
        for n in range(products.size):
            products[n] += bias[n]
    if residual_at:
        residual = f32(residual_at + m * word(output, RESIDUAL_ROW) + begin * 4, products.size)
        for n in range(products.size):
            products[n] += residual[n]
    for n in range(products.size):
        y[n] = products[n]


# -- few tokens -------------------------------------------------------------------------------------------------------


@kernel(FORM + "2q")
def multiply_few(args, team, thread, threads):  # type: ignore[no-untyped-def]
    """Products of few tokens, row by row of the weights. Arguments: a source; arithmetic, the number of outputs; outputs."""
    arithmetic, count = word(args, SOURCE_WORDS), word(args, SOURCE_WORDS + 1)
    tokens, width = word(args, COUNT), word(args, WIDTH)
    space, row_bytes = scratch(team, thread), (width + 1 + 15) // 16 * 64
    for m in range(tokens):
        read_row(args, m, space + m * row_bytes)
        _prepare_row(space + m * row_bytes, width, arithmetic)
    outputs, base, chunk = args + 8 * (SOURCE_WORDS + 2), 0, next_chunk(team)
    for i in range(count):
        output = outputs + i * OUTPUT_WORDS * 8
        matrix = word(output, MATRIX)
        rows, per = word(matrix, ROWS), max(1, STREAM // word(matrix, ROW_BYTES))
        blocks = (rows + per - 1) // per
        while chunk - base < blocks:
            begin = (chunk - base) * per
            for n in range(begin, min(rows, begin + per)):
                for m in range(tokens):
                    x, room = space + m * row_bytes, space + tokens * row_bytes
                    _finish_one(output, m, n, dot(matrix, n, x, arithmetic, room))
            chunk = next_chunk(team)
        base += blocks


@inline
def dot(matrix, n, x, arithmetic, room):  # type: ignore[no-untyped-def]
    """Row n of a matrix times prepared activations; `room` has space for a row."""
    if arithmetic == FLOAT32:
        return dot_row(matrix, n, x)
    width, row = word(matrix, COLUMNS), word(matrix, DATA) + n * word(matrix, ROW_BYTES)
    if word(matrix, FORMAT) != BF16:
        fill_rows(matrix, n, n + 1, 0, width, True, room, 0)
        row = room
    elif not PAIRS:
        return dot_row(matrix, n, x)
    return dot_pairs(row, x, width) if PAIRS else dot_f32(row, x, width)


@inline
def _finish_one(output, m, n, product):  # type: ignore[no-untyped-def]
    bias_at, residual_at = word(output, BIAS), word(output, RESIDUAL)
    if bias_at:
        product += f32(bias_at + n * 4, 1)[0]
    if residual_at:
        product += f32(residual_at + m * word(output, RESIDUAL_ROW) + n * 4, 1)[0]
    f32(word(output, OUT) + m * word(output, OUT_ROW) + n * 4, 1)[0] = product
