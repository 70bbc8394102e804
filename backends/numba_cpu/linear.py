"""`linear`: products with the rows of stored matrices, for few tokens at the memory's speed, for many at the arithmetic's.

Several matrices that read the same input (q, k and v) are one kernel's work: an output list says what they are.

Few tokens meet every row of the weights by a dot product. Many are packed into panels, as wide as a tile or of 16 tokens,
which lie side by side ([K, P] numbers, or [K/2, P] pairs of bf16): a number of a weight, read where it lies, is spread over
a vector and meets as many tokens at once, so nothing of the weight needs to be packed. Only formats that no instruction
multiplies are widened, a block of rows at a time. While a block meets one panel, the next is fetched: panels are read anew
for each block, and come from far.
"""

from __future__ import annotations

import numpy as np

from npllm.backends.numba_cpu.integers import dot_q4, dot_q8, dots_q4, dots_q8, quantise, twos_q4, twos_q8
from npllm.backends.numba_cpu.jit import PATH, inline, kernel
from npllm.backends.numba_cpu.matrix import (
    BF16,
    BLOCK_COLUMNS,
    COLUMNS,
    DATA,
    F8,
    F32,
    FORMAT,
    ORIGIN_COLUMN,
    Q8,
    ROW_BYTES,
    ROWS,
)
from npllm.backends.numba_cpu.memory import f32, word
from npllm.backends.numba_cpu.rows import dot_row, factors_at, fill_rows, row_at
from npllm.backends.numba_cpu.source import COUNT, FORM, SOURCE_WORDS, WIDTH, read_row, round_row, rounded
from npllm.backends.numba_cpu.team import next_chunk, scratch
from npllm.backends.numba_cpu.vectors import (
    LANES,
    MORE,
    SEVERAL,
    TOGETHER,
    dot_f8_bf16,
    dot_f32,
    dot_pairs,
    dots_f32,
    dots_pairs,
    more_dots_f32,
    more_dots_pairs,
    tile_narrow,
    tile_narrow_pairs,
    tile_wide,
    tile_wide_pairs,
    turn,
)

# An output, OUTPUT_WORDS in a list: a matrix's description; where its product goes and how many bytes apart its rows are;
# bias [F], or 0; residual and how many bytes apart its rows are, or 0.
MATRIX, OUT, OUT_ROW, BIAS, RESIDUAL, RESIDUAL_ROW, OUTPUT_WORDS = range(7)

# Arithmetic: float32 products and sums; products of bf16, float32 sums; of q8 and q4 with few tokens, products of integers
# (npllm.backends.numba_cpu.integers), with many those of `panelled`.
FLOAT32, BFLOAT16, INT8 = range(3)

# Tokens of a narrow and of a wide panel, as wide as a tile, and the height of the tiles.
TILE_ROWS, TILE_WIDTH = PATH.tile[0], PATH.tile[1] * LANES
NARROW = 16
WIDE = max(NARROW, TILE_WIDTH)
PAIRS = PATH.bf16

# Rows of weights that a thread takes at a time, numbers (or pairs) of them, and tokens: what meets stays in a core's cache.
BLOCK, STEPS, TOKENS = 48, PATH.steps, 512

# Bytes between the rows of a block of products: not a power of two, or they would fall into a few sets of the cache.
PRODUCT_ROW = 4 * TOKENS + 64

# Where a thread's scratch memory holds products, a block of widened weights, and rows of activations.
PRODUCTS, WIDENED = 0, BLOCK * PRODUCT_ROW
ACTIVATIONS = WIDENED + BLOCK * STEPS * 4 + 64

# Bytes of weights that a thread takes at a time where memory is the limit.
STREAM = 1 << 16

# Rows that these are at most.
MOST_ROWS = 2048

# -- panels -----------------------------------------------------------------------------------------------------------


@inline
def panelled(arithmetic):
    """The arithmetic of many tokens: panels hold no 8-bit activations."""
    if arithmetic == INT8:
        return BFLOAT16 if PAIRS else FLOAT32
    return arithmetic


@inline
def steps_of(width, arithmetic):
    """Rows of a panel: a number of each token, or a pair."""
    return (width + 1) // 2 if PAIRS and panelled(arithmetic) == BFLOAT16 else width


