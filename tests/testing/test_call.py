"""What is between a check and somebody's callable: its arguments, its faults, its results."""

import functools
import re
import time
from collections import namedtuple
from typing import Any

import numpy as np
import pytest

from npllm.config import nearest
from npllm.errors import ArgumentError
from npllm.testing.call import Form, arguments, by_name, signature_of
from npllm.testing.case import Case, cases, find_case
from npllm.testing.checking import check
from npllm.testing.operation import operation
from npllm.testing.report import Report
from npllm.testing.rounding import FORMATS

CASE = find_case("rms_norm", "plain")


def honest(x, weight=None, *, eps, offset=0.0):
    f = x.astype(np.float32)
    y = f / np.sqrt((f * f).mean(-1, keepdims=True) + np.float32(eps))
    return (y if weight is None else y * (weight.astype(np.float32) + np.float32(offset))).astype(x.dtype)


class Instance:
    def __call__(self, x, weight=None, *, eps, offset=0.0):
        return honest(x, weight, eps=eps, offset=offset)

    def method(self, x, w=None, eps=1e-6):
        return honest(x, w, eps=eps)


class WithoutSignature:
    """As compiled functions are: it takes arrays in order and settings by keyword, and tells nobody."""

    __signature__ = "none"

    def __call__(self, *arrays, **settings):
        return honest(*arrays, **settings)


class Compiled:
    """As Numba's dispatchers are: the Python function is an attribute."""

    def __init__(self, function):
        self.py_func = function

    def __call__(self, *arrays, **settings):
        return self.py_func(*arrays, **settings)


@functools.wraps(honest)
def wrapped(*arrays, **settings):
    return honest(*arrays, **settings)


def fills(x, weight=None, *, eps, offset=0.0, out):
    out[...] = honest(x, weight, eps=eps, offset=offset)


HONEST = {
    "function": honest,
    "lambda": lambda *arrays, **settings: honest(*arrays, **settings),
    "arrays in order": lambda a, b, eps: honest(a, b, eps=eps),
    "positional only": lambda x, b, eps, /: honest(x, b, eps=eps),
    "star": lambda *arrays, eps: honest(*arrays, eps=eps),
    "own parameters": lambda x, weight, eps, block=64, mode=None: honest(x, weight, eps=eps),
    "partial": functools.partial(honest, offset=0.0),
    "instance": Instance(),
    "method": Instance().method,
    "wrapped": wrapped,
    "compiled": Compiled(honest),
    "without signature": WithoutSignature(),
    "out": fills,
    "list": lambda x, weight, eps: [honest(x, weight, eps=eps)],
    "dict": lambda x, weight, eps: {"y": honest(x, weight, eps=eps), "root": 1.0},
    "named tuple": lambda x, weight, eps: namedtuple("Out", "root y")(0.0, honest(x, weight, eps=eps)),
    "transposed memory": lambda x, weight, eps: np.asfortranarray(honest(x, weight, eps=eps)),
    "read only": lambda x, weight, eps: np.broadcast_to(honest(x, weight, eps=eps), x.shape),
}


@pytest.mark.parametrize("kernel", HONEST.values(), ids=HONEST)
@pytest.mark.parametrize("policy", ["f32", "bf16", "f16"])
def test_a_correct_kernel_passes_whatever_its_form(kernel: Any, policy: str) -> None:
    check("rms_norm", kernel, CASE, policy, framework="numpy").raise_on_failure()


def raises(x, weight, eps):
    return x @ weight.reshape(3, -1)


def partly_given(x, weight, eps, out):
    out[:, 1:] = honest(x, weight, eps=eps)[:, 1:]


def greater_of(x, weight, eps, out):
    out[...] = np.fmax(out, honest(x, weight, eps=eps))


def modifies(x, weight, eps):
    y = honest(x, weight, eps=eps)
    weight[7] = np.nan
    return y


