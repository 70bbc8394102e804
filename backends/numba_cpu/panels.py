"""Panels: many tokens side by side, as tiles read them.

A panel is as wide as a tile or 16 tokens, [K, P] numbers of 32 bits, [K/2, P] pairs of bf16, or, where the CPU multiplies
bytes, groups of 8-bit activations (npllm.backends.numba_cpu.integer_tiles). A number of a weight, read where it lies, is
spread over a vector and meets as many tokens at once, so nothing of the weight needs to be packed.
"""

from __future__ import annotations

import numpy as np

from npllm.backends.numba_cpu.arithmetic import BFLOAT16, INT8, INTEGERS, before_panels, panelled, prepare_row
from npllm.backends.numba_cpu.emit import LANES
from npllm.backends.numba_cpu.integer_tiles import ROWS_OF_GROUP, quantise_columns
from npllm.backends.numba_cpu.integers import GROUP
from npllm.backends.numba_cpu.jit import PATH, inline, kernel
from npllm.backends.numba_cpu.memory import f32, word
from npllm.backends.numba_cpu.source import COUNT, FORM, PAIRS, SOURCE_WORDS, WIDTH, read_row
from npllm.backends.numba_cpu.team import SPARE, next_chunk, scratch
from npllm.backends.numba_cpu.vectors import turn

# Tokens of a narrow and of a wide panel, as wide as a tile.
TILE_WIDTH = PATH.tile[1] * LANES
NARROW = 16
WIDE = max(NARROW, TILE_WIDTH)


@inline
def steps_of(width, arithmetic):
    """Rows of a panel: a number of each token, or a pair, or what there is of a group."""
    if panelled(arithmetic) == INT8:
        return width // GROUP * ROWS_OF_GROUP
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
    panels, arithmetic = word(args, SOURCE_WORDS), word(args, SOURCE_WORDS + 1)
    tokens, width = word(args, COUNT), word(args, WIDTH)
    space = scratch(team, thread)
    row_bytes = (width + 1) * 4
    while True:
        begin = next_chunk(team) * NARROW
        if begin >= tokens:
            break
        for i in range(NARROW):
            place = space + i * row_bytes
            if begin + i < tokens:
                read_row(team, args, begin + i, place)
                prepare_row(team, place, width, before_panels(arithmetic))
            else:
                clear(place, width)
        pack_rows(space, row_bytes, width, arithmetic, panels, begin, tokens)


@inline
def pack_rows(space, row_bytes, width, arithmetic, panels, begin, tokens):
    """NARROW prepared rows at the beginning of a thread's scratch memory go to the panels, as tokens `begin`.. of them."""
    start, steps = begin // WIDE * WIDE, steps_of(width, arithmetic)
    wide = panel_width(start, tokens)
    panel = start if wide == WIDE else begin
    to = panels + panel * steps * 4 + (begin - panel) * 4
    if INTEGERS and arithmetic == INT8:
        for group in range(width // GROUP):
            turned(space + group * GROUP * 4, row_bytes, NARROW, GROUP, space + SPARE, NARROW * 4)
            quantise_columns(space + SPARE, NARROW * 4, NARROW, to + group * ROWS_OF_GROUP * wide * 4, wide * 4)
    else:
        turned(space, row_bytes, NARROW, steps, to, wide * 4)


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
