"""Logits as adjust.cu makes them: the canon's bits, whatever the row's history, and float64's formulas but for rounding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllm.arrays import Array
from npllm.backends.cupy_gpu.history import History
from npllm.backends.cupy_gpu.sampling import settings_of
from npllm.sampling import Sampler, Sampling, adjusted
from tests.gpu.emulator import EmulatedBackend, checked, emulated
from tests.gpu.emulator.arrays import STREAM, plain
from tests.gpu.test_sampling import KINDS, logits

pytestmark = [emulated, checked]

# More than a block's logits, and as many as one has.
SIZES = (2300, 1024, 1)

WAYS: tuple[dict[str, Any], ...] = (
    {}, {"repetition_penalty": 1.3}, {"repetition_penalty": 0.01}, {"presence_penalty": 0.7}, {"frequency_penalty": -2.0},
    {"presence_penalty": -0.3, "frequency_penalty": 0.1, "repetition_penalty": 1.1},
    {"logit_bias": {0: 2.5, 1: -1e30, 1023: 1e30, 1024: -math.inf, 2299: -3.3}},
    {"logit_bias": {0: -math.inf, 3: 0.1}, "repetition_penalty": 100.0, "frequency_penalty": 2.0, "presence_penalty": 2.0},
)  # fmt: skip


def sampler_of(way: dict[str, Any], size: int, prompt: list[int], said: list[int], stream: int = 0) -> Sampler:
    """A row's sampler that has seen and said these tokens, as far as the vocabulary has them."""
    bias = {token: value for token, value in way.get("logit_bias", {}).items() if token < size and size > 1}
    sampler = Sampler(Sampling(**{**way, "logit_bias": bias}), stream, [token % size for token in prompt], size)
    for token in said:
        sampler.take(token % size)
    return sampler


def on_device(logits_WN: Array, samplers: list[Sampler]) -> Array:
    be = EmulatedBackend("float32")
    history = History(be.device, samplers, len(samplers), 1)
    history.tell(samplers)
    STREAM.finish("what was told")
    args = be.device.upload(logits_WN), be.device.upload(settings_of(samplers)), history.entries_WT2
    return be.to_numpy(be.adjusted(*args))


PROMPT, SAID = [5, 0, 2299, 5, 700, 1023, 1024], [7, 5, 7, 7, 2299, 0, 1100]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_canons_bits(kind: str, size: int) -> None:
    samplers = [sampler_of(way, size, PROMPT, SAID[:r]) for r, way in enumerate(WAYS)]
    logits_WN = logits(kind, len(WAYS), size, 3)
    got = on_device(logits_WN, samplers)
    for row, logits_N, s in zip(got, logits_WN, samplers, strict=True):
        assert np.array_equal(row, adjusted(logits_N, s.sampling, s.prompted, s.counts)), s.sampling


@given(st.data())
def test_float64s_formulas(data: st.DataObject) -> None:
    """Each token by itself: four roundings of float32, each relative to the largest number that it met."""
    size, token = 40, st.integers(0, 39)
    numbers = {"repetition_penalty": (0.0625, 16.0), "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0)}
    way: dict[str, Any] = {name: data.draw(st.floats(*ends, width=32)) for name, ends in numbers.items()}
    way["logit_bias"] = data.draw(st.dictionaries(token, st.floats(-50, 50, width=32)))
    s = sampler_of(way, size, data.draw(st.lists(token)), data.draw(st.lists(token)))
    logits_WN = logits("plain", 1, size, data.draw(st.integers(0, 99)))
    got, rule = on_device(logits_WN, [s])[0], s.sampling
    for n in range(size):
        biased = float(logits_WN[0, n]) + rule.logit_bias.get(n, 0.0)
        seen, times = n in s.prompted or n in s.said, s.said.count(n)
        repeated = biased * (1.0 if not seen else rule.repetition_penalty if biased < 0 else 1 / rule.repetition_penalty)
        less = rule.presence_penalty * (times > 0) + rule.frequency_penalty * times
        largest = 60.0 * max(1.0, abs(repeated / biased) if biased else 1.0) + 2.0 + 2.0 * times
        assert abs(got[n] - (repeated - less)) <= 4 * 2.0**-24 * largest


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_stay(bad: float) -> None:
    logits_WN = logits("plain", 1, 2300, 1)
    logits_WN[0, 5] = bad
    got = on_device(logits_WN, [sampler_of(WAYS[5], 2300, PROMPT, SAID)])
    assert np.array_equal(got[0, 5], logits_WN[0, 5], equal_nan=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("draw", [{}, {"temperature": 1.0}, {"temperature": 2.0, "top_k": 30, "top_p": 0.9}])
def test_tokens_of_a_history_that_the_device_keeps(draw: dict[str, Any], size: int) -> None:
    """Token after token: what it draws, it adds; told once, each row's entries are in the end what its sampler remembers."""
    ours, theirs = ([sampler_of(way | draw, size, PROMPT, [], r) for r, way in enumerate(WAYS)] for _ in range(2))
    be = EmulatedBackend("float32")
    history = History(be.device, ours, len(ours), 12)
    STREAM.log.clear()
    for turn in range(12):
        logits_WN = logits("plain", len(ours), size, turn) / 3
        history.tell(ours)
        STREAM.finish("what was told")
        tokens_W = be.empty(len(ours), dtype="int64")
        settings_WS = be.device.upload(settings_of(ours))
        be.sample(be.device.upload(logits_WN), settings_WS, tokens_W, history.entries_WT2)
        drawn = be.taken(be.to_numpy(tokens_W), None, ours, history=history)
        assert drawn.tokens_W.tolist() == [each.draw(row) for each, row in zip(theirs, logits_WN, strict=True)]
    assert [what for what, _ in STREAM.log].count("write") == len(ours)
    for sampler, entries_T2 in zip(ours, plain(history.entries_WT2), strict=True):
        if sampler.sampling.repetition_penalty != 1.0:
            begin = len(sampler.sampling.logit_bias) + len(sampler.prompted)
            assert entries_T2[begin : begin + 12, 0].tolist() == sampler.said


def test_entries_are_told_once() -> None:
    """And again where another row stands in the place, or a row has got a token from elsewhere."""
    be = EmulatedBackend("float32")
    one, other = (sampler_of(WAYS[1], 50, [1, 2], [], r) for r in range(2))
    history = History(be.device, [one, other], 2, 8)

    def told(*samplers: Sampler) -> int:
        STREAM.log.clear()
        history.tell(samplers)
        return len(STREAM.log)

    assert told(one, other) == 2
    assert told(one, other) == 0
    one.take(3)
    history.agree([one])
    assert told(one, other) == 0
    one.take(4)
    assert told(one, other) == 1
    assert told(other, one) == 2
    assert told(sampler_of(WAYS[1], 50, [8], []), one) == 1
    assert history.holds([one], 5)
    assert not history.holds([one], 7)
    STREAM.finish("all")