FAULTS: dict[str, tuple[Any, str, str]] = {
    "no parameter": (lambda x, eps: x, "signature", "it does not take `weight`, which the case has: give it a parameter"),
    "requires more": (lambda x, weight, eps, mask: x, "signature", "it requires `mask`, which the case does not have"),
    "raises": (
        raises,
        "raised",
        "it raised ValueError: cannot reshape array of size 128 into shape (3,newaxis) (test",
    ),
    "exits": (lambda **_: exit(3), "raised", "it raised SystemExit: 3"),
    "hangs": (lambda **_: time.sleep(60), "hangs", "it did not return within 0.2 s"),
    "None": (lambda **_: None, "returned", "`y` is None; want an array"),
    "text": (lambda **_: "done", "returned", "`y` is a str; want an array"),
    "two": (lambda x, **_: (x, x), "returned", "it returned a tuple of 2; want `y` alone"),
    "other dict": (lambda x, **_: {"out": x}, "returned", "it returned a dict of 'out', without `y`"),
    "nested": (lambda x, **_: x.tolist(), "returned", "it returned a list of 256; want `y` alone"),
    "transposed": (lambda x, **_: x.T.copy(), "shape", "`y` has shape [128, 256], want [256, 128] ("),
    "wider": (lambda x, **_: x.astype(np.float64), "dtype", "`y` is float64, the policy says f32: change what"),
    "integers": (lambda x, **_: x.astype(np.int32), "dtype", "`y` is int32, the policy says f32"),
    "itself": (lambda x, **_: x, "view", "`y` shares memory with the input `x`"),
    "reversed": (lambda x, **_: x[::-1], "view", "`y` shares memory with the input `x`"),
    "modifies": (modifies, "modified", "the input `weight` was changed"),
    "partly given": (partly_given, "non-finite", "never written in 256 of 32,768 elements, the first at "),
    "greater": (greater_of, "bound", "`y`: "),
    "zeros": (lambda x, **_: np.zeros_like(x), "constant", "every element is 0"),
    "constant": (lambda x, **_: np.ones_like(x), "constant", "every element is 1"),
    "nan": (lambda x, **_: np.full_like(x, np.nan), "non-finite", "NaN or infinity in the wrong place in 32,768 of 32,768"),
}


