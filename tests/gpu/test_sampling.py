"""Tokens drawn by sample.cu against npllm.sampling, with the same logits and the same chance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllm.arrays import Array
from npllm.backends.cupy_gpu.sampling import settings_of
from npllm.errors import NumericsError
from npllm.sampling import Sampler, Sampling
from tests.gpu.emulator import EmulatedBackend, checked, emulated

pytestmark = [emulated, checked]

# The kernel is compiled for a vocabulary: one read by fours, one that cannot be, and one of a single token.
SIZES = (2300, 333, 1)

WAYS = (
    {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 2.0, "top_p": 0.8}, {"temperature": 0.1, "top_k": 8}, {"temperature": 1.0, "min_p": 0.3},
    {"temperature": 1.0, "top_k": 12, "top_p": 0.6}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1e-310},
    {"temperature": 1.0, "top_p": 1e-9}, {"temperature": 1.0, "top_k": 5000}, {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 100.0, "top_p": 0.5}, {"temperature": 1.0, "top_k": 1, "top_p": 0.5},
)  # fmt: skip


def logits(kind: str, rows: int, size: int, seed: int) -> Array:
    dice = np.random.default_rng(seed)
    plain = 3.0 * dice.standard_normal((rows, size))
    drawn = {
        "plain": plain,
        "ties": dice.integers(0, 4, (rows, size)),
        "equal": np.zeros((rows, size)),
        "huge": plain * 1e37,
        "tiny": plain * 1e-42,
        "far": plain + 3e4,
        "peaked": np.where(plain == plain.max(axis=1, keepdims=True), 60.0, plain),
        "signed zeros": np.where(plain > 0, 0.0, -0.0),
    }
    return drawn[kind].astype(np.float32)


KINDS = ("plain", "ties", "equal", "huge", "tiny", "far", "peaked", "signed zeros")


def drawn(logits_WN: Array, samplers: list[Sampler]) -> list[int]:
    be = EmulatedBackend("float32")
    tokens_W = be.empty(len(samplers), dtype="int64")
    be.sample(be.device.upload(logits_WN), be.device.upload(settings_of(samplers)), tokens_W)
    return be.to_numpy(tokens_W).tolist()


def samplers_of(sampling: Sampling, rows: int, size: int) -> list[Sampler]:
    return [Sampler(sampling, stream, [0], size) for stream in range(rows)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_draws_the_same(kind: str, size: int) -> None:
    """Every row of a batch has settings of its own."""
    ours, theirs = ([Sampler(Sampling(**way, seed=5), r, [0], size) for r, way in enumerate(WAYS)] for _ in range(2))
    logits_WN = logits(kind, len(WAYS), size, 7)
    assert drawn(logits_WN, ours) == [each.draw(row) for each, row in zip(theirs, logits_WN, strict=True)]


@pytest.mark.parametrize("kind", ["plain", "ties", "peaked"])
def test_few_of_many(kind: str) -> None:
    """As many parts of a row as there are at most: what their largest logits say of the k-th one is a bound, no more."""
    size, ks = 4 * 256 * 65 + 3, (1, 2, 20, 64, 65)
    ours, theirs = ([Sampler(Sampling(temperature=1.0, top_k=k), r, [0], size) for r, k in enumerate(ks)] for _ in range(2))
    logits_WN = logits(kind, len(ks), size, 11)
    assert drawn(logits_WN, ours) == [each.draw(row) for each, row in zip(theirs, logits_WN, strict=True)]


@given(
    st.integers(0, 2**31), st.sampled_from(KINDS), st.floats(0.05, 5.0), st.integers(0, 40), st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
)  # fmt: skip
def test_any_settings(seed: int, kind: str, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Also what lies between: settings that no list holds. A draw within rounding of a boundary may fall either way."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    ours, theirs = (samplers_of(sampling, 2, SIZES[0]) for _ in range(2))
    logits_WN = logits(kind, 2, SIZES[0], seed)
    got, want = drawn(logits_WN, ours), [each.draw(row) for each, row in zip(theirs, logits_WN, strict=True)]
    assert sum(a != b for a, b in zip(got, want, strict=True)) <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    logits_WN = logits("plain", 3, SIZES[0], 1)
    logits_WN[1, 2299] = bad
    tokens = drawn(logits_WN, samplers_of(Sampling(temperature=temperature), 3, SIZES[0]))
    assert tokens[1] == -1
    assert min(tokens[0], tokens[2]) >= 0
    be = EmulatedBackend("float32")
    with pytest.raises(NumericsError, match="not finite"):
        be.taken(np.array(tokens), None, samplers_of(Sampling(), 3, SIZES[0]))
