"""The corpus of the norms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from npllm.arrays import Array
from npllm.testing.case import Case, Draw


def rows(shape: tuple[int, ...], size: float = 1.0, offset: float | None = 0.0, bias: bool = False) -> Draw:
    """Rows of normal numbers of about `size`, with a gain around 1 - `offset`; no gain where `offset` is None."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        drawn = {"x": size * scale * dice.standard_normal(shape)}
        if offset is not None:
            drawn["weight"] = 1.0 - offset + 0.3 * dice.standard_normal(shape[-1])
        return drawn | ({"bias": 0.2 * dice.standard_normal(shape[-1])} if bias else {})

    return draw


def altered(draw: Draw, alter: Callable[[np.random.Generator, Array], Array]) -> Draw:
    """The same rows after `alter(dice, x)`."""

    def drawn(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        inputs = draw(dice, scale)
        return inputs | {"x": alter(dice, inputs["x"])}

    return drawn


def of_many_sizes(dice: np.random.Generator, x: Array) -> Array:
    return x * np.logspace(-4.0, 3.5, len(x))[:, None]


def some_zero(dice: np.random.Generator, x: Array) -> Array:
    return np.where(np.arange(len(x))[:, None] % 3 == 1, 0.0, x)


def one_outlier(dice: np.random.Generator, x: Array) -> Array:
    """Each row has one number a thousand times as large, as the residual streams of trained models have."""
    x[np.arange(len(x)), dice.integers(x.shape[-1], size=len(x))] *= 1000.0
    return x


def far_from_zero(dice: np.random.Generator, x: Array) -> Array:
    return 1000.0 + 16.0 * x


def nearly_constant(dice: np.random.Generator, x: Array) -> Array:
    """A thousand, but for one number in 64, the next one that bf16 has: the least spread that its 8 bits can show."""
    return 1000.0 + 4.0 * (dice.random(x.shape) < 1.0 / 64.0)


def all_equal(dice: np.random.Generator, x: Array) -> Array:
    """Whole numbers of few bits, whose sums are exact in any order."""
    return np.broadcast_to(np.rint(120.0 * x[:, :1]), x.shape) * 8.0


def rms(name: str, draw: Draw, tags: str, scales: tuple[float, ...] = (1.0,), eps: float = 1e-6, **more: float) -> Case:
    return Case("rms_norm", name, draw, {"eps": eps} | more, frozenset(tags.split()), scales)


RMS_NORM_CASES = (
    rms("plain", rows((256, 128)), "basic"),
    rms("wide", rows((16, 4096)), "basic large"),
    rms("no-gain", rows((64, 128), offset=None), "no-gain"),
    rms("offset", rows((128, 256), offset=1.0), "offset basic", offset=1.0),
    rms("tiny", rows((64, 256), 1e-3), "tiny", (1.0, 1e-2)),
    rms("tiny-offset", rows((64, 160), 1e-3, 1.0), "tiny offset", (3.0, 1e-2), offset=1.0),
    rms("tiny-eps5", rows((64, 128), 3e-3), "tiny", (1.0, 1e-2), 1e-5),
    rms("huge", rows((64, 256), 1e3), "huge", (0.1, 1.0, 10.0), 1e-5),
    rms("mixed-sizes", altered(rows((96, 128)), of_many_sizes), "tiny huge", (1.0, 0.1)),
    rms("zero-rows", altered(rows((96, 64)), some_zero), "zero"),
    rms("outlier", altered(rows((64, 256)), one_outlier), "outlier", (0.1, 1.0)),
    rms("heads", rows((32, 8, 64)), "heads"),
    rms("heads-offset", rows((16, 4, 256), offset=1.0), "heads offset", offset=1.0),
    rms("heads-no-gain", rows((24, 16, 128), offset=None), "heads no-gain", eps=1e-5),
    rms("heads-odd", rows((11, 5, 80), 0.01), "heads odd tiny"),
    rms("odd-width", rows((127, 37)), "odd"),
    rms("prime-width", rows((17, 1021)), "odd"),
    rms("width-one", rows((67, 1)), "odd"),
    rms("one-token", rows((1, 2880)), "decode"),
    rms("no-tokens", rows((0, 64)), "empty"),
)


def ln(name: str, draw: Draw, tags: str, scales: tuple[float, ...] = (1.0,), eps: float = 1e-5) -> Case:
    return Case("layer_norm", name, draw, {"eps": eps}, frozenset(tags.split()), scales)


LAYER_NORM_CASES = (
    ln("plain", rows((256, 128), bias=True), "basic"),
    ln("wide", rows((16, 4096), bias=True), "basic large"),
    ln("narrow", rows((512, 16), bias=True), "odd"),
    ln("tiny", rows((64, 256), 1e-3, bias=True), "tiny", (1.0, 1e-2)),
    ln("huge", rows((64, 256), 1e3, bias=True), "huge", (1.0, 10.0)),
    ln("far-from-zero", altered(rows((64, 512), bias=True), far_from_zero), "mean"),
    ln("nearly-constant", altered(rows((64, 1024), bias=True), nearly_constant), "mean"),
    ln("constant-rows", altered(rows((64, 384), bias=True), all_equal), "mean constant"),
    ln("odd-width", rows((127, 37), bias=True), "odd"),
    ln("outlier", altered(rows((64, 256), bias=True), one_outlier), "outlier", eps=1e-6),
    ln("one-token", rows((1, 768), bias=True), "decode"),
    ln("no-tokens", rows((0, 64), bias=True), "empty"),
)
