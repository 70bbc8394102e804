"""Cases that nobody named: variants of the corpus, and plain ones of any size."""

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from npllm.errors import ArgumentError
from npllm.testing import case as corpus
from npllm.testing import strategies
from npllm.testing.case import Case
from npllm.testing.checking import check
from npllm.testing.kernels import flash
from npllm.testing.rounding import FORMATS, Rounding


def norm(x, weight=None, *, eps, offset=0.0):
    f = x.astype(np.float32)
    y = f / np.sqrt((f * f).mean(-1, keepdims=True) + np.float32(eps))
    return (y if weight is None else y * (weight.astype(np.float32) + np.float32(offset))).astype(x.dtype)


def product(x, weight):
    return (x.astype(np.float32) @ weight.astype(np.float32).T).astype(x.dtype)


@settings(max_examples=25, deadline=None)
@given(strategies.cases("rms_norm", without="offset"), strategies.roundings())
def test_a_correct_norm_passes_all_variants(case: Case, policy: Rounding) -> None:
    check("rms_norm", norm, case, policy).raise_on_failure()


KERNELS: dict[str, Any] = {"attention": flash, "rms_norm": norm, "linear": product}


@pytest.mark.parametrize("operation", strategies.SIZED)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_correct_kernels_pass_at_any_size(operation: str, data: st.DataObject) -> None:
    case = data.draw(strategies.sized_cases(operation))
    policy = data.draw(strategies.roundings(("bf16", "f32")))
    check(operation, KERNELS[operation], case, policy).raise_on_failure()


def test_a_fault_at_odd_sizes_shrinks_to_the_least() -> None:
    def forgets_the_rest(x, weight, eps):
        y = norm(x, weight, eps=eps)
        y[:, len(weight) // 4 * 4 :] *= np.float32(1.5)
        return y

    case = find(
        strategies.sized_cases("rms_norm"),
        lambda case: not check("rms_norm", forgets_the_rest, case).ok,
        settings=settings(database=None, deadline=None),
    )
    assert case.name.startswith("sized(tokens=1, features=1)@0x1.0")


def test_a_variant_is_made_again_by_its_name() -> None:
    one = strategies.variant("rms_norm", "plain", 7, 0.5)
    again = strategies.variant("rms_norm", "plain", 7, 0.5)
    other = strategies.variant("rms_norm", "plain", 8, 0.5)
    x, y, z = (case.inputs(0, 0.5, FORMATS["f32"])["x"] for case in (one, again, other))
    assert np.array_equal(x, y)
    assert not np.array_equal(x, z)
    assert one.scales == (0.5,)
    assert one.tags == corpus.find_case("rms_norm", "plain").tags


@given(st.data())
def test_scales_lie_between_those_of_the_case(data: st.DataObject) -> None:
    case = Case("rms_norm", "wide", corpus.find_case("rms_norm", "plain").draw, scales=(4.0, 2.0**-8, 1.0))
    assert 2.0**-8 <= data.draw(strategies.scales(case)) <= 4.0


@given(strategies.roundings(points=("probs", "normed")))
def test_policies_have_the_points_that_are_asked_for(policy: Rounding) -> None:
    assert policy.probs in (policy.inputs, "f32")
    assert policy.normed in (policy.inputs, "f32")
    assert policy.scores == "f32"


def test_what_cannot_be_drawn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="'norm' has no cases of any size; those that have: rms_norm"):
        strategies.sized_cases("norm")
    with pytest.raises(ArgumentError, match="rms_norm needs the sizes tokens, features; got tokens"):
        strategies.sized("rms_norm", 0, tokens=3)
    with pytest.raises(ArgumentError, match="rms_norm has no cases tagged 'large-rows'"):
        strategies.cases("rms_norm", "large-rows")
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ArgumentError, match="needs Hypothesis: pip install hypothesis"):
        strategies.cases("rms_norm")
