"""How products of few tokens are dealt out: to more threads than this machine has, in many stretches, in every format."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from npllm import grouped
from npllm.arrays import Array
from npllm.backend import RMS, Backend
from npllm.backends.numba_cpu import tape, team
from npllm.backends.numba_cpu.backend import NumbaBackend
from npllm.backends.numba_cpu.ffn import AT_ONCE
from npllm.backends.numba_cpu.linear import LEAST_BYTES, rows_of_place, share, stretch_end
from npllm.backends.numba_cpu.products import FEW, SOME
from npllm.handles import Scale, Weight
from npllm.weights import MLP, QKV, GatedFFN, Linear
from tests.compare import agree

DICE = np.random.default_rng(11)

# A width whose rows are so long, in any format, that a share is read in several stretches; features that five threads cannot
# share evenly, more than a stretch of hidden ones has.
D, F = 512, 6048

THREADS = (1, 2, 5)

# What each run does of all formats in both arithmetics.
OFTEN = {("f32", "float32"), ("bf16", "stored"), ("f8_e4m3", "float32"), ("q8", "stored"), ("q4", "stored")}
CASES = [
    pytest.param(*case, marks=() if case in OFTEN else pytest.mark.full)
    for case in itertools.product(("f32", "f16", "bf16", "f8_e4m3", "q8", "q4"), ("float32", "stored"))
]


def normal(*shape: int) -> Array:
    return DICE.standard_normal(shape).astype(np.float32)


def of_format(format: str, rows: int, columns: int) -> Weight:
    weight = Weight.of("w", normal(rows, columns) / np.float32(columns**0.5))
    numbers = weight.array("float32")
    if format == "f32":
        return weight
    if format == "f16":
        return Weight.of("w", numbers.astype(np.float16))
    if format == "bf16":
        return replace(weight, format=format, data=(numbers.view(np.uint32) >> 16).astype(np.uint16))
    if format == "f8_e4m3":
        # Neither of the two codes that stand for no number.
        codes = DICE.integers(0, 127, (rows, columns), np.uint8) | DICE.integers(0, 2, (rows, columns), np.uint8) << 7
        factors = Weight.of("s", np.exp(normal(-(-rows // 128), -(-columns // 128))) / 4000)
        return replace(weight, format=format, data=codes, scale=Scale(factors, (128, 128), (0, 0)))
    return grouped.quantised(weight, format)


def matrix(format: str, rows: int, columns: int = D, *, bias: bool = False) -> Linear:
    return Linear(of_format(format, rows, columns), Weight.of("b", normal(rows)) if bias else None)


def bundles(format: str) -> dict[str, Any]:
    return {
        "linear": matrix(format, 4099, bias=True),
        # The second matrix has fewer rows than a round of shares, the third fewer than there are threads.
        "project_heads": QKV(matrix(format, 4099), matrix(format, 1021, bias=True), matrix(format, 3)),
        "gated_ffn": GatedFFN(matrix(format, F), matrix(format, F), matrix(format, D, F)),
        "mlp": MLP(matrix(format, F, bias=True), matrix(format, D, F, bias=True)),
    }


def run(be: Backend, name: str, x_MD: Array, w: Any, gain: Any) -> Array:
    """An operation with what it takes of a norm and a residual; all of its outputs side by side."""
    norm = RMS(gain, 1e-6)
    if name == "linear":
        return be.linear(x_MD, w, residual_MF=np.tile(x_MD, 9)[:, : len(w.weight)])
    if name == "project_heads":
        return np.concatenate(be.project_heads(x_MD, w, 1, norm=norm), axis=1)[..., 0]
    if name == "gated_ffn":
        return be.gated_ffn(x_MD, w, "silu", norm=norm, residual_MD=x_MD)
    return be.mlp(x_MD, w, "gelu_new", residual_MD=x_MD)


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A team of as many threads as are asked for."""
    monkeypatch.setattr(team, "cores", lambda: max(THREADS))
    made = team.Team()
    monkeypatch.setattr(tape, "team", lambda: made)
    yield
    made.stop()


@pytest.mark.usefixtures("crowd")
@pytest.mark.parametrize(("format", "dtype"), CASES)
def test_every_row_is_somebodys(format: str, dtype: str) -> None:
    """Any number of threads makes the same bits; they are what the canon makes, but for what the arithmetic rounds."""
    for name, w in bundles(format).items():
        be, canon, gain = NumbaBackend(dtype), Backend("float32"), Linear(Weight.of("g", 1 + normal(D) / 8))
        ours, theirs = ([each.prepare(bundle) for bundle in (w, gain)] for each in (be, canon))
        for M in (1, FEW, SOME):
            x_MD, found = normal(M, D), []
            for be.team_size in THREADS:
                found.append(run(be, name, x_MD, *ours))
            for each in found[1:]:
                agree(each, found[0], "exact")
            wanted = run(canon, name, x_MD, *theirs)
            error = np.linalg.norm(found[0] - wanted) / np.linalg.norm(wanted)
            assert error < (2e-5 if dtype == "float32" else 2e-2), (name, M, error)


@pytest.mark.parametrize("most", [AT_ONCE // 4, 1 << 20])
def test_stretches(most: int) -> None:
    """Each row of each share is dealt out once, whatever the number of rows, their length, and the threads."""
    for rows, row_bytes in itertools.product((0, 1, 3, 5, 63, 4099, 151936), (0, 2, 512, 2 * LEAST_BYTES)):
        for threads, places in itertools.product((1, 2, 3, 64), (1, 4)):
            apart, stop, seen = rows_of_place.py_func(rows, places, threads), 0, np.zeros(rows, np.int64)
            shares = [share.py_func(number, apart, places, rows) for number in range(threads)]
            while stop < apart:
                start, stop = stop, stretch_end.py_func(stop, apart, row_bytes, most)
                assert start < stop <= min(apart, start + most)
                for begin, end in shares:
                    for place in range(begin, end, apart):
                        seen[place + start : min(end, place + stop)] += 1
            assert (seen == 1).all()
