"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its extensions to longer contexts.

In float32, frequencies are rounded where transformers rounds them, because models were trained on those values and a
frequency that is off by one rounding turns position 100,000 by 0.006 rad. Angles are products of an integer position and
a frequency in float32 (float64 when the model computes in float64), never in a 16-bit type: bfloat16 turns 257 into 256.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from npllm.arrays import Array, DTypeLike, Namespace


@dataclass(frozen=True)
class Rope:
    """What a config.json says about RoPE (`rope_parameters`, or `rope_theta` with `rope_scaling`).

    `dim` is the rotated width per head; `kind` is one of default, linear, llama3, yarn. The other fields carry the names
    of the config's keys; `original` is `original_max_position_embeddings`.
    """

    dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


class Frequencies(NamedTuple):
    """Radians per position for each pair, [J], and the factor that cosine and sine are multiplied by."""

    inverse_J: Array
    attention_factor: float


class Angles(NamedTuple):
    """Cosine and sine of the angles of each token and pair, [M, J] each."""

    cos_MJ: Array
    sin_MJ: Array


def frequencies(rope: Rope, dtype: DTypeLike = "float32") -> Frequencies:
    """`theta^(-2j/dim)` for j = 0 .. dim/2 - 1, then the scaling that `rope.kind` names, each step rounded to `dtype`."""
    real = np.dtype(dtype).type
    exponent = np.arange(0, rope.dim, 2, dtype=dtype) / real(rope.dim)
    power = (rope.theta ** exponent.astype(np.float64)).astype(real)
    inverse = real(1.0) / power
    if rope.kind == "linear":
        return Frequencies(inverse / real(rope.factor), 1.0)
    if rope.kind == "llama3":
        return Frequencies(_llama3(inverse, rope), 1.0)
    if rope.kind == "yarn":
        return Frequencies(_yarn(inverse, real(1.0) / (real(rope.factor) * power), rope), yarn_attention_factor(rope))
    return Frequencies(inverse, 1.0)


def _llama3(inverse: Array, rope: Rope) -> Array:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, the band between them blended by wavelength."""
    real = inverse.dtype.type
    # The reciprocal, times the number: so torch divides a number by a tensor.
    wavelength = real(1.0) / inverse * real(2.0 * math.pi)
    keep = wavelength < rope.original / rope.high_freq_factor
    slow = wavelength > rope.original / rope.low_freq_factor
    scaled = np.where(slow, inverse / real(rope.factor), inverse)
    band = ~keep & ~slow
    # Only the band is blended: where high == low it is empty, and the blend would be 0 / 0.
    if band.any():
        waves = real(1.0) / wavelength[band] * real(rope.original)
        smooth = (waves - real(rope.low_freq_factor)) / real(rope.high_freq_factor - rope.low_freq_factor)
        scaled[band] = (real(1.0) - smooth) * inverse[band] / real(rope.factor) + smooth * inverse[band]
    return scaled


def _yarn(inverse: Array, slowed: Array, rope: Rope) -> Array:
    """YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.2): a ramp over pairs from `inverse` to `slowed` by the factor."""
    real = inverse.dtype.type

    def pair_turning(turns: float) -> float:
        return rope.dim * math.log(rope.original / (turns * 2.0 * math.pi)) / (2.0 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(rope.dim // 2, dtype=inverse.dtype) - real(low)) / real(high - low)
    kept = real(1.0) - np.clip(ramp, real(0.0), real(1.0))
    return slowed * (real(1.0) - kept) + inverse * kept


def yarn_mscale(factor: float, mscale: float) -> float:
    """`0.1 mscale ln(factor) + 1`, the YaRN temperature; 1 where the context is not extended."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_attention_factor(rope: Rope) -> float:
    """The factor on cosine and sine: given, or a ratio of two mscales (DeepSeek), or YaRN's own."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor, 1.0)


def angles(xp: Namespace, rope: Rope, positions_M: Array, dtype: DTypeLike) -> Angles:
    """Cosine and sine of `position * frequency`, times the attention factor, in `dtype` (float32 or float64)."""
    inverse, factor = frequencies(rope, dtype)
    phase_MJ = xp.asarray(positions_M, dtype=dtype)[:, None] * xp.asarray(inverse)
    cos_MJ, sin_MJ = xp.cos(phase_MJ), xp.sin(phase_MJ)
    if factor != 1.0:
        cos_MJ *= factor
        sin_MJ *= factor
    return Angles(cos_MJ, sin_MJ)


def rotate_halves(xp: Namespace, x_MHK: Array, angles: Angles) -> Array:
    """Rotate the pairs `(x[j], x[j + J])`, the order of Hugging Face's Llama, Qwen, OLMo and Gemma weights.

    When 2 J < K only the first 2 J entries of each head turn and the rest passes. float32 or float64 in, the same out.
    """
    cos, sin = angles.cos_MJ[:, None], angles.sin_MJ[:, None]
    J = cos.shape[-1]
    out = xp.empty_like(x_MHK)
    first, second = x_MHK[..., :J], x_MHK[..., J : 2 * J]
    xp.multiply(first, cos, out=out[..., :J])
    out[..., :J] -= second * sin
    xp.multiply(second, cos, out=out[..., J : 2 * J])
    out[..., J : 2 * J] += first * sin
    out[..., 2 * J :] = x_MHK[..., 2 * J :]
    return out


def rotate_interleaved(xp: Namespace, x_MHK: Array, angles: Angles) -> Array:
    """Rotate the pairs `(x[2j], x[2j + 1])`, the order of Llama 4, DeepSeek and of Meta's and Mistral's native files."""
    cos, sin = angles.cos_MJ[:, None], angles.sin_MJ[:, None]
    J = cos.shape[-1]
    out = xp.empty_like(x_MHK)
    even, odd = x_MHK[..., 0 : 2 * J : 2], x_MHK[..., 1 : 2 * J : 2]
    out[..., 0 : 2 * J : 2] = even * cos - odd * sin
    out[..., 1 : 2 * J : 2] = odd * cos + even * sin
    out[..., 2 * J :] = x_MHK[..., 2 * J :]
    return out
