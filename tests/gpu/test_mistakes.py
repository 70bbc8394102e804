"""Mistakes planted in kernels: the kit has to see them through the emulated device."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from npllm.testing.conformance import conformity, trials
from tests.gpu.emulator import EmulatedBackend, emulated
from tests.gpu.planted import plant

pytestmark = emulated


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
    Mistake("route.cuh", "there < place", "there > place", "route/ties"),
    Mistake("moe_plan.cu", "if (w < WARP) ahead += before[w];", "", "moe/skewed"),
    Mistake("latent_attention.cu", "s + key <= last_seen", "s + key < last_seen", "latent_attention/decode", "stored"),
)

RARELY = (
    Mistake("route.cuh", "pair && second >= 0", "false", "route/deepseek-v3"),
    Mistake("route.cuh", "bits & 0x80000000u ? 0u - bits", "bits & 0x80000000u ? bits", "route/strong-corrections"),
    Mistake("route.cuh", "(sum + floor)", "sum", "route/vanishing"),
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
    Mistake("turn.cuh", "interleaved ? k & 1 : k >= pairs", "k & 1", "latent_project/prefill-halves"),
    Mistake("latent.cu", "from[n - turning]", "from[n - turning - 1]", "latent_expand/value-wider"),
)  # fmt: skip


@pytest.fixture
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mistake:
    """The mistake, in a device of its own."""
    mistake: Mistake = request.param

    def change(text: str) -> str:
        assert text.count(mistake.right) == 1, "the line that was right has changed"
        return text.replace(mistake.right, mistake.wrong)

    plant(monkeypatch, mistake.file, change)
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
