"""Ring 2 on the emulated device: the backend's own launchers, and the same .cu text that a GPU runs, through the kit."""

from __future__ import annotations

import pytest

from npllm.testing.conformance import MODEL, conformity, trials
from npllm.testing.operation import operations
from npllm.testing.report import Suite
from tests.gpu.emulator import EmulatedBackend, checked, emulated

pytestmark = [emulated, checked]

OPERATIONS = [op.name for op in operations() if op.backends] + [MODEL]

# One trial of so many runs each time; all of them with `pytest -m full`.
EVERY = 9


def conforms(operation: str, dtype: str, every: int, *, seed: int = 0) -> None:
    storages = ["bf16"] if every > 1 else ["f32", "f16", "bf16"]
    found = trials(EmulatedBackend, [operation], storages=storages, dtypes=[dtype], seed=seed)[::every]
    suite = Suite(tuple(conformity(EmulatedBackend, trial, 120.0) for trial in found))
    suite.raise_on_failure()
    declined = {what for report in suite.reports for what in getattr(report, "declined", ())}
    assert declined == set(), "every operation has a kernel for every case"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_in_float32(operation: str) -> None:
    conforms(operation, "float32", EVERY)


@pytest.mark.parametrize("operation", ["linear", "attention", "gated_ffn", "latent_attention", "moe"])
def test_operations_on_tensor_cores(operation: str) -> None:
    conforms(operation, "bfloat16", 2 * EVERY)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "stored"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_everything(operation: str, dtype: str) -> None:
    conforms(operation, dtype, 1, seed=1)


def test_float64_is_the_canon_on_the_device() -> None:
    """Nothing has a kernel there: the canon runs on arrays that are not NumPy's."""
    for operation in ("linear", "attention", "moe", MODEL):
        found = trials(EmulatedBackend, [operation], storages=["f32"], dtypes=["float64"])[:: 2 * EVERY]
        Suite(tuple(conformity(EmulatedBackend, trial, 120.0) for trial in found)).raise_on_failure()
