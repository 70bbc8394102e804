"""Attention of few queries to each key head: keys and values stream by at the memory's speed, once for all of its heads."""

from __future__ import annotations

import numpy as np

from npllm.backends.numba_cpu.activations import exp
from npllm.backends.numba_cpu.attention_job import (
    BITS,
    CAP,
    END,
    FEW,
    FORM,
    GROUPS,
    HEADS,
    KEY_ENTRY,
    KEY_WIDTH,
    KEYS,
    PLAN,
    PLAN_BYTES,
    QUERY,
    ROWS,
    SCALE,
    SPLIT,
    SPLIT_LANES,
    SPLITS,
    SUMS_AT,
    VALUE_ENTRY,
    VALUE_WIDTH,
    VALUES,
    capped,
    combine_lane,
    entry_at,
    lanes_of,
    read_query,
    record,
    record_bytes,
    seen,
    splits_in,
    within_split,
)
from npllm.backends.numba_cpu.attention_vectors import score, top, weigh
from npllm.backends.numba_cpu.emit import LANES
from npllm.backends.numba_cpu.jit import inline, kernel
from npllm.backends.numba_cpu.memory import f32, real, word
from npllm.backends.numba_cpu.panels import clear
from npllm.backends.numba_cpu.team import next_chunk, scratch

# Bytes between the scores of two lanes.
SCORES_ROW = (SPLIT + LANES) * 4


@kernel(FORM)
def attend_few(args, team, thread, threads):
    """Records of the rows of fewer than FEW lanes, and the output of those that have one split."""
    groups, before, base, chunk = word(args, GROUPS), 0, 0, next_chunk(team)
    for row in range(word(args, ROWS)):
        line = word(args, PLAN) + row * PLAN_BYTES
        lanes, splits = lanes_of(args, line), splits_in(line)
        if 0 < lanes < FEW:
            while chunk - base < groups * splits:
                group, split = (chunk - base) // splits, (chunk - base) % splits
                _attend(args, team, line, row, lanes, group, split, before, scratch(team, thread))
                if splits == 1:
                    for lane in range(lanes):
                        combine_lane(team, args, line, before, lane, group)
                chunk = next_chunk(team)
            base += groups * splits
        if lanes <= SPLIT_LANES:
            before += lanes


@inline
def _attend(args, team, line, row, lanes, group, split, before, space):
    low, high = seen(args, line, word(line, QUERY))[0], seen(args, line, word(line, END) - 1)[1]
    begin, end = within_split(low, high, split)
    if begin == end:
        return
    scores, width, apart = space + FEW * SCORES_ROW, word(args, VALUE_WIDTH), record_bytes(word(args, VALUE_WIDTH))
    apart *= word(args, GROUPS) * word(args, SPLITS)
    at = record(args, before, 0, group, split)
    _score(args, team, line, row, lanes, group, begin, end, space, scores)
    for lane in range(lanes):
        _soften(args, line, lane, begin, end, space + lane * SCORES_ROW, at + lane * apart)
        clear(at + lane * apart + SUMS_AT, width)
    key = begin
    while key < end:
        place, run = entry_at(args, VALUES, line, row, group, key)
        run = min(run, end - key)
        p, out = space + (key - begin) * 4, at + SUMS_AT
        weigh(team, word(args, BITS), place, word(args, VALUE_ENTRY), run, p, SCORES_ROW, lanes, out, apart, width)
        key += run


@inline
def _score(args, team, line, row, lanes, group, begin, end, scores, queries):
    """Scores of the lanes with the keys begin..end; `queries` is room for the lanes' queries."""
    width, per = word(args, KEY_WIDTH), word(args, HEADS) // word(args, GROUPS)
    query_row = (width + 15) // 16 * 64
    factor = np.float32(real(args, SCALE))
    for lane in range(lanes):
        read_query(args, word(line, QUERY) + lane // per, group * per + lane % per, factor, queries + lane * query_row)
    key = begin
    while key < end:
        place, run = entry_at(args, KEYS, line, row, group, key)
        run = min(run, end - key)
        out = scores + (key - begin) * 4
        score(team, word(args, BITS), place, word(args, KEY_ENTRY), run, queries, query_row, lanes, out, SCORES_ROW, width)
        key += run


@inline
def _soften(args, line, lane, begin, end, scores, at):
    """A lane's scores become exponentials, of keys that it does not see 0; the record takes their base and sum."""
    per, count = word(args, HEADS) // word(args, GROUPS), end - begin
    if real(args, CAP) != 0:
        capped(args, scores, count, np.float32(1))
    low, high = seen(args, line, word(line, QUERY) + lane // per)
    padded = (count + LANES - 1) // LANES * LANES
    s = f32(scores, padded)
    for j in range(min(max(low - begin, 0), count)):
        s[j] = -np.inf
    for j in range(min(max(high - begin, 0), count), padded):
        s[j] = -np.inf
    base, total = top(scores, padded), np.float32(0)
    away = base if base != -np.inf else np.float32(0)
    for j in range(padded):
        s[j] = exp(s[j] - away)
        total += s[j]
    kept = f32(at, 2)
    kept[0], kept[1] = base, total
