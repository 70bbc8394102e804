"""Copies to the GPU and back through pinned memory, with a stream that does everything as late as may be."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npllm.arrays import Array
from npllm.backends.cupy_gpu import pinned
from npllm.backends.cupy_gpu.cuda import Cuda
from npllm.backends.cupy_gpu.pinned import LARGE, CudaTurn, Landing, Staging
from npllm.errors import MemoryLimitError
from tests.gpu.fake_cupy import Pending, RefusedError, on_device


def test_the_hosts_memory_that_runs_out_is_told_apart_from_the_gpus() -> None:
    def alloc(error: str) -> Any:
        raise RefusedError(error)

    runtime = SimpleNamespace(CUDARuntimeError=RefusedError, hostAllocPortable=1)
    for error, kind, message in (
        ("cudaErrorMemoryAllocation: out of memory", MemoryLimitError, r"the host has no 32 MiB that the GPU could reach"),
        ("cudaErrorIllegalAddress", RefusedError, "cudaErrorIllegalAddress"),
    ):
        cupy = SimpleNamespace(
            cuda=SimpleNamespace(
                runtime=runtime,
                PinnedMemory=lambda nbytes, flags, e=error: alloc(e),
                PinnedMemoryPointer=lambda memory, offset: memory,
            )
        )
        staging, landing = Staging(cupy, *LARGE), functools.partial(Landing, cupy, 32 << 20)
        for asks in (staging._piece, landing, functools.partial(pinned.pinned, cupy, 32 << 20)):
            with pytest.raises(kind, match=message):
                asks()


def test_a_table_in_pinned_memory_takes_no_more_than_its_bytes() -> None:
    """As CuPy's pool would, which takes the next power of two."""
    device: Any = object.__new__(Cuda)
    device.cupy = cupy = Pending()
    table = np.arange(5 << 10, dtype=np.float32).reshape(-1, 16)
    assert device.mapped(table).tolist() == table.tolist()
    assert cupy.sizes == [table.nbytes]


@given(st.lists(st.sampled_from(["write", "turn", "turn", "wait", "drop", "go on"]), min_size=5, max_size=60))
@settings(max_examples=100)
def test_what_a_turn_gives_is_what_its_launch_left(actions: list[str]) -> None:
    """Whatever is written, launched, waited for or given up meanwhile: a piece of pinned memory that another copy needs is
    not used again before that has come, and waiting for one turn waits for none after it."""
    cupy, landings = Pending(), list[Landing]()
    staging = Staging(cupy, 2, 16)
    memory = np.zeros(6, np.int64)
    target, told = on_device(memory), memory.copy()
    turns: list[tuple[Any, Array, int]] = []

    def doubled() -> None:
        memory[:] = 2 * memory + 1

    graph: Any = SimpleNamespace(launch=lambda: cupy.later(doubled))
    for number, action in enumerate(actions):
        if action == "write":
            told = np.arange(6) + number
            staging.copy(target, told)
        elif action == "turn":
            told = 2 * told + 1
            busy = [each for each in landings if not each.came.done]
            half = on_device(memory[3:])
            turns.append((CudaTurn(cupy, landings, graph, [target, half]), told, cupy.done + len(cupy.todo)))
            assert turns[-1][0].landing not in busy
        elif action == "wait" and turns:
            turn, want, last = turns.pop(number % len(turns))
            before = cupy.done
            got, seconds = turn.wait()
            assert [each.tolist() for each in got] == [want.tolist(), want[3:].tolist()]
            assert seconds > 0
            assert cupy.done == max(before, last)
        elif action == "drop" and turns:
            turns.pop(number % len(turns))
        elif action == "go on":
            cupy.until(min(cupy.done + 3, cupy.done + len(cupy.todo)))


def test_steps_that_follow_each_other_take_turns_with_two_landings() -> None:
    cupy, landings = Pending(), []
    memory = np.zeros(4, np.int64)
    graph: Any = SimpleNamespace(launch=lambda: None)
    ahead = CudaTurn(cupy, landings, graph, [on_device(memory)])
    for _ in range(20):
        turn, ahead = ahead, CudaTurn(cupy, landings, graph, [on_device(memory)])
        turn.wait()
    assert len(cupy.sizes) == 2


def interrupting(cupy: Pending) -> None:
    """Ctrl-C comes once, as soon as a copy has been launched."""
    copy = cupy.cuda.runtime.memcpyAsync

    def interrupted(*args: Any) -> None:
        copy(*args)
        cupy.cuda.runtime.memcpyAsync = copy
        raise KeyboardInterrupt

    cupy.cuda.runtime.memcpyAsync = interrupted


def test_an_interrupt_behind_a_copy_to_the_gpu_leaves_its_memory_alone() -> None:
    cupy = Pending()
    staging = Staging(cupy, 1, 64)
    first, second = np.zeros(4, np.int64), np.zeros(4, np.int64)
    interrupting(cupy)
    with pytest.raises(KeyboardInterrupt):
        staging.copy(on_device(first), np.arange(4))
    staging.copy(on_device(second), np.arange(4) + 9)
    cupy.until(cupy.done + len(cupy.todo))
    assert (first.tolist(), second.tolist()) == ([0, 1, 2, 3], [9, 10, 11, 12])


def test_an_interrupt_behind_a_launch_leaves_the_memory_that_its_results_come_to_alone() -> None:
    cupy, landings = Pending(), list[Landing]()
    graph: Any = SimpleNamespace(launch=lambda: None)
    interrupting(cupy)
    with pytest.raises(KeyboardInterrupt):
        CudaTurn(cupy, landings, graph, [on_device(np.zeros(4, np.int64))])
    (landing,) = landings
    turn = CudaTurn(cupy, landings, graph, [on_device(np.arange(4))])
    assert turn.landing is not landing
    assert turn.wait()[0][0].tolist() == [0, 1, 2, 3]
