"""Products of many tokens: a block of rows of a matrix meets panel after panel.

Only formats that no instruction multiplies are widened, a block of rows at a time. While a block meets one panel, the next
is fetched: panels are read anew for each block, and come from far.
"""

from __future__ import annotations

from npllm.backends.numba_cpu.arithmetic import BFLOAT16, FLOAT32, INT8, INTEGERS, panelled
from npllm.backends.numba_cpu.integer_tiles import (
    Q4_BYTES,
    Q8_BYTES,
    ROWS_OF_GROUP,
    TILE,
    tile_narrow_q4,
    tile_narrow_q8,
    tile_wide_q4,
    tile_wide_q8,
    widen_groups_q4,
    widen_groups_q8,
)
from npllm.backends.numba_cpu.integers import GROUP
from npllm.backends.numba_cpu.jit import PATH, inline
from npllm.backends.numba_cpu.matrix import BF16, COLUMNS, DATA, F32, FORMAT, Q8, ROW_BYTES
from npllm.backends.numba_cpu.memory import word
from npllm.backends.numba_cpu.panels import NARROW, TILE_WIDTH, WIDE, panel_width, steps_of
from npllm.backends.numba_cpu.rows import factors_at, fill_rows, row_at
from npllm.backends.numba_cpu.source import PAIRS
from npllm.backends.numba_cpu.team import called
from npllm.backends.numba_cpu.vectors import BLOCK, tile_narrow, tile_narrow_pairs, tile_wide, tile_wide_pairs

# The height of the tiles.
TILE_ROWS, INTEGER_ROWS = PATH.tile[0], TILE[0]

# Of a BLOCK of rows of weights, numbers (or pairs, or groups) at a time, and tokens: what meets stays in a core's cache.
STEPS, GROUPS, TOKENS = PATH.steps, PATH.steps // 32, 512

# Bytes between the rows of a block of products: not a power of two, or they would fall into a few sets of the cache.
PRODUCT_ROW = 4 * TOKENS + 64

