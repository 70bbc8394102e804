"""`linear`: products with the rows of stored matrices, for few tokens at the memory's speed, for many at the arithmetic's.

Several matrices that read the same input (q, k and v) are one kernel's work: an output list says what they are. Few tokens
meet every row of the weights by a dot product (npllm.backends.numba_cpu.dots); many are packed into panels
(npllm.backends.numba_cpu.panels, tiles).
"""

from __future__ import annotations

from npllm.backends.numba_cpu.arithmetic import FLOAT32, prepare_row
from npllm.backends.numba_cpu.dots import multiply_places, multiply_rows, prepared_row, together
from npllm.backends.numba_cpu.emit import LANES
from npllm.backends.numba_cpu.jit import inline, kernel
from npllm.backends.numba_cpu.matrix import COLUMNS, ROW_BYTES, ROWS
from npllm.backends.numba_cpu.memory import f32, word
from npllm.backends.numba_cpu.panels import NARROW, turned
from npllm.backends.numba_cpu.source import COUNT, FORM, SOURCE_WORDS, WIDTH, read_row
from npllm.backends.numba_cpu.team import next_chunk, scratch
from npllm.backends.numba_cpu.tiles import PRODUCT_ROW, TOKENS, WIDENED, multiply
from npllm.backends.numba_cpu.vectors import ABREAST, BLOCK, TOGETHER

# An output, OUTPUT_WORDS in a list: a matrix's description; where its product goes and how many bytes apart its rows are;
# bias [F], or 0; residual, in memory of its own, and how many bytes apart its rows are, or 0.
MATRIX, OUT, OUT_ROW, BIAS, RESIDUAL, RESIDUAL_ROW, OUTPUT_WORDS = range(7)

# Bytes of a place below which a stretch is not halved, where memory is the limit; and its rows at most, of several tokens.
LEAST_BYTES, MOST_ROWS = 1 << 13, 2048


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
                multiply(team, matrix, begin, end, panels, tokens, first, last, arithmetic, space + WIDENED, space)
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
    """Store the features from `begin` on of token m, with bias and residual."""
    _complete(output, m, begin, products)
    y = f32(word(output, OUT) + m * word(output, OUT_ROW) + begin * 4, products.size)
    for n in range(products.size):
        y[n] = products[n]


@inline
def _complete(output, m, begin, products):
    """Add bias and residual to the features from `begin` on of token m."""
    bias_at, residual_at = word(output, BIAS), word(output, RESIDUAL)
    if bias_at:
        bias = f32(bias_at + begin * 4, products.size)
        for n in range(products.size):
            products[n] += bias[n]
    if residual_at:
        residual = f32(residual_at + m * word(output, RESIDUAL_ROW) + begin * 4, products.size)
        for n in range(products.size):
            products[n] += residual[n]


# -- few tokens -------------------------------------------------------------------------------------------------------


@kernel(FORM + "2q")
def multiply_few(args, team, thread, threads):
    """Products of few tokens, row by row of the weights. Arguments: a source; arithmetic, the number of outputs; outputs."""
    arithmetic, count = word(args, SOURCE_WORDS), word(args, SOURCE_WORDS + 1)
    tokens, width = word(args, COUNT), word(args, WIDTH)
    space, row_bytes = scratch(team, thread), prepared_row(width, arithmetic)
    for m in range(tokens):
        read_row(team, args, m, space + m * row_bytes)
        prepare_row(team, space + m * row_bytes, width, arithmetic)
    places, dealt, chunk = ABREAST if tokens == 1 else 1, 0, next_chunk(team)
    for i in range(count):
        output = args + 8 * (SOURCE_WORDS + 2 + i * OUTPUT_WORDS)
        matrix, stop = word(output, MATRIX), 0
        rows = word(matrix, ROWS)
        apart = rows_of_place(rows, places, threads)
        while stop < apart:
            start, stop = stop, stretch_end(stop, apart, word(matrix, ROW_BYTES), rows if tokens == 1 else MOST_ROWS)
            while chunk - dealt < threads:
                begin, end = share(chunk - dealt, apart, places, rows)
                if begin + start < end and tokens == 1:
                    _meet_one(team, output, begin + start, end, apart, stop - start, space, row_bytes, arithmetic)
                elif begin + start < end:
                    _meet_some(team, output, begin + start, min(end, begin + stop), space, row_bytes, tokens, arithmetic)
                chunk = next_chunk(team)
            dealt += threads


# A matrix is dealt out in as many shares as there are threads. A share lies in places of `apart` rows, one after the other,
# so many that a token meets a row of each at once; several tokens have one place. A stretch is some rows of every place of
# every share: a chunk of work is that of one share. So each share is read from its beginning to its end, which memory likes,
# and the last chunks are small, so that no thread waits long for another.


@inline
def rows_of_place(rows, places, threads):
    return (rows + threads * places - 1) // (threads * places)


@inline
def share(number, apart, places, rows):
    """The rows begin..end of a share."""
    begin = min(rows, number * places * apart)
    return begin, min(rows, begin + places * apart)


@inline
def stretch_end(start, apart, row_bytes, most):
    """Where the stretch from row `start` of the places on ends: half of what is left of them, or `most` rows."""
    left, least = apart - start, LEAST_BYTES // max(1, row_bytes)
    half = left if left <= 2 * least else (left + 1) // 2
    return start + min(most, half)


@inline
def _meet_one(team, output, begin, end, apart, count, x, row_bytes, arithmetic):
    """Some rows in places, as `multiply_places` knows them, times one token, whose prepared activations lie at `x`."""
    out, room = word(output, OUT) + begin * 4, x + row_bytes + 64
    multiply_places(team, word(output, MATRIX), begin, end, apart, count, x, arithmetic, room, out, apart * 4)
    for first in range(begin, min(end, begin + ABREAST * apart), apart):
        _complete(output, 0, first, f32(word(output, OUT) + first * 4, min(count, end - first)))


@inline
def _meet_some(team, output, begin, end, x, row_bytes, tokens, arithmetic):
    """Rows begin..end times some tokens, whose prepared activations lie at `x`."""
    room, matrix = x + tokens * row_bytes + 64, word(output, MATRIX)
    products = room + TOGETHER * prepared_row(word(matrix, COLUMNS), FLOAT32)
    finished = products + (end - begin + 1) * together(tokens) * 4
    multiply_rows(team, matrix, begin, end, x, row_bytes, tokens, arithmetic, room, products)
    for m in range(tokens):
        y, product = f32(finished, end - begin), f32(products, end - begin, together(tokens))
        for n in range(y.size):
            y[n] = product[n, m]
        _finish(output, m, begin, y)
