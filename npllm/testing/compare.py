"""Comparing arrays where no error budget is known: two runs of a model, or a model and another implementation of it.

`agree(got, want, limit)` demands the same dtype, shape and pattern of non-finite values, and two figures below the limit:
the relative error of the whole, ||got - want|| / ||want||, and the largest error of an element as a fraction of the largest
wanted element (a single wrong element among many hardly moves the first). A reference that proves nothing is refused: one
with NaN, one that is empty, zero throughout or constant. Single operations have a budget instead (`npllm.testing.judge`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import Array


class Limit(NamedTuple):
    """`relative`: of ||got - want|| / ||want||. `element`: of max |got - want| / max |want|. `why`: where they come from."""

    relative: float
    element: float
    why: str


def agree(got: Any, want: Any, limit: Limit, *, what: str = "", literal: bool = False) -> None:
    """AssertionError unless `got` is `want` within `limit`; ValueError for a reference that proves nothing.

    what       heads the message.
    literal    the reference may be constant or empty: worked out by hand, or Hypothesis' smallest example.
    """
    if not literal:
        refuse_empty_proof(want)
    title = f"{what}: " if what else ""
    if type(got) is not type(want) or got.dtype != want.dtype or got.shape != want.shape:
        raise AssertionError(f"{title}got {describe(got)}, want {describe(want)}")
    same_pattern(got, want, title)
    finite = np.isfinite(want)
    wide_got, wide_want = (np.where(finite, x, 0).astype(np.float64) for x in (got, want))
    errors = np.abs(wide_got - wide_want)
    relative, element = ratio(norm(errors), norm(wide_want)), ratio(largest(errors), largest(wide_want))
    if relative > limit.relative or element > limit.element:
        raise AssertionError(
            f"{title}relative error {relative:.2e} (limit {limit.relative:.0e}), largest error {largest(errors):.3e}, "
            f"{element:.2e} of the largest element (limit {limit.element:.0e}), {worst(errors, got, want)} [{limit.why}]"
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
