"""What a person reads: patterns, explanations, and reports of whole suites."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from npllm.backend import Backend
from npllm.testing.case import Case, find_case
from npllm.testing.checking import check, truth, widened
from npllm.testing.estimate import Estimate
from npllm.testing.explain import explained
from npllm.testing.judge import Verdict
from npllm.testing.operation import operation
from npllm.testing.report import CheckError, Report, Suite, surroundings
from npllm.testing.rounding import FORMATS, Rounding
from npllm.testing.strategies import sized, variant
from npllm.testing.wording import coordinate, describe, figure, made, patterns, spelled, words_of

AXES = ("batch", "query", "head", "width")
SHAPE = (2, 40, 6, 8)


def said(error: np.ndarray, masked: np.ndarray | None = None) -> str:
    """The pattern of errors, in units of a correct kernel's, where nothing is expected of `masked` elements."""
    variance = np.ones(error.shape) if masked is None else np.where(masked, 0.0, 1.0)
    estimate = Estimate(np.zeros(error.shape), variance, 10.0 * variance)
    bad = np.abs(error) > 10.0
    return "; ".join(patterns(AXES, Verdict("bound", 1.0, 1.0, 1.0, 1.0, bad), error, estimate))


def wrong(where: object) -> np.ndarray:
    error = np.random.default_rng(0).uniform(-1.7, 1.7, SHAPE)
    error[where] += 50.0
    return error


PATTERNS = {
    "only head 3": np.s_[:, :, 3],
    "query >= 16": np.s_[:, 16:],
    "query < 7": np.s_[:, :7],
    "query 5 to 9; only head 0": np.s_[:, 5:10, 0],
    "every odd head": np.s_[:, :, 1::2],
    "every even width": np.s_[..., ::2],
    "every 3rd head, from 2": np.s_[:, :, 2::3],
    "every 8th query, from 7": np.s_[:, 7::8],
    "only head 0, 1, 4": np.s_[:, :, [0, 1, 4]],
    "9 of 40 values of query": np.s_[:, [0, 1, 4, 9, 13, 14, 22, 30, 33]],
    "only batch 1": np.s_[1],
    "all over": np.s_[:],
}


@pytest.mark.parametrize(("words", "where"), PATTERNS.items(), ids=PATTERNS)
def test_patterns_are_named_by_axis(words: str, where: object) -> None:
    assert said(wrong(where)) == words


def test_masked_rows_belong_to_no_pattern() -> None:
    masked = np.zeros(SHAPE, bool)
    masked[:, ::2] = True
    error = wrong(np.s_[:, 21:])
    error[masked] = 0.0
    assert said(error, masked) == "query >= 21"
    everywhere = np.where(masked, 0.0, wrong(np.s_[:]))
    assert said(everywhere, masked) == "all over"


def test_growth_is_named() -> None:
    grown = wrong(np.s_[:, :0]) * np.linspace(10.0, 100.0, 40)[:, None, None]
    assert said(grown).startswith("grows with query (")


def test_errors_here_and_there_have_no_pattern() -> None:
    error = wrong(np.random.default_rng(1).random(SHAPE) < 0.02)
    assert said(error) == ""


def test_axes_are_those_of_the_last_words() -> None:
    assert words_of(AXES, 3) == ("query", "head", "width")
    assert words_of(("token",), 2) == ("axis 0", "token")
    assert coordinate(AXES, (0, 3, 1, 2)) == "batch 0, query 3, head 1, width 2"
    assert coordinate((), ()) == "the only element"


def test_numbers_and_calls_are_short() -> None:
    assert [figure(x) for x in (0.123456, 23.21, 1234.5, 2.5e7)] == ["0.123", "23.2", "1,234", "2.5e+07"]
    assert spelled(Rounding("bf16")) == '"bf16"'
    assert spelled(Rounding("bf16", probs="f32", output="f32")) == 'Rounding("bf16", output="f32", probs="f32")'
    assert made(find_case("rms_norm", "plain")) == '"plain"'
    assert made(variant("rms_norm", "plain", 7, 0.5)) == 'variant("rms_norm", "plain", 7, 0.5)'
    assert made(sized("rms_norm", 7, tokens=3, features=5)) == 'sized("rms_norm", 7, 1.0, tokens=3, features=5)'


# -- explanations -----------------------------------------------------------------------------------------------------

OP, CASE = operation("rms_norm"), find_case("rms_norm", "plain")


@pytest.mark.parametrize("policy", ["f32", "bf16"])
def test_a_mistake_that_is_planted_is_named(policy: str) -> None:
    rounding = Rounding(policy)
    inputs = CASE.inputs(0, 1.0, rounding.format("inputs"))
    (estimate,) = OP.estimate(widened(inputs), CASE.settings, rounding, None)
    for mistake in OP.mistakes:
        result = truth(OP, CASE, inputs, mistake.made_by(Backend)("float64"))["y"]
        got = rounding.format("output").round(result)
        if np.abs(got - estimate.value).max() > 20.0 * estimate.bound.max():
            assert explained(OP, CASE, rounding, inputs, {"y": got}, estimate, "y") == (mistake.name, 1.0)


