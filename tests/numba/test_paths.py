"""The kit's suite on every path of CPU features that this machine runs: operations in each storage format, whole models."""

from __future__ import annotations

import os
import platform
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("numba")

from npllm.backends.numba_cpu.features import PATHS as ALL
from npllm.backends.numba_cpu.features import runnable
from npllm.testing.conformance import STORAGES
from npllm.testing.report import Suite
from tests.full import CHECKED
from tests.numba import guards
from tests.numba.work import conformance_on, declined

DTYPES = ("float32", "bfloat16", "stored")
PATHS = [path.name for path in runnable()]

# One case of so many, where all of them would take too long for every run.
SOME = 4

# What every run checks: float32 on the widest path; some cases of the other arithmetic there, that of stored bf16 by a team
# and between guards; and of what users of any CPU meet on the portable path. float32 arithmetic widens f16 and bf16 alike,
# and bfloat16 rounds all to the same: each is checked where it shows.
OFTEN = [
    (PATHS[0], "float32", "f32", 1), (PATHS[0], "float32", "f16", SOME), (PATHS[0], "bfloat16", "f32", SOME),
    ("generic", "float32", "f32", SOME), ("generic", "stored", "bf16", SOME),
]  # fmt: skip

Told = Callable[[str, object], None]


def judged(suite: Suite, told: Told, **about: str) -> None:
    """The suite passed, and nothing was left to the canon; what there was goes to the summary of `pytest -m full`."""
    cases = Counter(report.operation for report in suite.reports)
    failed = [f"{report.case}: {report.problem}" for report in suite.failures]
    told(CHECKED, about | {"cases": dict(cases), "failed": failed, "declined": sorted(declined(suite))})
    suite.raise_on_failure()
    assert not declined(suite)


@pytest.mark.parametrize(("path", "dtype", "storage", "every"), OFTEN)
def test_conformance(path: str, dtype: str, storage: str, every: int, record_property: Told) -> None:
    judged(conformance_on(path, dtype, [storage], every=every), record_property, path=path, dtype=dtype, storage=storage)


def test_conformance_of_a_team(record_property: Told) -> None:
    """Whatever OMP_NUM_THREADS is where the tests run: threads that share rows, chunks and sums."""
    suite = conformance_on(PATHS[0], "stored", ["bf16"], every=SOME, threads=2)
    judged(suite, record_property, path=PATHS[0], dtype="stored", storage="bf16", threads="2")


@pytest.mark.full
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_every_path(path: str, dtype: str, storage: str, record_property: Told) -> None:
    judged(conformance_on(path, dtype, [storage]), record_property, path=path, dtype=dtype, storage=storage)


@pytest.mark.full
@pytest.mark.parametrize("side", guards.SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_between_guards(path: str, dtype: str, side: str, record_property: Told) -> None:
    suite = conformance_on(path, dtype, ["f32", "bf16"], guard=side)
    judged(suite, record_property, path=path, dtype=dtype, storage="f32 bf16", guard=side)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("round", range(5))
def test_fresh_inputs(round: int, dtype: str, record_property: Told) -> None:
    """Seeds that nobody has seen, on the widest path."""
    seed = secrets.randbelow(1 << 31)
    suite = conformance_on(PATHS[0], dtype, ["f32", "bf16"], seed=seed)
    judged(suite, record_property, path=PATHS[0], dtype=dtype, storage="f32 bf16", seed=str(seed))


# What other CPUs' paths are named for; on each, every kernel is compiled, and none of them is run.
NAMED = {
    "avx512bf16": ["vdpbf16ps", "vcvtneps2bf16", "vpdpbusd", "zmm"], "avx512vnni": ["vpdpbusd", "zmm"],
    "avx512": ["vpmaddubsw", "zmm"], "avxvnni": ["vpdpbusd", "ymm"], "avx2": ["vpmaddubsw", "ymm"],
}  # fmt: skip
OTHERS = [path.name for path in ALL if path.name not in PATHS]
COMPILE = """
import sys
from npllm.backends.numba_cpu import features
path = next(path for path in features.PATHS if path.name == sys.argv[1])
features.choose = lambda: path._replace(cpu=path.cpu or "sapphirerapids")
import npllm.backends.numba_cpu.backend
from npllm.backends.numba_cpu.jit import Compiled
code = ""
for each in Compiled.known.values():
    each.address
    code += each._alive._library.get_asm_str()
print([named for named in sys.argv[2:] if named not in code])
"""


@pytest.mark.full
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="the paths are those of x86")
@pytest.mark.parametrize("path", OTHERS)
def test_paths_of_other_cpus_compile(path: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMPILE, path, *NAMED[path]]
    environment = os.environ | {"NPLLM_CACHE": str(tmp_path)}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert told.stdout == "[]\n", told.stderr
