"""What stands between the backend and a GPU: what is said where there is none, the driver's structures, kept code."""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import functools
import logging
import re
import shutil
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npllm import registry
from npllm.arrays import Array
from npllm.backend import Backend, log_once
from npllm.backends.cupy_gpu import cuda
from npllm.backends.cupy_gpu.device import CannotCaptureError
from npllm.errors import BackendError, MemoryLimitError
from npllm.registry import get_backend


class RefusedError(RuntimeError):
    """What CuPy's runtime raises."""


class DriverError(RuntimeError):
    """What CuPy raises where the driver says no."""


class OutOfMemoryError(MemoryError):
    """What CuPy's memory pool raises."""


ERRORS: dict[str, Any] = {
    "runtime": SimpleNamespace(CUDARuntimeError=RefusedError),
    "driver": SimpleNamespace(CUDADriverError=DriverError),
    "memory": SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
}


def pretended(error: str = "", *, count: int = 1, capability: str = "90") -> Any:
    """A CuPy whose runtime says so."""

    def count_devices() -> int:
        if error:
            raise RefusedError(error)
        return count

    runtime = SimpleNamespace(
        getDeviceCount=count_devices,
        CUDARuntimeError=RefusedError,
        runtimeGetVersion=lambda: 13000,
        driverGetVersion=lambda: 12040,
    )
    gpu = SimpleNamespace(compute_capability=capability)
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, Device=lambda: gpu))


WRONG = {
    "no driver": ("cudaErrorInsufficientDriver", None, r"no NVIDIA driver is installed .*: install it"),
    "old driver": (
        "cudaErrorInsufficientDriver",
        "12.4",
        r"the NVIDIA driver knows CUDA 12.4, CuPy is made for CUDA 13.0: update",
    ),
    "no GPU": ("cudaErrorNoDevice: no CUDA-capable device", "13.0", r"no NVIDIA GPU is visible \(nvidia-smi lists them"),
    "another": ("cudaErrorSystemNotReady", "13.0", r"the NVIDIA GPU cannot be used: cudaErrorSystemNotReady"),
}


