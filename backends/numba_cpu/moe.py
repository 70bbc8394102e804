"""`moe`: each token's chosen experts, gated feed-forward layers of one shape, and the weighted sum of what they say.

First the choices are sorted by expert, a short list that all that follows goes by: nothing outside the kernels depends on
what was chosen, and experts without tokens cost nothing. Few tokens: the rows of an expert meet each of its tokens, and a
block of rows of all experts' `down` is summed in the order of the choices. Many: tokens are gathered into panels, expert by
expert, and blocks of all experts are dealt out together, as npllm.backends.numba_cpu.ffn does for one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import accelerates
from npllm.backends.numba_cpu.activations import ACTIVATIONS
from npllm.backends.numba_cpu.arithmetic import FLOAT32, before_panels, prepare_row
from npllm.backends.numba_cpu.base import Base, at
from npllm.backends.numba_cpu.dots import multiply_rows, together
from npllm.backends.numba_cpu.emit import LANES
from npllm.backends.numba_cpu.ffn import AT_ONCE, features_of, hidden_panels, hidden_rows, row_room
from npllm.backends.numba_cpu.jit import inline, kernel
from npllm.backends.numba_cpu.matrix import ROW_BYTES, ROWS
from npllm.backends.numba_cpu.memory import f32, i64, word
from npllm.backends.numba_cpu.norms import Norms
from npllm.backends.numba_cpu.panels import NARROW, WIDE, clear, pack_rows, steps_of, turned
from npllm.backends.numba_cpu.products import FEW, Products, too_wide
from npllm.backends.numba_cpu.stack import Matrices
from npllm.backends.numba_cpu.tape import entry
from npllm.backends.numba_cpu.team import SCRATCH_BYTES, next_chunk, scratch
from npllm.backends.numba_cpu.tiles import PRODUCT_ROW, TOKENS, WIDENED, multiply
from npllm.backends.numba_cpu.vectors import ABREAST, BLOCK, TOGETHER
from npllm.weights import Experts

# What all kernels here begin with, MIXTURE_WORDS: x [M, D], M, C, E, D, F; the choices' indices, int64, and their weights
# [M, C], and whether these go to the input; tables of gate, up and down; the arithmetic of gate and up, that of down; the
# activation; the plan; the hidden features; what the experts say, [M C, D], where tokens are many; the result [M, D].
(X, TOKENS_M, CHOICES, EXPERTS, WIDTH, FEATURES, INDEX, WEIGHT, ON_INPUT, GATES, UPS, DOWNS, FIRST, SECOND, ACT, PLAN,
 PANELS, HIDDEN, SAID, RESULT, MIXTURE_WORDS) = range(21)  # fmt: skip
MIXTURE = f"{MIXTURE_WORDS}q"

# The plan, int64: how many experts have tokens; then of each of them, four numbers; then the choices (m C + c), expert by
# expert. Of an expert: its number, where its choices begin among them, how many, and in which column of the panels.
EXPERT, BEGIN, COUNT, COLUMN, PLANNED = range(5)

# Rows of `down` of each expert that a thread takes at a time, where tokens are few.
SAID_ROWS = 48

# Bytes of `gate` that a thread takes at a time at most; and the parts at least, for each thread, that it has.
STREAM, SHARES = 1 << 19, 2

# Choices whose panels and results are in memory at a time.
SLAB = 1 << 13


@kernel(MIXTURE)
def plan(args, team, thread, threads):
    """Sort choices by expert; numbers that are none of an expert's are left out. One thread does it."""
    if thread:
        return
    E, count = word(args, EXPERTS), word(args, TOKENS_M) * word(args, CHOICES)
    index, planned = i64(word(args, INDEX), count), i64(word(args, PLAN), 1 + PLANNED * E + count)
    places = i64(scratch(team, thread), E)
    for e in range(E):
        places[e] = 0
    for i in range(count):
        if 0 <= index[i] < E:
            places[index[i]] += 1
    active, begin, column = 0, 0, 0
    for e in range(E):
        of = places[e]
        places[e] = begin
        if of:
            each = planned[1 + PLANNED * active :]
            each[EXPERT], each[BEGIN], each[COUNT], each[COLUMN] = e, begin, of, column
            active, begin, column = active + 1, begin + of, column + columns_of(of)
    planned[0] = active
    order = planned[1 + PLANNED * E :]
    for i in range(count):
        if 0 <= index[i] < E:
            order[places[index[i]]] = i
            places[index[i]] += 1


