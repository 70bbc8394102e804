"""Steps captured as graphs: what a driver refuses, interrupts, memory, threads."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from npllm.backend import log_once
from npllm.backends.cupy_gpu.cuda import Cuda, Threads
from npllm.backends.cupy_gpu.device import CannotCaptureError
from npllm.errors import BackendError
from tests.gpu.fake_cupy import ERRORS, DriverError, RefusedError


class Pool:
    """A memory pool of CuPy's."""

    def __init__(self) -> None:
        self.limit = self.used = self.unused = 0
        self.malloc = None

    def set_limit(self, size: int) -> None:
        self.limit = size

    def get_limit(self) -> int:
        return self.limit

    def used_bytes(self) -> int:
        return self.used

    def free_bytes(self) -> int:
        return self.unused

    def total_bytes(self) -> int:
        return self.used + self.unused

    def free_all_blocks(self) -> None:
        self.unused = 0


class Capturing:
    """A CuPy whose streams capture what `refuses` does not say no to, when the capture ends or when a kernel is launched."""

    def __init__(self, refuses: Callable[[], bool]) -> None:
        nothing, cupy = contextlib.nullcontext(), self
        self.begun, self.open = 0, False
        self.after_begin = self.after_end = lambda: None

        class Stream(contextlib.nullcontext):  # type: ignore[type-arg]
            ptr = 0

            def __init__(self, non_blocking: bool) -> None:
                super().__init__()
                assert non_blocking

            def begin_capture(self, mode: int) -> None:
                cupy.begun, cupy.open = cupy.begun + 1, True
                cupy.after_begin()

            def end_capture(self) -> str:
                if refuses() or not cupy.open:
                    raise RefusedError("cudaErrorNotSupported")
                cupy.open = False
                cupy.after_end()
                return "a graph"

        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(
                streamCaptureModeRelaxed=2, CUDARuntimeError=RefusedError, memGetInfo=lambda: (1 << 40, 1 << 40)
            ),
            Stream=Stream,
            driver=ERRORS["driver"], memory=ERRORS["memory"],
            MemoryPool=Pool, using_allocator=lambda malloc: nothing,
            get_current_stream=lambda: SimpleNamespace(synchronize=lambda: None, ptr=0),
        )  # fmt: skip
        self.default = Pool()
        self.get_default_memory_pool = lambda: self.default


def capturing(refuses: Callable[[Any], bool]) -> Any:
    """A device on it, whose driver says no to launches in the same way."""

    def said_no(*args: Any) -> int:
        return 801 if refuses(device) else 0

    device: Any = object.__new__(Cuda)
    device.cupy, device.dependent, device.thread = Capturing(lambda: refuses(device)), True, Threads()
    device._asked, device._pools = {}, weakref.WeakSet()
    device._driver = SimpleNamespace(cuLaunchKernelEx=said_no, cuGetErrorName=lambda status, name: 0)
    return device


KERNEL: Any = SimpleNamespace(file="a.cu", name="a", handle=SimpleNamespace(ptr=1))


@pytest.mark.parametrize("launches", [False, True])
def test_graphs_where_a_driver_refuses_dependent_launch(launches: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Whether it says so of a launch, or in the end; once it has, nothing is tried again."""
    log_once.cache_clear()
    caplog.set_level(logging.INFO)
    device = capturing(lambda device: device.dependent)
    work = (lambda: device.launch(KERNEL, (1, 1, 1), 32, ())) if launches else lambda: None
    for _ in range(2):
        graph, _ = device.capture(work)
        assert (graph.graph, device.dependent, device.thread.capturing) == ("a graph", False, False)
    assert device.cupy.begun == 3
    assert [record.message for record in caplog.records if "do not overlap: " in record.message]


def test_a_step_that_cannot_be_captured_says_why_and_leaves_dependent_launch_on() -> None:
    device = capturing(lambda device: True)

    def of_cupys() -> None:
        raise DriverError("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: operation not permitted when stream is capturing")

    ours = functools.partial(device.launch, KERNEL, (1, 1, 1), 32, ())
    for work, why in ((lambda: None, "NotSupported"), (ours, r"801.*a\.cu"), (of_cupys, "CAPTURE_UNSUPPORTED")):
        with pytest.raises(CannotCaptureError, match=why):
            device.capture(work)
        assert (device.dependent, device.thread.capturing) == (True, False)
    with pytest.raises(BackendError, match="801") as raised:
        device.launch(KERNEL, (1, 1, 1), 32, ())
    assert not isinstance(raised.value, CannotCaptureError)


@pytest.mark.parametrize("when", ["after_begin", "after_end", "work"])
def test_an_interrupt_leaves_no_capture_open(when: str) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    device = capturing(lambda device: False)
    if when != "work":
        setattr(device.cupy, when, interrupted)
    with pytest.raises(KeyboardInterrupt):
        device.capture(interrupted if when == "work" else lambda: None)
    assert (device.cupy.begun, device.cupy.open, device.thread.capturing) == (1, False, False)


def test_graphs_share_the_limit_of_the_process() -> None:
    """What one holds, the next one and the default pool have no more; when it goes, they have it again."""
    device, given = capturing(lambda device: False), []
    default = device.cupy.default
    default.limit, default.used, default.unused = 1000, 300, 500

    def work() -> None:
        (pool,) = {each.pool for each in device._pools} - set(given)
        given.append(pool)
        pool.used = 400

    first, _ = device.capture(work)
    second, _ = device.capture(work)
    third, _ = device.capture(work)
    assert [pool.limit for pool in given] == [700, 300, 1]
    assert device.memory().free == 0
    del second, third
    assert device.memory().free == 300
    default.limit = 0
    fourth, _ = device.capture(work)
    assert given[-1].limit == 0
    assert (first.graph, fourth.graph) == ("a graph", "a graph")


def test_a_capture_is_of_one_thread() -> None:
    """Another one may send numbers meanwhile, and its launches wait for those before them."""
    device, seen = capturing(lambda device: False), []

    def launched(configuration: Any, *args: Any) -> int:
        seen.append(configuration._obj.count)
        return 0

    def work() -> None:
        device._not_while_capturing()
        device.launch(KERNEL, (1, 1, 1), 32, ())

    def captured() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(work).result()
        with pytest.raises(CannotCaptureError, match="numbers of the host"):
            work()
        device.launch(KERNEL, (1, 1, 1), 32, ())

    device._driver.cuLaunchKernelEx = launched
    device.capture(captured)
    assert seen == [0, 1]


def test_a_thread_knows_the_gpus_context_before_it_launches() -> None:
    """A new one has none before it calls the runtime, of which memory that CuPy has at hand is no call."""
    device, bound, seen = capturing(lambda device: False), threading.local(), []
    device.cupy.cuda.runtime.memGetInfo = lambda: setattr(bound, "here", True)

    def launched(*args: Any) -> int:
        seen.append(hasattr(bound, "here"))
        return 0 if seen[-1] else 201

    def told(*args: Any) -> int:
        return 0 if hasattr(bound, "here") else 201

    device._driver.cuLaunchKernelEx, device._driver.cuFuncSetAttribute = launched, told
    with ThreadPoolExecutor(2) as pool:
        for shared in (0, 1 << 16):
            device.launch(KERNEL, (1, 1, 1), 32, (), shared)
            pool.submit(device.launch, KERNEL, (1, 1, 1), 32, (), 2 * shared).result()
    assert seen == [True] * 4
