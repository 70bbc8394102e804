"""The plug-in of pytest, as its users run it: in a process of its own, with warnings as errors and strict markers."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

KERNELS = """
import numpy as np
import pytest

def norm(x, weight=None, *, eps, offset=0.0):
    y = x.astype(np.float32)
    y /= np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + np.float32(eps))
    return (y if weight is None else y * (weight.astype(np.float32) + np.float32(offset))).astype(x.dtype)

def wrong(x, weight=None, *, eps, offset=0.0):
    return norm(x, weight, eps=10 * eps, offset=offset)
"""

GOOD = """
@pytest.mark.npllm("rms_norm", dtype="bf16")
def test_norm(npllm_check, npllm_case, npllm_rounding):
    report = npllm_check(norm)
    assert report.ok and report.case == npllm_case.id and npllm_rounding.output == "bf16"
"""

WRONG = """
@pytest.mark.npllm("rms_norm", "tiny", dtype="bf16")
def test_norm(npllm_check):
    npllm_check(wrong)
"""


class Ran:
    """What a run of pytest came to."""

    def __init__(self, result: subprocess.CompletedProcess[str]) -> None:
        self.status, self.text = result.returncode, result.stdout + result.stderr

    @property
    def last(self) -> str:
        return self.text.strip().splitlines()[-1]


def run(folder: Path, tests: str, *options: str) -> Ran:
    """pytest on a file of these tests."""
    (folder / "test_it.py").write_text(KERNELS + tests)
    return run_all(folder, *options)


def run_all(folder: Path, *options: str) -> Ran:
    """pytest on what lies in a folder."""
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers -p no:cacheprovider\nfilterwarnings = error\n")
    command = [sys.executable, "-m", "pytest", "-q", *options]
    return Ran(subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120))


def test_the_plug_in_is_registered() -> None:
    """If this fails, npllm was installed before it had the plug-in: install it again."""
    assert [point.value for point in entry_points(group="pytest11") if point.name == "npllm"] == ["npllm.testing.plugin"]


def test_it_loads_nothing_until_it_is_used() -> None:
    probe = (
        "import sys, pytest; before = set(sys.modules); import npllm.testing.plugin; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)); "
        "print('numpy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["['npllm']", "False"]


def test_a_test_without_the_marker_does_not_load_it(tmp_path: Path) -> None:
    """The suites of other projects stay as they were."""
    (tmp_path / "test_it.py").write_text("import sys\ndef test_it():\n    assert 'numpy' not in sys.modules\n")
    ran = run_all(tmp_path, "-p", "no:hypothesispytest")
    assert ran.status == 0, ran.text


def test_a_good_kernel_passes_every_case(tmp_path: Path) -> None:
    from npllm.testing import cases

    ran = run(tmp_path, GOOD)
    assert ran.status == 0, ran.text
    assert f"{len(cases('rms_norm'))} passed" in ran.last


def test_cases_are_selected_by_id(tmp_path: Path) -> None:
    ran = run(tmp_path, GOOD, "-k", "odd-width", "--npllm-seed=7", "-rA")
    assert "PASSED test_it.py::test_norm[rms_norm/odd-width]" in ran.text
    assert ran.last.startswith("1 passed")


def test_a_failure_shows_the_report_and_the_call_alone(tmp_path: Path) -> None:
    ran = run(tmp_path, WRONG, "-k", "tiny-eps5")
    assert ran.status == 1
    failure = ran.text.partition("FAILURES")[2].partition("short test summary")[0]
    assert "CheckError: FAIL rms_norm/tiny-eps5: `y`: " in failure
    assert "closest known mistake: eps ten times too large" in failure
    assert 'reproduce: check("rms_norm", kernel, "tiny-eps5", "bf16", seed=0)' in failure
    assert ">       npllm_check(wrong)" in failure
    assert "plugin.py" not in failure
    assert len(failure.splitlines()) < 20


def test_the_seed_reaches_the_inputs(tmp_path: Path) -> None:
    assert "seed=11)" in run(tmp_path, WRONG, "-k", "tiny-eps5", "--npllm-seed=11").text


def test_a_case_and_options_can_be_given(tmp_path: Path) -> None:
    tests = """
@pytest.mark.npllm("rms_norm", "tiny")
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_norm(npllm_check, dtype):
    report = npllm_check(norm, "plain", policy=dtype, framework="numpy")
    assert report.case == "rms_norm/plain" and f"inputs {dtype}" in report.rounding
    with pytest.raises(AssertionError, match="eps ten times"):
        npllm_check(wrong, policy=dtype)
"""
    ran = run(tmp_path, tests)
    assert ran.status == 0, ran.text


def test_the_oracle_gives_the_truth_in_float64(tmp_path: Path) -> None:
    tests = """
