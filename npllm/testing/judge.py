"""The verdict on one output: its error against the budget of an `Estimate`, as a whole, by slice and by element.

Three questions, none of which has a tolerance to tune. Are NaN and the infinities where they must be? Does any element
leave the bound that no correct kernel leaves? Is the error, in units of what a correct kernel's would be, about one
(`spread`), over the whole output and over each slice of each axis? The first two are derived; SPREAD is calibrated on
correct kernels (`python -m bench detection`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.testing.estimate import Estimate
from npllm.testing.rounding import Format

# The root mean square of error / expected error that a correct kernel may reach over many elements; 1 is expected.
SPREAD = 1.25

# Over n elements it may be larger by this over sqrt(n): five standard deviations, and as much again for shared errors.
SCATTER = 4.0

# Slices of fewer elements are left to the bound.
SLICE = 16


class Verdict(NamedTuple):
    """What is wrong ("" if nothing), and how far.

    problem  "", or one of: non-finite, constant, bound, spread.
    error    root mean square of the error, over that of rounding the truth once (a perfect kernel has about 1).
    spread   the worst root mean square of error / expected error, of the whole or of a slice; `limit` is its limit there.
    share    the largest |error| / bound.
    bad      booleans: the elements that speak against the kernel.
    """

    problem: str
    error: float
    spread: float
    limit: float
    share: float
    bad: Array

    @property
    def excess(self) -> float:
        """How far beyond what is allowed, as a factor; below 1 for what passes."""
        return float("inf") if self.problem in ("non-finite", "constant") else max(self.share, self.spread / self.limit)


def judge(got: Array, estimate: Estimate, output: Format) -> Verdict:
    """`got` (float64, the shape of the estimate) against the budget. `estimate` includes the rounding to `output`."""
    truth = output.round(estimate.value)
    different = ~(np.isfinite(got) & np.isfinite(truth)) & ~((got == truth) | (np.isnan(got) & np.isnan(truth)))
    if different.any():
        return Verdict("non-finite", np.inf, np.inf, 1.0, np.inf, different)
    finite = np.isfinite(truth)
    error = np.where(finite, got - np.where(finite, estimate.value, 0.0), 0.0)
    share = ratio(np.abs(error), np.where(finite, estimate.bound, 0.0))
    rounding = root_mean_square(output.spacing(np.where(finite, estimate.value, 0.0))) / np.sqrt(12.0)
    spread = ratio(error, np.sqrt(np.where(finite, estimate.variance, 0.0)))
    worst, limit = worst_slice(spread)
    problem, bad = "", np.zeros(got.shape, dtype=bool)
    if (share > 1.0).any():
        problem, bad = "bound", share > 1.0
    elif worst > limit:
        problem, bad = "spread", np.abs(spread) > 2.0
    # A truth that varies by less than the budget may be met by a constant.
    if problem and is_constant(got) and not is_constant(truth):
        problem, bad = "constant", finite
    units = root_mean_square(error) / rounding if got.size else 0.0
    return Verdict(problem, units, worst, limit, float(np.max(share, initial=0.0)), bad)


def ratio(error: Array, size: Array) -> Array:
    """error / size, where no error of nothing is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0.0, 0.0, error / size)


def root_mean_square(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def is_constant(x: Array) -> bool:
    return x.size > 1 and bool((x == x.flat[0]).all())


def allowed(elements: int) -> float:
    """The limit on the spread over so many elements."""
    return SPREAD * (1.0 + SCATTER / np.sqrt(max(elements, 1)))


def worst_slice(spread: Array) -> tuple[float, float]:
    """The root mean square that is largest against its limit, of the whole array or of one index of one axis; that limit."""
    found = [(root_mean_square(spread), allowed(spread.size))]
    for axis in range(spread.ndim):
        others = tuple(i for i in range(spread.ndim) if i != axis)
        elements = spread.size // max(1, spread.shape[axis])
        if elements >= SLICE and spread.shape[axis] > 1:
            found.append((float(np.sqrt(np.max(np.mean(np.square(spread), axis=others)))), allowed(elements)))
    return max(found, key=lambda each: each[0] / each[1])
