"""`linear`: products with the rows of stored matrices, for few tokens at the memory's speed, for many at the arithmetic's.

Several matrices that read the same input (q, k and v) are one kernel's work: an output list says what they are. Few tokens
meet every row of the weights by a dot product (npllm.backends.numba_cpu.dots); many are packed into panels
(npllm.backends.numba_cpu.panels, tiles).
"""

from __future__ import annotations

from npllm.backends.numba_cpu.arithmetic import FLOAT32, prepare_row
from npllm.backends.numba_cpu.dots import multiply_rows, prepared_row, together
from npllm.backends.numba_cpu.jit import inline, kernel
from npllm.backends.numba_cpu.matrix import ROW_BYTES, ROWS
from npllm.backends.numba_cpu.memory import f32, word
from npllm.backends.numba_cpu.panels import NARROW, turned
from npllm.backends.numba_cpu.source import COUNT, FORM, SOURCE_WORDS, WIDTH, read_row
from npllm.backends.numba_cpu.team import next_chunk, scratch
from npllm.backends.numba_cpu.tiles import PRODUCT_ROW, TOKENS, WIDENED, multiply
from npllm.backends.numba_cpu.vectors import ABREAST, BLOCK, LANES, TOGETHER

# An output, OUTPUT_WORDS in a list: a matrix's description; where its product goes and how many bytes apart its rows are;
# bias [F], or 0; residual and how many bytes apart its rows are, or 0.
MATRIX, OUT, OUT_ROW, BIAS, RESIDUAL, RESIDUAL_ROW, OUTPUT_WORDS = range(7)

# Bytes of weights, and rows, that a thread takes at a time at most where memory is the limit; and the parts at least, for
# each thread, that a matrix then has, so that none waits long for another.
STREAM, MOST_ROWS, SHARES = 1 << 19, 2048, 2


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
        prepare_row(space + m * row_bytes, width, arithmetic)
    room, room_row = space + tokens * row_bytes + 64, prepared_row(width, FLOAT32)
    outputs, base, chunk = args + 8 * (SOURCE_WORDS + 2), 0, next_chunk(team)
    for i in range(count):
        output = outputs + i * OUTPUT_WORDS * 8
        matrix = word(output, MATRIX)
        rows, per = word(matrix, ROWS), stream_rows(matrix, threads)
        blocks = (rows + per - 1) // per
        while chunk - base < blocks:
            begin = (chunk - base) * per
            end = min(rows, begin + per)
            products = room + TOGETHER * room_row
            finished = products + (per + 1) * together(tokens) * 4
            multiply_rows(team, matrix, begin, end, space, row_bytes, tokens, arithmetic, room, products)
            for m in range(tokens):
                y, x = f32(finished, end - begin), f32(products, end - begin, together(tokens))
                for n in range(y.size):
                    y[n] = x[n, m]
                _finish(output, m, begin, y)
            chunk = next_chunk(team)
        base += blocks


@inline
def stream_rows(matrix, threads):
    """Rows that a thread takes at a time, where memory is the limit."""
    fitting, share = STREAM // max(1, word(matrix, ROW_BYTES)), word(matrix, ROWS) // (SHARES * threads)
    return max(ABREAST, min(MOST_ROWS, fitting, share) // ABREAST * ABREAST)