# Where a thread's scratch memory holds products of two blocks, a block of widened weights, and what comes after.
PRODUCTS, WIDENED = 0, 2 * BLOCK * PRODUCT_ROW
AFTER = WIDENED + BLOCK * max(STEPS * 4, GROUPS * max(Q8_BYTES, Q4_BYTES) // INTEGER_ROWS) + 64


@called
def multiply(team, matrix, begin, end, panels, tokens, first, last, given, space, out):
    """Rows begin..end of a matrix (at most BLOCK) times tokens first..last of the panels (at most TOKENS).

    `given` is the products' arithmetic. `out` takes them as [BLOCK, TOKENS] float32 with rows PRODUCT_ROW bytes apart;
    `space` holds a block of widened weights.
    """
    arithmetic = panelled(given)
    if INTEGERS and arithmetic == INT8:
        _multiply_groups(matrix, begin, end, panels, tokens, first, last, space, out)
        return
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
            stop = min(width, (step + count) * per)
            fill_rows(team, matrix, begin, end, step * per, stop, arithmetic == BFLOAT16, space, a_row)
        token = first
        while token < last:
            wide, to = panel_width(token, tokens), out + (token - first) * 4
            b = panels + token * steps * 4 + step * wide * 4
            if direct and token == first:
                ahead, ahead_row, ahead_step = a + TILE_ROWS * a_row, a_row, 4 * TILE_ROWS
            else:
                ahead = _next_panel(panels, tokens, token + wide, first, last, steps, step, count)
                ahead_row, ahead_step = count * wide * 4 // BLOCK, wide * 4 * TILE_ROWS // BLOCK
            # A narrow tile has twice as many rows.
            ahead_step, rows = ahead_step if wide == WIDE else 2 * ahead_step, end - begin
            spread(team, a, a_row, 4, rows, b, wide, count, to, PRODUCT_ROW, step, pairs, ahead, ahead_row, ahead_step)
            token += wide


@inline
def _multiply_groups(matrix, begin, end, panels, tokens, first, last, space, out):
    """The same in integers."""
    q8, groups = word(matrix, FORMAT) == Q8, word(matrix, COLUMNS) // GROUP
    tile, steps = GROUPS * (Q8_BYTES if q8 else Q4_BYTES), groups * ROWS_OF_GROUP
    for group in range(0, groups, GROUPS):
        count = min(GROUPS, groups - group)
        for n in range(begin, end):
            factors, row = factors_at(matrix, n) + 2 * group, n - begin
            place = space + row // INTEGER_ROWS * tile + row % INTEGER_ROWS * 4
            if q8:
                widen_groups_q8(row_at(matrix, n) + group * GROUP, factors, count, place)
            else:
                widen_groups_q4(row_at(matrix, n) + group * GROUP // 2, factors, count, place)
        token, step, rows = first, group * ROWS_OF_GROUP, count * ROWS_OF_GROUP
        while token < last:
            wide = panel_width(token, tokens)
            b, to = panels + (token * steps + step * wide) * 4, out + (token - first) * 4
            ahead = _next_panel(panels, tokens, token + wide, first, last, steps, step, rows)
            _multiply_integer_panel(q8, space, tile, end - begin, b, wide, count, to, group, ahead)
            token += wide


@inline
def _multiply_integer_panel(q8, a, a_tile, rows, b, wide, count, c, add, ahead):
    """One panel; `ahead` is the next."""
    tiles = 1 if wide == WIDE else 2
    ahead_row = count * ROWS_OF_GROUP * wide * 4 // BLOCK
    ahead_step = ROWS_OF_GROUP * wide * 4 * tiles * INTEGER_ROWS // BLOCK
    for i in range(0, (rows + INTEGER_ROWS - 1) // INTEGER_ROWS, tiles):
        n = i * INTEGER_ROWS
        at, to, then = a + i * a_tile, c + n * PRODUCT_ROW, ahead + n * ahead_row
        if wide == WIDE:
            for column in range(0, WIDE, TILE_WIDTH):
                x, y = b + column * 4, to + column * 4
                if q8:
                    tile_wide_q8(at, a_tile, x, wide * 4, count, y, PRODUCT_ROW, add, then, ahead_step)
                else:
                    tile_wide_q4(at, a_tile, x, wide * 4, count, y, PRODUCT_ROW, add, then, ahead_step)
        elif q8:
            tile_narrow_q8(at, a_tile, b, wide * 4, count, to, PRODUCT_ROW, add, then, ahead_step)
        else:
            tile_narrow_q4(at, a_tile, b, wide * 4, count, to, PRODUCT_ROW, add, then, ahead_step)


@inline
def _next_panel(panels, tokens, token, first, last, steps, step, count):
    """Where the numbers lie that a block of rows meets next: those of the next tokens, or the first ones' next numbers."""
    if token >= last:
        token, step = first, step + count
    return panels + (token * steps + step * panel_width(token, tokens)) * 4


@called
def spread(team, a, a_row, a_step, rows, b, wide, count, c, c_row, add, pairs, ahead, ahead_row, ahead_step):
    """c[rows, wide] (+)= a[rows, count] b[count, wide]: the numbers of `a` are spread over the lanes of a panel.

    They lie at `a + row a_row + step a_step`; with `pairs` those of both are pairs of bf16. Up to 2 TILE_ROWS - 1 rows may
    be written behind the last of c. Meanwhile what comes next is fetched: from `ahead`, so many bytes on for each row, and
    for each step of a tile.
    """
    row = wide * 4
    if wide == WIDE or TILE_WIDTH <= NARROW:
        for column in range(0, row, TILE_WIDTH * 4):
            for n in range(0, rows, TILE_ROWS):
                at, to, last, then = a + n * a_row, c + n * c_row + column, rows - n - 1, ahead + n * ahead_row
                if PAIRS and pairs:
                    tile_wide_pairs(at, a_row, a_step, last, b + column, row, count, to, c_row, add, then, ahead_step)
                else:
                    tile_wide(at, a_row, a_step, last, b + column, row, count, to, c_row, add, then, ahead_step)
        return
    for n in range(0, rows, 2 * TILE_ROWS):
        at, to, last, then = a + n * a_row, c + n * c_row, rows - n - 1, ahead + n * ahead_row
        if PAIRS and pairs:
            tile_narrow_pairs(at, a_row, a_step, last, b, row, count, to, c_row, add, then, ahead_step)
        else:
            tile_narrow(at, a_row, a_step, last, b, row, count, to, c_row, add, then, ahead_step)