@pytest.mark.npllm("rms_norm", dtype="f16")
def test_truth(npllm_case, npllm_oracle, npllm_rounding):
    inputs = npllm_case.inputs(0, npllm_case.scales[0], npllm_rounding.format("inputs"))
    truth = npllm_oracle("rms_norm", npllm_case)["y"]
    assert truth.dtype == np.float64
    assert np.array_equal(truth, npllm_oracle("rms_norm", npllm_case.name, inputs)["y"])
    got = norm(**{name: x.astype(np.float32) for name, x in inputs.items()}, **npllm_case.settings)
    assert np.allclose(got, truth, rtol=1e-5)

def test_unmarked(npllm_oracle, npllm_rounding):
    assert str(npllm_rounding).startswith("inputs f32")
    assert npllm_oracle("rms_norm", "plain")
"""
    ran = run(tmp_path, tests)
    assert ran.status == 0, ran.text


REFUSED = {
    'npllm("rms_nrm")': "operation 'rms_nrm' is unknown; known: rms_norm, ",
    'npllm("rms_norm", tags="tinny")': "rms_norm has no cases tagged 'tinny'; tags: tiny, ",
    'npllm("rms_norm", without="tinny")': "rms_norm has no cases tagged 'tinny'; tags: tiny, ",
    'npllm("rms_norm", "tiny", "tiny")': "no case of rms_norm has tags 'tiny' without 'tiny'",
    'npllm("rms_norm", dtype="bf61")': "format 'bf61' is unknown; known: bf16, ",
    'npllm("rms_norm", dtype="bf16", policy="f16")': "dtype and policy contradict each other",
    'npllm("rms_norm", tag="tiny")': "pytest.mark.npllm: got an unexpected keyword argument 'tag'",
    "npllm()": "pytest.mark.npllm: missing 1 required positional argument: 'op'",
}


def test_a_marker_that_asks_for_what_there_is_not_is_refused(tmp_path: Path) -> None:
    """One file for each, in one run: each error is its text alone, and names what comes nearest."""
    for i, marker in enumerate(REFUSED):
        text = f"import pytest\n@pytest.mark.{marker}\ndef test_it(npllm_check):\n    npllm_check(None)\n"
        (tmp_path / f"test_{i}.py").write_text(text)
    ran = run_all(tmp_path)
    assert ran.status == 2
    for i, why in enumerate(REFUSED.values()):
        section = ran.text.partition(f"ERROR collecting test_{i}.py ")[2].partition("\n_____")[0]
        assert f"\ntest_{i}.py::test_it: " in section
        assert why in section
        assert "Traceback" not in section
        assert "plugin.py" not in section


@pytest.mark.parametrize(
    ("tests", "why"),
    [
        ('@pytest.mark.npllm("rms_norm")\ndef test_it():\n    pass\n', "takes neither npllm_check nor npllm_case"),
        ("def test_it(npllm_check):\n    pass\n", "so mark it with an operation"),
    ],
    ids=["marker without fixture", "fixture without marker"],
)
def test_half_of_a_check_is_refused(tmp_path: Path, tests: str, why: str) -> None:
    ran = run(tmp_path, tests)
    assert ran.status == 2
    assert why in ran.text


def test_a_marker_of_a_class_serves_those_that_want_it(tmp_path: Path) -> None:
    tests = """
@pytest.mark.npllm("rms_norm", "tiny")
class TestNorm:
    def test_norm(self, npllm_check):
        npllm_check(norm)

    def test_other(self):
        pass

def test_late(request):
    request.getfixturevalue("npllm_case")
"""
    ran = run(tmp_path, tests)
    assert ran.status == 1
    assert "1 failed" in ran.last or "1 error" in ran.last
    assert "make it an argument of the test" in ran.text


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--npllm-backend=nmpy"], "--npllm-backend: backend 'nmpy' is not installed; installed: numpy"),
        (["--npllm-seed=-1"], "--npllm-seed must not be negative"),
        (["--npllm-seed=one"], "invalid int value: 'one'"),
    ],
    ids=["backend", "negative seed", "seed"],
)
def test_a_bad_option_is_a_usage_error(tmp_path: Path, options: list[str], why: str) -> None:
    ran = run(tmp_path, GOOD, *options)
    assert ran.status == 4
    assert why in ran.text
    assert "Traceback" not in ran.text


def test_markers_and_fixtures_are_listed(tmp_path: Path) -> None:
    assert "@pytest.mark.npllm(op, tags=" in run(tmp_path, GOOD, "--markers").text
    listed = run(tmp_path, GOOD, "--fixtures").text
    for fixture in ("npllm_case", "npllm_check", "npllm_oracle", "npllm_rounding"):
        assert f"\n{fixture} -- " in listed


def test_it_runs_on_several_processes(tmp_path: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    ran = run(tmp_path, GOOD, "-n2")
    assert ran.status == 0, ran.text
    assert " passed" in ran.last
