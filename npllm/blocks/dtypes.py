"""One rule about dtypes for every block: compute in float32 or wider, return what came in."""

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
