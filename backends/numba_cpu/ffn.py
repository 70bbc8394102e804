"""`gated_ffn`: `residual + down(act(gate h) * up h)` with `h = norm(x)`; and `mlp`, the same without `up`.

Few tokens: some rows of `gate` and the same of `up` meet each token; `down` is a product like others.
Many: blocks of products [features, tokens] of both, still in the core's cache, become hidden features and are written
straight into the panels that `down` reads, of which a feature is a step.
"""

from __future__ import annotations

import numpy as np

from npllm.arrays import Array
from npllm.backend import Norm, accelerates
from npllm.backends.numba_cpu.activations import ACTIVATIONS, activate
from npllm.backends.numba_cpu.arithmetic import BFLOAT16, FLOAT32, INT8, INTEGERS, panelled, prepare_row
from npllm.backends.numba_cpu.base import at
from npllm.backends.numba_cpu.dots import multiply_places, multiply_rows, prepared_row, together
from npllm.backends.numba_cpu.integer_tiles import ROWS_OF_GROUP, quantise_columns
from npllm.backends.numba_cpu.integers import GROUP
from npllm.backends.numba_cpu.jit import inline, kernel
from npllm.backends.numba_cpu.linear import rows_of_place, share, stretch_end
from npllm.backends.numba_cpu.matrix import COLUMNS, ROW_BYTES, ROWS
from npllm.backends.numba_cpu.memory import f32, u32, word
from npllm.backends.numba_cpu.panels import NARROW, clear, pack, panel_bytes, panel_width, steps_of
from npllm.backends.numba_cpu.products import FEW, Products, unprepared
from npllm.backends.numba_cpu.source import COUNT, FORM, PAIRS, SOURCE_WORDS, WIDTH, bf16, read_row, rounded
from npllm.backends.numba_cpu.tape import entry
from npllm.backends.numba_cpu.team import next_chunk, scratch
from npllm.backends.numba_cpu.tiles import AFTER, PRODUCT_ROW, TOKENS, WIDENED, multiply
from npllm.backends.numba_cpu.vectors import ABREAST, BLOCK, TOGETHER
from npllm.weights import MLP, GatedFFN, Linear

# What hidden features are made by, HIDDEN_WORDS of a kernel's arguments: the products' arithmetic and the activation; gate
# and up as descriptions of matrices and biases, or 0. Without `up` they are `act(gate)`.
ARITHMETIC, ACT, GATE, GATE_BIAS, UP, UP_BIAS, HIDDEN_WORDS = range(7)

# Products of few tokens that are in memory at once.
AT_ONCE = 2048

# -- few tokens -------------------------------------------------------------------------------------------------------


