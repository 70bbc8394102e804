"""Attention in the kit: its budget is that of correct kernels, and each known mistake leaves it."""

import functools
import secrets
import time
from typing import Any

import numpy as np
import pytest

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.testing.case import Case, cases, find_case
from npllm.testing.checking import truth, verdicts_on, widened
from npllm.testing.judge import Verdict, judge
from npllm.testing.kernels import flash
from npllm.testing.operation import operation
from npllm.testing.ops.attention_plain import Plain
from npllm.testing.rounding import Rounding, in_format

OP = operation("attention")
full = pytest.mark.full


def drawn(case: Case, rounding: Rounding, seed: int) -> Any:
    return [case.inputs(seed, scale, rounding.format("inputs")) for scale in case.scales]


def rounded(out: Array, rounding: Rounding) -> Array:
    """`out` in the output's format, as float64."""
    with np.errstate(over="ignore"):
        return out.astype(rounding.format("output").dtype).astype(np.float64)


def judged(case: Case, inputs: dict[str, Array], out: Array, rounding: Rounding) -> Verdict:
    return verdicts_on(OP, case, inputs, rounding, {"out": rounded(out, rounding)})["out"][0]


def eager(rounding: Rounding) -> Backend:
    """Whole scores, normalised probabilities rounded before they meet the values."""

    class Eager(Plain):
        def scores(self, q_HTK: Array, k_HKS: Array, scale: float, cap: float | None) -> Array:
            return in_format(super().scores(q_HTK, k_HKS, scale, cap), rounding.format("scores"))

        def sums(self, p_HTS: Array, v_HSV: Array) -> Array:
            return super().sums(in_format(p_HTS, rounding.format("probs")), v_HSV)

    return Eager("float32")


def hugging_face(rounding: Rounding) -> Backend:
    """Eager attention as in transformers: each step an array of its own in the type of scores, a sink one score more."""
    to = rounding.format("scores")

    class Stepwise(Plain):
        def scores(self, q_HTK: Array, k_HKS: Array, scale: float, cap: float | None) -> Array:
            s_HTS = in_format(np.float32(scale) * in_format(q_HTK @ k_HKS, to), to)
            if cap is None:
                return s_HTS
            return in_format(cap * in_format(np.tanh(in_format(s_HTS / np.float32(cap), to)), to), to)

        def sums(self, p_HTS: Array, v_HSV: Array) -> Array:
            return super().sums(in_format(p_HTS, rounding.format("probs")), v_HSV)

    class TakenOff(Stepwise):
        """With sinks, the largest score is taken off in that type too (gpt-oss)."""

        def weights(self, hidden_HTS: Array, s_HTS: Array, sink_H11: Array) -> Array:
            top = np.maximum(np.max(hidden_HTS, axis=-1, keepdims=True), sink_H11)
            if not np.isfinite(sink_H11).all():
                return super().weights(hidden_HTS, s_HTS, sink_H11)
            less_HTS, less_H11 = (np.where(np.isfinite(x), in_format(x - top, to), x) for x in (hidden_HTS, sink_H11))
            return super().weights(less_HTS, s_HTS, less_H11)

    return TakenOff("float32")


@pytest.mark.parametrize("case", OP.cases, ids=str)
def test_the_budget_is_around_the_truth(case: Case) -> None:
    """And is finite and not negative everywhere; where a query sees nothing, it is zero."""
    for inputs in drawn(case, Rounding("f32"), 0):
        want = truth(OP, case, inputs)["out"]
        with np.errstate(all="ignore"):
            (estimate,) = OP.estimate(widened(inputs), case.settings, Rounding("f32"), None)
        np.testing.assert_allclose(estimate.value, want, rtol=0, atol=1e-12 * max(1.0, np.abs(want).max(initial=0.0)))
        assert all(np.isfinite(x).all() and (x >= 0).all() for x in (estimate.variance, estimate.bound))
        nothing = ~want.any(axis=-1)
        assert not estimate.bound[nothing].any()
        assert nothing.any() == ("masked" in case.tags or (case.name == "nan-padded"))


