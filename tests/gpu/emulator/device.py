"""The device: kernels compiled by g++, launches that run at once, graphs that run them again."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from npllm.arrays import Array, DTypeLike
from npllm.backends.cupy_gpu.backend import CupyBackend
from npllm.backends.cupy_gpu.cublaslt import Products
from npllm.backends.cupy_gpu.device import Argument, Device, Grid, Kernel, Memory, Packed
from npllm.backends.cupy_gpu.sources import kernels, source
from tests.gpu.emulator.arrays import STREAM, DeviceArray, Module, plain
from tests.gpu.emulator.launches import Launch, Launches, Moved

HERE = Path(__file__).parent

OPTIONS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-fno-strict-aliasing", "-fno-gnu-unique")

# Instrumented as for ThreadSanitizer, with checker.cpp in the place of its library.
CHECKED = ("-DEMU_CHECKED", "-fsanitize=thread", "-nodefaultlibs", "-lm", "-lc", "-lgcc", "-g1")

# What a launch may do with an array, as checker.cpp knows it.
ROLES = {"reads": 1, "writes": 2, "both": 3, "fixed": 4}

PROBLEMS = {
    1: "a barrier that some threads never reach",
    2: "copies to shared memory that nobody waited for",
    3: "a vector that does not begin at a multiple of 16 bytes",
}

# What arrays begin at multiples of on a GPU.
ALIGNMENT = 256

POISON = 0xFF

GPU_MEMORY = 1 << 30


def built(name: str, text: str, *more: str) -> Path:
    """A shared library made of a C++ text, kept from run to run."""
    digest = hashlib.blake2b("\0".join((text, *OPTIONS, *more)).encode(), digest_size=10).hexdigest()
    folder = Path(os.environ.get("NPLLM_EMULATOR_CACHE", Path(tempfile.gettempdir()) / f"npllm-emulator-{os.getuid()}"))
    folder.mkdir(exist_ok=True)
    library = folder / f"{name}-{digest}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / "made.so"
        command = ["g++", *OPTIONS, "-x", "c++", "-", "-x", "none", *more, "-o", str(made)]
        result = subprocess.run(command, input=text, text=True, capture_output=True)
        if result.returncode:
            raise RuntimeError(f"{name}: {result.stderr[:4000]}")
        made.replace(library)
    return library


# What a grid may have at most along its axes.
LARGEST_GRID = (2**31 - 1, 65535, 65535)


# Threads of a block whose kernel does not say how many there are (`__launch_bounds__`): each may have been given 255 of a
# multiprocessor's 65,536 registers.
UNBOUNDED = 256


@functools.cache
def is_bounded(file: str, kernel: str) -> bool:
    return re.search(rf"__launch_bounds__\([^)]*\) {kernel}\(", source(file)) is not None


def allowed(device: Emulator, kernel: Kernel, grid: Grid, block: int, shared: int) -> None:
    """ValueError for a launch that a GPU would refuse, or might."""
    arrays = device.arrays.get((kernel.file, kernel.name, *kernel.defines), 0)
    sizes = all(0 < size <= most for size, most in zip(grid, LARGEST_GRID, strict=True))
    most = 1024 if is_bounded(kernel.file, kernel.name) else UNBOUNDED
    if not (sizes and block in range(32, most + 1, 32) and shared + arrays <= device.shared_limit):
        raise ValueError(f"{kernel.name} on a grid of {grid}, {block} threads, {shared} and {arrays} bytes each")


def room_for(shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
    """An array that nobody has written."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    room = np.full(size + ALIGNMENT, POISON, np.uint8)
    begin = -room.ctypes.data % ALIGNMENT
    return room[begin : begin + size].view(dtype).reshape(shape).view(DeviceArray)


