"""Numbers that know how far a correct kernel may be from them: first-order error analysis, one rule per step.

An `Estimate` is the true value (float64), the variance of a correct kernel's error, and a bound that the error of no correct
kernel exceeds. Each rule adds what its own step may add and carries what its inputs bring along. Variances add as those of
independent errors; bounds add as they are (Higham, Accuracy and Stability of Numerical Algorithms, chapters 2 and 3).

Sums: in which order a kernel adds is its own matter, so the variance is that of a plain loop, and the bound is the
gamma_n sum|a||b| of any order. Roundings: an error uniform over one spacing has the variance spacing^2 / 12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.testing.rounding import Format

# A single error that a whole row shares does not average out within the row: its square is taken at three standard
# deviations, so that no correct row stands out.
SHARED = 9.0


class Estimate(NamedTuple):
    """`value`, and of a correct kernel's error the `variance` and the `bound`: float64 arrays of one shape."""

    value: Array
    variance: Array
    bound: Array

    def map(self, move: Callable[[Array], Array]) -> Estimate:
        """The same estimate after `move`, which only takes numbers from one place to another (reshape, transpose, index)."""
        return Estimate(*map(move, self))


def exact(x: Array) -> Estimate:
    """An input: what the kernel was given, without error."""
    x = np.array(x, dtype=np.float64)
    return Estimate(x, np.zeros_like(x), np.zeros_like(x))


def factor(x: Array, to: Format) -> Estimate:
    """An input that is multiplied in the format `to`, to which it was rounded to nearest.

    Inputs are known, and so is what rounding does: nothing to what the format holds. Of the others the larger counts of
    that and of an error uniform over a spacing.
    """
    moved = to.round(x) - x
    half = np.where(moved != 0.0, 0.5 * to.spacing(x), 0.0)
    return Estimate(x, np.maximum(half**2 / 3.0, moved**2), half)


def rounded(x: Estimate, to: Format) -> Estimate:
    """`x` rounded to a format once. Half a spacing is taken where the value may have moved to by its earlier errors."""
    half = 0.5 * to.spacing(np.abs(x.value) + x.bound)
    return Estimate(x.value, x.variance + to.spacing(x.value) ** 2 / 12.0, x.bound + half)


def handed_on(x: Array, by: Format, to: Format) -> Estimate:
    """Inputs in the format `by` that are returned as they are, in the format `to`: without error where `to` holds them."""
    holds = to.bits >= by.bits and to.least <= by.least and to.most >= by.most
    return exact(x) if holds else rounded(exact(x), to)


def stored(x: Estimate, at: Format, to: Format) -> Estimate:
    """`x`, which arithmetic in `at` has just rounded, put away in `to`: the same type rounds nothing more."""
    return x if to == at else rounded(x, to)


def plus(x: Estimate, y: Estimate, at: Format) -> Estimate:
    """`x + y`, rounded in `at`."""
    return rounded(Estimate(x.value + y.value, x.variance + y.variance, x.bound + y.bound), at)


def times(x: Estimate, y: Estimate, at: Format) -> Estimate:
    """`x * y` elementwise, rounded in `at`."""
    variance = y.value**2 * x.variance + x.value**2 * y.variance + x.variance * y.variance
    bound = np.abs(y.value) * x.bound + np.abs(x.value) * y.bound + x.bound * y.bound
    return rounded(Estimate(x.value * y.value, variance, bound), at)


def applied(
    function: Callable[[Array], Array], x: Estimate, at: Format, roundings: float = 4.0, cancels: float = 1.0
) -> Estimate:
    """`function(x)` elementwise, as a library of `at`'s precision computes it (activations: slopes between -2 and 2).

    `roundings` says how many units in the last place of the result, and of the argument, such a function may be off by: 0
    for one that only selects. `cancels` adds units of the argument alone: what `0.5 x (1 + y)` leaves where the parenthesis
    cancels and y is off by as many units in the last place of 1. The variance is carried through by three points (Gauss and
    Legendre's, for an error uniform over an interval): right at bends and at extremes too.
    """
    value = function(x.value)
    step = np.maximum(np.abs(x.value), 1.0) * 1e-6
    slope = (function(x.value + step) - function(x.value - step)) / (2.0 * step)
    own = roundings * (at.spacing(value) + np.abs(slope) * at.spacing(x.value)) + cancels * at.spacing(x.value)
    apart = np.sqrt(1.8 * x.variance)
    variance = 5.0 / 18.0 * sum(np.square(function(x.value + side * apart) - value) for side in (-1.0, 1.0))
    # The slope moves within the bound; its largest value near by is taken, from both ends.
    steep = np.maximum(np.abs(function(x.value + x.bound) - value), np.abs(function(x.value - x.bound) - value))
    carried = np.maximum(np.abs(slope) * x.bound, steep)
    return Estimate(value, variance + own**2 / 12.0, carried + own)


