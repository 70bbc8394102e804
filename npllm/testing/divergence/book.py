"""What one comparing pass knows and finds: the dump, the names of weights, the budget, a verdict for each name.

The rows of a pass are the dump's own and COPIES further ones of the same tokens, whose arithmetic is disturbed wherever an
engine of the dump's format may round (npllm.testing.divergence.probe). How far the copies scatter is the budget. After
each comparison all of them go on with the dump's own numbers, so an error counts where it arises, and nowhere else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.errors import ArgumentError
from npllm.model import Model
from npllm.testing.divergence.dump import Dump
from npllm.testing.estimate import Estimate
from npllm.testing.judge import judge
from npllm.testing.rounding import Format

# Calibrated on honest dumps of transformers (tests/testing/test_diff.py): an engine's rounding errors may be so many times
# those of the disturbed copies, and an element so many of their standard deviations.
SLACK = 1.5
FURTHEST = 12.0

# A variance measured on few copies is mixed with the mean of its row, that weighs as much as so many copies.
PRIOR = 4.0

# Roundings that are allowed between two modules where no operation of a backend is.
WIRING = 4.0

# Relative errors of float64 itself, and of what is not marked.
FLOOR = 1e-13


class Point(NamedTuple):
    """One comparison.

    name       as the dump spells it.
    layer      its number; None outside the layers.
    operation  what was computed since the last comparison, the last step first in importance.
    problem    "" or what is wrong (judge's problems, "choice" for experts).
    error      root mean square of the error in roundings of the dump's format.
    excess     the error over the budget: above 1 is a divergence.
    """

    name: str
    layer: int | None
    operation: str
    problem: str
    error: float
    excess: float


class Tie(NamedTuple):
    """A token whose experts differ from the canon's by less than the budget.

    Where the dump does not tell the experts, `theirs` is (), and the token is not compared until the dump goes on without
    them: others may have been taken.
    """

    name: str
    layer: int | None
    token: int
    ours: tuple[int, ...]
    theirs: tuple[int, ...]


class Reached(Exception):  # noqa: N818 (no error: the pass has done what it was for)
    """A pass has come to the name it was to stop at; `value` is what the canon has there."""

    def __init__(self, value: Array) -> None:
        super().__init__()
        self.value = value


@dataclass
class Book:
    """The state of one pass. `rows` and `length` are the dump's B and T, `modules` the prepared weights by their modules'
    names, `stop` is the name to stop at. `since` are the steps since the last comparison, `pending` those that no name shows
    but a later residual sum. `doubt` are tokens [B * T] whose numbers rest on a choice of experts that the dump may have
    made otherwise."""

    dump: Dump
    format: Format
    rows: int
    length: int
    modules: dict[str, Any]
    copies: int
    stop: str = ""
    points: list[Point] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    since: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    dice: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    embedded: Array | None = None
    latest: Array | None = None
    calls: Counter[str] = field(default_factory=Counter)
    names: dict[int, list[str]] = field(default_factory=dict)
    doubt: Array = field(init=False)

    def __post_init__(self) -> None:
        self.doubt = np.zeros(self.exact, dtype=bool)
        for name, weight in self.modules.items():
            self.names.setdefault(id(weight), []).append(name)

    @property
    def exact(self) -> int:
        """Tokens of the dump's own rows; what follows them are the copies."""
        return self.rows * self.length

    def name(self, weight: Any, *, head: bool = False) -> str:
        """The module that a prepared weight belongs to; of a tied one the head, if `head`."""
        found = self.names.get(id(weight), [""])
        return found[-1] if head else found[0]

    def rough(self, x: Array, times: float = 1.0, size: Array | None = None, token_T: Array | None = None) -> Array:
        """`x` with the copies disturbed as by `times` roundings at `size` (default: of x itself).

        The first axis are tokens, all of them, or those that `token_T` names.
        """
        if not self.copies:
            return x
        if token_T is None:
            part: Any = slice(self.exact, None)
        else:
            part = token_T >= self.exact
        chosen = x[part]
        spacing = self.format.spacing(np.abs(chosen if size is None else size[part]))
        out = x.copy()
        out[part] = chosen + spacing * np.sqrt(times) * (self.dice.random(chosen.shape) - 0.5)
        return out

    def spread(self, x: Array, deviation: Array, token_T: Array | None = None) -> Array:
        """`x` with normal errors of this standard deviation (any shape that broadcasts) in the copies."""
        if not self.copies:
            return x
        copies = (np.arange(len(x)) if token_T is None else token_T) >= self.exact
        noise = deviation * self.dice.standard_normal(np.shape(deviation))
        return x + copies.reshape(-1, *[1] * (x.ndim - 1)) * noise

    def meet(self, x: Array, *names: str, demanded: bool = False, step: str = "") -> Array:
        """Compare `x` with what the dump has under the first of `names`, and go on with that."""
        self.asked.update(names)
        if step:
            self.since.append(step)
        if step == "residual sum":
            self.since += self.pending
            self.pending.clear()
        # A module that is called again has its second call under a name of its own.
        self.calls.update(names)
        again = (name if self.calls[name] == 1 else f"{name}#{self.calls[name]}" for name in names)
        name = self.dump.find(*again)
        if name is None:
            return x
        value = self.fitted(name, x, demanded)
        if value is None:
            self.dump.used.discard(name)
            return x
        if value.shape != x[: self.exact].shape:
            self.last_only(name, x, value)
            return x
        return self.compared(name, x, value)

    def given(self, x: Array, name: str) -> Array:
        """Compare what a module is given. What stands before it in a model file's own arithmetic may round a few times."""
        if not name:
            return x
        full = f"{name}.input"
        wired = not self.since and x is not self.latest and full in self.dump.values
        if wired:
            typical = np.sqrt(np.mean(x**2))
            x = self.rough(x, WIRING, np.maximum(np.abs(x), typical))
        return self.meet(x, full)

    def compared(self, name: str, x: Array, value: Array) -> Array:
        """Judge and replace: `value` has the shape of the exact part of `x`."""
        if name == self.stop:
            raise Reached(x[: self.exact])
        self.judged(name, x, value)
        if not np.isfinite(value).all():
            return x
        self.latest = np.concatenate([value] * (self.copies + 1))
        return self.latest

    def last_only(self, name: str, x: Array, value: Array) -> None:
        """The dump has only the last token of each row."""
        every = x.reshape(-1, self.length, *x.shape[1:])[:, -1]
        if name == self.stop:
            raise Reached(every[: self.rows])
        self.judged(name, every, value)

    def judged(self, name: str, x: Array, value: Array) -> None:
        doubt = self.doubt if len(value) == self.exact else self.doubt.reshape(self.rows, -1)[:, -1]
        kept = ~doubt | ~np.isfinite(value.reshape(len(value), -1)).all(axis=1)
        x = x.reshape(-1, *value.shape)[:, kept].reshape(-1, *value.shape[1:])
        value = value[kept]
        n = len(value)
        if not n:
            self.note(name, "", 0.0, 0.0)
            return
        estimate = self.estimate(x[:n], x[n:], self.dump.format(name))
        verdict = judge(value, estimate, self.format)
        self.note(name, verdict.problem, self.roundings(value - x[:n], x[:n]), verdict.excess)

    def settle(self, compared: int) -> None:
        """No token is in doubt any more, if there are more than so many points: the pass goes on with the dump's numbers."""
        if len(self.points) > compared:
            self.doubt[:] = False

    def roundings(self, error: Array, true: Array) -> float:
        """An error's root mean square over that of roundings to the format."""
        squares = np.mean(self.format.spacing(true) ** 2) / 12.0 if true.size else 0.0
        return float(np.sqrt(np.mean(error**2) / squares)) if squares and np.isfinite(error).all() else float("inf")

    def note(self, name: str, problem: str, error: float, excess: float) -> None:
        place = self.dump.spelled[name], layer_of(name), self.operation(name)
        self.points.append(Point(*place, problem, float(error), float(excess)))
        self.since.clear()

    def estimate(self, exact: Array, copies: Array, stored: Format) -> Estimate:
        """The true value and its budget, from how the copies scatter about it."""
        K = max(1, len(copies) // max(1, len(exact)))
        square = (copies.reshape(K, *exact.shape) - exact) ** 2 if len(copies) else np.zeros((1, *exact.shape))
        own = np.mean(square, axis=0)
        variance = (K * own + PRIOR * np.mean(own, axis=-1, keepdims=True)) / (K + PRIOR)
        if stored.bits < self.format.bits:
            variance = variance + stored.spacing(exact) ** 2 / 12.0
        largest = np.max(np.abs(exact), axis=-1, keepdims=True, initial=0.0)
        variance = SLACK**2 * variance + (FLOOR * largest) ** 2
        return Estimate(exact, variance, FURTHEST * np.sqrt(variance))

    def operation(self, name: str) -> str:
        """What was computed since the last comparison, each step once, in order."""
        if name.endswith("o_proj.input") or name.endswith("attn.c_proj.input") or name.endswith("attention.heads"):
            return "attention with RoPE" if "attention" in self.since else "attention"
        return " and ".join(dict.fromkeys(self.since)) or "the wiring before it"

    def fitted(self, name: str, x: Array, demanded: bool) -> Array | None:
        """The dump's tensor in the shape of the exact part of `x` (or of one token per row); None if it has another."""
        value, rest = self.dump.values[name], x.shape[1:]
        size = int(np.prod(rest))
        found = []
        if value.shape == (1, self.length, *rest):
            # What depends on positions only stands there once.
            value = np.repeat(value, self.rows, axis=0)
        if value.ndim == 4 and len(rest) == 2:
            # Heads before tokens, as queries are kept; streams before rows, as Gemma 3n has them.
            for turned in (value.swapaxes(1, 2), np.moveaxis(value, 0, 2)):
                found += [turned] if turned.shape == (self.rows, self.length, *rest) else []
        if value.ndim > 1 and value.size == self.exact * size and (len(rest) > 1 or value.shape[-1] == size):
            found += [] if found and value.shape[1:] != (self.length, *rest) else [value]
        if found:
            shaped = [each.reshape(self.exact, *rest) for each in found]
            return min(shaped, key=lambda each: distance(x[: self.exact], each))
        if value.ndim > 0 and value.size == self.rows * size and value.shape[-1] == rest[-1]:
            return value.reshape(self.rows, *rest)
        if demanded:
            have, want = list(value.shape), [self.rows, self.length, *rest]
            raise ArgumentError(
                f"{self.dump.source}: {self.dump.spelled[name]} has shape {have}, this model and these tokens need {want}; "
                "is it a dump of other tokens, or of another model?"
            )
        return None


def distance(x: Array, y: Array) -> float:
    return float(np.sum((x - y) ** 2))


def layer_of(name: str) -> int | None:
    found = re.match(r"(?:layers|h)\.(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def modules_of(model: Model) -> dict[str, Any]:
    """The prepared weights by their modules' names; an embedding comes before a head tied to it."""
    modules = {}
    for name, tensor in model.spec.items():
        path = name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name
        place = f"{tensor.bundle.path}.{tensor.bundle.field}" if tensor.bundle else path
        modules[path] = found_at(model.weights, place.split("."))
    return modules


def found_at(tree: Any, steps: Iterable[str]) -> Any:
    """The weight of the Linear at a path of the tree."""
    for step in steps:
        tree = tree[int(step)] if isinstance(tree, list) else getattr(tree, step, None)
    return tree if tree is None or isinstance(tree, SimpleNamespace) else tree.weight