def test_zero_and_chance_are_explained_by_nothing() -> None:
    inputs = CASE.inputs(0, 1.0, FORMATS["f32"])
    (estimate,) = OP.estimate(widened(inputs), CASE.settings, Rounding(), None)
    for got in (np.zeros_like(estimate.value), np.random.default_rng(0).standard_normal(estimate.value.shape)):
        assert explained(OP, CASE, Rounding(), inputs, {"y": got}, estimate, "y") == ("", 0.0)


def test_nan_where_a_mistake_has_it_is_explained() -> None:
    """Rows of zeros: without eps they are 0/0, and nothing else is wrong."""

    def draw(dice, scale):
        arrays = CASE.draw(dice, scale)
        arrays["x"][::8] = 0.0
        return arrays

    case = replace(CASE, draw=draw)

    def without_eps(x, weight, eps):
        f = x.astype(np.float32)
        return (f / np.sqrt((f * f).mean(-1, keepdims=True)) * weight).astype(x.dtype)

    report = check("rms_norm", without_eps, case, "f32")
    assert report.problem == "non-finite"
    assert "in 4,096 of 32,768 elements" in report.message
    assert "where: every 8th" in report.message
    assert report.explanation in {"", *(mistake.name for mistake in OP.mistakes if "eps" in mistake.name)}


def test_errors_that_only_the_sum_shows_are_told_by_the_worst() -> None:
    estimate = Estimate(np.ones((4, 64)), np.ones((4, 64)), np.full((4, 64), 9.0))
    got = 1.0 + 1.9 * np.sign(np.arange(256).reshape(4, 64) % 2 - 0.5)
    verdict = Verdict("spread", 1.9, 1.9, 1.3, 0.2, np.zeros((4, 64), bool))
    text = describe(OP, CASE, Rounding(), "y", Report("rms_norm", CASE.id, ""), verdict, got, estimate)
    assert "no element is beyond the bound, but errors are larger" in text
    assert "worst: " in text


# -- suites -----------------------------------------------------------------------------------------------------------

PASSED = Report("rms_norm", "rms_norm/plain", "bf16", spread=0.5, limit=1.25, share=0.2, seconds=0.25)
RAISED = "it raised \x00 <&\n  reproduce: x"
FAILED = Report("attention", "attention/d64", "bf16", "raised", RAISED, spread=np.inf, seconds=0.5)


def test_a_suite_is_written_as_json() -> None:
    suite = Suite((PASSED, FAILED), surroundings(policy="bf16", seed="0"))
    told = json.loads(suite.json())
    assert told["schema"] == "npllm.verify/1"
    assert (told["ok"], told["cases"], told["failed"], told["seconds"]) == (False, 2, 1, 0.75)
    assert told["reports"][0]["ok"]
    assert told["reports"][1]["spread"] == "inf"
    assert {"npllm", "numpy", "python", "machine", "framework", "policy", "seed"} == set(told["properties"])


def test_a_suite_is_written_as_junit() -> None:
    root = ElementTree.fromstring(Suite((PASSED, FAILED), {"seed": "0"}).junit())
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("2", "1", "0")
    assert [suite.get("name") for suite in root.iter("testsuite")] == ["rms_norm", "attention"]
    (failure,) = root.iter("failure")
    assert failure.get("type") == "raised"
    assert failure.get("message") == "it raised ? <&"
    assert "reproduce: x" in (failure.text or "")
    assert {each.get("name"): each.get("value") for each in root.iter("property")} == {"seed": "0"}


def test_a_suite_is_written_as_a_table() -> None:
    suite = Suite((PASSED, FAILED))
    assert suite.table().splitlines()[1].split() == ["rms_norm", "1", "0", "40", "%", "0.2"]
    assert str(suite).endswith("1 of 2 cases failed")
    with pytest.raises(CheckError, match="FAIL attention/d64"):
        suite.raise_on_failure()
    Suite((PASSED,)).raise_on_failure()


def test_a_suite_without_cases_is_no_success() -> None:
    assert not Suite(()).ok
    with pytest.raises(CheckError, match="no case was run"):
        Suite(()).raise_on_failure()


def test_a_report_of_a_case_says_where_what_and_how_to_see_it_again() -> None:
    def other_head(x, weight, eps):
        f = x.astype(np.float32)
        y = f / np.sqrt((f * f).mean(-1, keepdims=True) + np.float32(eps)) * weight.astype(np.float32)
        y[:, 64:] *= np.float32(1.1)
        return y.astype(x.dtype)

    case = Case("rms_norm", CASE.name, CASE.draw, CASE.settings)
    lines = str(check("rms_norm", other_head, case, "bf16", seed=3)).splitlines()
    assert lines[0].startswith("FAIL rms_norm/plain: `y`: 16,384 of 32,768 elements are beyond the bound of any correct")
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["error", "first", "where", "reproduce"]
    assert lines[3].strip() == "where: feature >= 64"
    assert all(len(line) <= 140 for line in lines)
