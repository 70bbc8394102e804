"""From logits to a token: penalties, temperature, top-k, top-p, min-p, one random stream per row.

The order is that of transformers and vLLM: bias and penalties on the logits, then the temperature, then top-k, top-p and
min-p on what is left. Everything here works on one row's logits on the host. What bends logits (`adjusted`) rounds to their
own type, so that a device that does the same gets the same bits; what follows is in float64.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.config import shown
from npllm.errors import ArgumentError, NumericsError

# Candidates that top-p looks at before it sorts the whole vocabulary.
LIKELY = 1024

# Logits of which only the largest is looked at first where few are to be kept.
BLOCK = 64

# Far beyond any logit, and far from an overflow.
LARGEST_BIAS = 1e30

# What penalties and biases make of a logit lies between this and its negative, which is what a ban makes of it.
LARGEST_LOGIT = float(np.finfo(np.float32).max)


class Alternative(NamedTuple):
    """A token that could have come, and its log-probability under the model."""

    token: int
    logprob: float


class Drawn(NamedTuple):
    """The tokens of a step, int64 [W], and the logits they were drawn from, NumPy [W, N].

    A backend that draws on its device may leave the logits out where no row asked for log-probabilities. `seconds`: what a
    device spent on the step, where that may be more than the caller waited for.
    """

    tokens_W: Array
    logits_WN: Array | None
    seconds: float = 0.0


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    temperature          0 is greedy (the lowest id wins a tie).
    top_k                keep the k most likely tokens; 0 keeps all.
    top_p                keep the smallest set of most likely tokens whose probabilities reach top_p, in (0, 1].
    min_p                keep tokens at least min_p times as likely as the most likely one, in [0, 1].
    repetition_penalty   divides positive and multiplies negative logits of tokens seen in prompt or answer (Keskar et al.
                         2019, arXiv 1909.05858), in [0.01, 100]; 1 is none.
    presence_penalty     subtracted from the logit of every token of the answer so far, in [-2, 2].
    frequency_penalty    subtracted once per occurrence in the answer so far, in [-2, 2].
    logit_bias           token id -> added to its logit; -inf bans it.
    seed                 row r draws from the stream (seed, r).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        _between("temperature", self.temperature, 0, 100)
        _between("top_p", self.top_p, 0, 1, open_below=True)
        _between("min_p", self.min_p, 0, 1)
        _between("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _between("presence_penalty", self.presence_penalty, -2, 2)
        _between("frequency_penalty", self.frequency_penalty, -2, 2)
        whole("top_k", self.top_k, 0)
        whole("seed", self.seed, 0)
        if not isinstance(self.logit_bias, Mapping):
            raise ArgumentError(f"logit_bias = {shown(self.logit_bias)} must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            whole("logit_bias: token id", token, 0)
            if not _is_number(bias) or not (bias == -math.inf or abs(bias) <= LARGEST_BIAS):
                raise ArgumentError(f"logit_bias: {shown(bias)} for token {token} must be a finite number or -inf")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _between(name: str, value: Any, low: float, high: float, *, open_below: bool = False) -> None:
    if not _is_number(value) or not (low < value if open_below else low <= value) or not value <= high:
        opening = "(" if open_below else "["
        raise ArgumentError(f"{name} = {shown(value)} must be a number in {opening}{low}, {high}]")


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value`, a whole number in [least, most]; anything else is an ArgumentError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ArgumentError(f"{name} = {shown(value)} must be a whole number of at least {least}")
    if most is not None and value > most:
        raise ArgumentError(f"{name} = {shown(value)} must be at most {most}")
    return int(value)


class Sampler:
    """Draws the tokens of one row; it remembers what the row has seen."""

    def __init__(self, sampling: Sampling, stream: int, prompt: Sequence[int], vocabulary: int) -> None:
        self.sampling, self.vocabulary = sampling, vocabulary
        beyond = [token for token in sampling.logit_bias if token >= vocabulary]
        if beyond:
            raise ArgumentError(f"logit_bias: token id {beyond[0]} is beyond the vocabulary of {vocabulary}")
        if list(sampling.logit_bias.values()).count(-math.inf) == vocabulary:
            raise ArgumentError("logit_bias bans every token")
        self.random = np.random.default_rng([sampling.seed, stream])
        self._foreseen: deque[float] = deque()
        self.prompted = frozenset(prompt)
        self.said: list[int] = []
        self.counts: dict[int, int] = {}

    def draw(self, logits_N: Array) -> int:
        """The next token from one row of logits; NumericsError if they are not finite."""
        check_finite(logits_N)
        if self.adjusts:
            logits_N = adjusted(logits_N, self.sampling, self.prompted, self.counts)
        return self.take(self._choose(logits_N))

    def take(self, token: int) -> int:
        """Remember a token that was drawn; -> the same."""
        self.said.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1
        return token

    def chance(self) -> float:
        """What decides the next draw, in [0, 1): the row's next random number, or 0 where nothing is left to chance."""
        chance = self.foreseen(0)
        if self._foreseen:
            self._foreseen.popleft()
        return chance

    def foreseen(self, draws: int) -> float:
        """What `chance` will be after so many more draws; asking spends nothing."""
        if self.sampling.temperature == 0.0:
            return 0.0
        while len(self._foreseen) <= draws:
            self._foreseen.append(float(self.random.random()))
        return self._foreseen[draws]

    @property
    def adjusts(self) -> bool:
        """Whether penalties or biases change the logits before a token is drawn."""
        s = self.sampling
        return s.repetition_penalty != 1.0 or bool(s.presence_penalty or s.frequency_penalty or s.logit_bias)

    @property
    def greedy(self) -> bool:
        """Whether the next token is the first with the largest logit, whatever chance says."""
        return self.sampling.temperature == 0.0 and not self.adjusts

    def _choose(self, logits_N: Array) -> int:
        s = self.sampling
        if s.temperature == 0.0:
            return int(np.argmax(logits_N))
        tokens, weights = candidates(logits_N, s)
        mass = np.cumsum(weights)
        index = np.searchsorted(mass, self.chance() * mass[-1], side="right")
        return int(tokens[min(int(index), len(tokens) - 1)])


