"""The kit's `route` and `moe`: its budget, plain kernels that must pass it, and every known mistake."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from npllm.backend import Backend
from npllm.testing.case import Case
from npllm.testing.checking import check, truth, widened
from npllm.testing.operation import operation
from npllm.testing.rounding import Rounding
from npllm.testing.seeding import reference
from tests.testing.products import assert_half_inputs_show

Array = np.ndarray[Any, Any]

FORMATS = ("f32", "bf16", "f16")
every_format = pytest.mark.parametrize("form", FORMATS)
f32 = np.float32


def sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return f32(1) / (f32(1) + np.exp(-x))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True, initial=-np.inf))
    return e / e.sum(axis=-1, keepdims=True)


# -- plain kernels ----------------------------------------------------------------------------------------------------


def best(ranks: Array, k: int) -> Array:
    return np.argsort(-ranks, axis=-1, kind="stable")[..., :k]


def route_plain(logits: Array, correction: Array | None = None, *, experts_per_token: int, scores: str = "softmax",
                by: str = "scores", groups: int = 1, kept_groups: int = 1, ranking: str = "max", normalise: bool = False,
                floor: float = 0.0, scale: float = 1.0) -> tuple[Array, Array]:  # fmt: skip
    x = logits.astype(f32)
    s = sigmoid(x) if scores == "sigmoid" else softmax(x)
    ranks = (x if by == "logits" else s) + (0 if correction is None else correction)
    index = best(within_groups(ranks, groups, kept_groups, ranking), experts_per_token)
    weight = np.take_along_axis(s, index, axis=-1)
    if normalise:
        weight = weight / (weight.sum(axis=-1, keepdims=True) + f32(floor))
    return index.astype(np.int32), (weight * f32(scale)).astype(logits.dtype)


def within_groups(ranks: Array, groups: int, kept: int, ranking: str) -> Array:
    M, E = ranks.shape
    parts = ranks.reshape(M, groups, E // groups)
    largest = -np.sort(-parts, axis=-1)
    worth = largest[..., :2].sum(axis=-1) if ranking == "pair" else largest[..., 0]
    mask = np.zeros((M, groups), bool)
    np.put_along_axis(mask, best(worth, kept), True, axis=-1)
    return np.where(mask[..., None], parts, -np.inf).reshape(M, E).astype(f32)


def route_other(logits: Array, correction: Array | None = None, **rule: Any) -> tuple[Array, Array]:
    """By another way: a softmax that is normalised anyway is one of the chosen only, experts stand in no order, in int64."""
    index, weight = route_plain(logits.astype(f32), correction, **rule)
    if rule.get("scores", "softmax") == "softmax" and rule.get("normalise"):
        weight = softmax(np.take_along_axis(logits.astype(f32), index, axis=-1)) * f32(rule.get("scale", 1.0))
    order = np.argsort((index * 7919) % 101, axis=-1)
    both = (np.take_along_axis(part, order, axis=-1) for part in (index.astype(np.int64), weight.astype(logits.dtype)))
    return next(both), next(both)


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def gelu_tanh(x: Array) -> Array:
    return f32(0.5) * x * (f32(1) + np.tanh(f32(0.7978845608) * (x + f32(0.044715) * x**3)))


def gelu(x: Array) -> Array:
    from math import erf

    return f32(0.5) * x * (f32(1) + np.vectorize(erf, otypes=[f32])(x * f32(0.70710678)))


ACTIVATIONS = {"silu": silu, "gelu_pytorch_tanh": gelu_tanh, "gelu": gelu}


def moe_by_token(x: Array, gate: Array, up: Array, down: Array, index: Array, weight: Array, *, act: str,
                 weigh: str = "output") -> Array:  # fmt: skip
    y, to = np.zeros(x.shape, f32), x.dtype
    gate, up, down, w = (part.astype(f32) for part in (gate, up, down, weight))
    for m, c in np.ndindex(*index.shape):
        e, row = index[m, c], x[m].astype(f32)
        if weigh == "input":
            row = (row * w[m, c]).astype(to).astype(f32)
        hidden = (ACTIVATIONS[act](gate[e] @ row) * (up[e] @ row)).astype(to).astype(f32)
        y[m] += (down[e] @ hidden) * (w[m, c] if weigh == "output" else f32(1))
    return y.astype(to)


def moe_by_expert(x: Array, gate: Array, up: Array, down: Array, index: Array, weight: Array, *, act: str,
                  weigh: str = "output") -> Array:  # fmt: skip
    """Grouped, the last expert first; a weight on the input is applied to the products instead, which are linear in it."""
    y, to = np.zeros(x.shape, f32), x.dtype
    for e in np.unique(index)[::-1]:
        token, choice = np.nonzero(index == e)
        rows, w = x[token].astype(f32), weight[token, choice].astype(f32)[:, None]
        g, u = rows @ gate[e].astype(f32).T, rows @ up[e].astype(f32).T
        if weigh == "input":
            g, u, w = g * w, u * w, np.ones_like(w)
        hidden = (ACTIVATIONS[act](g) * u).astype(to).astype(f32)
        np.add.at(y, token, (hidden @ down[e].astype(f32).T) * w)
    return y.astype(to)


def moe_unfused(x: Array, gate: Array, up: Array, down: Array, index: Array, weight: Array, **rule: Any) -> Array:
    """Each expert's output is rounded before it is weighted and added."""
    y = np.zeros(x.shape, f32)
    for c in range(index.shape[1]):
        w = weight[:, c : c + 1]
        on_input = rule.get("weigh") == "input"
        one = moe_by_expert(x, gate, up, down, index[:, c : c + 1], w if on_input else np.ones_like(w), **rule)
        y += one.astype(f32) * (f32(1) if on_input else w.astype(f32))
    return y.astype(x.dtype)


