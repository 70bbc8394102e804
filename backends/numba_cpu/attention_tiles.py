"""Attention of many queries to each key head, in tiles [keys, lanes] with an online softmax (arXiv 2205.14135).

The queries of UNIT lanes lie side by side in panels [K, lanes], as tokens do for products with weights; keys are read where
they lie and spread over the lanes. A tile of exponentials [keys, lanes] is in turn the panel that values are multiplied
with. Where products are of pairs of bf16, keys and values of a block are first laid out in pairs, once for all of the
unit's panels. Tiles that nobody in a panel sees are skipped; only those at the edge of what it sees are masked.
"""

from __future__ import annotations

import numpy as np

from npllm.backends.numba_cpu.attention_job import (
    BITS,
    CAP,
    FEW,
    FORM,
    GROUPS,
    HEADS,
    KEY_ENTRY,
    KEY_WIDTH,
    KEYS,
    OUT,
    PAIRED,
    PLAN,
    PLAN_BYTES,
    QUERY,
    ROWS,
    SCALE,
    SPLIT_LANES,
    SUMS_AT,
    VALUE_ENTRY,
    VALUE_WIDTH,
    VALUES,
    capped,
    entry_at,
    lanes_of,
    read_query,
    record,
    seen,
    sink_of,
    splits_in,
    within_split,
)
from npllm.backends.numba_cpu.attention_vectors import (
    BASE,
    HIGH,
    LOW,
    SHARPNESS,
    STATE_ROWS,
    TOTAL,
    hide,
    scale,
    soften,
    soften_pairs,
)
from npllm.backends.numba_cpu.conversions import from_bits
from npllm.backends.numba_cpu.emit import CACHE_LINE, LANES
from npllm.backends.numba_cpu.jit import inline, kernel
from npllm.backends.numba_cpu.memory import f32, i32, real, u16, u32, word
from npllm.backends.numba_cpu.panels import WIDE, clear, panel_width, turned
from npllm.backends.numba_cpu.source import PAIRS, bf16, round_row
from npllm.backends.numba_cpu.team import SCRATCH_BYTES, next_chunk, scratch
from npllm.backends.numba_cpu.tiles import TILE_ROWS, spread

# Lanes of a unit of work, and keys of a block: whole tiles, and so few that they stay in the cache from scores to values.
UNIT, BLOCK = 256, 48

# Rows that a tile may write behind its last.
OVERHANG = 16

# Columns of values are read row by row: rows that are multiples of so many bytes apart share too few sets of a cache.
CROWDED = 512

# What a unit keeps in the thread's memory: panels of queries and of sums, their states, a tile, a block of keys and one of
# values, and rows of lanes.
PANELS, SUMS, STATES, TILE, BLOCK_KEYS, BLOCK_VALUES, LANE_ROWS = range(7)


@inline
def _rows_of_sums(width):
    return (width + 15) // 16 * 16 + OVERHANG


@inline
def _places(space, key_width, value_width):
    """Where a unit keeps what the words above name."""
    queries = space
    sums = queries + UNIT * key_width * 4
    states = sums + UNIT * _rows_of_sums(value_width) * 4
    tile = states + UNIT * STATE_ROWS * 4
    keys = tile + (BLOCK + OVERHANG) * WIDE * 4
    values = keys + BLOCK * row_bytes(key_width)
    return queries, sums, states, tile, keys, values, values + BLOCK * row_bytes(value_width)


@inline
def row_bytes(width):
    """Of a row of float32 or of pairs, which may be written one number too far."""
    return (width + 16) // 16 * 64


def fits(key_width: int, value_width: int) -> bool:
    """Whether a thread's memory holds a unit."""
    padded = max(key_width, value_width) + 48
    return (2 * UNIT + 2 * BLOCK + 2 * WIDE) * padded * 4 < SCRATCH_BYTES


@kernel(FORM)
def attend_tiles(args, team, thread, threads):
    """Outputs, or where rows are split records, of the rows of FEW lanes or more; those that see most come first."""
    rows, base, chunk = word(args, ROWS), 0, next_chunk(team)
    for back in range(rows):
        row = rows - 1 - back
        own = _units(args, row)
        while chunk - base < own:
            _attend(args, team, row, own - 1 - (chunk - base), scratch(team, thread))
            chunk = next_chunk(team)
        base += own


