"""Softmax attention in all its forms: dense, padded, ragged, paged; with windows, chunks, soft caps, sinks, grouped heads.

Every form says the same in its own way: for each row which queries it has, where its keys lie, and at which position its
first query stands. `rows_of` reads that off the arrays. Queries are a row's last positions (bottom-right alignment), so
that with fewer keys than queries the first queries stand before position 0 and see nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.blocks.masks import Mask
from npllm.cache import Keys, Rows
from npllm.testing.estimate import Estimate, applied, exact, factor, growth, product, rounded, summation
from npllm.testing.operation import Arrays, Operation, Settings
from npllm.testing.ops import factors, feed
from npllm.testing.ops.attention_cases import CASES
from npllm.testing.ops.attention_mistakes import MISTAKES
from npllm.testing.rounding import FORMATS, Format, Rounding

# No relative error of an exponential is followed beyond e to this power: it is a bound no longer.
LOST = 150.0

# The error of one score, and what the roundings of a row's probabilities have in common, move a whole row of outputs at
# once. A slice of an output has few rows, which may all have bad luck: such variances count this much (calibrated).
COMMON = 2.0


class Row(NamedTuple):
    """One sequence: its queries among all [M], its keys among all [N] in the order of their positions, and the position of
    its first query; the first key stands at position 0."""

    queries: slice
    keys_S: Array
    start: int

    def allowed(self, mask: Mask) -> Array:
        """What its queries see of its keys -> booleans [T, S]."""
        query_T = np.arange(self.start, self.start + self.queries.stop - self.queries.start)
        return np.asarray(mask.allowed(np, query_T, np.arange(len(self.keys_S))))


def rows_of(inputs: Arrays) -> list[Row]:
    """The rows of a case's arrays, in any of the four forms."""
    if "query_offsets" in inputs:
        queries, keys = (np.asarray(inputs[f"{name}_offsets"]).tolist() for name in ("query", "key"))
        bounds = zip(pairwise(queries), pairwise(keys), strict=True)
        return [Row(slice(a, b), np.arange(c, d), (d - c) - (b - a)) for (a, b), (c, d) in bounds]
    (B, T), (_, size) = inputs["q"].shape[:2], inputs["k"].shape[:2]
    lengths = np.asarray(inputs["lengths"]).tolist() if "lengths" in inputs else [size] * B
    rows = []
    for r, length in enumerate(lengths):
        s = np.arange(length)
        page = np.asarray(inputs["pages"])[r, s // size].astype(np.int64) if "pages" in inputs else r + s // size
        rows.append(Row(slice(r * T, (r + 1) * T), page * size + s % size, length - T))
    return rows


def packed(x: Array) -> Array:
    """Rows or pages one after the other: [.., .., H, K] -> [M, H, K]; what is packed stays."""
    return x.reshape(-1, *x.shape[-2:])


def mask_of(settings: Settings) -> Mask:
    return Mask(settings.get("window"), settings.get("chunk"))


def run_attention(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    rows = rows_of(inputs)
    lengths, nothing = tuple(len(row.keys_S) for row in rows), (0,) * len(rows)
    counts, starts = tuple(row.queries.stop - row.queries.start for row in rows), tuple(row.start for row in rows)
    positions = [np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
    plan = Rows(tuple(range(len(rows))), starts, counts, be.asarray(np.concatenate(positions)))
    k, v = feed.activation(be, inputs["k"]), feed.activation(be, inputs["v"])
    if "query_offsets" in inputs:
        begins = tuple(np.asarray(inputs["key_offsets"])[:-1].tolist())
        keys = Keys(k[None], v[None], nothing, lengths, nothing, begins, be.xp)
    elif "pages" in inputs:
        pages = tuple(map(tuple, np.asarray(inputs["pages"]).tolist()))
        keys = Keys(k, v, nothing, lengths, nothing, nothing, be.xp, pages=pages)
    else:
        keys = Keys(k, v, plan.slots, lengths, nothing, nothing, be.xp)
    sinks = feed.linear(be, inputs, "sinks") if "sinks" in inputs else None
    q, how = inputs["q"], {"scale": settings["scale"], "softcap": settings.get("softcap")}
    o_MHV = be.attention(feed.activation(be, packed(q)), keys, plan, mask=mask_of(settings), sinks=sinks, **how)
    return (o_MHV.reshape(*q.shape[:-1], v.shape[-1]),)


@factors.known("q", "k", "v")
def estimate_attention(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    """The budget, row by row: see `row_estimate`."""
    q_MHK, k_NGK, v_NGV = (packed(inputs[name]) for name in "qkv")
    total = exact(np.zeros((*q_MHK.shape[:2], v_NGV.shape[-1])))
    for row in rows_of(inputs):
        allowed_TS = row.allowed(mask_of(settings))
        # What none of its queries sees may hold anything.
        seen_S = allowed_TS.any(axis=0)
        k_SGK, v_SGV = k_NGK[row.keys_S[seen_S]], v_NGV[row.keys_S[seen_S]]
        allowed_TS = allowed_TS[:, seen_S]
        part = row_estimate(q_MHK[row.queries], k_SGK, v_SGV, allowed_TS, inputs.get("sinks"), settings, rounding)
        for whole, own in zip(total, part, strict=True):
            whole[row.queries] = own
    return (total.map(lambda x: x.reshape(*inputs["q"].shape[:-1], v_NGV.shape[-1])),)


def row_estimate(
    q_THK: Array, k_SGK: Array, v_SGV: Array, allowed_TS: Array, sinks_H: Array | None, settings: Settings,
    rounding: Rounding,
) -> Estimate:  # fmt: skip
    """One row -> estimate of o_THV; exactly 0 where a query sees no key."""
    (T, H, K), (_, G, V) = q_THK.shape, v_SGV.shape
    q_GRTK, k_G1KS = q_THK.reshape(T, G, H // G, K).transpose(1, 2, 0, 3), k_SGK.transpose(1, 2, 0)[:, None]
    v_G1SV, allowed_GRTS = v_SGV.transpose(1, 0, 2)[:, None], np.broadcast_to(allowed_TS, (G, H // G, *allowed_TS.shape))
    query, key, value = (factor(x, rounding.format("factors")) for x in (q_GRTK, k_G1KS, v_G1SV))
    scores_GRTS = scores(query, key, settings["scale"], settings.get("softcap"), rounding)
    if sinks_H is not None:
        # A sink is a key with an exact score and a value of 0, which everybody sees.
        sink_GRT1 = np.broadcast_to(sinks_H.reshape(G, H // G, 1, 1), (G, H // G, T, 1))
        pairs = zip(scores_GRTS, exact(sink_GRT1), strict=True)
        scores_GRTS = Estimate(*(np.concatenate([x, sink], axis=-1) for x, sink in pairs))
        value = value.map(lambda x: np.concatenate([x, np.zeros((G, 1, 1, V))], axis=2))
        allowed_GRTS = np.concatenate([allowed_GRTS, np.ones((G, H // G, T, 1), bool)], axis=-1)
        if rounding.format("scores").bits < rounding.format("accumulate").bits:
            scores_GRTS = taken_off(scores_GRTS, allowed_GRTS, rounding.format("scores"))
    at, probs, keys = rounding.format("accumulate"), rounding.format("probs"), len(k_SGK)
    o_GRTV = weighed(scores_GRTS, value, allowed_GRTS, at, probs, keys)
    o_THV = rounded(o_GRTV, rounding.format("output")).map(lambda x: x.transpose(2, 0, 1, 3).reshape(T, H, V))
    visible_T11 = np.any(allowed_TS, axis=1, keepdims=True)[..., None]
    return o_THV.map(lambda x: np.where(visible_T11, x, 0.0))


def scores(q: Estimate, k: Estimate, scale: float, softcap: float | None, rounding: Rounding) -> Estimate:
    """`softcap(scale q k)`: the product's own error, the scale's and the cap's.

    The scale is rounded itself, and may be applied to the query, to the score or together with log2(e). Where scores are
    declared coarser than arithmetic, a kernel may put them away once, at the end, or after every step: see `chain`.
    """
    at = rounding.format("accumulate")
    dot = product(q, k, at)
    raw = np.abs(scale * dot.value) * at.unit
    x = Estimate(scale * dot.value, scale**2 * dot.variance + raw**2, abs(scale) * dot.bound + 3.0 * raw)
    if softcap is not None:
        cap = softcap
        x = applied(lambda s: cap * np.tanh(s / cap), x, at)
    x, to = x._replace(variance=COMMON * x.variance), rounding.format("scores")
    if to.bits >= at.bits:
        kept = rounded(x, to)
        return kept._replace(variance=np.maximum(kept.variance, x.variance))
    # One rounding moves a whole row of outputs alike; where it is coarse, what it does is known and is taken if larger.
    stepwise, end = chain(dot.value, scale, softcap, to)
    ends = (each - x.value for each in (to.round(x.value), end))
    known = np.maximum(*(np.where(np.isfinite(each), each, 0.0) ** 2 for each in ends))
    variance = np.maximum(x.variance + stepwise.variance, x.variance + known)
    return Estimate(x.value, variance, x.bound + stepwise.bound)


def chain(dot: Array, scale: float, softcap: float | None, to: Format) -> tuple[Estimate, Array]:
    """`softcap(scale dot)` where each step is an array of its own in the format `to`, as in eager attention.

    That is a rounding of the product, one after the scale, and with a cap one each after the division by it, the tanh and
    the product with it -> the estimate of what they do, and what they give if nothing else is rounded.
    """
    fine = FORMATS["f64"]
    steps: list[Callable[[Array], Array]] = [lambda x: scale * x]
    if softcap is not None:
        cap = softcap
        steps += [lambda x: x / cap, np.tanh, lambda x: cap * x]
    estimate, end = rounded(exact(dot), to), to.round(dot)
    for step in steps:
        estimate, end = rounded(applied(step, estimate, fine, 0.0), to), to.round(step(end))
    return estimate, end


def taken_off(s: Estimate, allowed: Array, to: Format) -> Estimate:
    """`s` where the largest of a row, its sink among them, may have been taken off in `to` (gpt-oss in eager attention)."""
    top = np.max(np.where(allowed, s.value, -np.inf), axis=-1, keepdims=True)
    step = to.spacing(s.value - top)
    return Estimate(s.value, s.variance + COMMON * step**2 / 12.0, s.bound + 0.5 * step + to.unit * s.bound)


def weighed(s: Estimate, value: Estimate, allowed: Array, at: Format, probs: Format, keys: int) -> Estimate:
    """`softmax(s) v` over the last axis of s, where `allowed`; not rounded to the output's format yet. The first `keys`
    scores are those of keys, another is a sink's.

    With p the true probabilities and o = p v, to first order a correct kernel's error is a sum of
      p_j d_j (v_j - o)   d_j the error of score j, and of its exponential: normalising takes away what the row shares;
      p_j e_j             e_j the error of value j;
      r_j v_j             r_j the rounding of p_j to `probs`; few kernels normalise by the rounded ones;
      a plain loop's summation error of p v, and o times that of the sum of p, with the rescaling of online softmax.
    The bound holds beyond first order: exp(d) - 1 for d, probabilities as large as the errors of scores can make them.
    """
    s, v = s.map(lambda x: np.where(allowed, x, 0.0)), value.value
    shifted, S = np.where(allowed, s.value, -np.inf), allowed.shape[-1]
    top = np.max(shifted, axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0.0)
    p = np.exp(shifted - top)
    p /= np.maximum(np.sum(p, axis=-1, keepdims=True), 1.0)
    out = p @ v
    # Of the exponential and its argument, whose parts may have been rounded before they were subtracted.
    own = at.unit * (np.abs(s.value - top) + np.abs(top) + 4.0)

    squares, plain = np.sum(p**2, axis=-1, keepdims=True), S + S // 4 + 8
    limit = np.minimum(s.bound + own, LOST)
    more = 1.0 / np.maximum(np.sum(p * np.exp(-limit), axis=-1, keepdims=True), np.exp(-LOST))
    far = more * p * np.expm1(limit)

    # The exponential's error per error of its argument, which is p as long as errors are small.
    steep = np.minimum(far / np.maximum(limit, at.unit), 1.0)
    variance = (
        around(steep**2 * (s.variance + own**2 / 3.0), v, out) + rounding_of(p, v, out, probs, keys) + p**2 @ value.variance
    )
    # A tile of an online softmax multiplies the sums once more, hence more terms than keys.
    variance += summation(out, p**2 @ v**2, plain, at) + out**2 * summation(np.ones(1), squares, plain, at)

    sizes = (more * p * np.exp(limit)) @ (np.abs(v) + value.bound)
    # By Cauchy and Schwarz, sum far |v - o| <= sqrt(sum far) sqrt(sum far (v - o)^2).
    bound = np.sqrt(np.sum(far, axis=-1, keepdims=True) * around(far, v, out))
    bound += (more * p * np.exp(limit)) @ value.bound
    bound += probs.unit * sizes + 0.5 * probs.spacing(np.zeros(1)) * (allowed @ np.abs(v))
    return Estimate(out, variance, bound + growth(5 * S + 16, at) * (sizes + bound))


def around(weights: Array, v: Array, out: Array) -> Array:
    """`sum weights (v - out)^2` over the keys."""
    total = np.sum(weights, axis=-1, keepdims=True)
    return np.maximum(weights @ v**2 - 2.0 * out * (weights @ v) + out**2 * total, 0.0)


def rounding_of(p: Array, v: Array, out: Array, probs: Format, keys: int) -> Array:
    """The variance of `sum r v = sum r (v - o) + o sum r` where r is what rounding does to each probability.

    The largest is taken of what it does to those that are normalised (eager), and to those relative to the row's largest,
    or to the largest of a key where a sink comes in at the end (flash). Roundings of different numbers are independent;
    those of equal ones are equal, so the sum is taken as it is where it is larger than that of independent ones.
    """
    kinds = [probs.round(p) - p, relative_rounding(p, p, probs)]
    if keys < p.shape[-1]:
        kinds.append(relative_rounding(p * (np.arange(p.shape[-1]) < keys), p[..., :keys], probs))
    apart = [around(r**2, v, out) for r in kinds]
    sums = [np.sum(r, axis=-1, keepdims=True) ** 2 for r in kinds]
    squares = [COMMON * np.sum(r**2, axis=-1, keepdims=True) for r in kinds]
    return np.maximum.reduce(apart) + out**2 * np.maximum.reduce(sums + squares)


def relative_rounding(p: Array, among: Array, probs: Format) -> Array:
    """What rounding does to `p` as multiples of the largest number of a row of `among`."""
    top = np.max(among, axis=-1, keepdims=True, initial=0.0)
    relative = p / np.where(top > 0.0, top, 1.0)
    return top * (probs.round(relative) - relative)


OPERATIONS = (
    Operation(
        name="attention",
        about="softmax attention, causal, over dense, padded, ragged or paged keys",
        inputs={
            "q": ("batch", "query", "head", "width"),
            "k": ("batch", "key", "kv head", "width"),
            "v": ("batch", "key", "kv head", "feature"),
            "sinks": ("head",),
            "lengths": ("batch",),
            "pages": ("batch", "page"),
            "query_offsets": ("batch",),
            "key_offsets": ("batch",),
        },
        outputs={"out": ("batch", "query", "head", "feature")},
        run=run_attention,
        estimate=estimate_attention,
        cases=CASES,
        mistakes=MISTAKES,
    ),
)
