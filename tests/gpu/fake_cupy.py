"""What stands in the place of CuPy where there is no GPU: its errors, a runtime, a stream that does everything late."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from npllm.arrays import Array


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