@pytest.mark.parametrize("why", WRONG)
def test_what_is_wrong_with_gpu_or_driver(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, driver, message = WRONG[why]
    monkeypatch.setattr(cuda, "driver_version", lambda: driver)
    with pytest.raises(BackendError, match=message) as raised:
        cuda.check_gpu(pretended(error))
    assert "\n" not in str(raised.value)


def test_a_gpu_that_is_too_old_or_hidden() -> None:
    with pytest.raises(BackendError, match=r"compute capability 7\.5; kernels need 8\.0"):
        cuda.check_gpu(pretended(capability="75"))
    with pytest.raises(BackendError, match="no NVIDIA GPU is visible"):
        cuda.check_gpu(pretended(count=0))
    cuda.check_gpu(pretended())


# As cupy/__init__.py has it.
FRAMED = f"""
{"=" * 64}
Failed to import CuPy.

If you installed CuPy via wheels (cupy-cudaXXX), make sure that the package matches with the version of CUDA installed.

Check the Installation Guide for details:
  https://docs.cupy.dev/en/latest/install.html

Original error:
  ImportError: libcudart.so.12: cannot open shared object file
{"=" * 64}
"""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'cupy'", name="cupy"), r"CuPy is not installed: pip install 'npllm"),
        (
            ImportError("CuPy failed to load\nlibnvrtc.so.12: no such file"),
            r"not for this machine's CUDA \(libnvrtc",
        ),
        (ImportError(FRAMED), r"CUDA \(ImportError: libcudart\.so\.12: cannot open .*\): pip install "),
        (AttributeError("no attribute 'x'"), r"but cannot be imported \(no attribute 'x'\): pip install"),
        (ImportError(), r"not for this machine's CUDA \(ImportError\): pip install 'npllm"),
    ],
)
def test_cupy_that_is_missing_or_for_another_cuda(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importing(name: str, *args: Any, **options: Any) -> Any:
        if name == "cupy":
            raise error
        return real(name, *args, **options)

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(BackendError, match=message):
        cuda.cupy_module()


def test_memory_that_runs_out_is_an_error_of_ours_and_is_given_back() -> None:
    given_back: list[bool] = []
    device = SimpleNamespace(
        cupy=SimpleNamespace(cuda=SimpleNamespace(**ERRORS)),
        release=lambda: given_back.append(True),
        memory=lambda: SimpleNamespace(free=3 << 30),
    )
    guard: Any = cuda.MemoryErrors(device)  # type: ignore[arg-type]
    full: list[Exception] = [
        OutOfMemoryError(),
        RefusedError("cudaErrorMemoryAllocation: out of memory"),
        DriverError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    ]
    for error in full:
        with pytest.raises(MemoryLimitError, match=r"the GPU's memory is full \(3\.0 GiB is free\): lower max_con"), guard:
            raise error
    for other in (ZeroDivisionError(), RefusedError("cudaErrorIllegalAddress"), DriverError("CUDA_ERROR_NO_BINARY_FOR_GPU")):
        with pytest.raises(type(other)), guard:
            raise other
    assert given_back == [True] * len(full)


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
        staging, landing = cuda.Staging(cupy, *cuda.LARGE), functools.partial(cuda.Landing, cupy, 32 << 20)
        for asks in (staging._piece, landing, functools.partial(cuda.pinned, cupy, 32 << 20)):
            with pytest.raises(kind, match=message):
                asks()


def test_a_table_in_pinned_memory_takes_no_more_than_its_bytes() -> None:
    """As CuPy's pool would, which takes the next power of two."""
    device: Any = object.__new__(cuda.Cuda)
    device.cupy = cupy = Pending()
    table = np.arange(5 << 10, dtype=np.float32).reshape(-1, 16)
    assert device.mapped(table).tolist() == table.tolist()
    assert cupy.sizes == [table.nbytes]


class Pending:
    """A CuPy whose stream does everything as late as may be. Memory is the host's; `todo` is what has not been done."""

    def __init__(self) -> None:
        self.todo: list[Callable[[], None]] = []
        self.done = 0
        stream = SimpleNamespace(ptr=0)
        runtime = SimpleNamespace(memcpyAsync=self.copy, memcpyHostToDevice=1, memcpyDeviceToHost=2, hostAllocPortable=1)
        self.cuda = SimpleNamespace(
            runtime=runtime, get_current_stream=lambda: stream, PinnedMemory=self.pinned, Event=self.event,
            PinnedMemoryPointer=lambda memory, offset: memory, UnownedMemory=lambda pointer, size, owner, device: owner,
            MemoryPointer=lambda memory, offset: memory, Device=lambda: SimpleNamespace(id=0),
            get_elapsed_time=lambda began, came: 1e3 * (came.number - began.number),
        )  # fmt: skip
        self.ndarray = lambda shape, dtype, memory: np.frombuffer(memory, dtype).reshape(shape)
        self.sizes: list[int] = []

    def later(self, work: Callable[[], None]) -> int:
        self.todo.append(work)
        return self.done + len(self.todo)

    def until(self, number: int) -> None:
        while self.done < number:
            self.todo.pop(0)()
            self.done += 1

    def copy(self, to: int, source: int, size: int, kind: int, stream: int) -> None:
        self.later(lambda: ctypes.memmove(to, source, size))

    def pinned(self, size: int, flags: int) -> Any:
        self.sizes.append(size)

        class Memory(ctypes.c_char * size):  # type: ignore[misc]
            ptr = property(ctypes.addressof)

        return Memory()

    def event(self, block: bool = False, disable_timing: bool = False) -> Any:
        pending = self

        class Event:
            number = 0

            def record(self, stream: Any) -> None:
                self.number = pending.later(lambda: None)

            @property
            def done(self) -> bool:
                return pending.done >= self.number

            def synchronize(self) -> None:
                pending.until(self.number)

        return Event()


def on_device(values: Array) -> Any:
    return SimpleNamespace(
        data=SimpleNamespace(ptr=values.ctypes.data), nbytes=values.nbytes, dtype=values.dtype, shape=values.shape
    )


@given(st.lists(st.sampled_from(["write", "turn", "turn", "wait", "drop", "go on"]), min_size=5, max_size=60))
@settings(max_examples=100)
def test_what_a_turn_gives_is_what_its_launch_left(actions: list[str]) -> None:
    """Whatever is written, launched, waited for or given up meanwhile: a piece of pinned memory that another copy needs is
    not used again before that has come, and waiting for one turn waits for none after it."""
    cupy, landings = Pending(), list[cuda.Landing]()
    staging = cuda.Staging(cupy, 2, 16)
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
            turns.append((cuda.CudaTurn(cupy, landings, graph, [target, half]), told, cupy.done + len(cupy.todo)))
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
    ahead = cuda.CudaTurn(cupy, landings, graph, [on_device(memory)])
    for _ in range(20):
        turn, ahead = ahead, cuda.CudaTurn(cupy, landings, graph, [on_device(memory)])
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
    staging = cuda.Staging(cupy, 1, 64)
    first, second = np.zeros(4, np.int64), np.zeros(4, np.int64)
    interrupting(cupy)
    with pytest.raises(KeyboardInterrupt):
        staging.copy(on_device(first), np.arange(4))
    staging.copy(on_device(second), np.arange(4) + 9)
    cupy.until(cupy.done + len(cupy.todo))
    assert (first.tolist(), second.tolist()) == ([0, 1, 2, 3], [9, 10, 11, 12])


def test_an_interrupt_behind_a_launch_leaves_the_memory_that_its_results_come_to_alone() -> None:
    cupy, landings = Pending(), list[cuda.Landing]()
    graph: Any = SimpleNamespace(launch=lambda: None)
    interrupting(cupy)
    with pytest.raises(KeyboardInterrupt):
        cuda.CudaTurn(cupy, landings, graph, [on_device(np.zeros(4, np.int64))])
    (landing,) = landings
    turn = cuda.CudaTurn(cupy, landings, graph, [on_device(np.arange(4))])
    assert turn.landing is not landing
    assert turn.wait()[0][0].tolist() == [0, 1, 2, 3]


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

    device: Any = object.__new__(cuda.Cuda)
    device.cupy, device.dependent, device.thread = Capturing(lambda: refuses(device)), True, cuda.Threads()
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


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise BackendError("no NVIDIA GPU is visible")

    cuda.gpu.cache_clear()
    monkeypatch.setattr(cuda, "gpu", none)
    log_once.cache_clear()


@pytest.mark.usefixtures("without_gpu")
def test_named_it_is_an_error_and_auto_moves_on_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "PREFERENCE", (registry.Candidate("cupy"), *registry.PREFERENCE[1:]))
    with pytest.raises(BackendError, match=r"^backend 'cupy' cannot run here: no NVIDIA GPU is visible$"):
        get_backend("cupy")
    assert "no NVIDIA GPU" in registry.available_backends()["cupy"]
    for _ in range(2):
        assert get_backend("auto").name != "cupy"
    assert [record.levelname for record in caplog.records if "cupy" in record.message] == ["WARNING"]


