"""Sampling: the probabilities that tokens are drawn from, after temperature, top-k, top-p and min-p in that order.

Each of the three keeps likely tokens and drops others, so what is kept is an upper set: no token that is out is likelier
than one that is in. Where exactly it ends, rounding may decide: how far is told by two counts, the fewest and the most
tokens that a correct kernel may keep (`Cut`), and tokens as likely as the last one are all in or out as the kernel likes.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.sampling import Sampling, most_likely, probabilities
from npllm.testing.case import Case, Draw
from npllm.testing.estimate import Estimate, divided, exact, exponential, growth, plus, rounded, summed, times
from npllm.testing.operation import Arrays, Operation, Settings
from npllm.testing.ops.feed import activation
from npllm.testing.ops.sampling_mistakes import MISTAKES, by_row
from npllm.testing.rounding import Format, Rounding


def run(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    """By the backend's `sample`, which only one with a mistake has; else by npllm.sampling, as every backend draws."""
    sample = getattr(be, "sample", functools.partial(by_row, probabilities))
    return (sample(be.to_numpy(activation(be, inputs["logits"])), Sampling(**settings)),)


# -- the budget -------------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """The fewest and the most tokens that a correct kernel may keep, and how many are kept in truth."""

    fewest: int
    most: int
    true: int


def estimate(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    s, logits = Sampling(**settings), inputs["logits"]
    if s.temperature == 0.0:
        return (exact(np.arange(logits.shape[1]) == np.argmax(logits, axis=1)[:, None]),)
    at, output = rounding.format("accumulate"), rounding.format("output")
    drawn = got["probs"] if got is not None else [None] * len(logits)
    rows = [row_of(row, s, at, output, mine) for row, mine in zip(logits, drawn, strict=True)]
    parts = zip(*rows, strict=True) if rows else [logits] * 3
    return (Estimate(*(np.array(part).reshape(logits.shape) for part in parts)),)


def row_of(logits_N: Array, s: Sampling, at: Format, output: Format, got_N: Array | None) -> Estimate:
    """One row's probabilities, of the tokens that the kernel kept if it may keep them."""
    order = most_likely(logits_N, len(logits_N))
    scaled = scaled_logits(logits_N, s, at)
    cut = cut_of(scaled.map(lambda x: x[order]), s, at)
    kept = order[: cut.true]
    out = probabilities_of(scaled, kept, at)
    if got_N is not None:
        smallest = 2.0 ** (output.least - output.bits + 1)
        mine = np.flatnonzero((got_N > 0.0) | ((out.value > 0.0) & (out.value <= out.bound + smallest)))
        if len(mine) != cut.true or (np.sort(kept) != mine).any():
            out = probabilities_of(scaled, mine, at) if permitted(logits_N[order], logits_N, mine, cut) else out
    whole = rounded(out, output)
    inside = out.value > 0.0
    return Estimate(out.value, np.where(inside, whole.variance, 0.0), np.where(inside, whole.bound, out.bound))


def scaled_logits(logits_N: Array, s: Sampling, at: Format) -> Estimate:
    """`(x - max x) / temperature`; a kernel may divide first, or multiply by the rounded reciprocal."""
    centred = plus(exact(logits_N), exact(-np.max(logits_N, keepdims=True)), at)
    step = at.spacing(logits_N) + at.spacing(np.max(logits_N, keepdims=True))
    loose = Estimate(centred.value, centred.variance + step**2 / 12.0, centred.bound + step)
    # The reciprocal's error is one for all: it is taken at its largest.
    unit = at.unit / s.temperature
    inverse = Estimate(np.full(1, 1.0 / s.temperature), np.full(1, unit**2), np.full(1, 2.0 * unit))
    return times(loose, inverse, at)


def probabilities_of(scaled: Estimate, kept: Array, at: Format) -> Estimate:
    """Softmax over the `kept` tokens, 0 for others."""
    weights = exponential(np.exp, scaled.map(lambda x: x[kept]), at)
    shares = divided(weights, summed(weights, at), at)
    out = exact(np.zeros(scaled.value.shape))
    for whole, part in zip(out, shares, strict=True):
        whole[kept] = part
    return out


def cut_of(sorted_logits: Estimate, s: Sampling, at: Format) -> Cut:
    """Where the set of kept tokens ends, of logits in descending order."""
    N = len(sorted_logits.value)
    base = min(s.top_k, N) if s.top_k else N
    # A kernel that keeps all of a tie at the cut of top-k normalises over more of them, and its nucleus is larger.
    widest = int(np.sum(sorted_logits.value >= sorted_logits.value[base - 1]))
    cuts = [Cut(base, widest, base)]
    if s.top_p < 1.0:
        weights = exponential(np.exp, sorted_logits, at)
        narrow, wide = (nucleus(weights, among, s.top_p, at) for among in (base, widest))
        cuts.append(Cut(narrow.fewest, wide.most, narrow.true))
    if s.min_p > 0.0:
        threshold = math.log(s.min_p)
        slack = sorted_logits.bound + 8.0 * at.unit * (1.0 + abs(threshold))
        cuts.append(Cut(*(int(np.sum(sorted_logits.value >= threshold + side * slack)) for side in (1.0, -1.0, 0.0))))
    return Cut(*(max(1, min(part)) for part in zip(*cuts, strict=True)))


def nucleus(sorted_weights: Estimate, among: int, top_p: float, at: Format) -> Cut:
    """The fewest of the first `among` that reach `top_p`: a token is kept if those before it do not reach it yet."""
    weights = sorted_weights.map(lambda x: x[:among])
    shares = weights.value / weights.value.sum()
    before = np.cumsum(shares) - shares
    slack = np.sum(weights.bound) / weights.value.sum() + growth(among + 4, at)
    return Cut(*(int(np.sum(before < top_p + side * slack)) for side in (-1.0, 1.0, 0.0)))


def permitted(descending_N: Array, logits_N: Array, kept: Array, cut: Cut) -> bool:
    """Whether a correct kernel may keep these: neither too few nor too many, and none that is out is likelier."""
    if len(kept) < cut.fewest or logits_N[kept].min() < descending_N[cut.most - 1]:
        return False
    return bool(np.delete(logits_N, kept).max(initial=-np.inf) <= logits_N[kept].min())


# -- cases ------------------------------------------------------------------------------------------------------------


def rows(B: int, N: int, size: float = 2.0, top: float = 0.0) -> Draw:
    """Normal logits of deviation `size`; a tenth of the tokens, at least one, stands about `top` higher."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        logits = size * dice.standard_normal((B, N))
        logits[:, : max(1, N // 10)] += top
        return {"logits": scale * dice.permuted(logits, axis=1)}

    return draw


def levels(B: int, N: int) -> Draw:
    """Logits of four values: many tokens share the maximum."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        return {"logits": scale * dice.integers(0, 4, (B, N)).astype(np.float64)}

    return draw


def case(name: str, draw: Draw, tags: str, scales: tuple[float, ...] = (1.0,), /, **settings: Any) -> Case:
    return Case("sample", name, draw, {"temperature": 1.0} | settings, frozenset(tags.split()), scales)


ALL: dict[str, Any] = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05}

