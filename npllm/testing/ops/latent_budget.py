"""The error budgets of latent attention: what a kernel may round in either of its two forms, and what becomes of it.

A softmax is what errors of scores pass through. To first order an error d_s of score s moves the output by
`p_s d_s (v_s - o)`; exactly, `o' - o = sum p_s (e^d_s - 1) (v_s - o) / sum p_s e^d_s`, which gives the bound.
Errors of a query are shared by all of its scores, and keys and values are made of the same latents: they are therefore
carried to the output exactly, feature by feature, by the covariance of keys and values under p.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.testing.estimate import (
    Estimate,
    exact,
    factor,
    growth,
    handed_on,
    plus,
    product,
    rms_norm,
    rounded,
    summation,
    times,
)
from npllm.testing.estimate import linear as projected
from npllm.testing.ops.attention import around, scores
from npllm.testing.ops.rope_mistakes import pairs
from npllm.testing.rounding import Format, Rounding

# No score is off by more than this, as an exponent: beyond it the bound is that of an average, whatever the weights.
MOST = 30.0

# How many units in the last place an exponential may be off by.
ULPS = 2.0

# What the variance grows by, as a factor less one, where all features of a row share a single error of a score: a row's mean
# square error may then be several times its expectation. Calibrated on correct kernels; it fades as more keys matter.
COMMON = 4.0


class Weights(NamedTuple):
    """Softmax weights of the keys, and how far a kernel's may be from them; leading axes are batch and head.

    p_TS         the weights; 0 where a key is not seen.
    variance_TS  of each score's own error. What comes from the query is not in it.
    bound_TS     no score is further off.
    error_TS     relative variance of the weight's rounding before it multiplies a value.
    """

    p_TS: Array
    variance_TS: Array
    bound_TS: Array
    error_TS: Array


def weights(q_TK: Estimate, k_SK: Estimate, seen_TS: Array, scale: float, rounding: Rounding) -> Weights:
    """Softmax of `scale q k` over what is seen."""
    at = rounding.format("accumulate")
    known = q_TK._replace(variance=np.zeros_like(q_TK.variance))
    s_TS = scores(known, k_SK.map(lambda x: np.swapaxes(x, -1, -2)), scale, None, rounding)
    seen = np.where(seen_TS, s_TS.value, -np.inf)
    below = seen - np.max(seen, axis=-1, keepdims=True)
    e_TS = np.exp(below)
    p_TS = e_TS / np.sum(e_TS, axis=-1, keepdims=True)
    # Subtracting the maximum, and the factor log2(e) of kernels that take powers of two.
    step = at.spacing(np.where(seen_TS, below, 0.0)) + at.spacing(s_TS.value)
    own = step + 2.0 * ULPS * at.unit
    error_TS = np.maximum(relative(p_TS, rounding.format("probs")), relative(e_TS, rounding.format("probs")))
    return Weights(p_TS, s_TS.variance + own**2 / 12.0, s_TS.bound + own, error_TS)


def relative(x: Array, to: Format) -> Array:
    """The relative variance of rounding to a format; 0 of 0."""
    there = x > 0.0
    return np.where(there, to.spacing(x) ** 2 / 12.0 / np.where(there, x, 1.0) ** 2, 0.0)


def variance_through(w: Weights, q_TK: Estimate, k_SK: Array, v_SV: Array, scale: float) -> Array:
    """The variance that errors of the scores, and the rounding of the weights, bring to `p v` [.., T, V]."""
    # A common part of all values passes through a softmax unchanged, whatever the scores.
    v_S, p = v_SV - np.mean(v_SV, axis=-2, keepdims=True), w.p_TS
    o_TV = p @ v_S
    moved = around(p**2 * w.variance_TS, v_S, o_TV) + shared(p, q_TK.variance, k_SK * scale, v_S, o_TV)
    # Weights may be rounded before or after they are divided by their sum, and the sum may be of either.
    rounding = p**2 * w.error_TS
    both = moved + np.maximum(around(rounding, v_S, o_TV), rounding @ v_SV**2)
    return both * (1.0 + COMMON / independent(p, v_S, o_TV)[..., None])


def independent(p_TS: Array, v_SV: Array, o_TV: Array) -> Array:
    """How many errors of scores an output row depends on, at least one [.., T]: the keys that matter, less one.

    All features of a row share them: where one or two keys have nearly all the weight, a row is off as a whole, and its
    mean square error scatters as that of a single number.
    """
    away_TS = np.sum(v_SV**2, axis=-1)[..., None, :] - 2.0 * o_TV @ np.swapaxes(v_SV, -1, -2)
    away_TS = np.maximum(away_TS + np.sum(o_TV**2, axis=-1, keepdims=True), 0.0) * p_TS**2
    squares = np.sum(away_TS**2, axis=-1)
    return np.maximum(np.sum(away_TS, axis=-1) ** 2 / np.where(squares > 0.0, squares, 1.0) - 1.0, 1.0)


def bound_through(w: Weights, v_SV: Array, probs: Format) -> Array:
    """The bound on the same errors."""
    centre = np.mean(v_SV, axis=-2, keepdims=True)
    v_S, p = v_SV - centre, w.p_TS
    o_TV = np.abs(p @ v_S)
    grown = p * np.expm1(np.minimum(w.bound_TS, MOST))
    least = np.sum(p * np.exp(-np.minimum(w.bound_TS, MOST)), axis=-1, keepdims=True)
    moved = (grown @ np.abs(v_S) + np.sum(grown, axis=-1, keepdims=True) * o_TV) / least
    furthest = np.max(np.abs(v_S), axis=-2, keepdims=True) + o_TV
    most = np.minimum((p + grown) / least, 1.0)
    smallest = np.where(p > 0.0, 2.0 ** (probs.least - probs.bits), 0.0)
    # Twice, for the weights and for their sum.
    return np.minimum(moved, furthest) + 2.0 * (most * probs.unit + smallest) @ (np.abs(v_SV) + np.abs(centre))


def shared(p_TS: Array, q_variance_TK: Array, k_SK: Array, v_SV: Array, o_TV: Array) -> Array:
    """What errors of queries do to the output: `sum_k var(q_k) cov(k_k, v)^2`, the covariance being that under p."""
    if not q_variance_TK.any():
        return np.zeros_like(o_TV)
    mean_TK = p_TS @ k_SK
    weighed_TKS = p_TS[..., None, :] * np.swapaxes(k_SK, -1, -2)[..., None, :, :]
    covariance_TKV = weighed_TKS @ v_SV[..., None, :, :] - mean_TK[..., None] * o_TV[..., None, :]
    return (q_variance_TK[..., None, :] @ covariance_TKV**2)[..., 0, :]


def mixed(p_TS: Array, v_SV: Estimate, at: Format) -> Estimate:
    """`p v` and the division by the sum of p, summed in `at`. Errors of p itself are not in it: see `variance_through`."""
    value, S = p_TS @ v_SV.value, p_TS.shape[-1]
    variance = p_TS**2 @ v_SV.variance + summation(value, p_TS**2 @ v_SV.value**2, S, at)
    variance = variance + value**2 * (summation(np.ones(1), np.sum(p_TS**2, axis=-1, keepdims=True), S, at) + at.unit**2)
    # The largest of the values' bounds counts: a kernel's weights are not quite p.
    carried = np.max(v_SV.bound, axis=-2, keepdims=True)
    return Estimate(value, variance, carried + growth(2 * S + 4, at) * (p_TS @ np.abs(v_SV.value) + carried))


def added(x: Estimate, variance: Array, bound: Array) -> Estimate:
    return Estimate(x.value, x.variance + variance, x.bound + bound)


class Parts(NamedTuple):
    """The operands of latent attention, heads first: q_BHTK, latent_B1SK, W_k and W_v of each head, and what is seen."""

    q: Array
    latent: Array
    up_k: Array
    up_v: Array
    seen_TS: Array
    scale: float

    @property
    def nope(self) -> int:
        return int(self.up_k.shape[-2])

    @property
    def width(self) -> int:
        """L, the compressed vector's."""
        return int(self.up_k.shape[-1])

    @property
    def compressed(self) -> Array:
        return self.latent[..., : self.width]