def adjusted(logits_N: Array, sampling: Sampling, prompted: Collection[int], counts: Mapping[int, int]) -> Array:
    """Logits as bias and penalties make them, in their own type; each step is rounded to it once.

    `prompted`: tokens of the prompt; `counts`: how often each token of the answer was said. A token's bias is added first;
    if it was seen at all, the repetition penalty divides it if it is positive and multiplies it if not; if it was said,
    `presence_penalty + frequency_penalty * times` is subtracted. In the end a logit is cut to what float32 can hold: one
    that is banned is the least of these.
    """
    s, logits_N = sampling, logits_N.copy()
    biased = np.fromiter(s.logit_bias, np.int64)
    logits_N[biased] += np.fromiter(s.logit_bias.values(), logits_N.dtype)
    with np.errstate(over="ignore"):
        if s.repetition_penalty != 1.0:
            seen = np.fromiter({*prompted, *counts}, np.int64)
            values, penalty = logits_N[seen], logits_N.dtype.type(s.repetition_penalty)
            logits_N[seen] = np.where(values > 0, values / penalty, values * penalty)
    if counts and (s.presence_penalty or s.frequency_penalty):
        said, times = np.fromiter(counts, np.int64), np.fromiter(counts.values(), logits_N.dtype)
        presence, frequency = logits_N.dtype.type(s.presence_penalty), logits_N.dtype.type(s.frequency_penalty)
        logits_N[said] -= presence + frequency * times
    return np.clip(logits_N, -LARGEST_LOGIT, LARGEST_LOGIT)


def candidates(logits_N: Array, sampling: Sampling) -> tuple[Array, Array]:
    """The tokens that may be drawn at a temperature above 0 [C], and in which proportion, float64 [C]."""
    s = sampling
    tokens = contenders(logits_N, s.top_k or len(logits_N))
    logits = logits_N[tokens].astype(np.float64)
    logits -= logits.max()
    with np.errstate(over="ignore"):  # a temperature next to zero sends all but the likeliest to -inf
        logits /= s.temperature
    if 0 < s.top_k < len(logits_N):
        # Also where there are just so many: the order in which chance meets tokens must not depend on how they were found.
        kept = most_likely(logits, s.top_k)
        tokens, logits = tokens[kept], logits[kept]
    if s.top_p < 1.0:
        kept = _nucleus(logits, s.top_p)
        tokens, logits = tokens[kept], logits[kept]
    if s.min_p > 0.0:
        kept = logits >= logits.max() + math.log(s.min_p)
        tokens, logits = tokens[kept], logits[kept]
    return tokens, np.exp(logits - logits.max())


def probabilities(logits_N: Array, sampling: Sampling) -> Array:
    """What each token is drawn with, float64 [N]; at temperature 0 all goes to one. Penalties and biases take no part."""
    out_N = np.zeros(len(logits_N))
    if sampling.temperature == 0.0:
        out_N[np.argmax(logits_N)] = 1.0
        return out_N
    tokens, weights = candidates(logits_N, sampling)
    out_N[tokens] = weights / weights.sum()
    return out_N


def check_finite(logits: Array) -> None:
    """NumericsError when a model's logits hold NaN or infinity."""
    if not np.isfinite(logits).all():
        raise not_finite()


def not_finite() -> NumericsError:
    """What is said of logits that hold NaN or infinity."""
    return NumericsError("the model's logits are not finite (NaN or infinity): its weights are damaged or overflowed")


def contenders(logits: Array, k: int) -> Array:
    """Ids in ascending order, among them those of the k largest logits and of all that equal the last of these.

    The k-th largest of the maxima of blocks bounds the k-th largest of all from below, and is found much sooner.
    """
    blocks = len(logits) // BLOCK
    if blocks <= k:
        return np.arange(len(logits))
    maxima = logits[: blocks * BLOCK].reshape(blocks, BLOCK).max(axis=1)
    return np.flatnonzero(logits >= np.partition(maxima, -k)[-k])


def most_likely(logits: Array, k: int) -> Array:
    """The ids of the k largest logits, in descending order; ties go to the lowest id."""
    ids = contenders(logits, k)
    few = logits[ids]
    kept = np.flatnonzero(few >= np.partition(few, -k)[-k])
    return ids[kept[np.argsort(-few[kept], kind="stable")]][:k]


def _nucleus(logits: Array, top_p: float) -> Array:
    weights = np.exp(logits - logits.max())
    total = weights.sum()
    for count in (min(LIKELY, len(logits)), len(logits)):
        order = most_likely(logits, count)
        reached = np.cumsum(weights[order])
        if reached[-1] >= top_p * total:
            break
    return order[: int(np.searchsorted(reached, top_p * total)) + 1]


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def alternatives(logprobs_N: Array, count: int) -> list[Alternative]:
    """The `count` most likely tokens."""
    ids: Iterable[int] = most_likely(logprobs_N, min(count, len(logprobs_N))) if count else ()
    return [Alternative(int(token), float(logprobs_N[token])) for token in ids]
