"""The corpus of RoPE and its angles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.blocks.rope import Rope, frequencies
from npllm.blocks.rope import angles as angles_of
from npllm.testing.case import Case, Draw

# -- angles: budget ---------------------------------------------------------------------------------------------------


# Draws positions [M] of so many tokens.
Places = Callable[[np.random.Generator, int], Array]


def counting(start: int, step: int = 1) -> Places:
    return lambda dice, tokens: start + step * np.arange(tokens)


def anywhere(below: int, start: int = 0) -> Places:
    """Unsorted, with repetitions."""
    return lambda dice, tokens: dice.integers(start, below, size=tokens)


def two_rows(dice: np.random.Generator, tokens: int) -> Array:
    """Two sequences of a packed batch, the second in the middle of its text."""
    half = tokens // 2
    return np.concatenate([7 + np.arange(half), 1000 + np.arange(tokens - half)])


def turned(tokens: int, heads: int, width: int, dim: int, theta: float, places: Places) -> Draw:
    """Heads of normal numbers of about `scale`; the first `dim` features turn."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        positions, rope = places(dice, tokens).astype(np.int32), Rope(dim, theta)
        cos, sin = angles_of(np, rope, positions, "float64")
        return {
            "x": scale * dice.standard_normal((tokens, heads, width)),
            "cos": cos.astype(np.float32),
            "sin": sin.astype(np.float32),
            "positions": positions,
            "inv_freq": frequencies(rope, "float64").inverse_J.astype(np.float32),
            "theta": np.full(1, theta, np.float32),
        }

    return draw


def at_positions(tokens: int, places: Places) -> Draw:
    return lambda dice, scale: {"positions": places(dice, tokens).astype(np.int32)}


def rope_case(name: str, draw: Draw, tags: str, scales: tuple[float, ...] = (1.0,), **settings: Any) -> Case:
    return Case("rope", name, draw, settings, frozenset(tags.split()), scales)


def angles_case(name: str, tokens: int, places: Places, tags: str, **settings: Any) -> Case:
    return Case("angles", name, at_positions(tokens, places), settings, frozenset(tags.split()))


ROPE_CASES = (
    rope_case("halves-d128", turned(128, 4, 128, 128, 5e5, counting(0)), "halves prefill"),
    rope_case("interleaved-d128", turned(128, 4, 128, 128, 5e5, counting(3)), "interleaved prefill", interleaved=True),
    rope_case("halves-d64", turned(96, 6, 64, 64, 1e6, anywhere(2000)), "halves unsorted", (1e-2, 30.0)),
    rope_case("interleaved-d64", turned(96, 3, 64, 64, 1e4, two_rows), "interleaved ragged", interleaved=True),
    rope_case("partial", turned(64, 4, 96, 32, 1e6, counting(10)), "halves partial"),
    rope_case("partial-interleaved", turned(64, 4, 80, 40, 5e5, anywhere(900)), "interleaved partial", interleaved=True),
    rope_case("packed", turned(64, 8, 64, 64, 5e5, two_rows), "halves ragged"),
    rope_case("decode", turned(7, 16, 128, 128, 5e5, anywhere(4096, 300)), "halves decode unsorted"),
    rope_case("decode-one", turned(1, 32, 128, 128, 5e5, counting(2049)), "halves decode"),
    rope_case("position-zero", turned(1, 32, 128, 128, 5e5, counting(0)), "halves decode"),
    rope_case("far", turned(64, 4, 128, 128, 5e5, anywhere(131072, 65537)), "halves large unsorted"),
    rope_case("far-interleaved", turned(64, 4, 64, 64, 1e4, counting(131008)), "interleaved large", interleaved=True),
    rope_case("one-pair", turned(257, 3, 2, 2, 1e4, counting(0)), "halves odd"),
    rope_case("one-head-d96", turned(101, 1, 96, 96, 1e6, counting(11, 17)), "halves odd mqa"),
    rope_case("no-tokens", turned(0, 4, 64, 64, 1e4, counting(0)), "halves empty"),
)

LLAMA3 = {
    "dim": 128, "theta": 5e5, "kind": "llama3", "factor": 8.0, "original": 8192, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip
DEEPSEEK = {"dim": 64, "theta": 1e4, "kind": "yarn", "factor": 40.0, "original": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
UNCUT = {"dim": 64, "theta": 150000.0, "kind": "yarn", "factor": 32.0, "original": 4096, "truncate": False}

ANGLES_CASES = (
    angles_case("default-d128", 256, counting(0), "default", dim=128, theta=5e5),
    angles_case("default-d64", 256, anywhere(4096), "default unsorted", dim=64, theta=1e4),
    angles_case("default-d96", 128, counting(1, 31), "default odd", dim=96, theta=1e6),
    angles_case("default-far", 256, anywhere(131072, 65537), "default large unsorted", dim=128, theta=5e5),
    angles_case("default-last", 64, counting(131008), "default large", dim=64, theta=1e6),
    angles_case("packed", 128, two_rows, "default ragged", dim=128, theta=1e6),
    angles_case("decode", 1, counting(4097), "default decode", dim=128, theta=5e5),
    angles_case("one-pair", 300, counting(0), "default odd", dim=2, theta=1e4),
    angles_case("no-tokens", 0, counting(0), "default empty", dim=64, theta=1e4),
    angles_case("linear", 256, anywhere(8192), "linear", dim=128, theta=1e6, kind="linear", factor=8.0),
    angles_case("linear-far", 128, anywhere(131072, 65537), "linear large", dim=64, theta=1e4, kind="linear", factor=4.0),
    angles_case("llama3", 256, anywhere(8192), "llama3", **LLAMA3),
    angles_case("llama3-far", 256, anywhere(131072, 65537), "llama3 large", **LLAMA3),
    angles_case("llama3-32", 128, anywhere(4096), "llama3", **{**LLAMA3, "dim": 64, "factor": 32.0}),
    angles_case("yarn", 256, anywhere(4096), "yarn", **DEEPSEEK),
    angles_case("yarn-far", 256, anywhere(131072, 65537), "yarn large", **DEEPSEEK),
    angles_case("yarn-equal-mscales", 128, anywhere(4096), "yarn mscale", mscale=1.0, mscale_all_dim=1.0, **DEEPSEEK),
    angles_case("yarn-two-mscales", 128, anywhere(4096), "yarn mscale", mscale=1.0, mscale_all_dim=0.707, **DEEPSEEK),
    angles_case("yarn-given-factor", 128, anywhere(4096), "yarn", attention_factor=1.25, **DEEPSEEK),
    angles_case("yarn-uncut", 256, anywhere(8192), "yarn", **UNCUT),
)
