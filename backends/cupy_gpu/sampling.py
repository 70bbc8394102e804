"""Drawing tokens on the device (sample.cu), by the rules of npllm.sampling and with its random numbers.

A row's random number does not depend on its logits, so the host draws it before the step. No logits have to come back, but
where a row asks for log-probabilities, which the host computes of them. Penalties and biases (adjust.cu) go by what
history.py keeps on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from npllm.arrays import Array
from npllm.backends.cupy_gpu.base import Base, groups
from npllm.backends.cupy_gpu.device import Argument, InOut, Out
from npllm.backends.cupy_gpu.history import History, counts_of
from npllm.sampling import Drawn, Sampler, not_finite

if TYPE_CHECKING:
    from npllm.generation import State

# Numbers of a row, as history.cuh lists them.
SETTINGS = 12

# Beyond it, 1 / temperature times a difference of 0 would not be 0.
SHARPEST = 1e300

# Logits of a row at most: the kernel adds masses of up to 2^44.
MOST_LOGITS = 1 << 19

# Of sample.cu: threads of a row; the parts, at most, in which its largest logit is looked for, and threads of each.
THREADS, PARTS, PART_THREADS = 512, 64, 256

# Of adjust.cu: logits of a block, and its threads.
ADJUSTED, ADJUST_THREADS = 1024, 256


def settings_of(samplers: Sequence[Sampler], draws: int = 0) -> Array:
    """What the kernel draws by after so many more draws, float64 [W, SETTINGS]; no random number is spent."""
    rows = [_numbers(each, draws) for each in samplers]
    return np.array(rows, np.float64).reshape(len(rows), SETTINGS)


def _numbers(sampler: Sampler, draws: int) -> tuple[float, ...]:
    s = sampler.sampling
    sharpness = 0.0 if s.temperature == 0.0 else 1.0 / s.temperature if s.temperature > 1.0 / SHARPEST else SHARPEST
    log_min_p = math.log(s.min_p) if s.min_p > 0.0 else -math.inf
    draw = sharpness, float(min(s.top_k, MOST_LOGITS)), s.top_p, log_min_p, sampler.foreseen(draws)
    counts = counts_of(sampler)
    counts = counts._replace(said=counts.said + draws * counts.recalls)
    return *draw, s.repetition_penalty, s.presence_penalty, s.frequency_penalty, *counts


class Draws(Base):
    """Tokens of logits."""

    def settings(self, state: State, vocabulary: int) -> Array | None:
        """What the step's tokens are drawn by on the device; None where the host has to draw them."""
        return None if self.dtype == "float64" or vocabulary >= MOST_LOGITS else settings_of(state.samplers)

    def sample(self, logits_WN: Array, settings_WS: Array, tokens_W: Array, entries_WT2: Array | None = None) -> None:
        """Draw a token of each row into `tokens_W`, -1 where logits are not finite; all lie on the device.

        Rows are adjusted by their entries, where these are given, and those that recall what they said get one more.
        """
        W, N = logits_WN.shape
        if not W:
            return
        logits_WN = self.plain(logits_WN)
        entries: tuple[Argument, ...] = None, 0
        if entries_WT2 is not None:
            logits_WN = self.adjusted(logits_WN, settings_WS, entries_WT2)
            entries = InOut(entries_WT2), entries_WT2.shape[1]
        parts = max(1, min(PARTS, N // (4 * PART_THREADS)))
        tops = self.empty(W, parts, dtype="uint64")
        self.launch("sample.cu", "find_tops", {"N": N}, (parts, W, 1), PART_THREADS, (logits_WN, Out(tops)))
        args = (logits_WN, tops, parts, settings_WS, *entries, Out(tokens_W))
        self.launch("sample.cu", "sample", {"N": N}, (W, 1, 1), THREADS, args)

    def adjusted(self, logits_WN: Array, settings_WS: Array, entries_WT2: Array) -> Array:
        """Logits as penalties and biases make them."""
        (W, N), out_WN = logits_WN.shape, self.empty(*logits_WN.shape)
        args = (logits_WN, N, settings_WS, entries_WT2, entries_WT2.shape[1], Out(out_WN))
        self.launch("adjust.cu", "adjust", {}, (groups(N, ADJUSTED), W, 1), ADJUST_THREADS, args)
        return out_WN

    def taken(
        self, tokens_W: Array, logits_WN: Array | None, samplers: Sequence[Sampler], seconds: float = 0.0,
        history: History | None = None,
    ) -> Drawn:  # fmt: skip
        """Tokens that the device has drawn, which their rows remember, as their chance is spent; NumericsError."""
        tokens_W = tokens_W[: len(samplers)]
        if (tokens_W < 0).any():
            raise not_finite()
        for sampler, token in zip(samplers, tokens_W.tolist(), strict=True):
            sampler.chance()
            sampler.take(token)
        if history is not None:
            history.agree(samplers)
        return Drawn(tokens_W, logits_WN, seconds)