@inline
def columns_of(count):
    """Columns of the panels of so many tokens: more than half a wide panel is a whole one, whose tiles are faster."""
    rest = count % WIDE
    return count - rest + (WIDE if 2 * rest > WIDE else (rest + NARROW - 1) // NARROW * NARROW)


def plan_words(choices: int, experts: int) -> int:
    return 1 + PLANNED * experts + choices


def most_columns(choices: int, experts: int) -> int:
    """Columns that the panels of all experts take at most."""
    return choices + (max(NARROW, WIDE // 2) - 1) * min(choices, experts)


@inline
def read_choice(team, args, choice, arithmetic, out):
    """What an expert reads for a choice: its token, prepared for the arithmetic."""
    width = word(args, WIDTH)
    x, y = f32(word(args, X) + choice // word(args, CHOICES) * width * 4, width), f32(out, width)
    factor = f32(word(args, WEIGHT) + choice * 4, 1)[0] if word(args, ON_INPUT) else np.float32(1)
    for k in range(width):
        y[k] = x[k] * factor
    prepare_row(team, out, width, arithmetic)


@inline
def layer_of(args, expert):
    """An expert's gate and up, as npllm.backends.numba_cpu.ffn knows them."""
    return word(args, FIRST), word(args, ACT), word(word(args, GATES), expert), 0, word(word(args, UPS), expert), 0


@inline
def output_weight(args, choice):
    return np.float32(1) if word(args, ON_INPUT) else f32(word(args, WEIGHT) + choice * 4, 1)[0]


# -- few tokens -------------------------------------------------------------------------------------------------------


@kernel(MIXTURE)
def hidden_of_few(args, team, thread, threads):
    """Hidden features [M C, F] of few tokens."""
    E, F, planned, space = word(args, EXPERTS), word(args, FEATURES), word(args, PLAN), scratch(team, thread)
    row_bytes, order = row_room(word(args, WIDTH)), planned + 8 * (1 + PLANNED * E)
    per = _features_at_once(word(word(args, GATES), 0), threads) if E else 1
    blocks, seen = (F + per - 1) // per, -1
    while True:
        chunk = next_chunk(team)
        if chunk // blocks >= word(planned, 0):
            break
        each, begin = planned + 8 * (1 + chunk // blocks * PLANNED), chunk % blocks * per
        expert, count, choices = word(each, EXPERT), word(each, COUNT), order + 8 * word(each, BEGIN)
        if seen != expert:
            for i in range(count):
                read_choice(team, args, word(choices, i), word(args, FIRST), space + i * row_bytes)
            seen = expert
        to, end = word(args, HIDDEN) + (word(each, BEGIN) * F + begin) * 4, min(F, begin + per)
        hidden_rows(team, layer_of(args, expert), begin, end, space, row_bytes, count, space + count * row_bytes, to, F * 4)


@inline
def _features_at_once(gate, threads):
    """Hidden features of an expert that a thread takes at a time: at most STREAM bytes, or a share of all."""
    fitting, share = STREAM // max(1, word(gate, ROW_BYTES)), word(gate, ROWS) // (SHARES * threads)
    return max(ABREAST, min(AT_ONCE, fitting, share) // ABREAST * ABREAST)


@kernel(MIXTURE)
def say_few(args, team, thread, threads):
    """The weighted sums of few tokens, by blocks of rows of `down` of all their experts."""
    F, D, planned = word(args, FEATURES), word(args, WIDTH), word(args, PLAN)
    active, count = word(planned, 0), word(args, TOKENS_M) * word(args, CHOICES)
    hidden, row_bytes = scratch(team, thread), row_room(F)
    said = hidden + count * row_bytes
    per = min(D, SAID_ROWS)
    for i in range(count):
        _prepare_hidden(team, args, i, hidden + i * row_bytes)
    while True:
        begin = next_chunk(team) * per
        if begin >= D:
            break
        end = min(D, begin + per)
        clear(said, count * per)
        for i in range(active):
            each = planned + 8 * (1 + i * PLANNED)
            _say(team, args, each, begin, end, hidden + word(each, BEGIN) * row_bytes, row_bytes, said, per)
        _sum(args, begin, end, said, per * 4)


@inline
def _prepare_hidden(team, args, place, out):
    F = word(args, FEATURES)
    x, y = f32(word(args, HIDDEN) + place * F * 4, F), f32(out, F)
    for k in range(F):
        y[k] = x[k]
    prepare_row(team, out, F, word(args, SECOND))


@inline
def _say(team, args, each, begin, end, hidden, row_bytes, said, per):
    """Rows begin..end of one expert's `down` times the hidden features of its choices."""
    choices = word(args, PLAN) + 8 * (1 + PLANNED * word(args, EXPERTS) + word(each, BEGIN))
    down, room = word(word(args, DOWNS), word(each, EXPERT)), said + word(args, TOKENS_M) * word(args, CHOICES) * per * 4
    count, products = word(each, COUNT), room + TOGETHER * row_bytes
    multiply_rows(team, down, begin, end, hidden, row_bytes, count, word(args, SECOND), room, products)
    for i in range(count):
        x, y = f32(products, end - begin, together(count)), f32(said + word(choices, i) * per * 4, per)
        for n in range(end - begin):
            y[n] = x[n, i]


@inline
def _sum(args, begin, end, said, row):
    """Columns begin..end of all tokens' results: what was said, weighted, in the order of the choices."""
    C, D = word(args, CHOICES), word(args, WIDTH)
    for m in range(word(args, TOKENS_M)):
        _sum_token(args, m, f32(word(args, RESULT) + (m * D + begin) * 4, end - begin), said + m * C * row, row)


@inline
def _sum_token(args, m, y, said, row):
    C = word(args, CHOICES)
    for n in range(y.size):
        y[n] = np.float32(0)
    for c in range(C):
        x, weight = f32(said + c * row, y.size), output_weight(args, m * C + c)
        for n in range(y.size):
            y[n] += x[n] * weight


# -- many tokens ------------------------------------------------------------------------------------------------------


@kernel(MIXTURE)
def gather(args, team, thread, threads):
    """The panels of each expert's tokens."""
    E, planned, width = word(args, EXPERTS), word(args, PLAN), word(args, WIDTH)
    arithmetic, row_bytes, space = word(args, FIRST), row_room(width), scratch(team, thread)
    column_bytes = steps_of(width, arithmetic) * 4
    order, base, chunk = planned + 8 * (1 + PLANNED * E), 0, next_chunk(team)
    for i in range(word(planned, 0)):
        each = planned + 8 * (1 + i * PLANNED)
        count, choices = word(each, COUNT), order + 8 * word(each, BEGIN)
        columns = columns_of(count)
        groups = columns // NARROW
        while chunk - base < groups:
            begin = (chunk - base) * NARROW
            for j in range(NARROW):
                if begin + j < count:
                    read_choice(team, args, word(choices, begin + j), before_panels(arithmetic), space + j * row_bytes)
                else:
                    clear(space + j * row_bytes, width)
            panels = word(args, PANELS) + word(each, COLUMN) * column_bytes
            pack_rows(space, row_bytes, width, arithmetic, panels, begin, columns)
            chunk = next_chunk(team)
        base += groups


@kernel(MIXTURE)
def hidden_of_many(args, team, thread, threads):
    """Hidden features of gathered tokens, in panels again."""
    F, planned, prepared = word(args, FEATURES), word(args, PLAN), word(args, SECOND)
    into, steps, per = steps_of(word(args, WIDTH), word(args, FIRST)), steps_of(F, prepared), features_of(prepared)
    blocks = (F + per - 1) // per
    while True:
        chunk = next_chunk(team)
        if chunk // blocks >= word(planned, 0):
            break
        each, begin = planned + 8 * (1 + chunk // blocks * PLANNED), chunk % blocks * per
        panels = word(args, PANELS) + word(each, COLUMN) * into * 4
        hidden = word(args, HIDDEN) + word(each, COLUMN) * steps * 4
        layer, columns = layer_of(args, word(each, EXPERT)), columns_of(word(each, COUNT))
        hidden_panels(team, thread, layer, begin, min(F, begin + per), panels, columns, hidden, F, prepared)


@kernel(MIXTURE)
def say_many(args, team, thread, threads):
    """What each expert says for its choices [M C, D]."""
    D, planned, arithmetic = word(args, WIDTH), word(args, PLAN), word(args, SECOND)
    steps, space, blocks = steps_of(word(args, FEATURES), arithmetic), scratch(team, thread), (D + BLOCK - 1) // BLOCK
    while True:
        chunk = next_chunk(team)
        if chunk // blocks >= word(planned, 0):
            break
        each, begin = planned + 8 * (1 + chunk // blocks * PLANNED), chunk % blocks * BLOCK
        count, end, down = word(each, COUNT), min(D, begin + BLOCK), word(word(args, DOWNS), word(each, EXPERT))
        hidden = word(args, HIDDEN) + word(each, COLUMN) * steps * 4
        for first in range(0, count, TOKENS):
            last = min(count, first + TOKENS)
            room = space + WIDENED
            multiply(team, down, begin, end, hidden, columns_of(count), first, last, arithmetic, room, space)
            _hand_back(args, each, begin, end, first, last, space)


@inline
def _hand_back(args, each, begin, end, first, last, products):
    """Products [features, choices] go to their choices' rows."""
    D, rows = word(args, WIDTH), products + BLOCK * PRODUCT_ROW
    choices = word(args, PLAN) + 8 * (1 + PLANNED * word(args, EXPERTS) + word(each, BEGIN))
    features = (end - begin + LANES - 1) // LANES * LANES
    for i in range(first, last, NARROW):
        turned(products + (i - first) * 4, PRODUCT_ROW, features, NARROW, rows, BLOCK * 4)
        for j in range(i, min(last, i + NARROW)):
            x = f32(rows + (j - i) * BLOCK * 4, end - begin)
            y = f32(word(args, SAID) + (word(choices, j) * D + begin) * 4, end - begin)
            for n in range(x.size):
                y[n] = x[n]


@kernel(MIXTURE)
def sum_many(args, team, thread, threads):
    """The weighted sums of what was said."""
    M, C, D = word(args, TOKENS_M), word(args, CHOICES), word(args, WIDTH)
    while True:
        m = next_chunk(team)
        if m >= M:
            break
        _sum_token(args, m, f32(word(args, RESULT) + m * D * 4, D), word(args, SAID) + m * C * D * 4, D * 4)


# -- the operation ----------------------------------------------------------------------------------------------------


def not_experts(be: Base, w: Experts) -> str | None:
    """Why kernels cannot compute with these."""
    if be.dtype == "float64":
        return "kernels compute in float32 and bfloat16"
    if not all(isinstance(part.weight, Matrices) and part.bias is None for part in w):
        return "the experts were not prepared by this backend, or have biases"
    return too_wide(*(each for part in w for each in part.weight[:1]))


class Mixtures(Norms, Products):
    """Mixtures of experts."""

    @accelerates(lambda self, x_MD, w, index_MC, weight_MC, act, weigh="output": not_experts(self, w))
    def moe(
        self, x_MD: Array, w: Experts, index_MC: Array, weight_MC: Array, /, act: str, *, weigh: str = "output"
    ) -> Array:
        x_MD, weight_MC = self.plain(x_MD), self.plain(weight_MC)
        index_MC, y_MD, (M, C) = self.numbers(index_MC), self.empty(*x_MD.shape), index_MC.shape
        if M > FEW:
            self.within(index_MC, len(w.gate_proj.weight), "an expert's index")
        per = max(1, SLAB // max(1, C))
        for begin in range(0, M, per):
            part = slice(begin, begin + per)
            self._mix(x_MD[part], w, index_MC[part], weight_MC[part], y_MD[part], ACTIVATIONS[act], weigh == "input")
        return y_MD

    def _mix(
        self, x_MD: Array, w: Experts, index_MC: Array, weight_MC: Array, y_MD: Array, act: int, on_input: bool
    ) -> None:
        (M, C), (F, D), E = index_MC.shape, w.gate_proj.weight[0].shape, len(w.gate_proj.weight)
        first, second = self._of_experts(w.gate_proj.weight, w.up_proj.weight), self._of_experts(w.down_proj.weight)
        few = M <= FEW and 4 * (M * C + 1) * (max(F, D) + SAID_ROWS + 2 * LANES) < SCRATCH_BYTES // 2
        columns = most_columns(M * C, E)
        planned = self.room(8 * plan_words(M * C, E))
        panels = self.room(0 if few else columns * D * 4)
        hidden = self.room((M * C if few else columns) * (F + 1) * 4)
        said = self.room(0 if few else M * C * D * 4)
        tables = (part.weight.address for part in w)
        mixture: tuple[Any, ...] = (
            at(x_MD), M, C, E, D, F, at(index_MC), at(weight_MC), int(on_input), *tables, first, second, act,
            at(planned), at(panels), at(hidden), at(said), at(y_MD),
        )  # fmt: skip
        self.run(entry(plan, *mixture), numbers=M * C)
        kernels = (hidden_of_few, say_few) if few else (gather, hidden_of_many, say_many, sum_many)
        self.run(*(entry(each, *mixture) for each in kernels))

    def _of_experts(self, *stacks: Matrices) -> int:
        """The arithmetic of experts' matrices: their own where it is the same, else float32."""
        kinds = {self.arithmetic(stack[0]) if stack.alike else FLOAT32 for stack in stacks}
        return kinds.pop() if len(kinds) == 1 else FLOAT32
