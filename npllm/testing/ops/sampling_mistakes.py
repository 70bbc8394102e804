"""What samplers are known to get wrong: rules in another order, off by one, or renormalised where they should not be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.sampling import Sampling, most_likely, probabilities
from npllm.testing.mistakes import Mistake
from npllm.testing.rounding import FORMATS

# One row's probabilities, of its logits [N] in float64.
Wrong = Callable[[Array, Sampling], Array]


def by_row(one: Wrong, logits_BN: Array, sampling: Sampling) -> Array:
    """`one` for each row -> float64 [B, N]."""
    return np.array([one(row.astype(np.float64), sampling) for row in logits_BN]).reshape(logits_BN.shape)


def sampling(name: str, wrong: Wrong) -> Mistake:
    """A mistake of a backend's `sample`, which Backend lacks: drawing is the host's part."""

    class Changed(Backend):
        def sample(self, logits_BN: Array, sampling: Sampling) -> Array:
            return by_row(wrong, logits_BN, sampling)

    return Mistake(name, Changed)


def other(rule: Callable[[Sampling], dict[str, Any]]) -> Wrong:
    """The right probabilities by another rule; greedy rows stay as they are."""
    return lambda x, s: probabilities(x, replace(s, **rule(s)) if s.temperature else s)


def stage(s: Sampling, *names: str) -> Sampling:
    """Only the rules of these names."""
    return Sampling(**{"temperature": 1.0} | {name: getattr(s, name) for name in names})


def kept(x: Array, s: Sampling, *names: str) -> Array:
    """The logits, -inf for tokens that these rules alone drop."""
    return np.where(probabilities(x, stage(s, *names)) > 0.0, x, -np.inf)


def shares(weights: Array) -> Array:
    return np.asarray(weights / weights.sum())


def rules_before_temperature(x: Array, s: Sampling) -> Array:
    return probabilities(kept(x, s, "top_k", "top_p", "min_p"), stage(s, "temperature")) if s.temperature else one_hot(x)


def one_hot(x: Array) -> Array:
    return probabilities(x, Sampling())


def nucleus_before_top_k(x: Array, s: Sampling) -> Array:
    return probabilities(kept(x, s, "temperature", "top_p"), replace(s, top_p=1.0)) if s.temperature else one_hot(x)


def min_p_before_temperature(x: Array, s: Sampling) -> Array:
    return probabilities(kept(x, s, "min_p"), replace(s, min_p=0.0)) if s.temperature else one_hot(x)


def last_dropped(x: Array, s: Sampling) -> Array:
    """The token that reaches top_p is left out, but never the only one."""
    right = probabilities(x, s)
    inside = np.flatnonzero(right)
    if s.top_p < 1.0 and len(inside) > 1:
        right[most_likely(np.where(right > 0.0, x, -np.inf), len(inside))[-1]] = 0.0
    return shares(right)


def one_more(x: Array, s: Sampling) -> Array:
    """The token behind the one that reaches top_p is kept too."""
    right = probabilities(x, s)
    if s.top_p == 1.0 or not s.temperature:
        return right
    inside = most_likely(x, min(len(x), int(np.count_nonzero(right)) + 1))
    wider = np.full(len(x), -np.inf)
    wider[inside] = x[inside]
    return probabilities(wider, stage(s, "temperature"))


def not_renormalised(x: Array, s: Sampling) -> Array:
    right = probabilities(x, s)
    return np.where(right > 0.0, probabilities(x, stage(s, "temperature")), 0.0) if s.temperature else right


def min_p_absolute(x: Array, s: Sampling) -> Array:
    """Probabilities are compared with min_p itself; the likeliest token always stays."""
    right = probabilities(x, replace(s, min_p=0.0))
    return shares(np.where((right >= s.min_p) | (right == right.max()), right, 0.0))


def highest_of_ties(x: Array, s: Sampling) -> Array:
    return probabilities(x[::-1], s)[::-1]


def spread_over_ties(x: Array, s: Sampling) -> Array:
    return shares((x == x.max()).astype(np.float64)) if not s.temperature else probabilities(x, s)


def scaled_in_bf16(x: Array, s: Sampling) -> Array:
    if not s.temperature:
        return one_hot(x)
    return probabilities(FORMATS["bf16"].round(x / s.temperature), replace(s, temperature=1.0))


def exponentials_in_bf16(x: Array, s: Sampling) -> Array:
    return shares(FORMATS["bf16"].round(probabilities(x, s)))


MISTAKES = (
    sampling("temperature ignored", other(lambda s: {"temperature": 1.0})),
    sampling("multiplied by the temperature", other(lambda s: {"temperature": 1.0 / s.temperature})),
    sampling("cold sampling taken for greedy", lambda x, s: probabilities(x, s) if s.temperature > 0.5 else one_hot(x)),
    sampling("top-k, top-p and min-p before the temperature", rules_before_temperature),
    sampling("min-p before the temperature", min_p_before_temperature),
    sampling("top-p before top-k", nucleus_before_top_k),
    sampling("nucleus one token short", last_dropped),
    sampling("nucleus one token too long", one_more),
    sampling("top-p ignored", other(lambda s: {"top_p": 1.0})),
    sampling("one token too many in top-k", other(lambda s: {"top_k": s.top_k + 1 if s.top_k else 0})),
    sampling("one token too few in top-k", other(lambda s: {"top_k": max(s.top_k - 1, 1) if s.top_k else 0})),
    sampling("top-k ignored", other(lambda s: {"top_k": 0})),
    sampling("not renormalised over the kept tokens", not_renormalised),
    sampling("min-p compared with probabilities, not with the largest", min_p_absolute),
    sampling("min-p ignored", other(lambda s: {"min_p": 0.0})),
    sampling("greedy: ties to the highest index", highest_of_ties),
    sampling("greedy: ties share the probability", spread_over_ties),
    sampling("scaled logits in bfloat16", scaled_in_bf16),
    sampling("weights in bfloat16 before the division", exponentials_in_bf16),
)
