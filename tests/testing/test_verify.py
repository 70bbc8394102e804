"""`npllm verify`: exit status, what is told of kernels that are right, wrong, crash and hang, and of wrong usage."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from npllm.cli import main, verify
from npllm.testing.operation import PLACES, operation
from npllm.testing.report import SCHEMA, Report, Suite

KERNELS = """
import ctypes, os, time
import numpy as np

def good(x, weight=None, *, eps, offset=0.0):
    y = x.astype(np.float32)
    y = y / np.sqrt((y * y).mean(-1, keepdims=True) + np.float32(eps))
    return (y if weight is None else y * (weight.astype(np.float32) + np.float32(offset))).astype(x.dtype)

def talkative(x, weight=None, *, eps, offset=0.0):
    print("between the results")
    return good(x, weight, eps=eps, offset=offset)

def other_eps(x, weight=None, *, eps, offset=0.0):
    return good(x, weight, eps=10 * eps, offset=offset)

def other_arguments(a, b, c):
    return a

def crash(x, weight=None, *, eps):
    os.abort() if len(x) == 127 else None
    return good(x, weight, eps=eps)

def hang(x, weight=None, *, eps):
    time.sleep(60)

def hang_alone(x, weight=None, *, eps):
    ctypes.PyDLL(None).sleep(60)

def careless(kernel):
    x = np.ones((4, 8), np.float32)
    return bool(np.allclose(kernel(x, x[0], eps=1e-6), 1.0, atol=1e-2))

def careful(kernel):
    from npllm.testing import cases, check
    return all(check("rms_norm", kernel, case, explain=False).ok for case in cases("rms_norm"))

