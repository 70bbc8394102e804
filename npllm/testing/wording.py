"""A failed verdict in words: how large, where first, in which rows, what explains it, and how to see it again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from itertools import pairwise

import numpy as np

from npllm.arrays import Array
from npllm.testing.case import Case
from npllm.testing.estimate import Estimate
from npllm.testing.judge import Verdict, ratio
from npllm.testing.operation import Operation
from npllm.testing.report import Report
from npllm.testing.rounding import Rounding

# An index of an axis belongs to the pattern if its share of wrong elements is at least this part of the largest.
BELONGS = 0.1

# Errors grow along an axis if the last quarter has so many times those of the first.
GROWS = 4.0

# An error so many times a correct kernel's counts as wrong where a pattern is looked for.
UNUSUAL = 3.0

# Scattered indices are told where so many elements are wrong at each.
FEW = 4


def describe(
    op: Operation, case: Case, rounding: Rounding, output: str, report: Report, verdict: Verdict, got: Array,
    estimate: Estimate,
) -> str:  # fmt: skip
    """The message of a report: a headline, then a line each for size, first place, pattern, cause and the call."""
    axes = words_of(op.outputs[output], got.ndim)
    lines = [headline(output, verdict), size_of(verdict), place_of(axes, verdict, got, estimate)]
    where = patterns(axes, verdict, got, estimate)
    lines += [f"where: {'; '.join(where)}"] if where else []
    lines += [cause(report)] if report.explanation else []
    lines += [STALE] if verdict.problem == "non-finite" and np.isnan(got[verdict.bad]).all() else []
    return "\n  ".join([line for line in lines if line] + [reproduce(case, rounding, report)])


# Results are overwritten with NaN once they are copied, and so is memory that a kernel is to write.
STALE = "perhaps memory of an earlier call is returned again, or `out` is read before it is written"


def headline(output: str, verdict: Verdict) -> str:
    bad, size = int(verdict.bad.sum()), verdict.bad.size
    what = {
        "non-finite": f"NaN or infinity in the wrong place in {bad:,} of {size:,} elements",
        "constant": f"all {size:,} elements are the same, the truth's are not",
        "bound": f"{bad:,} of {size:,} elements are beyond the bound of any correct kernel",
        "spread": "no element is beyond the bound, but errors are larger than the declared roundings explain",
    }
    return f"`{output}`: {what[verdict.problem]}"


def size_of(verdict: Verdict) -> str:
    if not np.isfinite(verdict.error):
        return ""
    bound = "just beyond" if 1.0 < verdict.share < 1.001 else f"at most {verdict.share:.4g} times"
    spread = f"{figure(verdict.spread)} times what correct kernels have (limit {verdict.limit:.2f})"
    return f"error: {figure(verdict.error)} output roundings (rms), {spread}; {bound} its bound"


def place_of(axes: tuple[str, ...], verdict: Verdict, got: Array, estimate: Estimate) -> str:
    """The first bad element; where none is bad alone, the worst."""
    if verdict.problem == "constant":
        return f"every element is {got.flat[0]:.6g}"
    if verdict.problem == "spread":
        which, at = "worst", np.unravel_index(int(np.argmax(np.abs(relative(got, estimate)))), got.shape)
    else:
        which, at = "first", tuple(np.argwhere(verdict.bad)[0])
    index = tuple(int(i) for i in at)
    numbers = f"got {got[index]:.6g}, truth {estimate.value[index]:.6g}"
    bound = f", bound {estimate.bound[index]:.2g}" if np.isfinite(got[index] - estimate.value[index]) else ""
    return f"{which}: {coordinate(axes, index)}: {numbers}{bound}"


def cause(report: Report) -> str:
    if report.explained >= 1.0:
        return f"closest known mistake: {report.explanation} (explains all of the error but rounding)"
    return f"closest known mistake: {report.explanation} (explains {100.0 * report.explained:.3g} % of the error)"


def reproduce(case: Case, rounding: Rounding, report: Report) -> str:
    """The call that fails, and the inputs that it failed on."""
    call = f'check("{case.operation}", kernel, {made(case)}, {spelled(rounding)}, seed={report.seed})'
    return f"reproduce: {call}   # scale {report.scale:g}"


def made(case: Case) -> str:
    """The expression for a case: its name, or the call of `npllm.testing.strategies` that makes it."""
    base, _, drawn = case.name.partition("@")
    seed, _, scale = drawn.partition("x")
    if not drawn:
        return f'"{case.name}"'
    if base.startswith("sized("):
        return f'sized("{case.operation}", {seed}, {scale}, {base.removeprefix("sized(")}'
    return f'variant("{case.operation}", "{base}", {seed}, {scale})'


def spelled(rounding: Rounding) -> str:
    """The policy as one would write it: only what was not filled in."""
    usual = Rounding(rounding.inputs)
    others = [each.name for each in fields(rounding) if getattr(rounding, each.name) != getattr(usual, each.name)]
    if not others:
        return f'"{rounding.inputs}"'
    return f'Rounding("{rounding.inputs}", ' + ", ".join(f'{name}="{getattr(rounding, name)}"' for name in others) + ")"


# -- where ------------------------------------------------------------------------------------------------------------


def words_of(axes: tuple[str, ...], ndim: int) -> tuple[str, ...]:
    """Names for the axes of an array: the last ones where an output has fewer (packed rows), "axis 0" where it has more."""
    named = axes[max(0, len(axes) - ndim) :]
    return tuple(f"axis {i}" for i in range(ndim - len(named))) + named


def coordinate(axes: Iterable[str], index: tuple[int, ...]) -> str:
    return ", ".join(f"{axis} {i}" for axis, i in zip(axes, index, strict=False)) or "the only element"


def relative(got: Array, estimate: Estimate) -> Array:
    """Errors in units of what a correct kernel's would be; 0 where either is not finite."""
    with np.errstate(invalid="ignore"):
        error = np.where(np.isfinite(got) & np.isfinite(estimate.value), got - estimate.value, 0.0)
        return np.nan_to_num(ratio(error, np.sqrt(estimate.variance)), posinf=1e9, neginf=-1e9)