def divided(x: Estimate, y: Estimate, at: Format) -> Estimate:
    """`x / y` elementwise (y above 0, and above its bound), rounded in `at`."""
    value = x.value / y.value
    variance = (x.variance + value**2 * y.variance) / y.value**2
    bound = (x.bound + np.abs(value) * y.bound) / np.maximum(y.value - y.bound, 0.0)
    return rounded(Estimate(value, variance, np.where(np.isnan(bound), np.inf, bound)), at)


def summed(x_N: Estimate, at: Format) -> Estimate:
    """The sum over the last axis, which stays with one entry; in `at`, in any order."""
    value, variance, bound = (np.sum(part, axis=-1, keepdims=True) for part in x_N)
    squares, sizes = (np.sum(np.abs(x_N.value) ** power, axis=-1, keepdims=True) for power in (2, 1))
    N = x_N.value.shape[-1]
    return Estimate(value, variance + summation(value, squares, N, at), bound + growth(N, at) * (sizes + bound))


def flushed(x: Estimate, at: Format) -> Estimate:
    """`x` where what lies below the normal numbers of `at` may have become 0."""
    tiny = np.abs(x.value) < 2.0**at.least
    lost = np.where(tiny, np.abs(x.value), 0.0)
    return Estimate(x.value, x.variance + lost**2, x.bound + lost)


def exponential(function: Callable[[Array], Array], x: Estimate, at: Format) -> Estimate:
    """`exp(x)` or `1 / (1 + exp(-x))`, of small results too within four units in the last place; what is tiny may be 0.

    Errors of x move the result by their own size, relatively, at most.
    """
    value, own = function(x.value), 4.0 * at.spacing(function(x.value))
    return flushed(Estimate(value, value**2 * x.variance + own**2 / 12.0, value * np.expm1(x.bound) + own), at)


def weights_of_softmax(logits_N: Estimate, at: Format) -> Estimate:
    """`exp(x - max(x))` over the last axis, of which softmax is the share of the sum."""
    top = np.max(logits_N.value, axis=-1, keepdims=True, initial=-np.inf)
    return exponential(np.exp, plus(logits_N, exact(-top), at), at)


def growth(terms: int, at: Format) -> float:
    """gamma_n: the largest relative error of a sum of so many products, whatever the order."""
    return terms * at.unit / max(1.0 - terms * at.unit, 0.5)


def summation(total: Array, squares: Array, terms: int, at: Format) -> Array:
    """The variance that a plain loop over `terms` adds, from the sum and the sum of squares of the terms.

    Partial sums grow like a walk where signs vary (n/2 times the squares) and like a ramp where they agree (n/3 of total^2).
    """
    return at.unit**2 / 3.0 * terms * (squares / 2.0 + total**2 / 3.0)


def product(x_MK: Estimate, w_KF: Estimate, at: Format) -> Estimate:
    """`x W` over the last axis of x and the last but one of W (any leading axes that broadcast), summed in `at`."""
    a, b = x_MK, w_KF
    value = a.value @ b.value
    squares = a.value**2 @ b.value**2
    variance = a.variance @ b.value**2 + a.value**2 @ b.variance + summation(value, squares, a.value.shape[-1], at)
    sizes = np.abs(a.value) @ np.abs(b.value)
    bound = a.bound @ np.abs(b.value) + np.abs(a.value) @ b.bound + a.bound @ b.bound
    return Estimate(value, variance, bound + growth(a.value.shape[-1] + 1, at) * (sizes + bound))


def linear(
    x_MD: Estimate, weight_FD: Estimate, at: Format, added: Iterable[Estimate] = (), partial: Format | None = None
) -> Estimate:
    """`x W^T` and what is `added` (a bias, a residual), summed in `at`; the output is not rounded to anything yet.

    What is added may be where a kernel's sum begins: then each partial sum holds it. Where `partial` is not the format
    `at`, a kernel may have rounded what it has to `partial` each time before it adds.
    """
    out = product(x_MD, weight_FD.map(lambda w: np.swapaxes(w, -1, -2)), at)
    terms = x_MD.value.shape[-1] - 1
    for each in added:
        terms, out = terms + 1, stored(out, at, partial or at)
        variance = out.variance + each.variance + at.unit**2 / 3.0 * (terms * each.value**2 + out.value**2)
        grown = growth(terms + 2, at) * (np.abs(each.value) + each.bound) + 2.0 * at.unit * (np.abs(out.value) + out.bound)
        out = Estimate(out.value + each.value, variance, out.bound + each.bound + grown)
    return out


# How activations are quantised on the fly: elements that share a scale, and the code of the largest of them.
DYNAMIC = {"int8": (32, 127.0), "fp8": (128, 448.0)}

# FP8 e4m3 as a format.
E4M3 = Format("e4m3", 4, -6, 8)


