"""Mistakes planted in kernels: the kit has to see them through the emulated device."""

from __future__ import annotations

import shutil
from typing import NamedTuple

import pytest

if shutil.which("g++") is None:
    pytest.skip("g++ compiles the kernels for the CPU, and is not installed", allow_module_level=True)

from npllm.backends.cupy_gpu import sources
from npllm.testing.conformance import conformity, trials
from tests.gpu.emulator import EmulatedBackend, Emulator
from tests.gpu.emulator import device as emulated


class Mistake(NamedTuple):
    """What stands in the place of a line of a file, and a case of the kit that shows it."""

    file: str
    right: str
    wrong: str
    case: str
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.file}: {self.wrong or 'nothing'} for {self.right}"


# Found each time, then those that `pytest -m full` runs besides.
OFTEN = (
    Mistake("route.cu", "there < place", "there > place", "route/ties"),
    Mistake("moe_plan.cu", "if (w < WARP) ahead += before[w];", "", "moe/skewed"),
    Mistake("latent_attention.cu", "s + key <= last_seen", "s + key < last_seen", "latent_attention/decode", "stored"),
)

RARELY = (
    Mistake("route.cu", "pair && second >= 0", "false", "route/deepseek-v3"),
    Mistake("route.cu", "bits & 0x80000000u ? 0u - bits", "bits & 0x80000000u ? bits", "route/strong-corrections"),
    Mistake("route.cu", "(sum + floor)", "sum", "route/vanishing"),
    Mistake("moe_few.cu", "c += WARPS", "c += 2 * WARPS", "moe/decode-batch"),
    Mistake("moe_many.cu", "i % 2 ? ups : gates", "i % 2 ? gates : ups", "moe/mixtral"),
    Mistake("moe_many.cu", "stack_entry(down, expert)", "stack_entry(down, 0)", "moe/crowded"),
    Mistake("moe_many.cu", "* weight[t]) * (u", ") * (u", "moe/same-expert-twice-input"),
    Mistake("moe_plan.cu", "weights ? weights[choice] : 1.0f", "1.0f", "moe/tiny-weights"),
    Mistake("tiles.cuh", "if (k + STEP < width) bring", "if (k + 2 * STEP < width) bring", "moe/eight-of-sixteen"),
    Mistake("latent_attention.cu", "first_seen <= s + key", "0 <= s + key", "latent_attention/mtp-3-window", "stored"),
    Mistake("latent_attention.cu", "total * shrink + sum", "total + sum", "latent_attention/decode-300", "stored"),
    Mistake("latent_attention.cu", "COLUMNS + LANE / 16 * 8", "COLUMNS", "latent_attention/wide", "stored"),
    Mistake("absorb.cu", "w < WARPS; w++) sum += room", "w < 1; w++) sum += room", "latent_attention/decode"),
    Mistake("absorb.cu", "sum * inverse", "sum", "latent_attention/decode-300", "stored"),
    Mistake("heads.cu", "c[l] * inverse", "c[l]", "latent_project/odd"),
    Mistake("heads.cu", "interleaved ? k & 1 : k >= pairs", "k & 1", "latent_project/prefill-halves"),
    Mistake("latent.cu", "from[n - turning]", "from[n - turning - 1]", "latent_expand/value-wider"),
)  # fmt: skip


@pytest.fixture
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mistake:
    """The mistake, in a device of its own."""
    mistake: Mistake = request.param
    text = sources.source(mistake.file) if mistake.file.endswith(".cu") else ""
    assert not text or text.count(mistake.right) == 1, "the line that was right has changed"

    def source(file: str) -> str:
        return sources.source(file).replace(mistake.right, mistake.wrong)

    monkeypatch.setattr(emulated, "source", source)
    monkeypatch.setattr(EmulatedBackend, "shared_device", Emulator())
    return mistake


@pytest.mark.parametrize(
    "planted", [*OFTEN, *(pytest.param(each, marks=pytest.mark.full) for each in RARELY)], indirect=True, ids=str
)
def test_it_is_found(planted: Mistake) -> None:
    operation = planted.case.partition("/")[0]
    found = trials(EmulatedBackend, [operation], storages=["bf16"], dtypes=[planted.dtype])
    (trial,) = [each for each in found if each.case == planted.case]
    assert not conformity(EmulatedBackend, trial).ok


def test_without_one_the_same_cases_pass() -> None:
    for case, dtype in {(mistake.case, mistake.dtype) for mistake in OFTEN}:
        found = trials(EmulatedBackend, [case.partition("/")[0]], storages=["bf16"], dtypes=[dtype])
        (trial,) = [each for each in found if each.case == case]
        conformity(EmulatedBackend, trial).raise_on_failure()