CASES = (
    case("greedy", rows(64, 500), "greedy", temperature=0.0),
    case("greedy-ties", levels(64, 100), "greedy tie", temperature=0.0),
    # f16 takes many neighbours of bf16 for equal below 2^-17.
    case("greedy-tiny", rows(512, 100), "greedy wide-range", (2.0**-20,), temperature=0.0),
    case("plain", rows(16, 1000), "basic", (1.0, 4.0)),
    case("warm", rows(16, 1000), "temperature", temperature=0.7),
    case("hot", rows(16, 1000), "temperature", temperature=2.0),
    case("cold", rows(16, 1000), "temperature", temperature=0.1),
    case("large", rows(4, 5000), "large temperature top-k top-p", **ALL),
    case("large-flat", rows(3, 5000, 0.02), "large flat", temperature=0.7),
    case("large-nucleus", rows(4, 5000, 3.0), "large top-p", top_p=0.9),
    case("one-kept", rows(64, 300), "top-k", top_k=1),
    case("few-kept", rows(64, 300), "top-k", top_k=8, temperature=0.7),
    case("all-kept", rows(16, 300), "top-k", top_k=300),
    case("more-than-all-kept", rows(16, 300), "top-k", top_k=301),
    case("ties-at-the-cut", levels(16, 100), "top-k tie", top_k=10),
    case("small-nucleus", rows(64, 300), "top-p", (1.0, 3.0), top_p=0.1),
    case("nucleus", rows(64, 300), "top-p temperature", (1.0, 2.0), top_p=0.8, temperature=0.7),
    case("wide-nucleus", rows(64, 300), "top-p temperature", top_p=0.99, temperature=2.0),
    case("peaked-nucleus", rows(64, 300, 1.0, 8.0), "top-p", top_p=0.95),
    case("flat-nucleus", rows(16, 300, 0.1), "top-p flat", top_p=0.5),
    case("min-p", rows(64, 300), "min-p", min_p=0.1),
    case("min-p-hot", rows(64, 300), "min-p temperature", min_p=0.3, temperature=2.0),
    case("min-p-one", rows(64, 300), "min-p", min_p=1.0),
    case("all", rows(64, 300), "top-k top-p min-p temperature", (1.0, 2.0), **ALL),
    case("top-k-top-p", rows(64, 300), "top-k top-p", top_k=12, top_p=0.6),
    case("far-from-zero", rows(16, 300, 1.0, 64.0), "offset", (1.0, 8.0), temperature=0.7),
    case("tiny", rows(1, 2), "odd", temperature=0.7),
    case("one-token", rows(3, 1), "odd", temperature=0.7, top_p=0.5),
    case("no-rows", rows(0, 100), "empty", temperature=0.7),
)  # fmt: skip

OPERATIONS = (
    Operation(
        name="sample",
        about="the probabilities that a token is drawn from, after temperature, top-k, top-p and min-p",
        inputs={"logits": ("batch", "token")},
        outputs={"probs": ("batch", "token")},
        run=run,
        estimate=estimate,
        chooses=True,
        cases=CASES,
        mistakes=MISTAKES,
        backends=False,
    ),
)