def patterns(axes: tuple[str, ...], verdict: Verdict, got: Array, estimate: Estimate) -> list[str]:
    """What the wrong elements have in common: for each axis the indices that they are confined to, or grow along."""
    if verdict.problem == "constant" or verdict.bad.sum() < 2:
        return []
    error = relative(got, estimate)
    # The bound is seldom left where an error is small, so all that no correct kernel would often do counts.
    bad = verdict.bad | (np.abs(error) > UNUSUAL) if verdict.problem != "non-finite" else verdict.bad
    possible = bad | (estimate.variance > 0.0) | ~np.isfinite(estimate.value)
    found, wrong = [], int(bad.sum())
    for axis, word in enumerate(axes):
        others = tuple(i for i in range(got.ndim) if i != axis)
        rates = ratio(bad.sum(axis=others).astype(float), possible.sum(axis=others))
        there = np.asarray(possible.any(axis=others))
        hit = np.asarray(rates >= BELONGS * rates.max())
        found.append(confined(word, hit, there, wrong) or growing(word, error, axis))
    said = [each for each in found if each]
    everywhere = verdict.problem == "bound" and wrong > 0.5 * possible.sum()
    return said or (["all over"] if everywhere else [])


def confined(axis: str, hit: Array, there: Array, wrong: int) -> str:
    """Which indices of an axis are hit, in words; "" if all are that can be (`there`), or if they follow no rule.

    `wrong` elements are hit: where they are few, scattered indices mean nothing.
    """
    indices = [int(i) for i in np.flatnonzero(hit)]
    if hit.size < 2 or (hit | ~there).all():
        return ""
    first, last, count = indices[0], indices[-1], len(indices)
    if count == 1:
        return f"only {axis} {first}"
    if there[first : last + 1].sum() == count:
        return span(axis, first, last, np.flatnonzero(there))
    if wrong < FEW * count:
        return ""
    steps = set(np.diff(indices).tolist())
    if len(steps) == 1 and (count > 2 or last + (last - first) >= hit.size):
        return every(axis, first, steps.pop())
    if count <= 4:
        return f"only {axis} {', '.join(map(str, indices))}"
    return f"{count} of {int(there.sum())} values of {axis}" if count <= 0.25 * there.sum() else ""


def span(axis: str, first: int, last: int, there: Array) -> str:
    """A range of an axis: open where it goes to an end."""
    if last == there[-1]:
        return f"{axis} >= {first}"
    return f"{axis} < {last + 1}" if first == there[0] else f"{axis} {first} to {last}"


def every(axis: str, first: int, step: int) -> str:
    if step == 2 and first < 2:
        return f"every {'odd' if first else 'even'} {axis}"
    return f"every {step}th {axis}, from {first}".replace("2th", "2nd").replace("3th", "3rd")


def growing(axis: str, spread: Array, along: int) -> str:
    """Whether errors grow along an axis: `grows with query (9 times from the first quarter to the last)`."""
    size = spread.shape[along]
    if size < 8:
        return ""
    quarters = [np.take(spread, range(i * size // 4, (i + 1) * size // 4), axis=along) for i in range(4)]
    sizes = [float(np.sqrt(np.mean(np.square(quarter)))) for quarter in quarters]
    rising = all(b >= a for a, b in pairwise(sizes))
    if rising and sizes[0] > 0.0 and sizes[3] > GROWS * sizes[0]:
        return f"grows with {axis} ({figure(sizes[3] / sizes[0])} times from the first quarter to the last)"
    return ""


def figure(x: float) -> str:
    """Three digits, thousands grouped, no exponent until a million."""
    return f"{x:,.0f}" if 1000.0 <= abs(x) < 1e6 else f"{x:.3g}"
