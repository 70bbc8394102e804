"""The device: a GPU through CuPy (arrays, memory, streams, capture, NVRTC) and the driver's own launch call.

CuPy launches by `cuLaunchKernel`, which knows no programmatic dependent launch: a kernel that may begin while the one before
it still runs, and fetch weights until `griddepcontrol.wait` lets it go on (CUDA programming guide, "Programmatic Dependent
Launch"). `cuLaunchKernelEx` is called here for it, in captured steps alone. NPLLM_PDL=0 in the environment switches it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from npllm.arrays import Array, DTypeLike
from npllm.backend import log_once
from npllm.backends.cupy_gpu import cubins, cublaslt, driver
from npllm.backends.cupy_gpu.device import Argument, CannotCaptureError, Device, Graph, Grid, Kernel, Memory, Packed
from npllm.backends.cupy_gpu.pinned import LARGE, SMALL, CudaTurn, Landing, Staging, pinned
from npllm.errors import BackendError, MemoryLimitError
from npllm.machine import gibibytes

# The names of an error, the runtime's and the driver's.
FULL = "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY"


class CudaGraph:
    """An instantiated graph, with the memory pool that its intermediates lie in."""

    def __init__(self, graph: Any, kept: tuple[Any, ...]) -> None:
        self.graph, self.kept = graph, kept

    def launch(self) -> None:
        self.graph.launch()


class GraphPool:
    """The memory pool of a graph's intermediates, as long as anything of the graph is used: CuPy's own cannot be watched."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool


class Threads(threading.local):
    """Of each thread, whether it captures, while others may go on; whether it knows the GPU's context."""

    capturing = False
    bound = False


