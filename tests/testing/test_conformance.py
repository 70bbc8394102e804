"""Backends run through the whole kit: npllm's own, one of another package, and what is wrong with wrong ones."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npllm import numpy_backend
from npllm.arrays import Array
from npllm.backend import Backend, log_once
from npllm.errors import ArgumentError, BackendError
from npllm.numpy_backend import NumpyBackend
from npllm.registry import available_backends
from npllm.testing.conformance import MODEL, MODEL_CASES, Conformity, conformance, conformity, trials
from npllm.testing.operation import operations
from npllm.testing.report import Suite
from tests.coarse import Coarse
from tests.strict import StrictBackend
from tests.testing import mine
from tests.testing.mine import Capless, LastOfTies, Mine, Unscaled, WideWindow

# Operations that take weights: only these meet what a backend makes of a storage format.
WEIGHED = (
    "embed", "linear", "project_heads", "gated_ffn", "mlp", "rms_norm", "layer_norm", "moe", "latent_project",
    "latent_expand",
)  # fmt: skip


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a backend declined here is told again elsewhere."""
    yield
    log_once.cache_clear()


# One trial of so many runs every time; all of them take minutes.
sampled = pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.full)])


def some(every: int, backend: Callable[..., Backend], ops: Sequence[str] | None = None, **asked: Any) -> Suite:
    """`conformance`, one trial of `every` so many."""
    return Suite(tuple(conformity(backend, trial) for trial in trials(backend, ops, **asked)[::every]))


def everywhere(every: int, backend: Callable[..., Backend]) -> Suite:
    """Some of all in float32, and of what has weights in the other formats and arithmetics too."""
    narrow = some(every, backend, WEIGHED, storages=["f16"], dtypes=["float32"], seed=1)
    wide = some(every, backend, [*WEIGHED, MODEL], storages=["bf16"], dtypes=["float64"], seed=2)
    return Suite(some(every, backend, storages=["f32"], dtypes=["float32"]).reports + narrow.reports + wide.reports)


# -- npllm's own --------------------------------------------------------------------------------------------------------


@sampled
def test_numpy_conforms_where_it_uses_threads(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thresholds are lowered, so that the small arrays of the cases are cut into parts as large ones are."""
    for name, small in {"SPLIT": 4, "SMALL_PRODUCT": 1, "SMALL_STEP": 1, "WIDE": 16, "FEATURES": 16}.items():
        monkeypatch.setattr(numpy_backend, name, small)
    everywhere(every, NumpyBackend).raise_on_failure()


@sampled
def test_the_canon_conforms_on_what_array_modules_share(every: int) -> None:
    some(every, StrictBackend, storages=["f32"], dtypes=["float32"]).raise_on_failure()


def test_nothing_is_left_out() -> None:
    found = trials(Backend)
    assert {trial.operation for trial in found} == {op.name for op in operations() if op.backends} | {MODEL}
    assert {trial.rounding.inputs for trial in found} == {"f32", "f16", "bf16"}
    assert {trial.rounding.accumulate for trial in found} == {"f32", "f64"}
    assert {trial.case for trial in found if trial.operation == MODEL} == {f"{MODEL}/{case}" for case in MODEL_CASES}
    assert set(WEIGHED) < {op.name for op in operations()}


# -- one of another package ---------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a distribution that registers two backends, on the path of this process and of its children."""
    shutil.copy(mine.__file__, tmp_path / "mine.py")
    info = tmp_path / "mine-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[npllm.backends]\nmine = mine:Mine\ncapless = mine:Capless\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")])))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


@pytest.mark.usefixtures("installed")
def test_a_backend_of_another_package_conforms_and_what_it_declines_is_told() -> None:
    assert available_backends()["mine"] == ""
    asked: dict[str, Any] = {"storages": ["f32"], "dtypes": ["float32"]}
    attention = conformance("mine", ["attention"], tags=["sinks"], **asked)
    suite = Suite(conformance("mine", ["linear", "moe", MODEL], **asked).reports + attention.reports)
    suite.raise_on_failure()
    declined = {(each.operation, what) for each in suite.reports if isinstance(each, Conformity) for what in each.declined}
    sinks, weigh = "attention: attention sinks", "moe: weights on the experts' input"
    assert {("attention", sinks), ("moe", weigh)} <= declined
    assert {what for _, what in declined} == {sinks, weigh}


KINDS = "f32-float32 and (sinks or moe or step or rms_norm)"


def run_suite(folder: Path, *options: str) -> tuple[int, str]:
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers -p no:cacheprovider\nfilterwarnings = error\n")
    command = [sys.executable, "-m", "pytest", "--pyargs", "npllm.testing.conformance_suite", "-q", *options]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    return result.returncode, result.stdout + result.stderr