def moe_eager(x: Array, gate: Array, up: Array, down: Array, index: Array, weight: Array, *, act: str,
              weigh: str = "output") -> Array:  # fmt: skip
    """As a loop of a framework's operations, experts in order: every one of them returns the type of x, the sum as well."""
    y, to = np.zeros_like(x), x.dtype

    def product(rows: Array, w: Array) -> Array:
        return (rows.astype(f32) @ w.astype(f32).T).astype(to)

    for e in np.unique(index):
        token, choice = np.nonzero(index == e)
        rows, w = x[token], weight[token, choice][:, None]
        rows = rows * w if weigh == "input" else rows
        active = ACTIVATIONS[act](product(rows, gate[e]).astype(f32)).astype(to)
        one = product(active * product(rows, up[e]), down[e])
        np.add.at(y, token, one if weigh == "input" else one * w)
    return y


PLAIN = {"route": (route_plain, route_other), "moe": (moe_by_token, moe_by_expert)}
KERNELS = [(name, kernel) for name, kernels in PLAIN.items() for kernel in kernels]


def in_numbers(name: str) -> list[Case]:
    """The cases whose weights are numbers: these kernels read no codes."""
    return [case for case in operation(name).cases if "storage" not in case.settings]


# -- the kit ----------------------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("name", PLAIN)
def test_the_budget_is_about_the_truth(name: str, form: str) -> None:
    op, rounding = operation(name), Rounding(form)
    for case in op.cases:
        for scale in case.scales:
            inputs = case.inputs(11, scale, rounding.format("inputs"))
            with np.errstate(all="ignore"):
                estimates = op.estimate(widened(inputs), case.settings, rounding, None)
            for want, estimate in zip(truth(op, case, inputs).values(), estimates, strict=True):
                np.testing.assert_allclose(estimate.value, want, rtol=1e-12, atol=1e-13)


@every_format
@pytest.mark.parametrize(("name", "kernel"), KERNELS, ids=lambda x: getattr(x, "__name__", x))
def test_correct_kernels_pass_whatever_their_order(name: str, kernel: Any, form: str) -> None:
    began = time.process_time()
    for case in in_numbers(name):
        check(name, kernel, case, form, seed=int(time.time_ns() % 10**6)).raise_on_failure()
    assert time.process_time() - began < 10.0


@pytest.mark.parametrize("form", ["bf16", "f16"])
def test_experts_may_round_what_they_hand_on_where_that_is_declared(form: str) -> None:
    for case in in_numbers("moe"):
        check("moe", moe_unfused, case, Rounding(form, partial=form)).raise_on_failure()


