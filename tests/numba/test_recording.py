"""Recorded steps: what NumPy does with arrays that remember is done again; what cannot be repeated is noticed."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")

from npllm.backends.numba_cpu.recording import Recorder

WAYS = {
    "sum of two": lambda x: x + 2 * x,
    "in place": lambda x: np.multiply(x, 3, out=x.copy()),
    "part in place": lambda x: part_in_place(x),
    "concatenated": lambda x: np.concatenate([x[:, :1], x[:, 1:] * 2], axis=1),
    "gathered": lambda x: x[np.array([1, 0, 1])],
    "reduced": lambda x: np.mean(np.square(x), axis=-1, keepdims=True) + x,
    "chosen": lambda x: np.where(x > 0, x, -1),
    "turned": lambda x: x.T + 0,
    "seen otherwise": lambda x: x.reshape(3, 2)[::2].T * 1,
    "another type": lambda x: x.astype(np.float64) / 3,
    "stacked": lambda x: np.stack([x, x + 1]),
}


def part_in_place(x):
    y = x.copy()
    y[:, :1] -= x[:, 1:2] * 2
    y[:, 2:] = 7
    return y


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_numpy_did_is_done_again_with_other_numbers(way):
    memory = np.arange(6, dtype=np.float32).reshape(2, 3)
    recorder = Recorder()
    result = way(recorder.remember(memory))
    assert not recorder.problem
    memory[:] = np.array([[5, -3, 2], [9, 0.5, -7]], np.float32)
    for call in recorder.finished():
        call()
    np.testing.assert_array_equal(result.view(np.ndarray), way(memory))


def test_what_nobody_holds_any_more_is_taken_by_the_next():
    recorder = Recorder()
    first, other = recorder.lent(64), recorder.lent(64)
    part, place = first.view(np.float32).reshape(4, 4)[1:], first.ctypes.data
    del first
    assert recorder.lent(64).ctypes.data not in (place, other.ctypes.data), "a part of it is still seen"
    del part
    again = recorder.lent(64)
    assert again.ctypes.data == place
    assert again.ctypes.data % 64 == 0
    assert recorder.lent(128).ctypes.data != place


@pytest.mark.parametrize(
    "read",
    [lambda x: x.tolist(), lambda x: bool(x.any()), lambda x: x.item(0), lambda x: x.max(), lambda x: x.repeat(2)],
    ids=["tolist", "bool", "item", "max", "repeat"],
)
def test_what_cannot_be_repeated_is_noticed(read):
    recorder = Recorder()
    read(recorder.remember(np.arange(6, dtype=np.float32).reshape(2, 3)))
    assert recorder.problem