def test_the_suite_of_pytest_passes_a_backend_and_tells_what_it_declined(installed: Path) -> None:
    status, text = run_suite(installed, "--npllm-backend=mine", "-x", "-k", KINDS)
    assert status == 0, text
    assert "left to npllm's canon" in text
    assert "mine.attention: attention sinks (" in text
    assert "mine.moe: weights on the experts' input (" in text


def test_the_suite_of_pytest_fails_a_wrong_backend(installed: Path) -> None:
    options = ("--npllm-backend=mine", "--npllm-backend=capless", "-k", "softcap and f32-float32")
    status, text = run_suite(installed, *options)
    assert status == 1, text
    assert "closest known mistake: soft cap omitted" in text
    assert "FAILED" in text
    assert "[capless-attention/" in text
    assert "[mine-" not in text
    assert "conformance.py" not in text


# -- wrong ones ---------------------------------------------------------------------------------------------------------

WRONG = {
    Capless: ("attention", "softcap", "soft cap omitted"),
    WideWindow: ("attention", "window", "window one key too wide"),
    Unscaled: ("route", "groups", "scale dropped"),
}


@pytest.mark.parametrize(("storage", "dtype"), [("bf16", "float32"), ("f32", "float64")])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda each: each.name)
def test_a_mistake_is_found_and_named(wrong: type[Backend], dtype: str, storage: str) -> None:
    op, tag, name = WRONG[wrong]
    right, suite = (conformance(each, [op], tags=[tag], storages=[storage], dtypes=[dtype]) for each in (Mine, wrong))
    assert right.ok, str(right)
    explanations = [report.explanation for report in suite.failures]
    assert explanations.count(name) > len(explanations) / 2, str(suite)
    assert f"closest known mistake: {name}" in str(suite)


def test_greedy_ties_are_found_and_named() -> None:
    suite = conformance(LastOfTies, [MODEL])
    assert {report.case for report in suite.failures} == {"step/tied-greedy"}
    assert "of equal logits the lowest index wins" in str(suite)


def test_a_wrong_operation_shows_in_whole_models() -> None:
    failed = {report.case for report in conformance(Capless, [MODEL], dtypes=["float64"]).failures}
    assert "step/gemma2-prefill" in failed
    assert not {case for case in failed if "gemma2" not in case}


def test_a_model_that_raises_is_reported() -> None:
    class Broken(Backend):
        def step(self, model: object, state: object, /) -> None:  # type: ignore[override]
            raise RuntimeError("no step today")

    suite = conformance(Broken, [MODEL], dtypes=["float32"])
    assert {report.problem for report in suite.failures} == {"raised"}
    assert "no step today" in str(suite)


# -- coarse arithmetic, declared ----------------------------------------------------------------------------------------


@sampled
def test_bfloat16_products_conform_where_they_are_declared(every: int) -> None:
    """Of inputs that they round, and of those that they do not."""
    some(every, Coarse, storages=["f32"]).raise_on_failure()
    some(every, Coarse, ["linear", "attention"], storages=["bf16"]).raise_on_failure()


class Undeclared(Coarse):
    def rounding(self, operation: str, storage: str) -> dict[str, str]:
        return {}


class Cut(Coarse):
    """Bits are cut off, not rounded."""

    @staticmethod
    def halved(x: Array) -> Array:
        return (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


@pytest.mark.parametrize("wrong", [Undeclared, Cut])
def test_what_is_coarser_than_declared_is_found(wrong: type[Backend]) -> None:
    """In nearly all cases of products; a single feature or a row of ones may be exact."""
    suite = conformance(wrong, ["linear"], storages=["f32"], tags=["prefill"])
    assert len(suite.failures) > 0.8 * len(suite.reports)


@pytest.mark.parametrize("op", ["gated_ffn", "moe", "attention", "latent_attention"])
def test_what_is_coarser_than_declared_is_found_in_every_operation(op: str) -> None:
    assert any(not conformity(Cut, trial).ok for trial in trials(Cut, [op], storages=["f32"]))


# -- what cannot be checked ---------------------------------------------------------------------------------------------


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(BackendError, match="backend 'nmpy' is not installed; installed: numpy"):
        conformance("nmpy")
    with pytest.raises(ArgumentError, match="operation 'atention' is unknown; known: attention"):
        conformance(Backend, ["atention"])
    with pytest.raises(ArgumentError, match="tagged 'sofcap'; tags: softcap"):
        conformance(Backend, ["attention"], tags=["sofcap"])
    with pytest.raises(BackendError, match="computes in float32 or float64, not in float16"):
        conformance(Backend, ["embed"], dtypes=["float16"])
