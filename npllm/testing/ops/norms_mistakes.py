"""Known mistakes of the norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.testing.mistakes import Mistake
from npllm.testing.rounding import FORMATS, in_format
from npllm.weights import Linear


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


def truncated(x: Array, name: str) -> Array:
    step = FORMATS[name].spacing(x.astype(np.float64))
    return (np.trunc(x / step) * step).astype(x.dtype)


def added_up(x: Array, name: str) -> Array:
    """The sum of each row, one number after another, each partial sum rounded to a format."""
    total = np.zeros_like(x[..., 0])
    for column in np.moveaxis(x, -1, 0):
        total = in_format(total + column, FORMATS[name])
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
    return n._replace(gain=None if n.gain is None else in_format(n.gain + n.offset, FORMATS["bf16"]), offset=0.0).normed()


def rounded_rows(n: Call) -> Array:
    """Only where a gain follows: without one, it is the output's own rounding."""
    plain = n._replace(gain=None, bias=None).normed()
    return n._replace(x=in_format(plain, FORMATS["bf16"])).over(np.ones((), plain.dtype))


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
    return n.normed(np.mean(in_format(n.x * n.x, FORMATS["f16"]), axis=-1, keepdims=True))


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
        return self.asarray(Call(x - in_format(x.mean(-1, keepdims=True), FORMATS["bf16"]), gain, bias, eps).normed())


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
