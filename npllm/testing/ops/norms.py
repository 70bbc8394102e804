"""RMSNorm in all its kinds, and LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.testing import estimate
from npllm.testing.case import Case, Draw
from npllm.testing.estimate import Estimate, exact, rounded
from npllm.testing.mistakes import Mistake
from npllm.testing.operation import Arrays, Operation, Settings
from npllm.testing.ops import feed
from npllm.testing.rounding import FORMATS, Rounding
from npllm.weights import Linear


def run_rms_norm(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    gain = feed.linear(be, inputs, "weight") if "weight" in inputs else None
    return (be.rms_norm(feed.activation(be, inputs["x"]), gain, settings["eps"], settings.get("offset", 0.0)),)


def run_layer_norm(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    return (be.layer_norm(feed.activation(be, inputs["x"]), feed.linear(be, inputs, "weight", "bias"), settings["eps"]),)


def estimate_rms_norm(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    at, normed = rounding.format("accumulate"), rounding.format("normed")
    x, weight, offset = exact(inputs["x"]), inputs.get("weight"), settings.get("offset", 0.0)
    return (rounded(estimate.rms_norm(x, weight, settings["eps"], offset, normed, at), rounding.format("output")),)


def estimate_layer_norm(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    at, x = rounding.format("accumulate"), exact(inputs["x"])
    out = estimate.layer_norm(x, inputs["weight"], inputs["bias"], settings["eps"], at)
    return (rounded(out, rounding.format("output")),)


# -- inputs -----------------------------------------------------------------------------------------------------------


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


# -- mistakes ---------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What a norm is called with: rows, gain and bias (None: it has none), eps, what is added to the gain."""

    x: Array
    gain: Array | None
    bias: Array | None
    eps: float
    offset: float = 0.0

    @property
    def size(self) -> Array:
        """The mean square of each row."""
        return self.x * self.x @ np.full((self.x.shape[-1], 1), 1.0 / self.x.shape[-1], self.x.dtype)

    @property
    def centred(self) -> Call:
        """The same with each row's mean taken off."""
        return self._replace(x=self.x - self.x.mean(-1, keepdims=True))

    def over(self, root: Array) -> Array:
        """Rows over `root`, times the gain, plus the bias."""
        out = self.x / root
        if self.gain is not None:
            out = out * (self.gain + self.offset)
        return out if self.bias is None else out + self.bias

    def normed(self, size: Array | None = None) -> Array:
        """Rows over their root mean square, or that of another mean square."""
        return self.over(((self.size if size is None else size) + self.eps) ** 0.5)


Change = Callable[[Call], Array]


def in_format(x: Array, name: str) -> Array:
    """`x` rounded to a format, in its own dtype."""
    return FORMATS[name].round(x.astype(np.float64)).astype(x.dtype)


def truncated(x: Array, name: str) -> Array:
    step = FORMATS[name].spacing(x.astype(np.float64))
    return (np.trunc(x / step) * step).astype(x.dtype)


def added_up(x: Array, name: str) -> Array:
    """The sum of each row, one number after another, each partial sum rounded to a format."""
    total = np.zeros_like(x[..., 0])
    for column in np.moveaxis(x, -1, 0):
        total = in_format(total + column, name)
    return total[..., None]


def rms_norm_with(name: str, change: Change) -> Mistake:
    class Changed(Backend):
        def rms_norm(self, x_D: Array, w: Linear | None, /, eps: float, offset: float = 0.0) -> Array:
            gain = None if w is None else self.to_numpy(self.dense(w.weight))
            return self.asarray(change(Call(self.to_numpy(x_D), gain, None, eps, offset)))

    return Mistake(name, Changed)


def layer_norm_with(name: str, change: Change) -> Mistake:
    class Changed(Backend):
        def layer_norm(self, x_D: Array, w: Linear, /, eps: float) -> Array:
            gain, bias = (self.to_numpy(self.dense(each)) for each in w)
            return self.asarray(change(Call(self.to_numpy(x_D), gain, bias, eps).centred))

    return Mistake(name, Changed)


def rounded_gain(n: Call) -> Array:
    return n._replace(gain=None if n.gain is None else in_format(n.gain + n.offset, "bf16"), offset=0.0).normed()


def rounded_rows(n: Call) -> Array:
    """Only where a gain follows: without one, it is the output's own rounding."""
    plain = n._replace(gain=None, bias=None).normed()
    return n._replace(x=in_format(plain, "bf16")).over(np.ones((), plain.dtype))


def neighbour_gain(n: Call) -> Array:
    return n._replace(gain=None if n.gain is None else np.roll(n.gain, 1)).normed()


def last_left_out(n: Call) -> Array:
    D = n.x.shape[-1]
    return n.normed(np.sum(n.x[..., :-1] ** 2, axis=-1, keepdims=True) / D)


def over_all_heads(n: Call) -> Array:
    """One mean for all heads of a token; of [M, D] the rows are right."""
    return n.normed(np.mean(n.size, axis=-2, keepdims=True) if n.x.ndim == 3 and n.x.size else None)


def sample_variance(n: Call) -> Array:
    D = n.x.shape[-1]
    return n.normed(n.size * np.divide(D, D - 1, dtype=n.x.dtype))


def squares_in_f16(n: Call) -> Array:
    return n.normed(np.mean(in_format(n.x * n.x, "f16"), axis=-1, keepdims=True))


