"""Mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): a token goes to a few experts, and sums what they say."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from npllm.arrays import Array, Namespace
from npllm.blocks.attention import softmax
from npllm.blocks.ffn import sigmoid

# A feed-forward layer of one expert: its number and the tokens x_TD that go to it -> y_TD.
Expert = Callable[[int, Array], Array]


class Router(NamedTuple):
    """How a layer chooses its experts.

    experts_per_token  how many each token goes to (num_experts_per_tok).
    scores             "softmax" over all experts, or "sigmoid" of each.
    by                 what they are ranked by: "scores" (plus the correction, where there is one), or the raw "logits".
    groups             experts lie in so many groups of equal size (n_group), of which only the best `kept_groups`
                       (topk_group) are eligible; a group is ranked by its best expert ("max") or its two best ("pair").
    normalise          the chosen scores are divided by their sum plus `floor` (norm_topk_prob).
    scale              what they are multiplied by in the end (routed_scaling_factor).
    """

    experts_per_token: int
    scores: str = "softmax"
    by: str = "scores"
    groups: int = 1
    kept_groups: int = 1
    ranking: str = "max"
    normalise: bool = False
    floor: float = 0.0
    scale: float = 1.0


def top_k(xp: Namespace, scores_ME: Array, k: int) -> Array:
    """The indices of the `k` largest of each row, the largest first -> index_MC; ties go to the lowest index."""
    return xp.argsort(-scores_ME, axis=-1, kind="stable")[:, :k]


def eligible(xp: Namespace, ranks_ME: Array, router: Router) -> Array:
    """`ranks_ME` with -inf outside the best groups (DeepSeek V2, arXiv 2405.04434, section 2.2.2) -> ranks_ME.

    transformers' DeepSeek V2 writes 0 there: the same, since no softmax is below 0. With a correction ranks may be.
    """
    if router.groups == router.kept_groups:
        return ranks_ME
    M, E = ranks_ME.shape
    grouped = ranks_ME.reshape(M * router.groups, E // router.groups)
    best = top_k(xp, grouped, 2 if router.ranking == "pair" else 1)
    worth = xp.sum(xp.take_along_axis(grouped, best, axis=-1), axis=-1).reshape(M, router.groups)
    kept = top_k(xp, worth, router.kept_groups)
    stays = xp.any(kept[:, :, None] == xp.arange(router.groups, dtype="int64"), axis=1)
    return xp.where(xp.repeat(stays, E // router.groups, axis=1), ranks_ME, ranks_ME.dtype.type(-math.inf))


def route(xp: Namespace, logits_ME: Array, router: Router, correction_E: Array | None = None) -> tuple[Array, Array]:
    """The experts of each token and their weights -> index_MC, weight_MC (the dtype of the logits).

    `correction_E` (e_score_correction_bias of DeepSeek V3, arXiv 2412.19437, section 2.1.2) takes part in the choice only.
    """
    scores_ME = softmax(xp, logits_ME.copy()) if router.scores == "softmax" else sigmoid(xp, logits_ME)
    ranks_ME = logits_ME if router.by == "logits" else scores_ME
    if correction_E is not None:
        ranks_ME = ranks_ME + correction_E
    index_MC = top_k(xp, eligible(xp, ranks_ME, router), router.experts_per_token)
    weight_MC = xp.take_along_axis(scores_ME, index_MC, axis=-1)
    if router.normalise:
        weight_MC = weight_MC / (xp.sum(weight_MC, axis=-1, keepdims=True) + router.floor)
    return index_MC, weight_MC * router.scale if router.scale != 1.0 else weight_MC


def moe_by_token(xp: Namespace, x_MD: Array, expert: Expert, index_MC: Array, weight_MC: Array, weigh: str) -> Array:
    """The definition: each token alone, `sum over c of weight_c expert_c(x)` -> y_MD.

    `weigh` "input" means `expert_c(weight_c x)` (Llama 4): not the same, since an expert is not linear.
    """
    y_MD = xp.zeros_like(x_MD)
    for m, (chosen, weights) in enumerate(zip(index_MC.tolist(), weight_MC, strict=True)):
        for e, weight in zip(chosen, weights, strict=True):
            x_1D = x_MD[m : m + 1]
            y_MD[m] += expert(e, weight * x_1D)[0] if weigh == "input" else weight * expert(e, x_1D)[0]
    return y_MD


def moe_pieces(
    xp: Namespace, x_MD: Array, expert: Expert, index_MC: Array, weight_MC: Array, out_MCD: Array, weigh: str
) -> list[Callable[[], None]]:
    """The named equal of `moe_by_token`, grouped by expert: each piece runs one expert over all its tokens.

    It writes what they get from it into their places of `out_MCD`, whose sum over C is the layer's output. Pieces may run
    in any order; an expert without tokens has none.
    """

    def run(e: int, token_T: Array, choice_T: Array) -> None:
        weight_T1 = weight_MC[token_T, choice_T][:, None]
        x_TD = x_MD[token_T]
        out_MCD[token_T, choice_T] = expert(e, x_TD * weight_T1) if weigh == "input" else expert(e, x_TD) * weight_T1

    return [functools.partial(run, e, *map(xp.asarray, places)) for e, *places in by_expert(index_MC.tolist())]


def by_expert(chosen: list[list[int]]) -> Iterator[tuple[int, Array, Array]]:
    """The experts that got tokens, each with the tokens' indices and the ranks at which they chose it, both [T]."""
    if not chosen:
        return
    index_MC = np.asarray(chosen, dtype=np.int64)
    order = np.argsort(index_MC, axis=None, kind="stable")
    experts, begins = np.unique(index_MC.ravel()[order], return_index=True)
    for e, places in zip(experts.tolist(), np.split(order, begins[1:]), strict=True):
        yield e, *np.divmod(places, index_MC.shape[1])