def absorbed(x: Parts, rounding: Rounding) -> Estimate:
    """Queries in the latent space, rounded to `hidden`; attention over latents, rounded to `hidden`; W_v."""
    at, hidden, factors = (rounding.format(point) for point in ("accumulate", "hidden", "factors"))
    q_HTK, up_k = factor(x.q, factors), factor(x.up_k, factors)
    q_HTL = rounded(product(q_HTK.map(lambda q: q[..., : x.nope]), up_k, at), hidden)
    q_HTK = joined(q_HTL, q_HTK.map(lambda q: q[..., x.nope :]))
    w = weights(q_HTK, factor(x.latent, factors), x.seen_TS, x.scale, rounding)
    lift = np.swapaxes(x.up_v, -1, -2)
    moved = bound_through(w, x.compressed, rounding.format("probs"))
    o_HTL = mixed(w.p_TS, factor(x.compressed, factors), at)
    # Rounding follows the value where errors of the scores have moved it; what they do to the output is added below,
    # in the space of values: in the latent one they are anything but independent.
    o_HTL = rounded(added(o_HTL, np.zeros_like(moved), moved), hidden)
    out = product(o_HTL, factor(lift, factors), at)
    v_HSV = x.compressed @ lift
    variance = variance_through(w, q_HTK, x.latent, v_HSV, x.scale)
    return added(out, variance, bound_through(w, v_HSV, rounding.format("probs")))