@inline
def _line(args, row):
    return word(args, PLAN) + row * PLAN_BYTES


@inline
def _splits(args, line):
    return splits_in(line) if lanes_of(args, line) <= SPLIT_LANES else 1


@inline
def _units(args, row):
    line = _line(args, row)
    lanes = lanes_of(args, line)
    return (lanes + UNIT - 1) // UNIT * _splits(args, line) * word(args, GROUPS) if lanes >= FEW else 0


@inline
def _attend(args, team, row, unit, space):
    """One unit: UNIT lanes of a row and key head, and a split of the keys or all of them."""
    line, groups = _line(args, row), word(args, GROUPS)
    lanes, splits = lanes_of(args, line), _splits(args, line)
    group, split = unit % groups, unit // groups % splits
    begin = unit // groups // splits * UNIT
    end = min(lanes, begin + UNIT)
    near, far = _seen(args, line, begin)[0], _seen(args, line, end - 1)[1]
    apart = lanes <= SPLIT_LANES
    if apart:
        near, far = within_split(near, far, split)
        if near == far:
            return
    places = _places(space, word(args, KEY_WIDTH), word(args, VALUE_WIDTH))
    lane = begin
    while lane < end:
        wide = panel_width(lane, end)
        _open(args, line, group, lane, end, wide, apart, places, lane - begin)
        lane += wide
    for key in range(near, far, BLOCK):
        _meet(args, team, line, row, group, begin, end, key, min(far, key + BLOCK), far, places)
    lane = begin
    while lane < end:
        wide = panel_width(lane, end)
        _close(args, row, line, group, split, lane, end, wide, apart, places, lane - begin)
        lane += wide


@inline
def _steps(args):
    """Of a product with keys: a number of each, or a pair."""
    width = word(args, KEY_WIDTH)
    return (width + 1) // 2 if PAIRS and word(args, PAIRED) else width


