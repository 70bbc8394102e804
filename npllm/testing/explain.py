"""Which known mistake explains an error best."""

from __future__ import annotations

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.testing.case import Case
from npllm.testing.estimate import Estimate
from npllm.testing.judge import allowed
from npllm.testing.operation import Arrays, Operation
from npllm.testing.rounding import Format, Rounding

# A mistake that takes away less of an error is no explanation, unless what it leaves is within the budget: then it explains
# the error fully if it takes away at least LITTLE (of an error that was small to begin with).
ENOUGH, LITTLE = 0.5, 0.25

# An element that is finite on one side only counts as an error of at least so many times a correct kernel's.
ONE_SIDED = 1e3


def explained(
    op: Operation, case: Case, rounding: Rounding, inputs: Arrays, results: Arrays, estimate: Estimate, output: str
) -> tuple[str, float]:
    """The mistake whose result lies nearest to the kernel's, and the part of the squared error that it takes away.

    1.0 if what is left is what a correct kernel's error would be; ("", 0.0) if no mistake explains anything. The canon runs
    in float64 with each mistake in turn, until one explains nearly all.
    """
    from npllm.testing.checking import truth

    got, unit = results[output], unit_of(estimate)
    total, size = apart(got, estimate.value, unit), apart(got, np.zeros_like(got), unit)
    best = ("", 0.0, 0.0)
    for mistake in op.mistakes:
        try:
            wrong = truth(op, case, inputs, mistake.made_by(Backend)("float64"))[output]
        except (ValueError, LookupError, TypeError, ArithmeticError):
            continue  # the mistake makes no sense on these inputs
        if wrong.shape != got.shape or not total:
            continue
        # A mistake that makes results larger makes their rounding errors larger too.
        left = apart(got, wrong, np.maximum(unit, spacing(wrong, rounding.format("output")) / np.sqrt(12.0)))
        if left > ENOUGH * size:
            continue  # zero would be as near
        part, fully = 1.0 - left / total, np.sqrt(left / got.size) <= allowed(got.size)
        if part > max(best[1], LITTLE if fully else ENOUGH):
            best = (mistake.name, part, 1.0 if fully else min(part, 0.999))
        if best[1] > (0.9 if best[2] == 1.0 else 0.999):
            break
    return best[0], best[2]


def unit_of(estimate: Estimate) -> Array:
    """What a correct kernel's error would be at each element, and at least what it usually is.

    Where the truth is nearly 0 its rounding is too: in such units a few elements would outweigh all others.
    """
    size = np.sqrt(np.where(np.isfinite(estimate.variance), estimate.variance, 0.0))
    known = size[size > 0.0]
    return np.maximum(size, float(np.median(known)) if known.size else 1.0)


def spacing(x: Array, of: Format) -> Array:
    return of.spacing(np.where(np.isfinite(x), x, 1.0))


def apart(x: Array, y: Array, unit: Array) -> float:
    """The sum of squares of x - y in units: 0 where both are not finite, at least ONE_SIDED where one is."""
    both, neither = np.isfinite(x) & np.isfinite(y), ~np.isfinite(x) & ~np.isfinite(y)
    size = np.where(both, np.abs(np.where(both, x, 0.0) - np.where(both, y, 0.0)), 0.0) / unit
    size = np.where(both | neither, size, max(ONE_SIDED, float(np.max(size, initial=0.0))))
    return float(np.sum(size**2))