class Cuda(Device):
    """The current GPU."""

    def __init__(self) -> None:
        self.cupy = driver.cupy_module()
        driver.check_gpu(self.cupy)
        self.xp = self.cupy
        gpu = self.cupy.cuda.Device()
        properties = self.cupy.cuda.runtime.getDeviceProperties(gpu.id)
        self.name = properties["name"].decode()
        self.architecture = int(gpu.compute_capability)
        self.multiprocessors = int(properties["multiProcessorCount"])
        self.shared_limit = int(properties["sharedMemPerBlockOptin"])
        self.dependent = self.architecture >= 90 and os.environ.get("NPLLM_PDL") != "0"
        self.thread = Threads()
        self._driver = driver.driver_library()
        self._staging, self._small = Staging(self.cupy, *LARGE), Staging(self.cupy, *SMALL)
        self._landings: list[Landing] = []
        # Of the graphs that there are: CuPy's limit and its count are of the default pool alone.
        self._pools: weakref.WeakSet[GraphPool] = weakref.WeakSet()
        self._kernels: dict[tuple[Any, ...], Kernel] = {}
        # Bytes of dynamic shared memory that functions were told of, by their handles.
        self._asked: dict[int, int] = {}
        runtime = self.cupy.cuda.runtime
        self.compiler = f"nvrtc {driver.compiler_version()} driver {runtime.driverGetVersion()}"

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        with self.guarded():
            return self.cupy.empty(tuple(shape), dtype=dtype)

    def _not_while_capturing(self) -> None:
        """CannotCaptureError: a graph would copy what pinned memory holds when it is launched, not what it holds now."""
        if self.thread.capturing:
            raise CannotCaptureError("numbers of the host go to the GPU")

    def upload(self, array: Array) -> Array:
        self._not_while_capturing()
        made = self.empty(array.shape, array.dtype)
        self._staging.copy(made, np.ascontiguousarray(array))
        return made

    def write(self, array: Array, values: Array) -> None:
        self._not_while_capturing()
        staging = self._small if values.nbytes <= self._small.size else self._staging
        staging.copy(array, np.ascontiguousarray(values))

    def turn(self, graph: Graph, results: Sequence[Array]) -> CudaTurn:
        return CudaTurn(self.cupy, self._landings, graph, results)

    def download(self, array: Array) -> Array:
        return self.cupy.asnumpy(array)

    def mapped(self, array: Array) -> Array:
        array = np.ascontiguousarray(array)
        memory = pinned(self.cupy, max(1, array.nbytes))
        pointer = int(memory.ptr)
        np.frombuffer(memory, np.uint8, array.nbytes)[:] = array.reshape(-1).view(np.uint8)
        # Pinned memory has the same address on the GPU (unified addressing).
        whole = self.cupy.cuda.UnownedMemory(pointer, max(1, array.nbytes), memory, self.cupy.cuda.Device().id)
        return self.cupy.ndarray(array.shape, array.dtype, self.cupy.cuda.MemoryPointer(whole, 0))

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def kernel(self, file: str, name: str, defines: Mapping[str, int]) -> Kernel:
        macros = tuple(sorted(defines.items()))
        key = file, name, macros
        if key not in self._kernels:
            module = self.cupy.cuda.function.Module()
            module.load(cubins.cubin(file, self.architecture, macros, self.compiler))
            self._kernels[key] = Kernel(file, name, macros, module.get_function(name))
        return self._kernels[key]

    def is_kept(self, file: str, macros: tuple[tuple[str, int], ...]) -> bool:
        return cubins.read_cubin(cubins.cubin_path(file, self.architecture, macros, self.compiler)) is not None

    def compile(self, file: str, macros: tuple[tuple[str, int], ...]) -> None:
        cubins.cubin(file, self.architecture, macros, self.compiler)

    def kept(self) -> dict[str, Any]:
        return cubins.kept_cubins()

    def launch(self, kernel: Kernel, grid: Grid, block: int, args: Iterable[Argument], shared: int = 0) -> None:
        packed, function, stream = Packed(args, self.address), ctypes.c_void_p(kernel.handle.ptr), self._stream()
        # More than 48 KiB, its own arrays included, a function gets only where it was told so before.
        if shared > self._asked.get(kernel.handle.ptr, 0):
            self._check(self._driver.cuFuncSetAttribute(function, driver.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared), kernel)
            self._asked[kernel.handle.ptr] = shared
        attribute = driver.Attribute(driver.PROGRAMMATIC_STREAM_SERIALIZATION)
        attribute.value[0] = 1
        dependent = int(self.dependent and self.thread.capturing)
        configuration = driver.Configuration(*grid, block, 1, 1, shared, stream, ctypes.pointer(attribute), dependent)
        self._check(self._driver.cuLaunchKernelEx(ctypes.byref(configuration), function, packed.pointers, None), kernel)

    def _stream(self) -> int:
        """The current stream, as the driver takes it from this thread.

        A thread that has called nothing of the runtime has no context, and asking CuPy for memory that it has at hand calls
        nothing.
        """
        if not self.thread.bound:
            self.cupy.cuda.runtime.memGetInfo()
            self.thread.bound = True
        return int(self.cupy.cuda.get_current_stream().ptr)

    def _check(self, status: int, kernel: Kernel | None = None) -> None:
        if status == driver.OUT_OF_MEMORY:
            raise memory_full(self)
        if status:
            name = ctypes.c_char_p()
            self._driver.cuGetErrorName(status, ctypes.byref(name))
            where = "" if kernel is None else f" at {kernel.file}: {kernel.name}"
            kind = CannotCaptureError if self.thread.capturing else BackendError
            raise kind(f"the GPU's driver says {(name.value or b'error').decode()} ({status}){where}")

    def capture(self, function: Callable[[], Array]) -> tuple[CudaGraph, Array]:
        try:
            return self._captured(function)
        except CannotCaptureError as error:
            if not self.dependent:
                raise
            # A driver that knows dependent launch need not know it in graphs.
            self.dependent = False
            try:
                made = self._captured(function)
            except CannotCaptureError:
                self.dependent = True
                raise
            log_once(f"cupy: kernels of a step do not overlap: {error}")
            return made

    def _captured(self, function: Callable[[], Array]) -> tuple[CudaGraph, Array]:
        pool = self._pool_of_graph()
        # The default stream would wait for another kind of stream, and a capture fails where anybody waits for it.
        stream = self.cupy.cuda.Stream(non_blocking=True)
        self.cupy.cuda.get_current_stream().synchronize()
        with stream, self.cupy.cuda.using_allocator(pool.pool.malloc), self.guarded():
            try:
                self.thread.capturing = True
                # Relaxed: the pool may have to ask for memory meanwhile.
                stream.begin_capture(self.cupy.cuda.runtime.streamCaptureModeRelaxed)
                result = function()
                graph = self._ended(stream)
            except BaseException as error:
                self._abandon(stream)
                if isinstance(error, (NotImplementedError, *refusals(self.cupy))):
                    raise CannotCaptureError(str(error)) from None
                raise
            finally:
                self.thread.capturing = False
        return CudaGraph(graph, (pool, result)), result

    def _pool_of_graph(self) -> GraphPool:
        """What a graph writes must never be given to others: so it has a pool, of what the process has left."""
        default, pool = self.cupy.get_default_memory_pool(), self.cupy.cuda.MemoryPool()
        if limit := default.get_limit():
            default.free_all_blocks()
            # To CuPy, 0 is no limit.
            pool.set_limit(size=max(1, limit - default.total_bytes() - self._held_by_graphs()))
        made = GraphPool(pool)
        self._pools.add(made)
        return made

    def _held_by_graphs(self) -> int:
        return sum(int(each.pool.total_bytes()) for each in self._pools)

    def _ended(self, stream: Any) -> Any:
        try:
            return stream.end_capture()
        except RuntimeError as error:
            raise CannotCaptureError(str(error)) from None

    def _abandon(self, stream: Any) -> None:
        """End a capture that failed; CuPy's own call may fail once more."""
        with contextlib.suppress(Exception):
            stream.end_capture()

    def blas(self) -> cublaslt.Products | None:
        return self._blas

    @functools.cached_property
    def _blas(self) -> cublaslt.Products | None:
        library = cublaslt.load()
        if library is None:
            log_once("cupy: cuBLASLt is not installed; products of prompts go through slower kernels of our own")
            return None
        self._workspace = self.empty((cublaslt.WORKSPACE,), "uint8")
        return cublaslt.Products(library, self.address(self._workspace), cublaslt.WORKSPACE, self._stream)

    def memory(self) -> Memory:
        free, total = self.cupy.cuda.runtime.memGetInfo()
        pool = self.cupy.get_default_memory_pool()
        free += pool.free_bytes()
        limit = pool.get_limit()
        left = limit - pool.used_bytes() - self._held_by_graphs() if limit else free
        return Memory(max(0, min(free, left)), total)

    def release(self) -> None:
        self.cupy.get_default_memory_pool().free_all_blocks()
        self.cupy.get_default_pinned_memory_pool().free_all_blocks()

    def guarded(self) -> contextlib.AbstractContextManager[None]:
        return MemoryErrors(self)