def expanded(x: Parts, rounding: Rounding) -> Estimate:
    """Keys and values of all heads, rounded to `hidden`, then attention."""
    at, hidden, factors = (rounding.format(point) for point in ("accumulate", "hidden", "factors"))
    c, q, up_k, up_v = (factor(part, factors) for part in (x.compressed, x.q, x.up_k, x.up_v))
    k_HSN, v_HSV = (rounded(projected(c, up, at), hidden) for up in (up_k, up_v))
    turned_HSJ = np.broadcast_to(x.latent[..., x.width :], (*k_HSN.value.shape[:-1], x.latent.shape[-1] - x.width))
    k_HSK = joined(k_HSN, factor(turned_HSJ, factors))
    w = weights(q, k_HSK, x.seen_TS, x.scale, rounding)
    variance = variance_through(w, q, k_HSK.value, v_HSV.value, x.scale)
    return added(mixed(w.p_TS, v_HSV, at), variance, bound_through(w, v_HSV.value, rounding.format("probs")))


def attention(x: Parts, rounding: Rounding) -> Estimate:
    """Either form, rounded to `output`; the budget of what a kernel may do is the larger of both."""
    output = rounding.format("output")
    general = rounded(larger(absorbed(x, rounding), expanded(x, rounding)), output)
    lone = (np.sum(x.seen_TS, axis=-1) == 1)[:, None]
    if not lone.any():
        return general
    return Estimate(*(np.where(lone, one, each) for one, each in zip(only(x, rounding), general, strict=True)))


def only(x: Parts, rounding: Rounding) -> Estimate:
    """The output of queries that see a single key: its weight is 1, no score matters, and nothing is rounded twice.

    For other queries, what comes out says nothing.
    """
    points = ("inputs", "factors", "accumulate", "hidden", "output")
    given, factors, at, hidden, output = (rounding.format(point) for point in points)
    lift, seen = factor(np.swapaxes(x.up_v, -1, -2), factors), np.eye(x.latent.shape[-2])[np.argmax(x.seen_TS, axis=-1)]
    c_TL = np.broadcast_to(seen @ x.compressed, (*x.q.shape[:-1], x.width))
    through_latent = rounded(product(nearly(handed_on(c_TL, given, hidden), at), lift, at), output)
    value = nearly(rounded(product(factor(c_TL, factors), lift, at), hidden), at)
    return larger(through_latent, value if hidden == output else rounded(value, output))


def nearly(x: Estimate, at: Format) -> Estimate:
    """`x` after a few roundings in `at`: times a weight that is 1, over a sum that is 1."""
    few = 4.0 * at.unit * np.abs(x.value)
    return added(x, few**2 / 4.0, few)


def latent(
    down_MF: Estimate, norm_L: Array, angles: tuple[Estimate, Estimate], eps: float, interleaved: bool, rounding: Rounding
) -> Estimate:
    """`[norm(c) | rope(k)]` of the projection `[c | k]`; `angles` are cosines and sines [M, J]."""
    at, L = rounding.format("accumulate"), len(norm_L)
    c_ML = rms_norm(down_MF.map(lambda x: x[:, :L]), norm_L, eps, 0.0, rounding.format("normed"), at)
    return joined(c_ML, rotated(down_MF.map(lambda x: x[:, L:]), angles, interleaved, at))


def rotated(x_MF: Estimate, angles: tuple[Estimate, Estimate], interleaved: bool, at: Format) -> Estimate:
    """All pairs of numbers turned by their angles."""
    cos, sin = angles
    first, second = pairs(cos.value.shape[-1], interleaved)
    a, b = x_MF.map(lambda x: x[:, first]), x_MF.map(lambda x: x[:, second])
    out = exact(np.zeros_like(x_MF.value))
    halves = (
        (first, plus(times(a, cos, at), times(b._replace(value=-b.value), sin, at), at)),
        (second, plus(times(b, cos, at), times(a, sin, at), at)),
    )
    for where, half in halves:
        for whole, part in zip(out, half, strict=True):
            whole[:, where] = part
    return out


def joined(*parts: Estimate) -> Estimate:
    """Parts of one array side by side, along the last axis."""
    return Estimate(*(np.concatenate(each, axis=-1) for each in zip(*parts, strict=True)))


def larger(x: Estimate, y: Estimate) -> Estimate:
    """Two ways to compute the same, of which a kernel may take either."""
    return Estimate(x.value, np.maximum(x.variance, y.variance), np.maximum(x.bound, y.bound))