@kernel(FORM + "8q")
def hidden_few(args, team, thread, threads):
    """Hidden features of few tokens. Arguments: a source; the words above; hidden [M, F], the bytes between its rows."""
    layer = args + 8 * SOURCE_WORDS
    hidden, hidden_row, arithmetic = word(layer, HIDDEN_WORDS), word(layer, HIDDEN_WORDS + 1), word(layer, ARITHMETIC)
    tokens, width, gate = word(args, COUNT), word(args, WIDTH), word(layer, GATE)
    space, row_bytes = scratch(team, thread), row_room(width)
    for m in range(tokens):
        read_row(team, args, m, space + m * row_bytes)
        prepare_row(team, space + m * row_bytes, width, arithmetic)
    rows, places, room = word(gate, ROWS), ABREAST if tokens == 1 else 1, space + tokens * row_bytes
    words = arithmetic, word(layer, ACT), gate, word(layer, GATE_BIAS), word(layer, UP), word(layer, UP_BIAS)
    apart = rows_of_place(rows, places, threads)
    dealt, chunk, stop = 0, next_chunk(team), 0
    while stop < apart:
        start, stop = stop, stretch_end(stop, apart, word(gate, ROW_BYTES), AT_ONCE // places)
        while chunk - dealt < threads:
            begin, end = share(chunk - dealt, apart, places, rows)
            to = hidden + (begin + start) * 4
            if begin + start < end and tokens == 1:
                _hidden_places(team, words, begin + start, end, apart, stop - start, space, room, to)
            elif begin + start < end:
                end = min(end, begin + stop)
                hidden_rows(team, words, begin + start, end, space, row_bytes, tokens, room, to, hidden_row)
            chunk = next_chunk(team)
        dealt += threads


@inline
def row_room(width):
    """Bytes for a row of prepared activations of any arithmetic."""
    return prepared_row(width, FLOAT32)


@inline
def hidden_rows(team, layer, begin, end, x, x_row, tokens, room, out, out_row):
    """Hidden features begin..end of some tokens whose prepared activations lie at `x`.

    `layer` are the words of HIDDEN_WORDS. Rows of `x` and of `out`, which takes the features of a token each, are so many
    bytes apart; `room` has space for TOGETHER more of `x`, and for AT_ONCE products.
    """
    gate, up, arithmetic, act = layer[GATE], layer[UP], layer[ARITHMETIC], layer[ACT]
    products, per = room + TOGETHER * row_room(word(gate, COLUMNS)), max(1, AT_ONCE // together(tokens))
    for first in range(begin, end, per):
        count, to = min(per, end - first), out + (first - begin) * 4
        if tokens == 1:
            apart = (count + ABREAST - 1) // ABREAST
            _hidden_places(team, layer, first, first + count, apart, apart, x, room, to)
            continue
        for part in range(2 if up else 1):
            matrix, bias = (up, layer[UP_BIAS]) if part else (gate, layer[GATE_BIAS])
            multiply_rows(team, matrix, first, first + count, x, x_row, tokens, arithmetic, room, products)
            for m in range(tokens):
                y, product = f32(to + m * out_row, count), f32(products, count, together(tokens))
                for i in range(count):
                    value = product[i, m] + bias_of(bias, first + i)
                    y[i] = y[i] * value if part else value
                if part == 0:
                    activate(team, act, to + m * out_row, count)


@inline
def _hidden_places(team, layer, begin, end, apart, count, x, room, out):
    """Hidden features of one token, in places, as `multiply_places` knows them, of AT_ONCE in all at most."""
    gate, up, arithmetic, act = layer[GATE], layer[UP], layer[ARITHMETIC], layer[ACT]
    products = room + row_room(word(gate, COLUMNS))
    multiply_places(team, gate, begin, end, apart, count, x, arithmetic, room, out, apart * 4)
    if up:
        multiply_places(team, up, begin, end, apart, count, x, arithmetic, room, products, count * 4)
    for place in range(ABREAST):
        first = begin + place * apart
        if first >= end:
            break
        at, product = out + place * apart * 4, f32(products + place * count * 4, count)
        y = f32(at, min(count, end - first))
        for i in range(y.size):
            y[i] += bias_of(layer[GATE_BIAS], first + i)
        activate(team, act, at, y.size)
        if up:
            for i in range(y.size):
                y[i] *= product[i] + bias_of(layer[UP_BIAS], first + i)


@inline
def bias_of(bias, n):
    return f32(bias + n * 4, 1)[0] if bias else np.float32(0)


# -- many tokens ------------------------------------------------------------------------------------------------------


@kernel("10q")
def hidden_packed(args, team, thread, threads):
    """Hidden features of packed tokens, packed. Arguments: the words above; panels, tokens; panels of the hidden features,
    and the arithmetic that they are prepared for.
    """
    panels, tokens = word(args, HIDDEN_WORDS), word(args, HIDDEN_WORDS + 1)
    hidden, prepared = word(args, HIDDEN_WORDS + 2), word(args, HIDDEN_WORDS + 3)
    gate, up, biases = word(args, GATE), word(args, UP), (word(args, GATE_BIAS), word(args, UP_BIAS))
    layer = word(args, ARITHMETIC), word(args, ACT), gate, biases[0], up, biases[1]
    rows, per = word(gate, ROWS), features_of(prepared)
    while True:
        begin = next_chunk(team) * per
        if begin >= rows:
            break
        hidden_panels(team, thread, layer, begin, min(rows, begin + per), panels, tokens, hidden, rows, prepared)


@inline
def features_of(prepared):
    """Hidden features that a thread takes at a time: whole groups, where they are quantised."""
    return 2 * BLOCK if panelled(prepared) == INT8 else BLOCK


@inline
def hidden_panels(team, thread, layer, begin, end, panels, tokens, hidden, rows, prepared):
    """Features begin..end (at most `features_of`) of `rows`, of all tokens, from their panels to those at `hidden`.

    `layer` are the words of HIDDEN_WORDS.
    """
    space = scratch(team, thread)
    for first in range(0, tokens, TOKENS):
        last = min(tokens, first + TOKENS)
        for n in range(begin, end, BLOCK):
            block = space + (n - begin) * PRODUCT_ROW
            _hidden_block(team, layer, n, min(end, n + BLOCK), panels, tokens, first, last, space, block)
        _store_hidden(space, begin, end, first, last, tokens, hidden, steps_of(rows, prepared), panelled(prepared))


@inline
def _hidden_block(team, layer, begin, end, panels, tokens, first, last, space, block):
    """Features begin..end of tokens first..last as [BLOCK, TOKENS] at `block`."""
    count, arithmetic = last - first, layer[ARITHMETIC]
    for part in range(2 if layer[UP] else 1):
        matrix, bias_at = (layer[UP], layer[UP_BIAS]) if part else (layer[GATE], layer[GATE_BIAS])
        products = space + AFTER if part else block
        multiply(team, matrix, begin, end, panels, tokens, first, last, arithmetic, space + WIDENED, products)
        for n in range(begin, end):
            place, bias = products + (n - begin) * PRODUCT_ROW, bias_of(bias_at, n)
            y, gated = f32(place, count), f32(block + (n - begin) * PRODUCT_ROW, count)
            for i in range(count):
                y[i] += bias
            if part:
                for i in range(count):
                    gated[i] *= y[i]
            else:
                activate(team, layer[ACT], place, count)


@inline
def _store_hidden(block, begin, end, first, last, tokens, hidden, steps, arithmetic):
    """Features [features, tokens] go to the panels at `hidden`, `steps` rows each; begin is even."""
    if (end - begin) % 2:
        clear(block + (end - begin) * PRODUCT_ROW, last - first + NARROW)
    token = first
    while token < last:
        wide = panel_width(token, tokens)
        _store_columns(block + (token - first) * 4, begin, end, hidden + token * steps * 4, wide, arithmetic)
        token += wide


@inline
def _store_columns(block, begin, end, panel, wide, arithmetic):
    if INTEGERS and arithmetic == INT8:
        for n in range(begin, end, GROUP):
            to = panel + n // GROUP * ROWS_OF_GROUP * wide * 4
            quantise_columns(block + (n - begin) * PRODUCT_ROW, PRODUCT_ROW, wide, to, wide * 4)
        return
    if PAIRS and arithmetic == BFLOAT16:
        for n in range(0, end - begin, 2):
            low, high = f32(block + n * PRODUCT_ROW, wide), f32(block + (n + 1) * PRODUCT_ROW, wide)
            pairs = u32(panel + (begin + n) // 2 * wide * 4, wide)
            for i in range(wide):
                pairs[i] = bf16(low[i]) | (bf16(high[i]) << np.uint32(16))
        return
    for n in range(end - begin):
        x, y = f32(block + n * PRODUCT_ROW, wide), f32(panel + (begin + n) * wide * 4, wide)
        if arithmetic == BFLOAT16:
            for i in range(wide):
                y[i] = rounded(x[i])
        else:
            for i in range(wide):
                y[i] = x[i]


# -- the operations ---------------------------------------------------------------------------------------------------


class FeedForward(Products):
    """Feed-forward layers."""

    @accelerates(lambda self, x_MD, w, act, norm=None, residual_MD=None: unprepared(self, *w))
    def gated_ffn(
        self, x_MD: Array, w: GatedFFN, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None
    ) -> Array:
        return self._feed_forward(x_MD, w.gate_proj, w.up_proj, w.down_proj, act, norm, residual_MD)

    @accelerates(lambda self, x_MD, w, act, norm=None, residual_MD=None: unprepared(self, *w))
    def mlp(self, x_MD: Array, w: MLP, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None) -> Array:
        return self._feed_forward(x_MD, w.c_fc, None, w.c_proj, act, norm, residual_MD)

    def _feed_forward(
        self, x_MD: Array, gate: Linear, up: Linear | None, down: Linear, act: str, norm: Norm | None,
        residual_MD: Array | None,
    ) -> Array:  # fmt: skip
        x_MD, (F, D) = self.plain(x_MD), gate.weight.shape
        arithmetic, second = self.shared([gate, up] if up else [gate]), self.shared([down])
        upper = (up.weight.address, at(up.bias)) if up else (0, 0)
        layer = (arithmetic, ACTIVATIONS[act], gate.weight.address, at(gate.bias), *upper)
        if len(x_MD) <= FEW:
            hidden_MF = self.empty(len(x_MD), F)
            if len(x_MD):
                self.run(entry(hidden_few, *self.source(x_MD, norm), *layer, at(hidden_MF), hidden_MF.strides[0]))
            return self.multiply(hidden_MF, [down], residual_MF=residual_MD)[0]
        panels, hidden = self.room(panel_bytes(len(x_MD), D)), self.room(panel_bytes(len(x_MD), F))
        self.run(
            entry(pack, *self.source(x_MD, norm), at(panels), arithmetic),
            entry(hidden_packed, *layer, at(panels), len(x_MD), at(hidden), second),
        )
        return self.multiply_panels(hidden, len(x_MD), [down], residual_MD, second)[0]
