"""Routing: which experts a token goes to, and with which weights, by every router of the registry.

A choice is right or wrong, so it is judged as one: in whatever order a kernel names a token's experts, they are sorted by
number first (`sorted_by_expert`), and must then be the true ones. There is one exception: experts whose ranks no kernel of
the declared precision can tell apart. `Choice` says whether the kernel's experts are such a tie; then they count as true.
Equal logits (with equal corrections) are no such tie: the lowest index wins.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from npllm import blocks
from npllm.arrays import Array
from npllm.backend import Backend
from npllm.blocks import Router, top_k
from npllm.blocks.moe import eligible
from npllm.testing.estimate import (
    Estimate,
    divided,
    exact,
    exponential,
    flushed,
    plus,
    rounded,
    summed,
    times,
    weights_of_softmax,
)
from npllm.testing.operation import Arrays, Operation, Settings
from npllm.testing.ops import feed
from npllm.testing.ops.routing_cases import CASES
from npllm.testing.ops.routing_mistakes import MISTAKES
from npllm.testing.rounding import Format, Rounding
from npllm.weights import Gate, Linear


def run(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    """Backend.route, with logits for hidden states and the identity for the router's matrix: exact."""
    E = inputs["logits"].shape[-1]
    correction = feed.linear(be, inputs, "correction") if "correction" in inputs else None
    prepared: Any = be.prepare(Linear(feed.handle("gate", np.eye(E, dtype=np.float32))))
    return be.route(feed.activation(be, inputs["logits"]), Gate(Linear(*prepared), correction), Router(**settings))


def sorted_by_expert(outputs: Arrays) -> dict[str, Array]:
    """A token's experts in the order of their numbers, each with its weight."""
    order = np.argsort(outputs["index"], axis=-1, kind="stable")
    return {name: np.take_along_axis(x, order, axis=-1) for name, x in outputs.items()}


# -- what may be chosen -----------------------------------------------------------------------------------------------


# A kernel that chose wrongly for so many tokens is wrong; its other choices are not looked at.
REFUSED = 16


class Choice(NamedTuple):
    """One token's experts as it sees them.

    rank, bound   what experts are ranked by, and how far a kernel's figure may be from it [E].
    logit, extra  what the rank is made of: experts that are equal in both have the same rank in every kernel [E].
    """

    rank: Array
    bound: Array
    logit: Array
    extra: Array

    def permits(self, chosen: Array, router: Router) -> bool:
        """Whether a correct kernel may have chosen these experts: distinct numbers [C], in any order."""
        groups = np.arange(router.groups)
        members = np.arange(len(self.rank)).reshape(router.groups, -1)
        if router.groups == router.kept_groups:
            return possible(self, members.ravel(), chosen)
        # Groups of which an expert was chosen were kept; any may be the others.
        seen = np.unique(chosen // members.shape[1])
        worth, rest = self.of_groups(router), np.setdiff1d(groups, seen)
        others = itertools.combinations(rest, max(router.kept_groups - len(seen), 0))
        kept_sets = (np.concatenate([seen, more]).astype(np.int64) for more in others)
        return len(seen) <= router.kept_groups and any(
            possible(worth, groups, kept) and possible(self, members[kept].ravel(), chosen) for kept in kept_sets
        )

    def of_groups(self, router: Router) -> Choice:
        """The groups as a Choice: a group's worth is its best rank or the sum of the two best."""
        best = 2 if router.ranking == "pair" else 1
        parts = [part.reshape(router.groups, -1) for part in self]
        order = np.argsort(-parts[0], axis=1, kind="stable")[:, :best]
        rank, _, logit, extra = (np.take_along_axis(part, order, axis=1) for part in parts)
        # Another expert may be the best one: no expert's bound is larger than the group's largest.
        bound = best * parts[1].max(axis=1) + (best - 1) * 2.0**-23 * np.abs(rank).sum(axis=1)
        # Groups are equal in every kernel if their best experts are: names for rows that are equal in both.
        names = np.unique(np.concatenate([logit, extra], axis=1), axis=0, return_inverse=True)[1].reshape(-1)
        return Choice(rank.sum(axis=1), bound, names.astype(np.float64), np.zeros(router.groups))


def possible(of: Choice, eligible: Array, chosen: Array) -> bool:
    """Whether `chosen` may be the best of those `eligible`: none left out is better for certain."""
    out = np.setdiff1d(eligible, chosen)
    if not len(out) or not len(chosen):
        return True
    worst = np.min(of.rank[chosen] + of.bound[chosen])
    if worst < np.max(of.rank[out] - of.bound[out]):
        return False
    same = (of.logit[chosen][:, None] == of.logit[out]) & (of.extra[chosen][:, None] == of.extra[out])
    return not (same & (chosen[:, None] > out)).any()


def followed(true: Array, got: Array, ranks: Estimate, inputs: Arrays, router: Router) -> Array:
    """The experts by which the weights are judged [M, C], sorted: the kernel's where they are as good as the true ones."""
    M, E = inputs["logits"].shape
    extra = np.broadcast_to(inputs.get("correction", np.zeros(E)), (M, E))
    chosen, refused = true.copy(), 0
    for m in np.flatnonzero((got != true).any(axis=1)):
        mine = got[m]
        proper = (mine == np.clip(np.rint(mine), 0, E - 1)).all() and (np.diff(mine) > 0).all()
        here = Choice(ranks.value[m], ranks.bound[m], inputs["logits"][m], extra[m])
        if proper and here.permits(mine.astype(np.int64), router):
            chosen[m] = mine
        elif (refused := refused + 1) == REFUSED:
            break
    return chosen


# -- the budget -------------------------------------------------------------------------------------------------------


def estimate(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    router, at = Router(**settings), rounding.format("accumulate")
    logits, correction = inputs["logits"], inputs.get("correction")
    scores = scores_of(exact(logits), router, at)
    ranks = exact(logits) if router.by == "logits" else scores
    if correction is not None:
        ranks = plus(ranks, exact(np.broadcast_to(correction, logits.shape)), at)
    best = eligible(np, ranks.value, router)
    index = np.sort(top_k(np, best, router.experts_per_token), axis=-1)
    if got is not None:
        index = followed(index, got["index"], ranks, inputs, router)
    weight = weights_of(scores.map(lambda x: np.take_along_axis(x, index, axis=-1)), router, at)
    return exact(index), rounded(weight, rounding.format("output"))


def scores_of(logits: Estimate, router: Router, at: Format) -> Estimate:
    if router.scores == "sigmoid":
        return exponential(lambda x: blocks.sigmoid(np, x), logits, at)
    weights = weights_of_softmax(logits, at)
    return flushed(divided(weights, summed(weights, at), at), at)


def weights_of(scores: Estimate, router: Router, at: Format) -> Estimate:
    if router.normalise:
        scores = divided(scores, plus(summed(scores, at), exact(np.full(1, router.floor)), at), at)
    return times(scores, exact(np.full(1, router.scale)), at) if router.scale != 1.0 else scores


OPERATIONS = (
    Operation(
        name="route",
        about="the experts of each token and their weights",
        inputs={"logits": ("token", "expert"), "correction": ("expert",)},
        outputs={"index": ("token", "choice"), "weight": ("token", "choice")},
        run=run,
        estimate=estimate,
        chooses=True,
        cases=CASES,
        mistakes=MISTAKES,
        comparable=sorted_by_expert,
    ),
)
