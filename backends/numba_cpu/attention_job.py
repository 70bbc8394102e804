"""What the kernels of attention share: their arguments, which keys a query sees, where keys lie, and results of splits.

A row of a step has `tokens x R` lanes for each key head: token by token, the R query heads that read it. Rows of few lanes
are attended to in splits of SPLIT keys, by as many threads as there are: a split's result is a record [base, total, sums],
the sum of exponentials relative to `base`, and the values weighed by them; `combine` adds the records up in their order.
Neither splits nor any other part of the work depends on the number of threads.
"""

from __future__ import annotations

import numpy as np

from npllm.backends.numba_cpu.activations import exp, tanh
from npllm.backends.numba_cpu.jit import inline, kernel
from npllm.backends.numba_cpu.memory import f32, real, word
from npllm.backends.numba_cpu.team import called, next_chunk

# Words of the arguments: the plan (npllm.backends.numba_cpu.base) and its rows; query heads, key heads, widths of keys and
# of values; queries [M, H, K] and output [M, H, V]; where keys lie and how many bytes apart slots, entries and heads are;
# the same for values; whether both are bf16 bits, entries of a slot, page numbers and how many a row has (or 0); window and
# chunk (or 0); sinks (or 0); records, and how many a lane has; whether tiles multiply pairs of bf16; scale, soft cap (or 0).
PLAN, ROWS, HEADS, GROUPS, KEY_WIDTH, VALUE_WIDTH, QUERIES, OUT = range(8)
KEYS, KEY_SLOT, KEY_ENTRY, KEY_HEAD, VALUES, VALUE_SLOT, VALUE_ENTRY, VALUE_HEAD = range(8, 16)
BITS, SIZE, PAGES, PAGES_ROW, WINDOW, CHUNK, SINKS, RECORDS, SPLITS, PAIRED, SCALE, CAP = range(16, 28)
FORM = "26q2d"

# Columns of a plan that are read here.
PLAN_BYTES = 64
SLOT, COUNT, FIRST, BEGIN, QUERY, END, START = range(7)

# Keys of a split; lanes up to which a row is split.
SPLIT, SPLIT_LANES = 512, 128

# Lanes below which a row's queries meet the keys a few at a time instead of side by side.
FEW = 16

# Where the sums of a record begin.
SUMS_AT = 64


def splits_of(capacity: int) -> int:
    """Records of each lane where a row has room for so many keys."""
    return -(-capacity // SPLIT)


@inline
def record_bytes(width):
    return SUMS_AT + (width + 15) // 16 * 64


@inline
def lanes_of(args, line):
    return (word(line, END) - word(line, QUERY)) * (word(args, HEADS) // word(args, GROUPS))


@inline
def record(args, before, lane, group, split):
    """The record of a row's lane; `before` counts the lanes of earlier rows that are split."""
    index = ((before + lane) * word(args, GROUPS) + group) * word(args, SPLITS) + split
    return word(args, RECORDS) + index * record_bytes(word(args, VALUE_WIDTH))


@inline
def seen(args, line, query):
    """The keys low..high, counted from the row's first, that a query sees: npllm.blocks.masks.Mask as a range."""
    first, position = word(line, FIRST), word(line, START) + query - word(line, QUERY)
    window, chunk, low = word(args, WINDOW), word(args, CHUNK), 0
    if window:
        low = max(low, position - window + 1)
    if chunk:
        low = max(low, position // chunk * chunk)
    low = max(low - first, 0)
    return low, max(low, min(position + 1 - first, word(line, COUNT)))


@inline
def within_split(low, high, split):
    """The keys of low..high that a split has."""
    begin = max(low, split * SPLIT)
    return begin, max(begin, min(high, (split + 1) * SPLIT))


@inline
def splits_in(line):
    """Splits over which a row's keys extend."""
    return (word(line, COUNT) + SPLIT - 1) // SPLIT


@inline
def entry_at(args, storage, line, row, group, key):
    """Where a key lies, or with VALUES for `storage` its value, and how many from there on lie one after the other."""
    size, slot = word(args, SIZE), word(line, SLOT)
    index = word(line, BEGIN) + key
    if word(args, PAGES):
        slot = word(word(args, PAGES), row * word(args, PAGES_ROW) + index // size)
    index %= size
    place = word(args, storage) + slot * word(args, storage + 1) + index * word(args, storage + 2)
    return place + group * word(args, storage + 3), size - index


@inline
def read_query(args, token, head, factor, out):
    """A query times a factor, as float32 numbers at `out`."""
    width = word(args, KEY_WIDTH)
    x, y = f32(word(args, QUERIES) + (token * word(args, HEADS) + head) * width * 4, width), f32(out, width)
    for k in range(width):
        y[k] = x[k] * factor


@inline
def capped(args, place, count, factor):
    """Products times a factor, through the soft cap."""
    s, cap = f32(place, count), np.float32(real(args, CAP))
    for j in range(count):
        s[j] = cap * tanh(s[j] * factor / cap)


@inline
def sink_of(args, head):
    """A head's base and sum before any key: those of its sink."""
    if word(args, SINKS) == 0:
        return np.float32(-np.inf), np.float32(0)
    sink = f32(word(args, SINKS), head + 1)[head]
    return sink, exp(sink - sink) if sink != -np.inf else np.float32(0)


@kernel(FORM)
def combine(args, team, thread, threads):
    """The output of all lanes that were split, from their records."""
    heads, per = word(args, HEADS), word(args, HEADS) // word(args, GROUPS)
    before, base, chunk = 0, 0, next_chunk(team)
    for row in range(word(args, ROWS)):
        line = word(args, PLAN) + row * PLAN_BYTES
        lanes = lanes_of(args, line)
        if lanes > SPLIT_LANES:
            continue
        count = 0 if lanes < FEW and splits_in(line) == 1 else lanes * word(args, GROUPS)
        while chunk - base < count:
            token, head = (chunk - base) // heads, (chunk - base) % heads
            combine_lane(team, args, line, before, token * per + head % per, head // per)
            chunk = next_chunk(team)
        base += count
        before += lanes


@called
def combine_lane(team, args, line, before, lane, group):
    """The output of a lane, from its records."""
    heads, per, width = word(args, HEADS), word(args, HEADS) // word(args, GROUPS), word(args, VALUE_WIDTH)
    token, head = word(line, QUERY) + lane // per, group * per + lane % per
    low, high = seen(args, line, word(line, QUERY))[0], seen(args, line, word(line, END) - 1)[1]
    splits = range(low // SPLIT, (high + SPLIT - 1) // SPLIT if high > low else low // SPLIT)
    base, total = sink_of(args, head)
    sunk = base
    for split in splits:
        base = max(base, f32(record(args, before, lane, group, split), 1)[0])
    away = base if base != -np.inf else np.float32(0)
    total *= exp(sunk - away)
    out = f32(word(args, OUT) + (token * heads + head) * width * 4, width)
    for v in range(width):
        out[v] = 0
    for split in splits:
        at = record(args, before, lane, group, split)
        head_of, sums = f32(at, 2), f32(at + SUMS_AT, width)
        factor = exp(head_of[0] - away)
        total += head_of[1] * factor
        for v in range(width):
            out[v] += sums[v] * factor
    inverse = np.float32(1) / total if total != 0 else np.float32(0)
    for v in range(width):
        out[v] *= inverse
