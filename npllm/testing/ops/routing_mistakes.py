"""What routers are known to get wrong: nearly all of it is the right routine with another rule, or with parts exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from npllm import blocks
from npllm.arrays import Array, Namespace
from npllm.backend import Backend
from npllm.blocks import Router, top_k
from npllm.blocks.attention import softmax
from npllm.blocks.moe import eligible
from npllm.testing.mistakes import Mistake
from npllm.testing.rounding import FORMATS
from npllm.weights import Gate, Linear

Routed = tuple[Array, Array]


class Call(NamedTuple):
    """The operands of a router once its logits are known; `correction` is 0 where there is none."""

    xp: Namespace
    logits: Array
    correction: Array
    router: Router

    @property
    def scores(self) -> Array:
        if self.router.scores == "sigmoid":
            return blocks.sigmoid(self.xp, self.logits)
        return softmax(self.xp, self.logits.copy())

    def right(self) -> Routed:
        return blocks.route(self.xp, self.logits, self.router, self.correction)

    def by(self, **rule: object) -> Routed:
        """With another rule."""
        return self._replace(router=self.router._replace(**rule)).right()  # type: ignore[arg-type]

    def chosen(self, ranks: Array) -> Array:
        """The experts that are best by `ranks`."""
        return top_k(self.xp, eligible(self.xp, ranks, self.router), self.router.experts_per_token)

    def weighed(self, index: Array, scores: Array) -> Routed:
        """The weights of these experts by these scores."""
        weight = self.xp.take_along_axis(scores, index, axis=-1)
        if self.router.normalise:
            weight = weight / (self.xp.sum(weight, axis=-1, keepdims=True) + self.router.floor)
        return index, weight * self.router.scale


def routing(name: str, wrong: Callable[[Call], Routed]) -> Mistake:
    class Changed(Backend):
        def route(self, h_MD: Array, w: Gate, /, router: Router) -> Routed:
            logits = self.linear(h_MD, w.gate)
            zero: Linear = Linear(self.xp.zeros(logits.shape[-1], dtype=logits.dtype))
            return wrong(Call(self.xp, logits, self.dense((w.correction or zero).weight), router))

    return Mistake(name, Changed)


def softmax_of_the_chosen(x: Call) -> Routed:
    index, _ = x.right()
    chosen = x.xp.take_along_axis(x.logits, index, axis=-1)
    return index, softmax(x.xp, chosen) * x.router.scale


def without_correction(x: Call) -> Routed:
    return x._replace(correction=0.0 * x.correction).right()


def correction_in_the_weights(x: Call) -> Routed:
    return x.weighed(x.right()[0], x.scores + x.correction)


def correction_subtracted(x: Call) -> Routed:
    return x._replace(correction=-x.correction).right()


def correction_on_the_logits(x: Call) -> Routed:
    return x.weighed(x.chosen(x.logits + x.correction), x.scores)


def correction_before_the_score(x: Call) -> Routed:
    return x._replace(logits=x.logits + x.correction, correction=0.0 * x.correction).right()


def highest_of_ties(x: Call) -> Routed:
    backwards = x._replace(logits=x.logits[:, ::-1], correction=x.correction[::-1])
    index, weight = backwards.right()
    return x.logits.shape[-1] - 1 - index, weight


def last_weight_zero(x: Call) -> Routed:
    index, weight = x.right()
    weight = weight.copy()
    weight[:, -1] = 0.0
    return index, weight


def one_expert_twice(x: Call) -> Routed:
    """In place of the last one, the first again; of one alone, the next expert."""
    index, weight = x.right()
    index = index.copy()
    index[:, -1] = index[:, 0] if index.shape[1] > 1 else (index[:, 0] + 1) % x.logits.shape[-1]
    return index, weight


def other_scores(x: Call) -> Routed:
    return x.by(scores="softmax" if x.router.scores == "sigmoid" else "sigmoid")


def scores_in_bf16(x: Call) -> Routed:
    scores = FORMATS["bf16"].round(x.scores.astype("float64")).astype(x.scores.dtype)
    return x.weighed(x.chosen(scores + x.correction), scores)


def weights_of_the_next_rank(x: Call) -> Routed:
    index, weight = x.right()
    return index, x.xp.roll(weight, 1, axis=-1)


def experts_in_one_row(x: Call) -> Routed:
    """The numbers of all tokens' experts, read as if a token had one: token m gets the m-th, with its weights in order."""
    index, weight = x.right()
    return x.xp.repeat(index.ravel()[: len(index)][:, None], index.shape[1], axis=1), weight