@pytest.mark.parametrize(("kernel", "problem", "message"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_is_said(kernel: Any, problem: str, message: str) -> None:
    report = check("rms_norm", kernel, CASE, "f32", limit_s=0.2 if problem == "hangs" else 20.0)
    assert report.problem == problem
    assert message in report.message
    assert str(report).startswith("FAIL rms_norm/plain: ")
    assert report.message.endswith('reproduce: check("rms_norm", kernel, "plain", "f32", seed=0)   # scale 1')
    with pytest.raises(AssertionError, match="FAIL rms_norm/plain"):
        report.raise_on_failure()


def test_memory_that_a_kernel_allocates_is_not_the_truth() -> None:
    """With the C library's allocator it holds NaN; with any it holds what is wrong."""

    def partly(x, weight, eps):
        y = np.empty_like(x)
        y[:, :-1] = honest(x, weight, eps=eps)[:, :-1]
        return y

    report = check("rms_norm", partly, CASE, "bf16")
    assert report.problem in ("non-finite", "bound")
    # How many are left as they were depends on what the allocator gave away meanwhile.
    unwritten = re.search(
        r"memory that was never written in \d+ of 32,768 elements, the first at row \d+, feature 127", report.message
    )
    assert unwritten or "where: only feature 127" in report.message


def test_a_kernel_cannot_find_its_last_answer_in_memory() -> None:
    """A result that was kept is spoiled: the second call returns it as it is."""
    kept: list[Any] = []

    def once_right(x, weight, eps):
        if not kept:
            kept.append(honest(x, weight, eps=eps))
        return kept[0]

    assert check("rms_norm", once_right, CASE, "bf16").ok
    assert check("rms_norm", once_right, CASE, "bf16").problem == "non-finite"


def test_numpy_does_not_warn_about_numbers_that_are_there_on_purpose() -> None:
    def divides(x, weight, eps):
        assert np.isnan(np.zeros(1) / np.zeros(1)).all()
        return honest(x, weight, eps=eps)

    check("rms_norm", divides, CASE).raise_on_failure()


# -- arguments --------------------------------------------------------------------------------------------------------


def taken(kernel: Any, name: str, op: str = "attention") -> dict[str, Any]:
    """What a kernel is called with on a case, by name or number."""
    case = find_case(op, name)
    arrays = dict.fromkeys(case.inputs(0, case.scales[0], FORMATS["f32"]), "array")
    args, keywords = arguments(operation(op), signature_of(kernel), case, arrays, None)
    return dict(enumerate(args)) | keywords


def test_a_parameter_stands_for_the_same_array_in_every_case() -> None:
    def kernel(a, b, c, scale, sinks=None, softcap=None):
        raise NotImplementedError

    assert set(taken(kernel, "d64")) == {"a", "b", "c", "scale"}
    with_sinks = cases("attention", "sinks", without="window,paged,ragged,padded,softcap,chunk")[0]
    assert set(taken(kernel, with_sinks.name)) == {"a", "b", "c", "scale", "sinks"}


def test_derived_arrays_are_passed_to_those_who_name_them() -> None:
    op = operation("rope")
    case = op.cases[0]
    arrays = dict.fromkeys(op.inputs, "array")

    def given(kernel: Any) -> set[str]:
        return set(arguments(op, signature_of(kernel), case, arrays, None)[1])

    assert "cos" in given(lambda x, cos, sin, interleaved=False: x)
    assert not given(lambda x, positions, inv_freq, interleaved=False: x) & {"cos", "sin"}
    assert set(op.inputs) <= given(lambda **everything: None)


@pytest.mark.parametrize(
    ("case", "lacks", "tag"),
    [("softcap-decode", "softcap", "softcap"), ("padded-decode", "lengths", "padded"), ("paged", "pages", "paged")],
)
def test_a_missing_argument_names_the_way_out(case: str, lacks: str, tag: str) -> None:
    report = check("attention", lambda q, k, v, *, scale: q, case)
    told = f"it does not take `{lacks}`, which the case has: give it a parameter of that name, or leave such cases out with "
    assert report.message.startswith(f"{told}without={tag!r}")


def test_a_required_parameter_that_a_case_lacks_needs_a_default() -> None:
    case = next(each for each in cases("rms_norm") if "weight" not in each.inputs(0, 1.0, FORMATS["f32"]))
    report = check("rms_norm", lambda x, gain, eps, offset=0.0: x, case)
    assert report.problem == "signature"
    assert "it requires `gain` (which would be `weight`), which the case does not have: give it a default" in report.message


def test_several_outputs_come_in_order_or_by_name() -> None:
    form = Form(("token",), (3,), FORMATS["f32"])
    forms = {"k": form, "v": form}
    assert by_name(forms, (1, 2)) == by_name(forms, [1, 2]) == by_name(forms, {"v": 2, "k": 1}) == {"k": 1, "v": 2}
    assert by_name(forms, namedtuple("Out", "v k")(2, 1)) == {"k": 1, "v": 2}
    with pytest.raises(Exception, match="it returned None; want `k` and `v` in this order"):
        by_name(forms, None)


# -- names ------------------------------------------------------------------------------------------------------------


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(ArgumentError, match="operation 'rmsnorm' is unknown; known: rms_norm"):
        check("rmsnorm", honest, "plain")
    with pytest.raises(ArgumentError, match="rms_norm has no case 'plane'; nearest: plain"):
        check("rms_norm", honest, "plane")
    with pytest.raises(ArgumentError, match="rms_norm has no cases tagged 'ofset'; tags: offset"):
        cases("rms_norm", "ofset")
    with pytest.raises(ArgumentError, match="format 'bfloat' is unknown"):
        check("rms_norm", honest, "plain", "bfloat")
    assert nearest("plane", ["plain", "odd"]).startswith("plain")


def test_the_report_has_the_scale_that_was_worst() -> None:
    case = Case("rms_norm", "scales", CASE.draw, CASE.settings, scales=(1.0, 2.0**-12, 1.0))

    def other_eps(x, weight, eps):
        return honest(x, weight, eps=10.0 * eps)

    report: Report = check("rms_norm", other_eps, case, "f32")
    assert report.scale == 2.0**-12
    assert "eps" in report.explanation
    assert report.explained == 1.0