def squares_added_in_bf16(n: Call) -> Array:
    return n.normed(added_up(n.x * n.x, "bf16") / n.x.shape[-1])


RMS_NORM_MISTAKES = (
    rms_norm_with("eps ten times too large", lambda n: n._replace(eps=10.0 * n.eps).normed()),
    rms_norm_with("eps outside the root", lambda n: n.over(n.size**0.5 + n.eps)),
    rms_norm_with("eps left out", lambda n: n._replace(eps=0.0).normed()),
    rms_norm_with("offset of the gain left out", lambda n: n._replace(offset=0.0).normed()),
    rms_norm_with("offset of the gain added twice", lambda n: n._replace(offset=2.0 * n.offset).normed()),
    rms_norm_with("gain with its offset rounded to bf16", rounded_gain),
    rms_norm_with("gain left out", lambda n: n._replace(gain=None).normed()),
    rms_norm_with("gain of the neighbouring feature", neighbour_gain),
    rms_norm_with("rows rounded to bf16 before the gain", rounded_rows),
    rms_norm_with("squares in f16", squares_in_f16),
    rms_norm_with("squares added up in bf16", squares_added_in_bf16),
    rms_norm_with("mean taken off, as LayerNorm does", lambda n: n.centred.normed()),
    rms_norm_with("last feature left out of the mean", last_left_out),
    rms_norm_with("mean over all heads of a token", over_all_heads),
    rms_norm_with("mean of D squares over D - 1", sample_variance),
    rms_norm_with("sum in place of the mean", lambda n: n.normed(n.size * n.x.shape[-1])),
    rms_norm_with("no root", lambda n: n.over(n.size + n.eps)),
    rms_norm_with("output truncated to bf16", lambda n: truncated(n.normed(), "bf16")),
)


class OnePass(Backend):
    """The variance as mean square less squared mean, in float32."""

    def layer_norm(self, x_D: Array, w: Linear, /, eps: float) -> Array:
        gain, bias = (self.to_numpy(self.dense(each)) for each in w)
        x = self.to_numpy(x_D).astype(np.float32)
        mean = x.mean(-1, keepdims=True)
        variance = np.mean(x * x, axis=-1, keepdims=True) - mean * mean
        return self.asarray(Call((x - mean).astype(x_D.dtype), gain, bias, eps).normed(variance))


class NotCentred(Backend):
    """The mean stays, as RMSNorm leaves it."""

    def layer_norm(self, x_D: Array, w: Linear, /, eps: float) -> Array:
        return self.rms_norm(x_D, Linear(w.weight), eps) + self.dense(w.bias)


class MeanInBF16(Backend):
    """The mean is rounded to bf16 before it is taken off."""

    def layer_norm(self, x_D: Array, w: Linear, /, eps: float) -> Array:
        gain, bias = (self.to_numpy(self.dense(each)) for each in w)
        x = self.to_numpy(x_D)
        return self.asarray(Call(x - in_format(x.mean(-1, keepdims=True), "bf16"), gain, bias, eps).normed())


def bias_before_gain(n: Call) -> Array:
    return n._replace(gain=None).normed() * n.gain


LAYER_NORM_MISTAKES = (
    layer_norm_with("eps ten times too large", lambda n: n._replace(eps=10.0 * n.eps).normed()),
    layer_norm_with("eps outside the root", lambda n: n.over(n.size**0.5 + n.eps)),
    layer_norm_with("eps left out", lambda n: n._replace(eps=0.0).normed()),
    Mistake("mean not taken off, as in RMSNorm", NotCentred),
    Mistake("mean rounded to bf16", MeanInBF16),
    Mistake("variance in one pass, in float32", OnePass),
    layer_norm_with("sum of D squares over D - 1", sample_variance),
    layer_norm_with("bias left out", lambda n: n._replace(bias=None).normed()),
    layer_norm_with("bias added before the gain", bias_before_gain),
    layer_norm_with("gain left out", lambda n: n._replace(gain=None).normed()),
    layer_norm_with("gain of the neighbouring feature", neighbour_gain),
    layer_norm_with("rows rounded to bf16 before the gain", rounded_rows),
    layer_norm_with("squares in f16", squares_in_f16),
    layer_norm_with("last feature left out of the variance", last_left_out),
    layer_norm_with("output truncated to bf16", lambda n: truncated(n.normed(), "bf16")),
)

OPERATIONS = (
    Operation(
        name="rms_norm",
        about="root-mean-square norm of the last axis, times a gain",
        inputs={"x": ("row", "feature"), "weight": ("feature",)},
        outputs={"y": ("row", "feature")},
        run=run_rms_norm,
        estimate=estimate_rms_norm,
        cases=RMS_NORM_CASES,
        mistakes=RMS_NORM_MISTAKES,
    ),
    Operation(
        name="layer_norm",
        about="mean taken off and divided by the standard deviation along the last axis, times a gain, plus a bias",
        inputs={"x": ("row", "feature"), "weight": ("feature",), "bias": ("feature",)},
        outputs={"y": ("row", "feature")},
        run=run_layer_norm,
        estimate=estimate_layer_norm,
        cases=LAYER_NORM_CASES,
        mistakes=LAYER_NORM_MISTAKES,
    ),
)
