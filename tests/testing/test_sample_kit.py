"""The kit's `sample`: its budget, plain kernels that must pass it, and every known mistake."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from npllm.backend import Backend
from npllm.sampling import Sampler, Sampling, probabilities
from npllm.testing.checking import check, truth, widened
from npllm.testing.operation import operation
from npllm.testing.rounding import Rounding
from npllm.testing.seeding import reference
from tests.testing.products import assert_half_inputs_show

Array = np.ndarray[Any, Any]

every_format = pytest.mark.parametrize("form", ["f32", "bf16", "f16"])
f32 = np.float32


def greedy(logits: Array) -> Array:
    return (np.arange(logits.shape[1]) == np.argmax(logits, axis=1)[:, None]).astype(logits.dtype)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True, initial=-np.inf))
    return e / e.sum(axis=-1, keepdims=True)


def sample_sorted(logits: Array, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Array:
    """In descending order, by counts."""
    if temperature == 0.0:
        return greedy(logits)
    x = logits.astype(f32) / f32(temperature)
    order = np.argsort(-x, axis=1, kind="stable")
    ranked = np.take_along_axis(x, order, axis=1)
    ranked[:, top_k or x.shape[1] :] = -np.inf
    p = softmax(ranked)
    if top_p < 1.0:
        ranked[np.cumsum(p, axis=1) - p >= f32(top_p)] = -np.inf
    p = softmax(ranked)
    ranked[p < f32(min_p) * p[:, :1]] = -np.inf
    out = np.empty_like(ranked)
    np.put_along_axis(out, order, softmax(ranked), axis=1)
    return out.astype(logits.dtype)


def sample_by_thresholds(
    logits: Array, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Array:
    """As transformers' processors: thresholds on logits, which keep all of a tie; sums from the least likely on."""
    if temperature == 0.0:
        return greedy(logits)
    x = logits.astype(f32) * f32(1.0 / temperature)
    if 0 < top_k < x.shape[1]:
        x[x < -np.sort(-x, axis=1)[:, top_k - 1 : top_k]] = -np.inf
    if top_p < 1.0:
        ascending = np.argsort(x, axis=1, kind="stable")
        least = np.cumsum(softmax(np.take_along_axis(x, ascending, axis=1)), axis=1) <= f32(1.0 - top_p)
        least[:, -1] = False
        dropped = np.empty_like(least)
        np.put_along_axis(dropped, ascending, least, axis=1)
        x[dropped] = -np.inf
    if min_p:
        p = softmax(x)
        x[p < f32(min_p) * p.max(axis=1, keepdims=True)] = -np.inf
    return softmax(x).astype(logits.dtype)


@every_format
def test_the_budget_is_about_the_truth(form: str) -> None:
    op, rounding = operation("sample"), Rounding(form)
    for case in op.cases:
        for scale in case.scales:
            inputs = case.inputs(11, scale, rounding.format("inputs"))
            with np.errstate(all="ignore"):
                (estimate,) = op.estimate(widened(inputs), case.settings, rounding, None)
            np.testing.assert_allclose(estimate.value, truth(op, case, inputs)["probs"], rtol=1e-12, atol=1e-300)


@every_format
@pytest.mark.parametrize("kernel", [sample_sorted, sample_by_thresholds])
def test_correct_kernels_pass(kernel: Any, form: str) -> None:
    began = time.process_time()
    for case in operation("sample").cases:
        check("sample", kernel, case, form, seed=time.time_ns() % 10**6).raise_on_failure()
    assert time.process_time() - began < 10.0


@every_format
def test_every_mistake_is_found(form: str) -> None:
    op = operation("sample")
    for mistake in op.mistakes:
        wrong = reference(op, mistake.made_by(Backend)("float64"))
        seed = time.time_ns() % 10**6
        assert not all(check(op, wrong, case, form, seed=seed, explain=False).ok for case in op.cases), mistake.name


@pytest.mark.parametrize("form", ["f32", "bf16"])
def test_inputs_through_float16_are_found(form: str) -> None:
    assert_half_inputs_show("sample", form)


def test_tokens_are_drawn_with_the_probabilities_told() -> None:
    logits, rule = np.array([0.0, 1.0, 2.0, 0.5, -1.0]), Sampling(temperature=0.7, top_k=4, top_p=0.95, min_p=0.01, seed=3)
    sampler = Sampler(rule, 0, (), 5)
    counts = np.bincount([sampler.draw(logits) for _ in range(20_000)], minlength=5)
    p = probabilities(logits, rule)
    assert (np.abs(counts - 20_000 * p) <= 5.0 * np.sqrt(20_000 * p * (1.0 - p))).all()


@pytest.mark.parametrize("kept", [[0], [1], [0, 1, 2], [0, 3]])
def test_a_nucleus_is_no_larger_and_no_smaller_where_rounding_does_not_decide(kept: list[int]) -> None:
    """0.4, 0.3, 0.2, 0.1: to reach 0.65 takes two."""
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    got = np.where(np.isin(np.arange(4), kept), shares, 0.0)[None]
    (estimate,) = operation("sample").estimate(
        {"logits": np.log(shares)[None]}, {"temperature": 1.0, "top_p": 0.65}, Rounding("f32"), {"probs": got / got.sum()}
    )
    np.testing.assert_allclose(estimate.value, [[4 / 7, 3 / 7, 0, 0]])


def test_a_token_that_rounding_lets_in_or_leaves_out_is_followed() -> None:
    """The first two reach 0.7 to within rounding: a third may be kept."""
    shares, settings = np.array([0.4, 0.3, 0.2, 0.1]), {"temperature": 1.0, "top_p": 0.7}
    for count in (2, 3):
        got = shares * (np.arange(4) < count)
        inputs, answer = {"logits": np.log(shares)[None]}, {"probs": got[None] / got.sum()}
        (estimate,) = operation("sample").estimate(inputs, settings, Rounding("f32"), answer)
        np.testing.assert_allclose(estimate.value, answer["probs"])
