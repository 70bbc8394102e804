"""What the backend needs of a GPU: arrays, kernels, launches, graphs, memory. `cuda.py` is one; tests bring another.

A kernel's parameters are of three kinds, so that a launch can be checked and emulated without knowing its signature:
pointers and whole numbers (`long long`, 8 bytes), `float`, and structures by value. An array is passed as the address of its
first element, and says what the launch does with it: reads it (bare), writes it (`Out`), both (`InOut`), or reads what
nobody writes while steps run (`Fixed`: weights), which a kernel may therefore fetch before the kernels ahead of it are done.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from npllm.arrays import Array, DTypeLike, Namespace
from npllm.backends.cupy_gpu.cublaslt import Products
from npllm.errors import BackendError


class Out(NamedTuple):
    """An array that a kernel writes, all of it that later kernels read."""

    array: Array


class InOut(NamedTuple):
    """An array of which a kernel reads and writes parts."""

    array: Array


class Fixed(NamedTuple):
    """An array that nobody writes while steps run."""

    array: Array


class Structure(NamedTuple):
    """A structure by value that holds the addresses of `arrays`, which are `Fixed`."""

    words: bytes
    arrays: tuple[Array, ...]


Argument = Any
Grid = tuple[int, int, int]


class Kernel(NamedTuple):
    """A function of a compiled file; `handle` is its device's own."""

    file: str
    name: str
    defines: tuple[tuple[str, int], ...]
    handle: Any


@dataclass(frozen=True)
class Memory:
    """Bytes of a device: free to be taken (a limit of the process's own considered), and all."""

    free: int
    total: int


class Graph(Protocol):
    """Launches, captured once."""

    def launch(self) -> None:
        """Run all of them, in the order of the device's stream; what they read and write lies where it lay."""


class Turn(Protocol):
    """A graph's launch under way. One that nobody waits for runs to its end and does no harm."""

    def wait(self) -> tuple[list[Array], float]:
        """The results' copies, and the seconds that the device took; called once.

        Waits for this launch and what came before it, for nothing that was launched since.
        """


class CannotCaptureError(BackendError):
    """A function does what no graph can hold."""


class Device(Protocol):
    """A GPU. `architecture`: 90 is sm_90. `shared_limit`: bytes of dynamic shared memory that a block may ask for."""

    xp: Namespace
    name: str
    compiler: str
    architecture: int
    multiprocessors: int
    shared_limit: int

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """Memory that nobody has written."""

    def upload(self, array: Array) -> Array:
        """A NumPy array's copy on the device, contiguous."""

    def download(self, array: Array) -> Array:
        """A device array's copy as a NumPy array: waits for what is to write it."""

    def write(self, array: Array, values: Array) -> None:
        """Put a NumPy array into a device array of its shape and type, in stream order; a small one without waiting."""

    def turn(self, graph: Graph, results: Sequence[Array]) -> Turn:
        """Launch a graph and have contiguous arrays, as it leaves them, copied to the host, without waiting."""

    def mapped(self, array: Array) -> Array:
        """A NumPy array's copy in pinned memory of the host, as an array that kernels can read."""

    def address(self, array: Array) -> int:
        """Of its first element, as kernels know it."""

    def kernel(self, file: str, name: str, defines: Mapping[str, int]) -> Kernel:
        """The function `name` of a file in kernels/, compiled with the given macros."""

    def is_kept(self, file: str, macros: tuple[tuple[str, int], ...]) -> bool:
        """Whether a file's kernels have been compiled with these macros, and the code is kept."""

    def compile(self, file: str, macros: tuple[tuple[str, int], ...]) -> None:
        """Compile and keep them, in any thread; BackendError."""

    def kept(self) -> dict[str, Any]:
        """The folder of compiled code (None: none can be kept), its bytes, and how many variants of files there are."""

    def launch(self, kernel: Kernel, grid: Grid, block: int, args: Iterable[Argument], shared: int = 0) -> None:
        """Run a kernel after all that was launched before."""

    def blas(self) -> Products | None:
        """cuBLASLt on this device; None where there is none."""

    def capture(self, function: Callable[[], Array]) -> tuple[Graph, Array]:
        """`function()` as a graph, and the memory that its result will lie in; CannotCaptureError.

        It must have run once before: what it makes at its first time must be there. It may upload and download nothing.
        """

    def memory(self) -> Memory:
        """What is free."""

    def guarded(self) -> contextlib.AbstractContextManager[None]:
        """A block in which memory that runs out is a MemoryLimitError, whoever asked for it."""

    def release(self) -> None:
        """Give memory back that no array uses."""


class Packed:
    """Arguments as both `cuLaunchKernel` and the emulator take them: an array of pointers to their values."""

    def __init__(self, args: Iterable[Argument], address: Callable[[Array], int]) -> None:
        self.values = [_value(each, address) for each in args]
        self.pointers = (ctypes.c_void_p * len(self.values))(*(ctypes.addressof(each) for each in self.values))


def _value(argument: Argument, address: Callable[[Array], int]) -> Any:
    if argument is None:
        return ctypes.c_int64(0)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, Structure):
        return ctypes.create_string_buffer(argument.words, len(argument.words))
    return ctypes.c_int64(address(argument.array if isinstance(argument, Out | InOut | Fixed) else argument))
