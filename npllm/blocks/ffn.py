"""Activations of the feed-forward layers. The layers themselves (SwiGLU, GeGLU, MLP) are wired in `npllm.backend`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from npllm.arrays import Array, Namespace
from npllm.blocks.dtypes import widened

# exp(LARGEST) is finite, and 1 / (1 + exp(LARGEST)) is zero for every purpose.
LARGEST = {4: 88.0, 8: 709.0}

# Of the normal tail: the terms that leave less than one rounding, by the bytes of a number; where the fit ends (the tail is
# 1e-19 there); where the tail is zero in any dtype.
TERMS = {4: 11, 8: 22}
FITTED = 9.0
NO_TAIL = 40.0


@widened
def silu(xp: Namespace, x: Array) -> Array:
    """`x * sigmoid(x) = x / (1 + exp(-x))` (Ramachandran et al. 2017, arXiv 1710.05941); elementwise, any shape."""
    return x / _one_plus_exp_minus(xp, x)


@widened
def sigmoid(xp: Namespace, x: Array) -> Array:
    """`1 / (1 + exp(-x))`; elementwise, any shape."""
    return 1.0 / _one_plus_exp_minus(xp, x)


def _one_plus_exp_minus(xp: Namespace, x: Array) -> Array:
    denominator = xp.minimum(-x, x.dtype.type(LARGEST[x.dtype.itemsize]))
    xp.exp(denominator, out=denominator)
    denominator += 1.0
    return denominator


@widened
def gelu_tanh(xp: Namespace, x: Array) -> Array:
    """The tanh form of GELU, `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))` (Hendrycks and Gimpel, arXiv 1606.08415)."""
    inner = xp.square(x)
    inner *= 0.044715
    inner += 1.0
    inner *= x
    inner *= math.sqrt(2.0 / math.pi)
    xp.tanh(inner, out=inner)
    inner += 1.0
    inner *= x
    inner *= 0.5
    return inner


@functools.cache
def _log_tail(terms: int) -> list[float]:
    """`log Q(a) + a^2 / 2` as a polynomial in `s = 4 FITTED / (a + FITTED) - 3`, highest power first.

    `Q(a) = erfc(a / sqrt 2) / 2` is the normal tail. As a runs from 0 to FITTED, s runs from 1 to -1, and over s the
    function bends so little that few terms do (Chebyshev interpolation).
    """

    def wanted(s: float) -> float:
        a = 4.0 * FITTED / (s + 3.0) - FITTED
        return math.log(0.5 * math.erfc(a / math.sqrt(2.0))) + 0.5 * a * a

    fitted = np.polynomial.chebyshev.chebinterpolate(np.vectorize(wanted), terms - 1)
    return [float(factor) for factor in np.polynomial.chebyshev.cheb2poly(fitted)[::-1]]


@widened
def gelu(xp: Namespace, x: Array) -> Array:
    """The exact GELU, `x Phi(x)` with the normal distribution function Phi (arXiv 1606.08415); elementwise, any shape.

    Computed as `max(x, 0) - |x| Q(|x|)` with `Q(a) = 1 - Phi(a)`, where nothing cancels.
    """
    size = xp.minimum(xp.abs(x), x.dtype.type(NO_TAIL))
    place = xp.maximum(4.0 * FITTED / (size + FITTED) - 3.0, x.dtype.type(-1.0))
    tail = xp.zeros_like(x)
    for factor in _log_tail(TERMS[x.dtype.itemsize]):
        tail *= place
        tail += factor
    tail -= 0.5 * xp.square(size)
    xp.exp(tail, out=tail)
    tail *= size
    return xp.maximum(x, x.dtype.type(0.0)) - tail


@widened
def relu(xp: Namespace, x: Array) -> Array:
    """`max(x, 0)`; elementwise, any shape."""
    return xp.maximum(x, x.dtype.type(0.0))


@widened
def gaussian_topk(xp: Namespace, gate_F: Array, sparsity: float) -> Array:
    """`relu(gate - cut)`, where about the share `sparsity` of a normal distribution lies below the cut -> gate_F.

    `cut = mean + z std` over the features F (any leading axes), with the population's standard deviation and the normal
    quantile `z` of `sparsity`, 0 < sparsity < 1, both rounded to the dtype: a top-k without sorting (Spark Transformer,
    You et al. 2025, arXiv 2506.06644). What passes the cut is what it exceeds the cut by.
    """
    from statistics import NormalDist  # slow to import, and few models need it

    quantile = NormalDist().inv_cdf(float(gate_F.dtype.type(sparsity)))
    mean_F1 = xp.mean(gate_F, axis=-1, keepdims=True)
    centred_F = gate_F - mean_F1
    cut_F1 = mean_F1 + xp.sqrt(xp.mean(xp.square(centred_F), axis=-1, keepdims=True)) * gate_F.dtype.type(quantile)
    return relu(xp, gate_F - cut_F1)


Activation = Callable[[Namespace, Array], Array]

# Names that `hidden_act`, `hidden_activation` and `activation_function` of a config.json may hold.
ACTIVATIONS: dict[str, Activation] = {
    "silu": silu,
    "swish": silu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_python_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_accurate": gelu_tanh,
    "gelu": gelu,
    "gelu_python": gelu,
    "relu": relu,
}
