"""Normalisations. The mean is taken over the last axis; eps stands inside the root."""

from __future__ import annotations

from npllm.arrays import Array, Namespace
from npllm.blocks.dtypes import widened


@widened
def rms_norm(xp: Namespace, x_D: Array, weight_D: Array | None, eps: float, offset: float = 0.0) -> Array:
    """Root-mean-square norm: `(offset + weight) * x / sqrt(mean(x^2) + eps)` (Zhang and Sennrich 2019, arXiv 1910.07467).

    Shapes: any leading axes, then D; the result has the shape and dtype of `x_D`. `eps` is `rms_norm_eps` of the config.
    Gemma stores its gains less 1 (`offset` 1); without a weight the gain is 1.
    """
    inverse = 1.0 / xp.sqrt(xp.mean(xp.square(x_D), axis=-1, keepdims=True) + eps)
    out = x_D * inverse
    if weight_D is not None:
        out *= weight_D + offset if offset else weight_D
    return out


@widened
def layer_norm(xp: Namespace, x_D: Array, weight_D: Array, bias_D: Array, eps: float) -> Array:
    """`weight * (x - mean) / sqrt(variance + eps) + bias`, with the population variance (Ba et al. 2016, arXiv 1607.06450).

    Shapes: any leading axes, then D; the result has the shape and dtype of `x_D`. `eps` is `layer_norm_epsilon`.
    """
    out = x_D - xp.mean(x_D, axis=-1, keepdims=True)
    out *= 1.0 / xp.sqrt(xp.mean(xp.square(out), axis=-1, keepdims=True) + eps)
    out *= weight_D
    out += bias_D
    return out