def quantised(x_D: Estimate, how: str) -> Estimate:
    """An exact `x` after dynamic quantisation of the groups of its last axis; `how` is `Rounding.activations`.

    The value is that of rounding to nearest, the bound is of its distance from `x`, and the variance that of errors spread
    evenly over a step (int8), or over the spacing, which doubles from binade to binade (e4m3). The scale itself may be
    rounded (llama.cpp keeps it in f16): that moves the whole group by 2^-11.
    """
    (group, most), x = DYNAMIC[how], x_D.value
    starts = np.arange(0, x.shape[-1], group)
    largest = np.maximum.reduceat(np.abs(x), starts, axis=-1) if x.size else np.zeros((*x.shape[:-1], len(starts)))
    scale = np.repeat(largest / most, group, axis=-1)[..., : x.shape[-1]]
    unit = np.where(scale > 0.0, scale, 1.0)
    step = scale if how == "int8" else E4M3.spacing(x / unit) * scale
    value = np.rint(x / np.where(step > 0.0, step, 1.0)) * step
    moved = 2.0**-11 * np.abs(x)
    return Estimate(value, step**2 / 12.0 + moved**2 / 3.0, 0.5 * step + moved)


def rms_norm(x_D: Estimate, weight_D: Array | None, eps: float, offset: float, normed: Format, at: Format) -> Estimate:
    """`(offset + weight) * round(x / rms(x))` over the last axis; `normed` is the rounding before the gain.

    The root's relative error is shared by a row: a sum of squares is never off by more than gamma_D.
    """
    D, squares = x_D.value.shape[-1], x_D.value**2
    mean = np.mean(squares, axis=-1, keepdims=True) + eps
    inverse = 1.0 / np.sqrt(mean)
    # d log(inverse) = -(mean of x dx) / mean: what errors of x do to the root, and what summing does.
    total, fourth = np.sum(squares, axis=-1, keepdims=True), np.sum(squares**2, axis=-1, keepdims=True)
    summed = SHARED * summation(total, fourth, D, at) / (2.0 * D * mean) ** 2 + (2.0 * at.unit) ** 2
    root_variance = np.sum(squares * x_D.variance, axis=-1, keepdims=True) / (D * mean) ** 2 + summed
    root_bound = np.sum((np.abs(x_D.value) + 0.5 * x_D.bound) * x_D.bound, axis=-1, keepdims=True) / (D * mean)
    root_bound = root_bound + (0.5 * growth(D + 2, at) + 4.0 * at.unit)
    shared = Estimate(np.broadcast_to(inverse, x_D.value.shape), inverse**2 * root_variance, inverse * root_bound)
    out = rounded(times(x_D, shared, at), normed)
    if weight_D is None:
        return out
    gain = exact(weight_D)
    if offset:
        gain = plus(gain, exact(np.full(1, offset)), at)
    return times(out, gain, at)


def layer_norm(x_D: Estimate, weight_D: Array, bias_D: Array, eps: float, at: Format) -> Estimate:
    """`weight * (x - mean) / sqrt(variance + eps) + bias` over the last axis.

    The mean's error is shared by a row, and grows with the numbers, not with what is left when the mean is taken off. The
    variance is that of the differences: a kernel that takes the mean square less the squared mean is not covered.
    """
    D = x_D.value.shape[-1]
    total, squares = np.sum(x_D.value, axis=-1, keepdims=True), np.sum(x_D.value**2, axis=-1, keepdims=True)
    mean = total / D
    own = SHARED * summation(total, squares, D, at) / D**2 + (2.0 * at.unit * mean) ** 2
    bound = growth(D + 2, at) * np.mean(np.abs(x_D.value), axis=-1, keepdims=True)
    variance = x_D.variance + np.sum(x_D.variance, axis=-1, keepdims=True) / D**2 + own
    centred = Estimate(x_D.value - mean, variance, x_D.bound + np.mean(x_D.bound, axis=-1, keepdims=True) + bound)
    return plus(rms_norm(rounded(centred, at), weight_D, eps, 0.0, at, at), exact(bias_D), at)


def cosine_and_sine(phase: Estimate, at: Format) -> tuple[Estimate, Estimate]:
    """Cosine and sine of a phase, as a library of `at`'s precision computes them: within two units in the last place."""
    cos, sin = np.cos(phase.value), np.sin(phase.value)
    # Beyond the first order, half the square of the phase's error: at large positions it is no longer small.
    second = 0.75 * phase.variance**2
    both = []
    for value, slope in ((cos, sin), (sin, cos)):
        own = 2.0 * at.spacing(value)
        variance = slope**2 * phase.variance + value**2 * second + own**2 / 12.0
        far = np.minimum(np.abs(slope) * phase.bound + 0.5 * phase.bound**2, 2.0)
        both.append(Estimate(value, variance, far + own))
    return both[0], both[1]