class Emulator(Device):
    """A small GPU: few multiprocessors, so that small cases are cut into splits too."""

    xp = Module()
    name = "emulator"
    compiler = "g++"
    architecture = 90
    multiprocessors = 4
    shared_limit = 227 * 1024

    def __init__(self, memory: int = GPU_MEMORY, *, checked: bool = False) -> None:
        self.header = (HERE / "cuda_on_cpu.h").read_text()
        runtime = (HERE / "runtime.cpp").read_text().replace('#include "cuda_on_cpu.h"', self.header)
        runtime = runtime.replace('#include "checker.cpp"', (HERE / "checker.cpp").read_text())
        self.checked = checked
        self.runtime = built("runtime", runtime, "-O2", *CHECKED[:1] * checked)
        self.loaded = ctypes.CDLL(str(self.runtime))
        self.limit = memory
        # Bytes that were asked for, of the device and of the host's pinned memory.
        self.allotted = self.pinned = 0
        self.kernels: dict[tuple[Any, ...], Kernel] = {}
        self.compiled: set[tuple[Any, ...]] = set()
        # Bytes of shared memory that the kernels of a file have as arrays, by what they were compiled with.
        self.arrays: dict[tuple[Any, ...], int] = {}
        self.launches: Launches | None = None
        self.seed = 0
        self.recording: list[Callable[[], None]] | None = None

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        made = room_for(tuple(shape), dtype)
        self.allotted += made.nbytes
        return made

    def upload(self, array: Array) -> Array:
        STREAM.read("upload")
        made = self.empty(array.shape, array.dtype)
        plain(made)[...] = array
        return made

    def download(self, array: Array) -> Array:
        STREAM.read("download")
        return plain(array).copy()

    def write(self, array: Array, values: Array) -> None:
        assert (array.dtype, array.shape) == (values.dtype, values.shape)
        values = values.copy()

        def arrive() -> None:
            plain(array)[...] = values
            self._moved(array, "writes")

        STREAM.later("write", arrive)

    def turn(self, graph: Any, results: Sequence[Array]) -> EmulatedTurn:
        assert all(each.flags.c_contiguous for each in results)
        turn = EmulatedTurn(graph, results, self._moved)
        turn.number = STREAM.later("turn", turn.run)
        return turn

    def _moved(self, array: Array, role: str) -> None:
        if self.launches is not None:
            self.launches.add(Moved(array, role))

    def mapped(self, array: Array) -> Array:
        STREAM.read("mapped")
        made = room_for(array.shape, array.dtype)
        plain(made)[...] = array
        self.pinned += made.nbytes
        return made

    def address(self, array: Array) -> int:
        if not isinstance(array, DeviceArray):
            raise TypeError(f"a kernel was given {type(array)}, not an array of the device")
        return int(plain(array).ctypes.data)

    def kernel(self, file: str, name: str, defines: Mapping[str, int]) -> Kernel:
        key = (file, name, *sorted(defines.items()))
        if key not in self.kernels:
            macros = tuple(sorted(defines.items()))
            library = ctypes.CDLL(str(self.compile(file, macros)))
            self.kernels[key] = Kernel(file, name, macros, getattr(library, f"emu_launch_{name}"))
            self.arrays[key] = library.emu_static_shared()
        return self.kernels[key]

    def compile(self, file: str, macros: tuple[tuple[str, int], ...]) -> Path:
        self.compiled.add((file, macros))
        more = (str(self.runtime), "-nostartfiles", *CHECKED * self.checked)
        return built(file.removesuffix(".cu"), self._text(file, macros), *more)

    def _text(self, file: str, macros: tuple[tuple[str, int], ...]) -> str:
        entries = "".join(f"EMU_ENTRY({each})\n" for each in kernels(file))
        return self.header + "".join(f"#define {macro} {value}\n" for macro, value in macros) + source(file) + entries

    def is_kept(self, file: str, macros: tuple[tuple[str, int], ...]) -> bool:
        return (file, macros) in self.compiled

    def kept(self) -> dict[str, Any]:
        return {"folder": "/emulated", "bytes": 0, "compiled": len(self.compiled)}

    def launch(self, kernel: Kernel, grid: Grid, block: int, args: Iterable[Argument], shared: int = 0) -> None:
        STREAM.finish("a launch")
        allowed(self, kernel, grid, block, shared)
        launch = Launch(kernel, grid, block, shared, tuple(args))
        packed = Packed(launch.args, self.address)

        def run() -> None:
            self.seed += 1
            if self.launches is not None:
                self.launches.add(launch)
            if self.checked:
                self._tell_spans(launch)
            sizes = (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(block, 1, 1)
            outcome = kernel.handle(*sizes, shared, self.seed, packed.pointers)
            if outcome:
                problem = PROBLEMS.get(outcome) or self._reported(kernel)
                raise RuntimeError(f"{kernel.file}: {kernel.name} {dict(kernel.defines)}: {problem}")

        run()
        if STREAM.calls is not None:
            STREAM.calls.append(run)

    def _tell_spans(self, launch: Launch) -> None:
        numbers = [number for begin, end, role in launch.spans for number in (begin, end, ROLES[role])]
        self.loaded.emu_spans((ctypes.c_uint64 * len(numbers))(*numbers), len(numbers) // 3)

    def _reported(self, kernel: Kernel) -> str:
        """What the checker found, and the lines that do it, from the innermost call on."""
        self.loaded.emu_report.restype = ctypes.c_char_p
        what, _, offset = self.loaded.emu_report().decode().partition("\n")
        library = self.compile(kernel.file, kernel.defines)
        command = ["addr2line", "-i", "-e", str(library), hex(int(offset))]
        found = subprocess.run(command, capture_output=True, text=True).stdout
        lines = self._text(kernel.file, kernel.defines).splitlines()
        return "\n  ".join([what, *(lines[int(number) - 1].strip() for number in re.findall(r":(\d+)", found))])

    def capture(self, function: Callable[[], Array]) -> tuple[Replay, Array]:
        STREAM.calls = calls = []
        try:
            result = function()
        finally:
            STREAM.calls = None
        return Replay(calls), result

    def blas(self) -> Products | None:
        return None

    def memory(self) -> Memory:
        return Memory(self.limit, self.limit)

    def guarded(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def release(self) -> None:
        pass


class Replay:
    """The calls of a captured function."""

    def __init__(self, calls: list[Callable[[], None]]) -> None:
        self.calls = calls

    def launch(self) -> None:
        STREAM.later("graph", self.run)

    def run(self) -> None:
        for call in self.calls:
            call()


class EmulatedTurn:
    """A graph's launch whose results nobody sees before it has been waited for."""

    number = 0

    def __init__(self, graph: Replay, results: Sequence[Array], moved: Callable[[Array, str], None]) -> None:
        self.graph, self.results, self.moved = graph, results, moved

    def run(self) -> None:
        began = time.perf_counter()
        self.graph.run()
        self.copies = [plain(each).copy() for each in self.results]
        for each in self.results:
            self.moved(each, "reads")
        self.seconds = time.perf_counter() - began

    def wait(self) -> tuple[list[Array], float]:
        STREAM.wait(self.number)
        return self.copies, self.seconds


class EmulatedBackend(CupyBackend):
    """The backend on the emulator."""

    xp: ClassVar[Any] = Emulator.xp
    shared_device: ClassVar[Emulator | None] = None

    @classmethod
    def open_device(cls) -> Device:
        if EmulatedBackend.shared_device is None:
            EmulatedBackend.shared_device = Emulator()
        return EmulatedBackend.shared_device
