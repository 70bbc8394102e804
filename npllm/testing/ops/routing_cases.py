"""The corpus of `route`. Logits of a row are distinct in every format but where a case is about ties."""

from __future__ import annotations

from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.testing.case import Case, Draw

# Distinct logits are drawn from multiples of 2^-5 below 8, which all formats hold.
STEP, MOST = 2.0**-5, 8.0


def distinct(dice: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Rows of distinct numbers, about normal with deviation 2."""
    grid = np.arange(-MOST + STEP, MOST, STEP)
    # The first to arrive, each at a rate of its own, are a draw without replacement by those rates.
    arrivals = dice.standard_exponential((shape[0], len(grid)), np.float32) * np.exp(grid**2 / 8.0).astype(np.float32)
    rows = dice.permuted(grid[np.argpartition(arrivals, shape[1], axis=1)[:, : shape[1]]], axis=1)
    # Rows are moved against each other, too little to make two numbers one: else all rows would share a few scores.
    return rows + dice.uniform(-STEP / 8.0, STEP / 8.0, (shape[0], 1))


def spread(tokens: int, experts: int, correction: float = 0.0, shift: float = 0.0, away: float = 0.0) -> Draw:
    """Distinct logits plus `away`; with a correction (float32) around `shift`, where it or its deviation is given."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        drawn = {"logits": scale * distinct(dice, (tokens, experts)) + away}
        if correction or shift:
            drawn["correction"] = (shift + correction * dice.standard_normal(experts)).astype(np.float32)
        return drawn

    return draw


def tied(tokens: int, experts: int, levels: int, correction: bool = False) -> Draw:
    """Logits of few levels, which differ from row to row, so that many are equal; the correction has two."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        height, lowest = dice.integers(16, 64, (tokens, 1)) / 32.0, dice.integers(-64, 64, (tokens, 1)) / 64.0
        drawn = {"logits": scale * (height * dice.integers(0, levels, (tokens, experts)) + lowest)}
        if correction:
            drawn["correction"] = dice.choice(np.array([-0.125, 0.25], np.float32), experts)
        return drawn

    return draw


def close(tokens: int, experts: int) -> Draw:
    """Neighbouring numbers of each format around 1 and -1, where scores nearly agree."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        near = 1.0 + dice.integers(0, 4, (tokens, experts)) * 2.0**-7 + dice.integers(0, 3, (tokens, experts)) * 2.0**-23
        return {"logits": scale * near * dice.choice([-1.0, 1.0], (tokens, experts), p=[0.2, 0.8])}

    return draw


def case(name: str, draw: Draw, tags: str, scales: tuple[float, ...] = (1.0,), /, **settings: Any) -> Case:
    return Case("route", name, draw, settings, frozenset(tags.split()), scales)


V3: dict[str, Any] = {
    "experts_per_token": 8, "scores": "sigmoid", "groups": 8, "kept_groups": 4, "ranking": "pair", "normalise": True,
    "floor": 1e-20, "scale": 2.5,
}  # fmt: skip
KIMI = V3 | {"groups": 1, "kept_groups": 1}
V2: dict[str, Any] = {"experts_per_token": 6, "groups": 8, "kept_groups": 3, "floor": 1e-20, "scale": 16.0}
LLAMA4: dict[str, Any] = {"experts_per_token": 1, "scores": "sigmoid", "by": "logits"}
WIDE = (0.25, 1.0, 4.0)

CASES = (
    case("mixtral", spread(600, 8), "softmax normalised", WIDE, experts_per_token=2, normalise=True),
    case("qwen2", spread(600, 60), "softmax", WIDE, experts_per_token=4),
    case("qwen3", spread(512, 128), "softmax normalised large", (0.25, 1.0), experts_per_token=8, normalise=True),
    case("deepseek-v2-lite", spread(512, 64), "softmax", (1.0,), experts_per_token=6, floor=1e-20),
    case("deepseek-v2", spread(700, 160), "softmax groups large", (0.25, 1.0), **V2),
    case("mistral4", spread(512, 128), "softmax normalised", (1.0,), experts_per_token=4, normalise=True, floor=1e-20),
    case("deepseek-v3", spread(512, 256, 0.2), "sigmoid correction groups normalised large", (0.25, 1.0), **V3),
    case("kimi", spread(400, 384, 0.1, 1.0), "sigmoid correction normalised large", (0.5,), **KIMI),
    case("sigmoid-plain", spread(512, 32, 0.2), "sigmoid correction", WIDE, experts_per_token=4, scores="sigmoid"),
    case("llama4", spread(2000, 16), "sigmoid logits", WIDE, **LLAMA4),
    case("llama4-saturated", spread(500, 16, away=40.0), "sigmoid logits saturated tie", (1.0,), **LLAMA4),
    case("negative-corrections", spread(512, 64, 0.3, -2.0), "sigmoid correction groups normalised", (1.0,), **V3),
    case("strong-corrections", spread(512, 64, 1.5), "sigmoid correction groups normalised", (1.0,), **V3),
    case("max-of-groups", spread(512, 64, 0.3), "sigmoid correction groups", (1.0,), **V3 | {"ranking": "max"}),
    case("one-group-kept", spread(512, 32), "sigmoid groups", (1.0,), **V3 | {"experts_per_token": 4, "kept_groups": 1}),
    case("saturated", spread(256, 64, 0.2, away=24.0), "sigmoid correction saturated tie groups normalised", (1.0,), **V3),
    case("vanishing", spread(256, 64, 0.2, away=-56.0), "sigmoid correction saturated tie groups normalised", (1.0,), **V3),
    case("peaked", spread(512, 16), "softmax saturated", (32.0,), experts_per_token=4, normalise=True),
    case("ties", tied(256, 16, 3), "softmax tie normalised", (1.0,), experts_per_token=4, normalise=True),
    case("ties-in-groups", tied(256, 64, 3, True), "sigmoid tie groups correction normalised", (1.0,), **V3),
    case("ties-in-groups-softmax", tied(256, 40, 2), "softmax tie groups", (1.0,), **V2),
    case("ties-of-logits", tied(256, 16, 3), "sigmoid logits tie", (1.0,), **LLAMA4),
    case("all-equal", tied(16, 8, 1), "softmax tie normalised", (1.0,), experts_per_token=2, normalise=True),
    case("near-ties", close(512, 32), "softmax close tie", (1.0,), experts_per_token=4, normalise=True),
    case("near-ties-sigmoid", close(512, 64), "sigmoid close tie groups normalised", (1.0,), **V3),
    # Numbers between 2^-25 and 2^-17: f16 takes neighbours of bf16 for equal there.
    case("tiny-logits", spread(2000, 16), "sigmoid logits tie wide-range", (2.0**-20,), **LLAMA4),
    case("every-expert", spread(512, 8), "softmax", (1.0,), experts_per_token=8),
    case("four-experts", spread(1025, 4), "softmax odd", (1.0,), experts_per_token=1),
    case("one-token", spread(1, 128), "softmax decode", (1.0,), experts_per_token=8, normalise=True),
    case("three-tokens", spread(3, 256, 0.2), "sigmoid correction groups decode odd normalised", (1.0,), **V3),
    case("no-tokens", spread(0, 16), "softmax empty", (1.0,), experts_per_token=2),
)  # fmt: skip