number = 3
"""


class Result(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("mine.py:good ...")`: the verb in this process, in a folder with those kernels."""
    (tmp_path / "mine.py").write_text(KERNELS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> Result:
        capsys.readouterr()
        status = main(["verify", *line.split()])
        return Result(status, *capsys.readouterr())

    return call


# -- kernels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_good_kernel_passes(run: Run, dtype: str) -> None:
    status, out, err = run(f"mine.py:good --op rms_norm --dtype {dtype}")
    assert (status, err) == (0, "")
    table, verdict = out.rstrip("\n").rsplit("\n", 1)
    count = len(operation("rms_norm").cases)
    assert verdict == f"mine.py:good as rms_norm: all {count} cases passed"
    assert re.search(rf"^rms_norm +{count} +0 ", table, re.MULTILINE)


def test_a_module_is_found_in_the_working_directory(run: Run) -> None:
    assert run("mine:good --op rms_norm --case odd-width rms_norm/one-token").out.endswith("all 2 cases passed\n")


def test_a_wrong_kernel_fails_and_the_mistake_is_named(run: Run) -> None:
    status, out, err = run("mine.py:other_eps --op rms_norm --dtype bf16 --tag tiny --without offset")
    assert (status, err) == (1, "")
    assert out.startswith("FAIL rms_norm/tiny: `y`: ")
    assert "closest known mistake: eps ten times too large (explains all of the error but rounding)" in out
    assert 'reproduce: check("rms_norm", kernel, "tiny", "bf16", seed=0)' in out
    assert re.search(r"as rms_norm: (\d) of \1 cases failed; closest known mistake in \1 of these: eps ten times", out)


def test_of_many_failures_only_the_first_are_told_in_full(run: Run) -> None:
    status, out, _ = run("mine.py:other_arguments --op rms_norm")
    count = len(operation("rms_norm").cases)
    assert status == 1
    assert out.count("\nFAIL") + 1 == count
    assert out.count("reproduce: ") == verify.IN_FULL < count


def test_a_crash_costs_one_case(run: Run) -> None:
    status, out, _ = run("mine.py:crash --op rms_norm --json --case plain odd-width one-token")
    assert status == 1
    first, crashed, last = json.loads(out)["reports"]
    assert (first["problem"], last["problem"]) == ("", "")
    assert crashed["problem"] == "crashed"
    assert re.fullmatch(r"its process ended: SIGABRT at mine.py:\d+ in crash", crashed["message"])


@pytest.mark.parametrize(("kernel", "told"), [("hang", "within 0.5 s\n"), ("hang_alone", "no other thread could run")])
def test_a_kernel_that_hangs_is_stopped(run: Run, kernel: str, told: str) -> None:
    status, out, _ = run(f"mine.py:{kernel} --op rms_norm --limit 0.5 --case plain")
    assert status == 1
    assert out.startswith("FAIL rms_norm/plain: it did not return within 0.5 s")
    assert told in out


def test_what_a_kernel_prints_is_not_among_the_results(run: Run) -> None:
    _, out, _ = run("mine.py:talkative --op rms_norm --case plain --json")
    assert json.loads(out)["ok"]


def test_a_declared_rounding_point_counts(run: Run) -> None:
    options = "--op rms_norm --policy bf16,normed=bf16 --case plain --json"
    (report,) = json.loads(run(f"mine.py:good {options}").out)["reports"]
    assert {"inputs bf16", "probs bf16", "normed bf16", "scores f32"} <= set(report["rounding"].split(", "))


def test_fresh_seeds_are_other_each_time(run: Run) -> None:
    def seeds() -> list[int]:
        found = json.loads(run("mine.py:good --op rms_norm --case plain --seeds 3 --json").out)
        return [report["seed"] for report in found["reports"]]

    first, second = seeds(), seeds()
    assert len({*first, *second}) == 6


# -- for machines -------------------------------------------------------------------------------------------------------


def test_json_and_junit(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("mine.py:other_eps --op rms_norm --json --junit found.xml --case plain tiny --seed 7")
    found = json.loads(out)
    assert status == 1
    assert list(found) == re.findall(r"^    (\w+) {2,}\S", verify.__doc__ or "", flags=re.MULTILINE)
    assert (found["schema"], found["ok"], found["cases"]) == (SCHEMA, False, 2)
    assert {report["seed"] for report in found["reports"]} == {7}
    assert found["properties"]["kernel"] == "mine.py:other_eps"
    suites = ElementTree.parse(tmp_path / "found.xml").getroot()
    assert (suites.get("tests"), suites.get("failures")) == ("2", str(found["failed"]))


# -- backends -----------------------------------------------------------------------------------------------------------


def test_a_backend_passes(run: Run) -> None:
    status, out, err = run("--backend numpy --op rms_norm --dtype bf16 --without huge")
    assert (status, err) == (0, ""), out
    assert re.search(r"backend numpy: all \d+ cases passed\n$", out)


def test_of_a_backend_cases_can_be_chosen(run: Run) -> None:
    found = json.loads(run("--backend numpy --op rms_norm,step --case rms_norm/plain qwen3-decode --json").out)
    assert {report["operation"] for report in found["reports"]} == {"rms_norm", "step"}
    assert {report["backend"] for report in found["reports"]} == {"numpy"}


def test_backends_that_do_not_load_are_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"cupy": "backend 'cupy' cannot load: no GPU", "numpy": ""}
    monkeypatch.setattr("npllm.registry.available_backends", lambda: known)
    status, out, _ = run("--backend all --op rms_norm --dtype f32 --tag odd")
    assert status == 0
    assert "backend cupy: not checked: backend 'cupy' cannot load: no GPU\n" in out
    found = json.loads(run("--backend all --op rms_norm --dtype f32 --tag odd --json").out)
    assert found["properties"]["not checked: cupy"] == known["cupy"]


def test_what_a_backend_declines_is_counted() -> None:
    class Declining(Report):
        declined = ("attention: no sinks", "rope: too long")

    reports = [Declining("attention", "a", "f32"), Declining("attention", "b", "f32"), Report("attention", "c", "f32")]
    assert verify.declines(reports) == ["declined: attention: no sinks (2 cases)", "declined: rope: too long (2 cases)"]


# -- bundles, audits, the list ------------------------------------------------------------------------------------------


def test_a_bundle_is_written_and_results_are_judged(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("--export bundle --op rms_norm --dtype f16 --case plain one-token")
    assert (status, out) == (0, f"{Path('bundle') / 'manifest.json'}\n")
    (tmp_path / "results").mkdir()
    status, out, _ = run("--judge bundle results")
    assert status == 1
    assert "no such file" in out
    assert out.endswith("results: 2 of 2 cases failed\n")
    assert json.loads(run("--judge bundle results --json").out)["failed"] == 2


@pytest.mark.parametrize(("test", "status"), [("careless", 1), ("careful", 0)])
def test_an_audit_prints_the_detection_rate(run: Run, test: str, status: int) -> None:
    found, out, _ = run(f"--audit mine.py:{test} --op rms_norm")
    assert found == status, out
    assert ("MISSED" in out) == bool(status)
    assert re.search(r"rms_norm: \d+ of \d+ faults noticed, detection rate \d+%\n$", out)


def test_the_list_has_every_operation_argument_and_case(run: Run) -> None:
    status, out, err = run("--list")
    assert (status, err) == (0, "")
    for name in PLACES:
        op = operation(name)
        (told,) = re.findall(rf"^{name}: .*?(?=^\w|\Z)", out, re.MULTILINE | re.DOTALL)
        settings = {name for case in op.cases for name in case.settings}
        for word in [*op.inputs, *op.outputs, *settings, *(case.name for case in op.cases)]:
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", told), (name, word)


def test_the_list_of_one_operation_has_shapes_and_mistakes(run: Run) -> None:
    _, out, _ = run("--list --op rms_norm --tag offset")
    assert "  def rms_norm(x, weight=None, *, eps, offset=None)\n" in out
    shapes = "x [128, 256], weight [256], eps=1e-06, offset=1.0, scales 1, tags basic offset"
    assert f"    rms_norm/offset\n        {shapes}\n" in out
    assert "rms_norm/plain" not in out
    assert all(f"    {mistake.name}\n" in out for mistake in operation("rms_norm").mistakes)


# -- wrong usage --------------------------------------------------------------------------------------------------------

USAGE = {
    "": "say what to check",
    "mine.py:good": "name one operation with --op: angles, attention",
    "mine.py:good --op rms_norm,rope": "name one operation",
    "mine.py:good --op rms_nrom": "operation 'rms_nrom' is unknown; known: rms_norm, ",
    "mine.py:good --op rms_norm --tag od": "no cases tagged 'od'; tags: odd, ",
    "mine.py:good --op rms_norm --tag odd,huge": "rms_norm has no case with tags odd, huge",
    "mine.py:good --op rms_norm --case pain": "no case 'pain'; nearest: plain, ",
    "mine.py:good --op rms_norm --policy prods=f32": "'prods' is unknown; known: probs, ",
    "mine.py:good --op rms_norm --dtype bf17": "format 'bf17' is unknown; known: bf16, ",
    "mine.py:good --op rms_norm --dtype bf16 --policy inputs=f16": "inputs is declared twice: bf16 and f16",
    "mine.py:good --op rms_norm --framework troch": "framework 'troch' is unknown; known: torch, ",
    "mine.py:good --op rms_norm --list": "a kernel and --list contradict each other",
    "mine.py:good --op rms_norm --seed 1 --seeds 2": "--seed and --seeds contradict each other",
    "mine.py:good --op rms_norm --case plain --tag odd": "--case and --tag contradict each other",
    "mine.py:good --op rms_norm --seeds 0": "--seeds: '0' is not a whole number above 0",
    "mine.py:good --op rms_norm --limit -1": "--limit: '-1' is not a number of seconds above 0",
    "mine.py:good --op rms_norm --junit no/such.xml": "--junit no/such.xml: there is no such folder",
    "mine.py:godo --op rms_norm": "mine.py has no 'godo'; it has: good, ",
    "mine.py:number --op rms_norm": "mine.py:number: is of type int, which cannot be called",
    "mine.py --op rms_norm": "mine.py: is not of the form package.module:name",
    "none.py:good --op rms_norm": "none.py: there is no such file",
    "nothing.like.it:good --op rms_norm": "nothing.like.it cannot be imported (ModuleNotFoundError",
    "--list --json": "--json does not go with --list",
    "--list --tag odd": "name it with --op",
    "--backend numpi": "backend 'numpi' is not installed; installed: numpy",
    "--backend numpy --policy f32": "--policy does not go with --backend",
    "--backend numpy --op rms_norm --case pain": "no case 'pain'; nearest: plain, ",
    "--backend numpy --op rms_norm --without od": "no case is tagged 'od'; tags: odd, ",
    "--backend numpy --tag od": "no case is tagged 'od'; tags: odd, ",
    "--audit mine.py:careless": "name one operation with --op",
    "--judge no where": "no",
}


@pytest.mark.parametrize("line", USAGE)
def test_wrong_usage_is_one_line(run: Run, line: str) -> None:
    status, out, err = run(line)
    assert (status, out) == (2, "")
    assert err.startswith("npllm: ")
    assert err.count("\n") == 1
    assert USAGE[line] in err


def test_a_suite_without_cases_says_so() -> None:
    assert verify.verdict(Suite(()), "mine") == "mine: no case was run"