def panel_bytes(tokens: int, width: int) -> int:
    """Memory that the panels of so many tokens take at most."""
    return -(-tokens // NARROW) * NARROW * width * 4


@inline
def panel_width(token, tokens):
    """Of the panel that begins with a token."""
    return WIDE if token + WIDE <= tokens else NARROW


@kernel(FORM + "2q")
def pack(args, team, thread, threads):
    """The rows of a source as panels. Arguments: a source; panels, arithmetic."""
    panels, arithmetic = word(args, SOURCE_WORDS), panelled(word(args, SOURCE_WORDS + 1))
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
def _prepare_row(place, width, arithmetic):
    """Round float32 numbers in place as the arithmetic asks."""
    if arithmetic == INT8:
        quantise(place, width)
    elif arithmetic == BFLOAT16:
        if PAIRS:
            round_row(place, width, place)
        else:
            x = f32(place, width)
            for k in range(width):
                x[k] = rounded(x[k])


@inline
def clear(place, width):
    x = f32(place, width)
    for k in range(width):
        x[k] = np.float32(0)


@inline
def turned(x, x_row, rows, columns, y, y_row):
    """y[k, i] = x[i, k] for `rows` of x, a multiple of LANES, with `columns` numbers of 32 bits."""
    for i in range(0, rows, LANES):
        whole = columns // LANES * LANES
        for k in range(0, whole, LANES):
            turn(x + i * x_row + k * 4, x_row, y + k * y_row + i * 4, y_row)
        for k in range(whole, columns):
            for j in range(i, i + LANES):
                f32(y + k * y_row, rows)[j] = f32(x + j * x_row, columns)[k]


@inline
def multiply(matrix, begin, end, panels, tokens, first, last, arithmetic, space, out, out_row):
    """Rows begin..end of a matrix (at most BLOCK) times tokens first..last of the panels (at most TOKENS).

    `out` takes them as [BLOCK, TOKENS] float32 with rows `out_row` bytes apart; `space` holds BLOCK x STEPS widened numbers.
    """
    width, kind, arithmetic = word(matrix, COLUMNS), word(matrix, FORMAT), panelled(arithmetic)
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
            wide, to = panel_width(token, tokens), out + (token - first) * 4
            b = panels + token * steps * 4 + step * wide * 4
            if direct and token == first:
                ahead, ahead_row, ahead_step = a + TILE_ROWS * a_row, a_row, 4 * TILE_ROWS
            else:
                ahead = _next_panel(panels, tokens, token + wide, first, last, steps, step, count)
                ahead_row, ahead_step = count * wide * 4 // BLOCK, wide * 4 * TILE_ROWS // BLOCK
            ways = ahead, ahead_row, ahead_step
            _multiply_panel(a, a_row, end - begin, b, wide, count, to, out_row, step, pairs, ways)
            token += wide


@inline
def _next_panel(panels, tokens, token, first, last, steps, step, count):
    """Where the numbers lie that a block of rows meets next: those of the next tokens, or the first ones' next numbers."""
    if token >= last:
        token, step = first, step + count
    return panels + (token * steps + step * panel_width(token, tokens)) * 4


@inline
def _multiply_panel(a, a_row, rows, b, wide, count, c, c_row, add, pairs, ways):
    """One panel; `ways` says what to fetch ahead: from where, and how many bytes go to each row and to each of its steps."""
    ahead, ahead_row, ahead_step = ways
    if wide == WIDE or TILE_WIDTH <= NARROW:
        for column in range(0, wide, TILE_WIDTH):
            for n in range(0, rows, TILE_ROWS):
                at, to, left, then = a + n * a_row, c + n * c_row + column * 4, rows - n - 1, ahead + n * ahead_row
                if pairs:
                    tile_wide_pairs(at, a_row, 4, left, b + column * 4, wide * 4, count, to, c_row, add, then, ahead_step)
                else:
                    tile_wide(at, a_row, 4, left, b + column * 4, wide * 4, count, to, c_row, add, then, ahead_step)
        return
    for n in range(0, rows, 2 * TILE_ROWS):
        at, to, left, then = a + n * a_row, c + n * c_row, rows - n - 1, ahead + n * ahead_row
        if pairs:
            tile_narrow_pairs(at, a_row, 4, left, b, wide * 4, count, to, c_row, add, then, 2 * ahead_step)
        else:
            tile_narrow(at, a_row, 4, left, b, wide * 4, count, to, c_row, add, then, 2 * ahead_step)


# -- many tokens ------------------------------------------------------------------------------------------------------


@kernel("4q")
def multiply_packed(args, team, thread, threads):
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
def _hand_out(output, begin, end, first, last, products):
    """Products [features, tokens] of a block go to their rows, with bias and residual."""
    count = end - begin
    row = products + BLOCK * PRODUCT_ROW
    for token in range(first, last, NARROW):
        turned(products + (token - first) * 4, PRODUCT_ROW, (count + LANES - 1) // LANES * LANES, NARROW, row, BLOCK * 4)
        for m in range(token, min(last, token + NARROW)):
            _finish(output, m, begin, f32(row + (m - token) * BLOCK * 4, count))


@inline
def _finish(output, m, begin, products):
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
def multiply_few(args, team, thread, threads):
    """Products of few tokens, row by row of the weights. Arguments: a source; arithmetic, the number of outputs; outputs."""
    arithmetic, count = word(args, SOURCE_WORDS), word(args, SOURCE_WORDS + 1)
    tokens, width = word(args, COUNT), word(args, WIDTH)
    space, row_bytes = scratch(team, thread), prepared_row(width, arithmetic)
    for m in range(tokens):
        read_row(args, m, space + m * row_bytes)
        _prepare_row(space + m * row_bytes, width, arithmetic)
    room, room_row = space + tokens * row_bytes + 64, prepared_row(width, FLOAT32)
    outputs, base, chunk = args + 8 * (SOURCE_WORDS + 2), 0, next_chunk(team)
    for i in range(count):
        output = outputs + i * OUTPUT_WORDS * 8
        matrix = word(output, MATRIX)
        rows, per = word(matrix, ROWS), stream_rows(matrix)
        blocks = (rows + per - 1) // per
        while chunk - base < blocks:
            begin = (chunk - base) * per
            end = min(rows, begin + per)
            products = room + TOGETHER * room_row
            finished = products + (per + 1) * together(tokens) * 4
            multiply_rows(matrix, begin, end, space, row_bytes, tokens, arithmetic, room, products)
            for m in range(tokens):
                y, x = f32(finished, end - begin), f32(products, end - begin, together(tokens))
                for n in range(y.size):
                    y[n] = x[n, m]
                _finish(output, m, begin, y)
            chunk = next_chunk(team)
        base += blocks


@inline
def prepared_row(width, arithmetic):
    """Bytes from one row of prepared activations to the next, whole cache lines.

    No more than they need: rows of bf16 that lie as far apart as those of float32 would share half of the cache's sets.
    """
    size = 2 if PAIRS and arithmetic == BFLOAT16 else 4
    return ((width + 1) * size + 63) // 64 * 64


@inline
def stream_rows(matrix):
    """Rows that a thread takes at a time, where memory is the limit."""
    return min(MOST_ROWS, max(TOGETHER, STREAM // max(1, word(matrix, ROW_BYTES)) // TOGETHER * TOGETHER))


@inline
def together(tokens):
    """Numbers between the rows of `multiply_rows`'s products."""
    if tokens == 1:
        return 1
    return SEVERAL if tokens <= SEVERAL else (tokens + MORE - 1) // MORE * MORE


@inline
def multiply_rows(matrix, begin, end, x, x_row, tokens, arithmetic, room, out):
    """Rows begin..end of a matrix times few rows of prepared activations, `x_row` bytes apart.

    The products go to `out`, float32 [end - begin + 1, together(tokens)]; `room` has space for TOGETHER rows of float32.
    Two rows meet SEVERAL tokens at once, one of each half: each is read ahead of its use where no other lies on its page.
    """
    if tokens == 1:
        y = f32(out, end - begin)
        for n in range(begin, end):
            y[n - begin] = dot(matrix, n, x, arithmetic, room)
        return
    out_row = together(tokens) * 4
    if arithmetic == INT8:
        for n in range(begin, end):
            _multiply_integers(matrix, n, x, x_row, tokens, out + (n - begin) * out_row)
        return
    if tokens <= SEVERAL:
        width, half = word(matrix, COLUMNS), (end - begin + 1) // 2
        for n in range(begin, begin + half):
            last, to = 1 if n + half < end else 0, out + (n - begin) * out_row
            row, step = _ready(matrix, n, half, last, arithmetic, room)
            if PAIRS and arithmetic == BFLOAT16:
                dots_pairs(row, step, last, x, x_row, tokens - 1, width, to, half * out_row)
            else:
                dots_f32(row, step, last, x, x_row, tokens - 1, width, to, half * out_row)
        return
    for n in range(begin, end):
        row, step = _ready(matrix, n, 0, 0, arithmetic, room)
        _multiply_more(row, x, x_row, tokens, word(matrix, COLUMNS), arithmetic, out + (n - begin) * out_row)


@inline
def _multiply_more(row, x, x_row, tokens, width, arithmetic, out):
    """A row of weights, ready, times more than SEVERAL tokens."""
    for first in range(0, tokens, MORE):
        at, to, rest = x + first * x_row, out + 4 * first, tokens - first - 1
        if PAIRS and arithmetic == BFLOAT16:
            more_dots_pairs(row, 0, 0, at, x_row, rest, width, to, 0)
        else:
            more_dots_f32(row, 0, 0, at, x_row, rest, width, to, 0)


@inline
def dots(matrix, n, x, x_row, tokens, arithmetic, room, out):
    """`multiply_rows` of one row."""
    multiply_rows(matrix, n, n + 1, x, x_row, tokens, arithmetic, room, out)


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
    `room`; and how many bytes apart.
    """
    kind = word(matrix, FORMAT)
    if (kind == F32 and arithmetic != BFLOAT16) or (PAIRS and kind == BF16 and arithmetic == BFLOAT16):
        return row_at(matrix, n), step * word(matrix, ROW_BYTES)
    room_row = prepared_row(word(matrix, COLUMNS), FLOAT32)
    for i in range(last + 1):
        at = n + i * step
        fill_rows(matrix, at, at + 1, 0, word(matrix, COLUMNS), arithmetic == BFLOAT16, room + i * room_row, 0)
    return room, room_row


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
    row, _ = _ready(matrix, n, 0, 0, arithmetic, room)
    return dot_pairs(row, x, width) if PAIRS else dot_f32(row, x, width)
