"""The one comparator of the tests, and the one table of tolerances.

`agree(got, want, limit)` demands the same dtype, shape and pattern of non-finite values, and two figures below the
limit: the relative error of the whole, ||got - want|| / ||want||, and the largest error of an element as a fraction of
the largest wanted element (a single wrong element among many hardly moves the first). A reference that proves nothing
is refused: one with NaN, one that is empty, zero throughout or constant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class Limit(NamedTuple):
    """`relative`: of ||got - want|| / ||want||. `element`: of max |got - want| / max |want|. `why`: where they come from."""

    relative: float
    element: float
    why: str


# A change here needs a reason, written in the third column.
LIMITS = {
    "exact": Limit(0.0, 0.0, "the same numbers must come out, to the last bit"),
    "truth": Limit(2e-5, 1e-4, "agreement asked of every float32 model with transformers' float32 (two float32 errors)"),
    "own float64": Limit(1e-5, 5e-5, "agreement asked of the float32 canon with its own float64 run"),
    "truth Gemma 3n": Limit(1e-4, 5e-4, "its streams amplify rounding by about 1.8 a layer: 6e-8 becomes 4e-5 in 11 layers"),
    "own float64 Gemma 3n": Limit(1e-4, 5e-4, "as above, of one float32 computation"),
    "reordered Gemma 3n": Limit(1e-4, 5e-4, "as above, of roundings in another order"),
    "truth float64": Limit(1e-13, 1e-12, "two float64 computations of a few layers: about 1e3 roundings of 1e-16"),
    "block": Limit(1e-6, 4e-6, "one operation in float32: sums of at most 52 terms, about 10 roundings of 6e-8"),
    "block float64": Limit(1e-14, 1e-13, "one operation in float64, as above with roundings of 1e-16"),
    "layer_norm": Limit(1e-4, 1e-4, "a constant row of 1.1: 2^-23 / sqrt(eps = 1e-5) = 4e-5 may be left of x - mean"),
    "layer_norm float64": Limit(1e-13, 1e-13, "as above with roundings of 1e-16"),
    "far block": Limit(1e-3, 3e-3, "RoPE at position 131071: angles are rounded by up to p 2^-24 = 8e-3 rad, most by less"),
    "far block float64": Limit(2e-11, 2e-11, "as above: p 2^-53 = 1.5e-11 rad"),
    "reordered": Limit(1e-5, 5e-5, "the same model, BLAS sums in another order: as near as float32 is to its own float64"),
    "reordered float64": Limit(1e-13, 1e-12, "as above, with roundings of 1e-16"),
}


def agree(got: Any, want: Any, limit: str, *, what: str = "", literal: bool = False) -> None:
    """AssertionError unless `got` is `want` within `LIMITS[limit]`; ValueError for a reference that proves nothing.

    what       heads the message.
    literal    the reference may be constant or empty: worked out by hand, or Hypothesis' smallest example.
    """
    if not literal:
        refuse_empty_proof(want)
    allowed, title = LIMITS[limit], f"{what}: " if what else ""
    if type(got) is not type(want) or got.dtype != want.dtype or got.shape != want.shape:
        raise AssertionError(f"{title}got {describe(got)}, want {describe(want)}")
    same_pattern(got, want, title)
    finite = np.isfinite(want)
    wide_got, wide_want = (np.where(finite, x, 0).astype(np.float64) for x in (got, want))
    errors = np.abs(wide_got - wide_want)
    relative, element = ratio(norm(errors), norm(wide_want)), ratio(largest(errors), largest(wide_want))
    if relative > allowed.relative or element > allowed.element:
        raise AssertionError(
            f"{title}relative error {relative:.2e} (limit {allowed.relative:.0e}), largest error {largest(errors):.3e}, "
            f"{element:.2e} of the largest element (limit {allowed.element:.0e}), {worst(errors, got, want)} [{limit}]"
        )


def refuse_empty_proof(want: Array) -> None:
    """ValueError for a reference that many wrong results would match."""
    if not want.size:
        raise ValueError("the reference is empty")
    if want.dtype.kind == "f" and np.isnan(want).any():
        raise ValueError("the reference has NaN")
    if not want.any():
        raise ValueError("the reference is zero throughout")
    if (want == want.flat[0]).all():
        raise ValueError(f"the reference is constant ({want.flat[0]})")


def describe(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__


def same_pattern(got: Array, want: Array, title: str) -> None:
    """NaN and the infinities must stand in the same places."""
    for name, of in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        if want.dtype.kind == "f" and (different := of(got) != of(want)).any():
            raise AssertionError(
                f"{title}{name} in other places, {np.count_nonzero(different)} of {want.size}; "
                f"{worst(different.astype(np.float64), got, want)}"
            )


def worst(errors: Array, got: Array, want: Array) -> str:
    index = np.unravel_index(np.argmax(errors), errors.shape)
    return f"worst at {[int(i) for i in index]}: got {got[index]}, want {want[index]}"


def norm(x: Array) -> float:
    return float(np.sqrt(np.sum(np.square(x))))


def largest(x: Array) -> float:
    return float(np.max(np.abs(x), initial=0.0))


def ratio(error: float, size: float) -> float:
    """error / size, where no error of nothing is none."""
    if error == 0:
        return 0.0
    return error / size if size else float("inf")


@contextlib.contextmanager
def unmodified(*arrays: Array) -> Iterator[None]:
    """AssertionError if the block changes one of `arrays`."""
    before = [x.tobytes() for x in arrays]
    yield
    for i, (x, old) in enumerate(zip(arrays, before, strict=True)):
        if x.tobytes() != old:
            raise AssertionError(f"input {i}, {describe(x)}, was modified")
