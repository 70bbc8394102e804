"""Alternating updates (AltUp; Baykal et al. 2023, arXiv 2301.13310): A residual streams, of which a layer computes on one.

Every stream is predicted from all of them before the layer, and corrected after it by what the layer's stream turned out
to be. The coefficients depend on the token.
"""

from __future__ import annotations

from npllm.arrays import Array, Namespace
from npllm.blocks.dtypes import widened

# The least mean square that `match_rms` divides by the root of.
LEAST_SQUARE = 1e-5


@widened
def altup_predict(xp: Namespace, x_MAD: Array, mixing_MAA: Array) -> Array:
    """`P[n] = X[n] + sum over j of C[n, j] X[j]` -> p_MAD; `mixing_MAA` is [M, n, j]."""
    predicted_MAD = mixing_MAA @ x_MAD
    predicted_MAD += x_MAD
    return predicted_MAD


@widened
def altup_correct(xp: Namespace, p_MAD: Array, computed_MD: Array, active: int, gain_MA: Array) -> Array:
    """`X[n] = P[n] + (1 + c[n]) (computed - P[active])` -> x_MAD: what the layer adds to its stream moves all of them."""
    innovation_MD = computed_MD - p_MAD[:, active]
    corrected_MAD = (gain_MA + 1.0)[:, :, None] * innovation_MD[:, None]
    corrected_MAD += p_MAD
    return corrected_MAD


@widened
def match_rms(xp: Namespace, y_MD: Array, x_MD: Array) -> Array:
    """`y` scaled, token by token, to the root mean square of `x` -> y_MD; a `y` near zero is not blown up.

    Gemma 3n's own (no paper says it; after transformers): further streams get the size of the first, there and back.
    """
    wanted_M1 = xp.sqrt(xp.mean(xp.square(x_MD), axis=-1, keepdims=True))
    square_M1 = xp.maximum(xp.mean(xp.square(y_MD), axis=-1, keepdims=True), y_MD.dtype.type(LEAST_SQUARE))
    scaled_MD = y_MD * wanted_M1
    scaled_MD /= xp.sqrt(square_M1)
    return scaled_MD