NO_NVRTC = RuntimeError("CuPy failed to load libnvrtc.so.12: OSError: libnvrtc.so.12: cannot open shared object file")
BROKEN = {
    "compiler": (NO_NVRTC, r"CuPy is for a CUDA whose NVRTC is not installed \(CuPy failed .*\): pip install 'npllm"),
    "properties": (RefusedError("cudaErrorUnknown"), r"the NVIDIA GPU cannot be used \(cudaErrorUnknown\): see what"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_auto_moves_on_from_a_gpu_that_fails_when_it_is_opened(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error, message = BROKEN[what]

    def fails(*args: Any) -> Any:
        raise error

    cupy = pretended()
    cupy.cuda.Device().id = 0
    named = {"name": b"a GPU", "multiProcessorCount": 4, "sharedMemPerBlockOptin": 1 << 17}
    cupy.cuda.runtime.getDeviceProperties = fails if what == "properties" else lambda number: named
    libraries = SimpleNamespace(nvrtc=SimpleNamespace(getVersion=fails if what == "compiler" else lambda: (13, 0)))
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", libraries)
    monkeypatch.setattr(cuda, "cupy_module", lambda: cupy)
    monkeypatch.setattr(registry, "PREFERENCE", (registry.Candidate("cupy"), *registry.PREFERENCE[1:]))
    cuda.gpu.cache_clear()
    log_once.cache_clear()
    with pytest.raises(BackendError, match=f"^backend 'cupy' cannot run here: {message}") as raised:
        get_backend("cupy")
    assert "\n" not in str(raised.value)
    for _ in range(2):
        assert get_backend("auto").name != "cupy"
    assert len([record for record in caplog.records if "cupy" in record.message]) == 1


def test_auto_says_nothing_of_a_package_that_nobody_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log_once.cache_clear()
    missing = registry.Candidate("cupy", package="no_such_package")
    monkeypatch.setattr(registry, "PREFERENCE", (missing, *registry.PREFERENCE[1:]))
    be = get_backend("auto")
    assert be.name != "cupy"
    assert "cupy" not in be.why
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_structures_of_the_driver() -> None:
    """Sizes and places of cuda.h."""
    assert (ctypes.sizeof(cuda.Attribute), cuda.Attribute.value.offset) == (72, 8)
    assert (ctypes.sizeof(cuda.Configuration), cuda.Configuration.stream.offset) == (56, 32)


def test_code_is_kept_and_a_damaged_file_counts_as_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = []
    monkeypatch.setenv("NPLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda, "compile_cubin", lambda text, name, *key: made.append(key) or b"machine code")
    for macros, compiler, count in (((), "13.0", 1), ((), "13.0", 1), ((("WIDE", 1),), "13.0", 2), ((), "13.1", 3)):
        assert cuda.cubin("norms.cu", 90, macros, compiler) == b"machine code"
        assert len(made) == count
    assert cuda.cubin("norms.cu", 80, (), "13.0") == b"machine code"
    for file in (tmp_path / "cuda").iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert cuda.cubin("norms.cu", 90, (), "13.0") == b"machine code"
    assert len(made) == 5


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the kernels for the CPU, and is not installed")
def test_a_model_that_does_not_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import npllm
    from tests.gpu.emulator import EmulatedBackend, Emulator
    from tests.models import make_checkpoint

    make_checkpoint(tmp_path)
    folder = tmp_path
    monkeypatch.setattr(EmulatedBackend, "shared_device", Emulator(memory=1000))
    monkeypatch.setattr("npllm.loading.get_backend", lambda *args, **options: EmulatedBackend("float32"))
    for weights in ("auto", "memory"):
        with pytest.raises(MemoryLimitError, match=r"the weights need \d+ MiB, 0 MiB of memory is free .*quantize it"):
            npllm.load(folder, backend="cupy", weights=weights)
    with pytest.raises(MemoryLimitError, match="keeps weights in the GPU's memory"):
        npllm.load(folder, backend="cupy", weights="disk")


class OnDisk(Backend):
    """In the place of "numba"."""

    name = "numba"


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the kernels for the CPU, and is not installed")
@pytest.mark.parametrize(
    ("memory", "weights", "taken", "why"),
    [
        (1 << 30, "disk", "numba", "the cupy backend keeps no weights on disk"),
        (1000, "auto", "numba", r"the weights need \d+ MiB, 0 MiB of memory is free where the cupy backend keeps them"),
        (1000, "memory", "numba", r"the weights need \d+ MiB, 0 MiB of memory is free where the cupy backend keeps them"),
        (1 << 30, "memory", "cupy", ""),
    ],
)
def test_auto_passes_over_a_gpu_that_cannot_have_the_weights(
    memory: int, weights: Any, taken: str, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:  # fmt: skip
    import npllm
    from tests.gpu.emulator import EmulatedBackend, Emulator
    from tests.models import make_checkpoint

    make_checkpoint(tmp_path)
    names = {"cupy": "tests.gpu.emulator:EmulatedBackend", "numba": f"{__name__}:OnDisk"}
    points = [EntryPoint(name, value, "npllm.backends") for name, value in names.items()]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    monkeypatch.setattr(registry, "PREFERENCE", tuple(map(registry.Candidate, names)))
    monkeypatch.setattr(EmulatedBackend, "shared_device", Emulator(memory=memory))
    log_once.cache_clear()
    for _ in range(2):
        llm = npllm.load(tmp_path, weights=weights)
        assert llm.backend.name == taken
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == bool(why)
    assert all(re.search(why, message) for message in said)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the kernels for the CPU, and is not installed")
def test_the_emulator_notices_what_a_gpu_would_not() -> None:
    """A NumPy array in a kernel's place, numbers that nobody wrote, a product in a capture that CuPy has cuBLAS make."""
    from npllm.backends.cupy_gpu.device import Out
    from tests.gpu.emulator import Emulator

    device = Emulator()
    kernel = device.kernel("elementwise.cu", "halve", {})
    with pytest.raises(TypeError, match="not an array of the device"):
        device.launch(kernel, (1, 1, 1), 32, (np.zeros(3), Out(device.empty((3,), "float32"))))
    with pytest.raises(ValueError, match="512 threads"):
        device.launch(kernel, (1, 1, 1), 512, (device.empty((3,), "float32"), 3, Out(device.empty((3,), "uint16"))))
    assert np.isnan(device.download(device.empty((3,), "float32"))).all()
    x = device.upload(np.arange(3.0))
    with pytest.raises(TypeError, match="upload it"):
        x + np.arange(3.0)
    with pytest.raises(TypeError, match="download it"):
        x.__array__()
    square = device.upload(np.eye(3))
    for product in (lambda: square @ square, lambda: device.xp.matmul(square, square), lambda: np.dot(square, square)):
        with pytest.raises(CannotCaptureError, match="cuBLAS"):
            device.capture(product)
        np.testing.assert_array_equal(device.download(product()), np.eye(3))


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the kernels for the CPU, and is not installed")
def test_counters_that_a_graph_knows_stay_where_they_are() -> None:
    """More of them are asked for later, by a longer prompt: the graph still draws from the first ones."""
    from tests.gpu.emulator import EmulatedBackend

    be = EmulatedBackend("float32")
    first = be.tickets(1).array
    address = be.device.address(first)
    assert len(be.tickets(2 * len(first)).array) == 2 * len(first)
    assert any(be.device.address(each) == address for each in be._tickets)