@pytest.mark.parametrize(("inputs", "block"), [("f32", 48), ("bf16", 16), pytest.param("f16", 128, marks=full)])
def test_a_tiled_kernel_passes_all_cases_in_seconds(inputs: str, block: int) -> None:
    """Those with NaN where no query looks too."""
    rounding, begin = Rounding(inputs), time.process_time()
    kernel = functools.partial(flash, rounding=rounding, block=block)
    for case in (*cases("attention"), *cases("attention", "hostile")):
        for arrays in drawn(case, rounding, block):
            verdict = judged(case, arrays, kernel(**arrays, **case.settings), rounding)
            assert not verdict.problem, (case, verdict[:-1])
    assert time.process_time() - begin < 10.0


@pytest.mark.parametrize(
    "rounding",
    [
        Rounding("f32"),
        pytest.param(Rounding("bf16"), marks=full),
        pytest.param(Rounding("bf16", scores="bf16"), marks=full),
        Rounding("f16", output="f32"),
    ],
    ids=str,
)
def test_an_eager_kernel_passes_all_cases(rounding: Rounding) -> None:
    backend = eager(rounding)
    for case in cases("attention"):
        for arrays in drawn(case, rounding, 1):
            verdict = judged(case, arrays, truth(OP, case, arrays, backend)["out"], rounding)
            assert not verdict.problem, (case, verdict[:-1])


@pytest.mark.parametrize("inputs", ["bf16", pytest.param("f16", marks=full)])
def test_eager_attention_that_rounds_every_step_passes_as_declared(inputs: str) -> None:
    """In float16, the scores of `large-logits` are infinite: that kernel is wrong there."""
    rounding, seed = Rounding(inputs, scores=inputs), secrets.randbelow(1 << 31)
    backend = hugging_face(rounding)
    for case in cases("attention", without="" if inputs == "bf16" else "overflow"):
        for arrays in drawn(case, rounding, seed):
            verdict = judged(case, arrays, truth(OP, case, arrays, backend)["out"], rounding)
            assert not verdict.problem, (case, seed, verdict[:-1])


@pytest.mark.parametrize("inputs", ["bf16", "f16"])
def test_eager_attention_that_rounds_every_step_is_noticed_where_it_is_not_declared(inputs: str) -> None:
    rounding = Rounding(inputs)
    backend = hugging_face(Rounding(inputs, scores=inputs))
    for name in ("d64", "softcap50", "sinks-scale"):
        case = find_case("attention", name)
        verdicts = [judged(case, x, truth(OP, case, x, backend)["out"], rounding) for x in drawn(case, rounding, 5)]
        assert any(verdict.problem for verdict in verdicts), name


def test_probabilities_may_have_more_bits_than_declared() -> None:
    rounding = Rounding("bf16")
    for case in cases("attention", "basic"):
        for arrays in drawn(case, rounding, 2):
            out = flash(**arrays, **case.settings, rounding=Rounding("bf16", probs="f32"))
            assert not judged(case, arrays, out, rounding).problem


def test_probabilities_with_fewer_bits_than_declared_are_noticed() -> None:
    rounding = Rounding("bf16", probs="f32", output="f32")
    (case,) = cases("attention", "basic")
    verdicts = [judged(case, x, flash(**x, **case.settings), rounding) for x in drawn(case, rounding, 3)]
    assert any(verdict.problem for verdict in verdicts)


def unlike_first() -> list[Case]:
    """The cases that have a tag which none before had, then the others: most mistakes are caught early."""
    first: list[Case] = []
    others: list[Case] = []
    for case in cases("attention"):
        seen = {tag for each in first for tag in each.tags}
        (others if seen.issuperset(case.tags) else first).append(case)
    return first + others


@pytest.mark.parametrize("inputs", ["f32", "bf16", "f16"])
def test_every_mistake_is_caught_on_some_case(inputs: str) -> None:
    rounding, left = Rounding(inputs), {mistake.name: mistake.made_by(Backend)("float32") for mistake in OP.mistakes}
    for case in unlike_first():
        for arrays in drawn(case, rounding, 4) if left else ():
            with np.errstate(all="ignore"):
                (estimate,) = OP.estimate(widened(arrays), case.settings, rounding, None)
            for name, backend in list(left.items()):
                out = rounded(truth(OP, case, arrays, backend)["out"], rounding)
                if judge(out, estimate, rounding.format("output")).problem:
                    del left[name]
    assert not left, f"these pass all cases: {', '.join(left)}"


def test_hostile_cases_come_when_asked_for() -> None:
    assert not [case for case in cases("attention") if "hostile" in case.tags]
    assert {case.name for case in cases("attention", "hostile")} == {"nan-window", "nan-chunk", "nan-padded"}
