"""Kernels that round inputs before they multiply them (`Rounding.factors`): what that does to an output is known."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from npllm.testing.estimate import Estimate
from npllm.testing.operation import Arrays, Settings
from npllm.testing.rounding import Rounding

Estimates = Callable[[Arrays, Settings, Rounding, Arrays | None], tuple[Estimate, ...]]


def known(*names: str) -> Callable[[Estimates], Estimates]:
    """Decorate the estimate of an operation whose inputs of these names are factors; an x that is normed first is none.

    Errors of factors are shared by all that they are multiplied with, and a row of outputs may be off as a whole. But they
    are known: the estimate is made again from rounded inputs, and how far that moves the value counts where it is more than
    independent errors would.
    """

    def wrap(estimate: Estimates) -> Estimates:
        @functools.wraps(estimate)
        def both(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
            outputs, to = estimate(inputs, settings, rounding, got), rounding.format("factors")
            if to.bits >= rounding.format("inputs").bits:
                return outputs
            factors = [name for name in names if name in inputs and not (name == "x" and "norm" in inputs)]
            moved = {name: to.round(inputs[name]) for name in factors if inputs[name].dtype.kind == "f"}
            others = estimate({**inputs, **moved}, settings, rounding, got)
            return tuple(_wider(*pair) for pair in zip(outputs, others, strict=True))

        return both

    return wrap


def _wider(x: Estimate, moved: Estimate) -> Estimate:
    with np.errstate(invalid="ignore"):
        shift = moved.value - x.value
    variance = moved.variance + np.where(np.isfinite(shift), shift, 0.0) ** 2
    return Estimate(x.value, np.maximum(x.variance, variance), x.bound)