@inline
def _seen(args, line, lane):
    """The keys that a lane's query sees."""
    return seen(args, line, word(line, QUERY) + lane // (word(args, HEADS) // word(args, GROUPS)))


# -- panels -----------------------------------------------------------------------------------------------------------


@inline
def _open(args, line, group, lane, end, wide, apart, places, offset):
    """Begin a panel of `wide` lanes: its queries side by side, its sums 0, its state."""
    room, sums = places[LANE_ROWS], places[SUMS] + offset * _rows_of_sums(word(args, VALUE_WIDTH)) * 4
    width, per, pairs = word(args, KEY_WIDTH), word(args, HEADS) // word(args, GROUPS), PAIRS and word(args, PAIRED)
    row = row_bytes(width)
    state = places[STATES] + offset * STATE_ROWS * 4
    base, total = f32(state + BASE * wide * 4, wide), f32(state + TOTAL * wide * 4, wide)
    sharpness = f32(state + SHARPNESS * wide * 4, wide)
    low, high = i32(state + LOW * wide * 4, wide), i32(state + HIGH * wide * 4, wide)
    for i in range(wide):
        base[i], total[i], low[i], high[i] = -np.inf, 0, 0, 0
        sharpness[i] = 1 if real(args, CAP) != 0 else real(args, SCALE)
        place = room + i * row
        if lane + i >= end:
            clear(place, width + 1)
            continue
        head = group * per + (lane + i) % per
        read_query(args, word(line, QUERY) + (lane + i) // per, head, np.float32(1), place)
        if pairs:
            round_row(place, width, place)
        low[i], high[i] = _seen(args, line, lane + i)
        if not apart:
            base[i], total[i] = sink_of(args, head)
    turned(room, row, wide, _steps(args), places[PANELS] + offset * width * 4, wide * 4)
    clear(sums, wide * word(args, VALUE_WIDTH))


@inline
def _close(args, row, line, group, split, lane, end, wide, apart, places, offset):
    """End a panel: its sums, divided by their weights, go to the output, or as they are to records."""
    room, sums = places[LANE_ROWS], places[SUMS] + offset * _rows_of_sums(word(args, VALUE_WIDTH)) * 4
    width, heads, per = word(args, VALUE_WIDTH), word(args, HEADS), word(args, HEADS) // word(args, GROUPS)
    state = places[STATES] + offset * STATE_ROWS * 4
    base, total = f32(state + BASE * wide * 4, wide), f32(state + TOTAL * wide * 4, wide)
    x_row = row_bytes(width)
    turned(sums, wide * 4, (width + LANES - 1) // LANES * LANES, wide, room, x_row)
    before = _lanes_before(args, row)
    for i in range(min(wide, end - lane)):
        place, factor = word(line, QUERY) + (lane + i) // per, np.float32(1)
        place = word(args, OUT) + (place * heads + group * per + (lane + i) % per) * width * 4
        if apart:
            at = record(args, before, lane + i, group, split)
            kept, place = f32(at, 2), at + SUMS_AT
            kept[0], kept[1] = base[i], total[i]
        else:
            factor = factor / total[i] if total[i] != 0 else np.float32(0)
        y, z = f32(room + i * x_row, width), f32(place, width)
        for v in range(width):
            z[v] = y[v] * factor


@inline
def _lanes_before(args, row):
    """Lanes of earlier rows that are split."""
    total = 0
    for other in range(row):
        lanes = lanes_of(args, _line(args, other))
        if lanes <= SPLIT_LANES:
            total += lanes
    return total


# -- blocks of keys ---------------------------------------------------------------------------------------------------


@inline
def _meet(args, team, line, row, group, begin, end, key, stop, far, places):
    """All panels of lanes begin..end meet the keys key..stop, those of a block; the next one's are fetched meanwhile."""
    width, pairs = word(args, VALUE_WIDTH), PAIRS and word(args, PAIRED)
    k, k_row = _keys(args, line, row, group, key, stop, places[BLOCK_KEYS])
    ahead = k + TILE_ROWS * k_row, k_row, 4 * TILE_ROWS
    if k == places[BLOCK_KEYS] and stop < far:
        entry = word(args, KEY_ENTRY)
        ahead = entry_at(args, KEYS, line, row, group, stop)[0], entry, entry * TILE_ROWS // _steps(args)
    if not pairs and word(args, VALUES) == word(args, KEYS) and k_row % CROWDED:
        v, v_row = k, k_row
    else:
        v, v_row = _values(args, line, row, group, key, stop, places[BLOCK_VALUES])
    per_row, lane = 2 if pairs else 1, begin
    while lane < end:
        wide, offset = panel_width(lane, end), lane - begin
        # Values lie in pairs.
        near = max(key, _seen(args, line, lane)[0])
        near -= (near - key) % per_row
        far = min(stop, _seen(args, line, min(lane + wide, end) - 1)[1])
        if near < far:
            first, values = k + (near - key) * k_row, v + (near - key) // per_row * v_row
            count = _soft_tile(args, team, line, first, k_row, near, far, lane, end, wide, offset, ahead, places)
            sums = places[SUMS] + offset * _rows_of_sums(width) * 4
            beside, row = values + CACHE_LINE, wide * 4
            spread(team, values, 4, v_row, width, places[TILE], wide, count, sums, row, 1, pairs, beside, 4, v_row)
        lane += wide


@inline
def _soft_tile(args, team, line, k, k_row, near, far, lane, end, wide, offset, ahead, places):
    """The tile of exponentials of keys near..far, which lie at `k`, with a panel -> its rows of numbers, or of pairs."""
    pairs, tile, count = PAIRS and word(args, PAIRED), places[TILE], far - near
    queries = places[PANELS] + offset * word(args, KEY_WIDTH) * 4
    then, then_row, then_step = ahead
    spread(team, k, k_row, 4, count, queries, wide, _steps(args), tile, wide * 4, 0, pairs, then, then_row, then_step)
    if real(args, CAP) != 0:
        capped(args, tile, count * wide, np.float32(real(args, SCALE)))
    last = min(lane + wide, end) - 1
    edge = near < _seen(args, line, last)[0] or far > _seen(args, line, lane)[1]
    state, values = places[STATES] + offset * STATE_ROWS * 4, word(args, VALUE_WIDTH)
    sums = places[SUMS] + offset * _rows_of_sums(values) * 4
    return _soften(tile, wide, count, near, state, edge, sums, values, pairs)


@inline
def _soften(tile, wide, count, first, state, edge, sums, width, pairs):
    """Scores of `count` keys become exponentials; sums so far are rescaled where bases rise. -> rows of the tile now."""
    row = wide * 4
    if pairs and count % 2:
        x = f32(tile + count * row, wide)
        for i in range(wide):
            x[i] = -np.inf
    even = count + count % 2
    for column in range(0, row, LANES * 4):
        if edge:
            hide(tile + column, row, count, first, state + column)
        if pairs:
            rises = soften_pairs(tile + column, row, even, state + column)
        else:
            rises = soften(tile + column, row, count, state + column)
        if rises:
            scale(sums + column, row, width, state + column)
    return even // 2 if pairs else count


@inline
def _keys(args, line, row, group, key, stop, room):
    """Keys key..stop as rows of numbers, or pairs, and how many bytes apart they are: where they lie, or in `room`."""
    width, bits, pairs = word(args, KEY_WIDTH), word(args, BITS), PAIRS and word(args, PAIRED)
    place, run = entry_at(args, KEYS, line, row, group, key)
    if run >= stop - key and (bits and width % 2 == 0 if pairs else bits == 0):
        return place, word(args, KEY_ENTRY)
    apart = row_bytes(width)
    for j in range(key, stop):
        x, y = entry_at(args, KEYS, line, row, group, j)[0], room + (j - key) * apart
        if not pairs:
            _widen(x, bits, width, y)
        elif bits:
            _copy_pairs(x, width, y)
        else:
            round_row(x, width, y)
    return room, apart


@inline
def _values(args, line, row, group, key, stop, room):
    """Values of key..stop as rows of numbers, or of pairs of two keys' numbers, and how many bytes apart the rows are."""
    width, bits, pairs = word(args, VALUE_WIDTH), word(args, BITS), PAIRS and word(args, PAIRED)
    place, run = entry_at(args, VALUES, line, row, group, key)
    if run >= stop - key and not pairs and bits == 0 and word(args, VALUE_ENTRY) % CROWDED:
        return place, word(args, VALUE_ENTRY)
    apart = row_bytes(width)
    for j in range(key, stop, 2 if pairs else 1):
        x, y = entry_at(args, VALUES, line, row, group, j)[0], room + (j - key) // (2 if pairs else 1) * apart
        if not pairs:
            _widen(x, bits, width, y)
        else:
            other = entry_at(args, VALUES, line, row, group, j + 1)[0] if j + 1 < stop else 0
            _interleave(x, other, bits, width, y)
    return room, apart


@inline
def _widen(x, bits, width, out):
    y = f32(out, width)
    if bits:
        halves = u16(x, width)
        for k in range(width):
            y[k] = from_bits(np.uint32(halves[k]) << np.uint32(16))
    else:
        numbers = f32(x, width)
        for k in range(width):
            y[k] = numbers[k]


@inline
def _copy_pairs(x, width, out):
    halves, y = u16(x, width), u16(out, width + 1)
    for k in range(width):
        y[k] = halves[k]
    y[width] = np.uint16(0)


@inline
def _interleave(x, other, bits, width, out):
    """Pairs of two rows' numbers; without an `other` (0), of the first row's and 0."""
    y = u32(out, width)
    if bits:
        low = u16(x, width)
        for v in range(width):
            y[v] = np.uint32(low[v])
    else:
        numbers = f32(x, width)
        for v in range(width):
            y[v] = bf16(numbers[v])
    if other and bits:
        high = u16(other, width)
        for v in range(width):
            y[v] |= np.uint32(high[v]) << np.uint32(16)
    elif other:
        numbers = f32(other, width)
        for v in range(width):
            y[v] |= bf16(numbers[v]) << np.uint32(16)
