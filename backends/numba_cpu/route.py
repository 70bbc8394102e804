"""`route`: the experts of each token and their weights, npllm.blocks.route.

The router's logits are float32 products in every arithmetic: an expert that rounding swaps for another is no small error.
"""

from __future__ import annotations

import math

import numpy as np

from npllm.arrays import Array
from npllm.backend import accelerates
from npllm.backends.numba_cpu.activations import exp, sigmoid
from npllm.backends.numba_cpu.arithmetic import FLOAT32
from npllm.backends.numba_cpu.base import at
from npllm.backends.numba_cpu.jit import inline, kernel
from npllm.backends.numba_cpu.memory import f32, i64, real, word
from npllm.backends.numba_cpu.norms import not_plain
from npllm.backends.numba_cpu.products import Products, unprepared
from npllm.backends.numba_cpu.tape import entry
from npllm.backends.numba_cpu.team import next_chunk, scratch
from npllm.blocks.moe import Router
from npllm.weights import Gate

# Arguments of `choose`: logits [M, E]; their correction [E], or 0; where the indices and the weights go [M, C]; M, E, C;
# then npllm.blocks.Router: whether scores are sigmoids, whether logits are ranked, the groups and how many are kept, whether
# a group's two best count, whether weights are normalised; the floor and the scale.
(LOGITS, CORRECTION, INDEX, WEIGHT, TOKENS, EXPERTS, CHOICES, SIGMOID, BY_LOGITS, GROUPS, KEPT, PAIR, NORMALISE, FLOOR,
 SCALE) = range(15)  # fmt: skip

# Tokens that a thread takes at a time.
PER = 8


@kernel("13q2d")
def choose(args, team, thread, threads):
    """Routing by logits; the arguments are said above."""
    tokens, E, C, space = word(args, TOKENS), word(args, EXPERTS), word(args, CHOICES), scratch(team, thread)
    scores, ranks, worth = f32(space, E), f32(space + 4 * E, E), f32(space + 8 * E, word(args, GROUPS))
    chosen = i64(space + 16 * (E + 1), E)
    while True:
        begin = next_chunk(team) * PER
        if begin >= tokens:
            break
        for m in range(begin, min(tokens, begin + PER)):
            logits = f32(word(args, LOGITS) + m * E * 4, E)
            _score(logits, word(args, SIGMOID), scores)
            _rank(logits if word(args, BY_LOGITS) else scores, word(args, CORRECTION), ranks)
            if word(args, GROUPS) != word(args, KEPT):
                _close_groups(ranks, worth, word(args, KEPT), word(args, PAIR), chosen)
            index, weight = i64(word(args, INDEX) + m * C * 8, C), f32(word(args, WEIGHT) + m * C * 4, C)
            _find_best(ranks, index)
            _weigh(scores, index, weight, word(args, NORMALISE), real(args, FLOOR), real(args, SCALE))


@inline
def _score(logits, sigmoids, scores):
    if sigmoids:
        for e in range(logits.size):
            scores[e] = sigmoid(logits[e])
        return
    top = np.float32(-math.inf)
    for e in range(logits.size):
        top = max(top, logits[e])
    total = np.float32(0)
    for e in range(logits.size):
        scores[e] = exp(logits[e] - top)
        total += scores[e]
    for e in range(logits.size):
        scores[e] = scores[e] / total


@inline
def _rank(by, correction_at, ranks):
    for e in range(by.size):
        ranks[e] = by[e]
    if correction_at:
        correction = f32(correction_at, by.size)
        for e in range(by.size):
            ranks[e] += correction[e]


@inline
def _close_groups(ranks, worth, kept, pair, chosen):
    """-inf for the experts of all but the `kept` best groups."""
    size = ranks.size // worth.size
    for g in range(worth.size):
        group = ranks[g * size : (g + 1) * size]
        best = chosen[: min(size, 2 if pair else 1)]
        _find_best(group, best)
        worth[g] = group[best[0]]
        if best.size == 2:
            worth[g] += group[best[1]]
    _find_best(worth, chosen[:kept])
    for g in range(worth.size):
        stays = False
        for i in range(kept):
            stays = stays or chosen[i] == g
        if not stays:
            ranks[g * size : (g + 1) * size] = np.float32(-math.inf)


@inline
def _find_best(x, best):
    """The places of the largest numbers, the largest first; of equal ones the lowest place, and NaN last."""
    for i in range(best.size):
        found = -1
        for n in range(x.size):
            if found >= 0 and not (x[n] > x[found] or (x[found] != x[found] and x[n] == x[n])):
                continue
            taken = False
            for j in range(i):
                taken = taken or best[j] == n
            if not taken:
                found = n
        best[i] = found


@inline
def _weigh(scores, index, weight, normalise, floor, scale):
    total = np.float32(0)
    for c in range(index.size):
        weight[c] = scores[index[c]]
        total += weight[c]
    total += np.float32(floor)
    for c in range(index.size):
        if normalise:
            weight[c] = weight[c] / total
        weight[c] *= np.float32(scale)


class Routers(Products):
    """Routers of mixtures."""

    @accelerates(
        lambda self, h_MD, w, router: unprepared(self, w.gate) or not_plain(self, w.correction and w.correction.weight)
    )
    def route(self, h_MD: Array, w: Gate, /, router: Router) -> tuple[Array, Array]:
        M, E, C = len(h_MD), len(w.gate.weight), router.experts_per_token
        (logits_ME,) = self.multiply(h_MD, [w.gate], arithmetic=FLOAT32)
        index_MC, weight_MC = self.empty(M, C, dtype="int64"), self.empty(M, C)
        correction = w.correction and w.correction.weight
        arrays = at(logits_ME), at(correction), at(index_MC), at(weight_MC), M, E, C
        how = (
            router.scores == "sigmoid", router.by == "logits", router.groups, router.kept_groups, router.ranking == "pair",
            router.normalise,
        )  # fmt: skip
        self.run(entry(choose, *arrays, *how, router.floor, router.scale), numbers=logits_ME.size)
        return index_MC, weight_MC