def weight_of_another_token(x: Call) -> Routed:
    index, weight = x.right()
    return index, x.xp.roll(weight, 1, axis=0)


def one_more_group(x: Call) -> Routed:
    return x.by(kept_groups=min(x.router.kept_groups + 1, x.router.groups))


def zero_in_other_groups(x: Call) -> Routed:
    """Ranks outside the kept groups become 0, and win where those inside are negative."""
    ranks = (x.logits if x.router.by == "logits" else x.scores) + x.correction
    kept = eligible(x.xp, ranks, x.router)
    return x.weighed(top_k(x.xp, x.xp.where(np.isfinite(kept), kept, 0.0), x.router.experts_per_token), x.scores)


def groups_without_correction(x: Call) -> Routed:
    kept = eligible(x.xp, x.scores, x.router)
    ranks = x.xp.where(np.isfinite(kept), x.scores + x.correction, kept)
    return x.weighed(top_k(x.xp, ranks, x.router.experts_per_token), x.scores)


def groups_interleaved(x: Call) -> Routed:
    """Expert e is taken to be in group e mod groups."""
    order = np.arange(x.logits.shape[-1]).reshape(-1, x.router.groups).T.ravel()
    index, weight = x._replace(logits=x.logits[:, order], correction=x.correction[order]).right()
    return x.xp.asarray(order)[index], weight


def sum_over_all(x: Call) -> Routed:
    """Normalised by the sum of all experts' scores, not of the chosen."""
    index, _ = x.right()
    scores = x.scores / x.xp.sum(x.scores, axis=-1, keepdims=True) if x.router.normalise else x.scores
    return index, x.xp.take_along_axis(scores, index, axis=-1) * x.router.scale


def other_ranking(x: Call) -> Routed:
    return x.by(ranking="max" if x.router.ranking == "pair" else "pair")


MISTAKES = (
    routing("softmax after top-k, over the chosen only", softmax_of_the_chosen),
    routing("weights not renormalised", lambda x: x.by(normalise=False)),
    routing("weights renormalised though not asked", lambda x: x.by(normalise=True)),
    routing("normalised by the sum over all experts", sum_over_all),
    routing("scale dropped", lambda x: x.by(scale=1.0)),
    routing("floor missing in the normalisation", lambda x: x.by(floor=0.0)),
    routing("correction ignored", without_correction),
    routing("correction leaks into the weights", correction_in_the_weights),
    routing("correction subtracted", correction_subtracted),
    routing("correction added to logits, not to scores, for the choice", correction_on_the_logits),
    routing("correction added to the logits", correction_before_the_score),
    routing("group limit ignored", lambda x: x.by(groups=1, kept_groups=1)),
    routing("one group too many kept", one_more_group),
    routing("groups ranked by the other rule (best, two best)", other_ranking),
    routing("groups ranked without the correction", groups_without_correction),
    routing("groups taken to be interleaved", groups_interleaved),
    routing("experts outside the kept groups ranked 0, not excluded", zero_in_other_groups),
    routing("ties to the highest index", highest_of_ties),
    routing("one expert too few: the last weight is zero", last_weight_zero),
    routing("one expert twice, the last one missing", one_expert_twice),
    routing("softmax for sigmoid, or sigmoid for softmax", other_scores),
    routing("scores in bfloat16", scores_in_bf16),
    routing("weights of the next rank", weights_of_the_next_rank),
    routing("weights of the token before", weight_of_another_token),
    routing("expert numbers flattened: one expert per token", experts_in_one_row),
)
