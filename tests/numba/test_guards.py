"""Kernels read and write nothing but their arrays: every case with its arrays between pages that cannot be touched."""

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("numba")

from npllm.backends.numba_cpu.features import runnable
from tests.numba import guarded, guards
from tests.numba.work import conformance_on

every_side = pytest.mark.parametrize("side", guards.SIDES)

TOUCH = """
import ctypes, sys
import numpy as np
from tests.numba.guards import guarded
x = guarded((5, 3), np.float32, sys.argv[1])
offset = int(sys.argv[2])
ctypes.string_at(x.ctypes.data + offset, 1)
"""


@pytest.mark.parametrize(("side", "offset", "ends"), [
    ("after", 0, False), ("after", 59, False), ("after", 60, True),
    ("before", 0, False), ("before", 59, False), ("before", -1, True),
])  # fmt: skip
def test_a_byte_beyond_an_array_ends_the_process(side: str, offset: int, ends: bool) -> None:
    result = subprocess.run([sys.executable, "-c", TOUCH, side, str(offset)], timeout=60)
    assert (result.returncode != 0) == ends


def test_a_gap_that_is_written_to_is_noticed() -> None:
    assert not guards.overwritten()
    x = guards.guarded((7,), np.float32, "after", 64)
    assert x.ctypes.data % 64 == 0
    np.lib.stride_tricks.as_strided(x, (8,))[7] = 1.0
    assert guards.overwritten()
    assert not guards.overwritten()


# What a kernel touches follows from sizes, which many cases share: one in so many runs every time, all with `-m full`.
SAMPLE = 4


@every_side
def test_kernels_keep_to_their_arrays(side: str) -> None:
    best = runnable()[0].name
    conformance_on(best, "stored", ["bf16"], guard=side, every=SAMPLE).raise_on_failure()


def test_models_keep_to_their_arrays() -> None:
    """Steps with rows of every length, where operations meet that no case of the kit brings together."""
    guarded_tests("rows_of_every_length", "after")


@pytest.mark.full
@every_side
def test_random_models_keep_to_their_arrays(side: str) -> None:
    guarded_tests("model or rows or batch", side)


def guarded_tests(chosen: str, side: str) -> None:
    """Run tests of test_pairs.py in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "tests.numba.guarded", "-p", "no:cacheprovider"]
    environment = os.environ | {guarded.VARIABLE: side}
    told = subprocess.run(
        [*command, "tests/numba/test_pairs.py", "-k", chosen], env=environment, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stdout[-2000:] + told.stderr[-2000:]