def refusals(cupy: Any) -> tuple[type[Exception], type[Exception]]:
    """What CuPy raises where the runtime says no, and where the driver does, which loads and launches kernels."""
    return cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError


class MemoryErrors(contextlib.AbstractContextManager[None]):
    """Turns errors of memory, CuPy's or the runtime's, into MemoryLimitError, and gives back what no array uses."""

    def __init__(self, device: Cuda) -> None:
        self.device = device

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        cuda = self.device.cupy.cuda
        # A graph's launch, pinned memory or a kernel's code is no business of CuPy's pool.
        full = isinstance(error, refusals(self.device.cupy)) and any(name in str(error) for name in FULL)
        if full or isinstance(error, cuda.memory.OutOfMemoryError):
            raise memory_full(self.device) from None


def memory_full(device: Cuda) -> MemoryLimitError:
    """What is said where the GPU's memory has run out, once what no array uses is given back."""
    device.release()
    return MemoryLimitError(
        f"the GPU's memory is full ({gibibytes(device.memory().free)} is free): lower max_context or the batch, "
        "use kv_dtype='bfloat16', or a smaller model"
    )


@functools.cache
def gpu() -> Cuda:
    """The current GPU, opened once; BackendError says in one line why it cannot be used."""
    try:
        return Cuda()
    except BackendError:
        raise
    except Exception as error:
        why = driver.reason(error)
        raise BackendError(f"the NVIDIA GPU cannot be used ({why}): see what nvidia-smi says of it") from error