@pytest.mark.parametrize("form", ["bf16", "f16"])
def test_a_loop_over_experts_in_the_type_of_its_inputs_passes_where_that_is_declared(form: str) -> None:
    declared = Rounding(form, features=form, partial=form)
    for case in in_numbers("moe"):
        check("moe", moe_eager, case, declared, seed=time.time_ns() % 10**9, explain=False).raise_on_failure()
    cases = operation("moe").cases
    assert not all(check("moe", moe_eager, case, Rounding(form, features=form), explain=False).ok for case in cases)


@pytest.mark.parametrize("form", ["f32", "bf16"])
@pytest.mark.parametrize("name", PLAIN)
def test_inputs_through_float16_are_found(name: str, form: str) -> None:
    assert_half_inputs_show(name, form)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=[pytest.mark.full] * (name == "route" and form != "f32"))
        for name in PLAIN for form in FORMATS
    ],
)  # fmt: skip
def test_every_mistake_is_found(name: str, form: str) -> None:
    op = operation(name)
    for mistake in op.mistakes:
        wrong = reference(op, mistake.made_by(Backend)("float64"))
        seed = time.time_ns() % 10**6
        assert not all(check(op, wrong, case, form, seed=seed, explain=False).ok for case in op.cases), mistake.name


# -- how a choice is judged -------------------------------------------------------------------------------------------


def altered(change: Any) -> Any:
    def kernel(logits: Array, correction: Array | None = None, **rule: Any) -> tuple[Array, Array]:
        index, weight = route_plain(logits, correction, **rule)
        return change(index.copy(), weight.copy())

    return kernel


@pytest.mark.parametrize("number", [-1, 8, 2**31 - 1])
def test_an_expert_that_is_not_there_is_no_choice(number: int) -> None:
    def change(index: Array, weight: Array) -> tuple[Array, Array]:
        index[3, 1] = number
        return index, weight

    report = check("route", altered(change), "mixtral", "f32")
    assert report.problem == "bound"
    assert "index" in report.message


def test_weights_that_stand_at_another_expert_are_found() -> None:
    assert not check("route", altered(lambda index, weight: (index[:, ::-1], weight)), "mixtral", "f32").ok
    assert check("route", altered(lambda index, weight: (index[:, ::-1], weight[:, ::-1])), "mixtral", "f32").ok


def route_on(logits: list[float], index: list[int], correction: list[float], **rule: Any) -> bool:
    """Whether the kernel's experts, of one token, are followed."""
    op, settings = operation("route"), {"experts_per_token": len(index), "scores": "sigmoid"} | rule
    inputs = {"logits": np.array([logits]), "correction": np.array(correction)}
    got = {"index": np.sort(np.array([index], np.float64)), "weight": np.ones((1, len(index)))}
    return bool((op.estimate(inputs, settings, Rounding("f32"), got)[0].value == got["index"]).all())


def test_what_rounding_cannot_tell_apart_is_a_tie() -> None:
    """Sigmoids of 30 and 31 are 1 in float32; those of 1 and 1.001 are not equal; equal logits go to the lowest index."""
    none = [0.0] * 4
    assert route_on([30, 31, 1, 0], [0], none)
    assert route_on([30, 31, 1, 0], [1], none)
    assert not route_on([1.001, 1, 0, 0], [1], none)
    assert route_on([1, 1, 0, 0], [0], none)
    assert not route_on([1, 1, 0, 0], [1], none)
    assert not route_on([30, 31, 1, 0], [2], none)
    assert not route_on([3, 2, 1, 0], [0, 0], none)
    assert not route_on([30, 31, 1, 0], [1], [0.001, 0, 0, 0])


def test_groups_that_rounding_cannot_tell_apart_are_ties_and_equal_ones_go_in_order() -> None:
    rule = {"groups": 2, "kept_groups": 1, "ranking": "pair"}
    assert route_on([30, 31, 32, 33], [2, 3], [0.0] * 4, **rule)
    assert route_on([30, 31, 32, 33], [0, 1], [0.0] * 4, **rule)
    assert not route_on([30, 31, 32, 33], [1, 2], [0.0] * 4, **rule)
    assert not route_on([1, 2, 2, 1], [2, 3], [0.0] * 4, **rule)
