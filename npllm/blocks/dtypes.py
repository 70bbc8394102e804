"""Dtypes: every block computes in float32 or wider and returns what came in; bfloat16 is its bits, since NumPy has none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from npllm.arrays import Array, Namespace

F = TypeVar("F", bound=Callable[..., Array])


def widened(block: F) -> F:
    """Let `block(xp, x, ...)` take a float16 `x`: it computes in float32 and the result is rounded once, at the end.

    NumPy sums float16 in float16, where the square of 300 is already infinite; an integer input is an error.
    """

    @functools.wraps(block)
    def wrapper(xp: Namespace, x: Array, *args: Any, **kwargs: Any) -> Array:
        # The 16-bit types of ml_dtypes are of kind "V".
        if x.dtype.kind not in "fV":
            raise TypeError(f"{block.__name__} takes floating-point arrays, not {x.dtype}")
        if x.dtype.itemsize >= 4:
            return block(xp, x, *args, **kwargs)
        wide = xp.asarray(x, dtype="float32")
        return block(xp, wide, *args, **kwargs).astype(x.dtype)

    return wrapper  # type: ignore[return-value]


def round_to_bfloat16(xp: Namespace, x: Array) -> Array:
    """The bits, uint16, of `x` (float32 or float64) rounded to nearest even; a NaN stays a NaN."""
    bits = xp.asarray(x, dtype="float32").view("uint32")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding could carry a NaN's bits into infinity: it keeps the upper ones, with one set.
    quiet = (bits >> 16) | 0x40
    return xp.where(xp.isnan(x), quiet, rounded).astype("uint16")


def widen_bfloat16(bits: Array, dtype: str) -> Array:
    """The exact values of bfloat16 bits in `dtype`."""
    return (bits.astype("uint32") << 16).view("float32").astype(dtype, copy=False)
