"""The device: a GPU through CuPy (arrays, memory, streams, capture, NVRTC) and the driver's own launch call.

CuPy launches by `cuLaunchKernel`, which knows no programmatic dependent launch: a kernel that may begin while the one before
it still runs, and fetch weights until `griddepcontrol.wait` lets it go on (CUDA programming guide, "Programmatic Dependent
Launch"). `cuLaunchKernelEx` is called here for it, in captured steps alone. NPLLM_PDL=0 in the environment switches it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npllm.arrays import Array, DTypeLike
from npllm.backend import log_once
from npllm.backends.cupy_gpu import cublaslt
from npllm.backends.cupy_gpu.device import Argument, CannotCaptureError, Device, Graph, Grid, Kernel, Memory, Packed
from npllm.backends.cupy_gpu.sources import source
from npllm.errors import BackendError, MemoryLimitError
from npllm.machine import available_memory, cache_root, gibibytes

# The least compute capability: cp.async and bf16 products.
LEAST_ARCHITECTURE = 80

# Pieces of pinned memory that copies to the GPU go through, and bytes of each: of weights, and of what a step is told. The
# small ones are many, so that the host finds one free whatever steps are under way.
LARGE = 2, 32 << 20
SMALL = 8, 1 << 16

# Bytes of pinned memory for what a step gives, at least.
LANDING = 4096

# The names of an error, the runtime's and the driver's.
FULL = "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY"

# cuda.h: its number, CUlaunchAttributeID, and what a function may be told.
OUT_OF_MEMORY = 2
PROGRAMMATIC_STREAM_SERIALIZATION = 6
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

DIGEST_BYTES = 16

# What stands above the loader's words in CuPy's error.
ORIGINAL = "Original error:"

INSTALL = "pip install 'npllm[cuda13]' (or 'npllm[cuda12]' for a driver below 580)"


def cupy_module() -> Any:
    """CuPy; BackendError says what to install where it is not there, or is for another CUDA."""
    try:
        import cupy
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            raise BackendError(f"CuPy is not installed: {INSTALL}") from None
        fault = "not for this machine's CUDA" if isinstance(error, ImportError) else "cannot be imported"
        raise BackendError(f"CuPy is installed, but {fault} ({reason(error)}): {INSTALL}") from None
    return cupy


def compiler_version() -> tuple[int, int]:
    """NVRTC's; BackendError where CuPy does not find it, which is no part of CuPy and loaded when it is first used."""
    try:
        from cupy_backends.cuda.libs import nvrtc

        return nvrtc.getVersion()
    except Exception as error:
        raise BackendError(f"CuPy is for a CUDA whose NVRTC is not installed ({reason(error)}): {INSTALL}") from None


def reason(error: Exception) -> str:
    """The line of an error that says what is wrong: CuPy frames its advice, and puts what the loader said at its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" =")]
    if ORIGINAL in lines[:-1]:
        return lines[lines.index(ORIGINAL) + 1]
    return lines[-1] if lines else type(error).__name__


def check_gpu(cupy: Any) -> None:
    """BackendError where no GPU can be used: which of GPU, driver and CuPy is at fault, and what to do."""
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        built, driver = _version(runtime.runtimeGetVersion()), driver_version()
        if driver is None:
            raise BackendError(
                "no NVIDIA driver is installed (libcuda is missing): install it, or use another backend"
            ) from None
        if "InsufficientDriver" in str(error):
            raise BackendError(
                f"the NVIDIA driver knows CUDA {driver}, CuPy is made for CUDA {built}: update the driver, "
                f"or install the other CuPy with {INSTALL}"
            ) from None
        if "NoDevice" in str(error):
            raise BackendError(
                "no NVIDIA GPU is visible (nvidia-smi lists them; CUDA_VISIBLE_DEVICES may hide them)"
            ) from None
        raise BackendError(f"the NVIDIA GPU cannot be used: {error}") from None
    if count == 0:
        raise BackendError("no NVIDIA GPU is visible (nvidia-smi lists them; CUDA_VISIBLE_DEVICES may hide them)")
    major, minor = divmod(int(cupy.cuda.Device().compute_capability), 10)
    if 10 * major + minor < LEAST_ARCHITECTURE:
        raise BackendError(f"the GPU has compute capability {major}.{minor}; kernels need 8.0 (Ampere) or newer")


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_version() -> str | None:
    """The newest CUDA that the driver knows, or None without a driver."""
    library = driver_library()
    number = ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(number)):
        return None
    return _version(number.value)


@functools.cache
def driver_library() -> Any:
    """libcuda, or None."""
    for name in ("libcuda.so.1", "libcuda.so", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: 72 bytes, the value at 8."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class Configuration(ctypes.Structure):
    """CUlaunchConfig: 56 bytes."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )


def compile_cubin(text: str, name: str, architecture: int, defines: Sequence[tuple[str, int]]) -> bytes:
    """A source compiled by NVRTC for exactly this architecture; needs no GPU. BackendError with what the compiler says."""
    from cupy_backends.cuda.libs import nvrtc

    options = (f"-arch=sm_{architecture}", "-std=c++17", "-default-device", *(f"-D{key}={value}" for key, value in defines))
    program = nvrtc.createProgram(text, name, (), ())
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError:
        log = nvrtc.getProgramLog(program)
        raise BackendError(f"{name} does not compile for sm_{architecture}: {log.strip()}") from None
    finally:
        nvrtc.destroyProgram(program)


def cubin(file: str, architecture: int, defines: tuple[tuple[str, int], ...], compiler: str) -> bytes:
    """A compiled file, from the cache where it has been compiled before: for this text, architecture and compiler.

    A file of the cache begins with a digest of what follows: one that is damaged counts as missing.
    """
    path = cubin_path(file, architecture, defines, compiler)
    if (stored := read_cubin(path)) is not None:
        return stored
    made = compile_cubin(source(file), file, architecture, defines)
    if path is None:
        return made
    # A folder that cannot be written costs time, nothing else.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        partial.write_bytes(_digest(made) + made)
        partial.replace(path)
    return made


def cubin_folder() -> Path | None:
    """Where compiled files are kept."""
    root = cache_root()
    return None if root is None else root / "cuda"


def cubin_path(file: str, architecture: int, defines: tuple[tuple[str, int], ...], compiler: str) -> Path | None:
    folder = cubin_folder()
    key = _digest(f"{source(file)}\0{architecture}\0{defines}\0{compiler}".encode()).hex()
    return None if folder is None else folder / f"{file.removesuffix('.cu')}-{key}.cubin"


def read_cubin(path: Path | None) -> bytes | None:
    if path is not None:
        with contextlib.suppress(OSError):
            stored = path.read_bytes()
            if _digest(stored[DIGEST_BYTES:]) == stored[:DIGEST_BYTES]:
                return stored[DIGEST_BYTES:]
    return None


def kept_cubins() -> dict[str, Any]:
    """Folder, bytes and number of the files that are kept, whatever they were compiled for."""
    folder = cubin_folder()
    files = [] if folder is None else sorted(folder.glob("*.cubin"))
    return {
        "folder": None if folder is None else str(folder),
        "bytes": sum(file.stat().st_size for file in files),
        "compiled": len(files),
    }


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


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


def pinned(cupy: Any, nbytes: int) -> Any:
    """Memory of the host that the GPU can reach, until nobody knows it; MemoryLimitError.

    Not from CuPy's pool, which takes the next power of two and gives nothing back: 8 GiB for a table of 5.
    """
    cuda = cupy.cuda
    try:
        return cuda.PinnedMemoryPointer(cuda.PinnedMemory(nbytes, cuda.runtime.hostAllocPortable), 0)
    except cuda.runtime.CUDARuntimeError as error:
        if "cudaErrorMemoryAllocation" not in str(error):
            raise
        raise MemoryLimitError(
            f"the host has no {gibibytes(nbytes)} that the GPU could reach (pinned memory; {gibibytes(available_memory())} "
            "is available): free some memory of the host"
        ) from None


class Landing:
    """Pinned memory that a result comes back to, and the events of when its launch began and when it had come."""

    def __init__(self, cupy: Any, nbytes: int) -> None:
        self.nbytes = nbytes
        self.memory = pinned(cupy, nbytes)
        self.began, self.came = cupy.cuda.Event(), cupy.cuda.Event()


class CudaTurn:
    """A graph's launch, with a landing of its own until it has been waited for or nobody knows it any more.

    A landing is used again only when its copy has come, so that no copy on its way meets another's.
    """

    def __init__(self, cupy: Any, landings: list[Landing], graph: Graph, results: Sequence[Any]) -> None:
        self.cupy, self.landings = cupy, landings
        self.landing = self._free(sum(each.nbytes for each in results))
        runtime, stream = cupy.cuda.runtime, cupy.cuda.get_current_stream()
        self.landing.began.record(stream)
        self.places: list[tuple[int, np.dtype[Any], tuple[int, ...]]] = []
        offset = 0
        try:
            graph.launch()
            for each in results:
                to = int(self.landing.memory.ptr) + offset
                runtime.memcpyAsync(to, each.data.ptr, each.nbytes, runtime.memcpyDeviceToHost, stream.ptr)
                self.places.append((offset, np.dtype(each.dtype), each.shape))
                offset += each.nbytes
        finally:
            # Also where Ctrl-C comes between: the landing is given back while a copy may be on its way to it.
            self.landing.came.record(stream)

    def _free(self, nbytes: int) -> Landing:
        for each in tuple(self.landings):
            if each.nbytes >= nbytes and each.came.done:
                # Another thread may have been faster. No lock: what gives a landing back may run at any time.
                with contextlib.suppress(ValueError):
                    self.landings.remove(each)
                    return each
        return Landing(self.cupy, max(LANDING, nbytes))

    def wait(self) -> tuple[list[Array], float]:
        landing = self.landing
        landing.came.synchronize()
        copies = [
            np.frombuffer(landing.memory, dtype, math.prod(shape), offset).reshape(shape).copy()
            for offset, dtype, shape in self.places
        ]
        seconds = self.cupy.cuda.get_elapsed_time(landing.began, landing.came) / 1e3
        self._give_back()
        return copies, float(seconds)

    def _give_back(self) -> None:
        self.landings.append(self.landing)
        del self.landing

    def __del__(self) -> None:
        if hasattr(self, "landing"):
            self._give_back()


class Threads(threading.local):
    """Of each thread, whether it captures, while others may go on; whether it knows the GPU's context."""

    capturing = False
    bound = False


class Cuda(Device):
    """The current GPU."""

    def __init__(self) -> None:
        self.cupy = cupy_module()
        check_gpu(self.cupy)
        self.xp = self.cupy
        gpu = self.cupy.cuda.Device()
        properties = self.cupy.cuda.runtime.getDeviceProperties(gpu.id)
        self.name = properties["name"].decode()
        self.architecture = int(gpu.compute_capability)
        self.multiprocessors = int(properties["multiProcessorCount"])
        self.shared_limit = int(properties["sharedMemPerBlockOptin"])
        self.dependent = self.architecture >= 90 and os.environ.get("NPLLM_PDL") != "0"
        self.thread = Threads()
        self._driver = driver_library()
        self._staging, self._small = Staging(self.cupy, *LARGE), Staging(self.cupy, *SMALL)
        self._landings: list[Landing] = []
        # Of the graphs that there are: CuPy's limit and its count are of the default pool alone.
        self._pools: weakref.WeakSet[GraphPool] = weakref.WeakSet()
        self._kernels: dict[tuple[Any, ...], Kernel] = {}
        # Bytes of dynamic shared memory that functions were told of, by their handles.
        self._asked: dict[int, int] = {}
        runtime = self.cupy.cuda.runtime
        self.compiler = f"nvrtc {compiler_version()} driver {runtime.driverGetVersion()}"

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
            module.load(cubin(file, self.architecture, macros, self.compiler))
            self._kernels[key] = Kernel(file, name, macros, module.get_function(name))
        return self._kernels[key]

    def is_kept(self, file: str, macros: tuple[tuple[str, int], ...]) -> bool:
        return read_cubin(cubin_path(file, self.architecture, macros, self.compiler)) is not None

    def compile(self, file: str, macros: tuple[tuple[str, int], ...]) -> None:
        cubin(file, self.architecture, macros, self.compiler)

    def kept(self) -> dict[str, Any]:
        return kept_cubins()

    def launch(self, kernel: Kernel, grid: Grid, block: int, args: Iterable[Argument], shared: int = 0) -> None:
        packed, function, stream = Packed(args, self.address), ctypes.c_void_p(kernel.handle.ptr), self._stream()
        # More than 48 KiB, its own arrays included, a function gets only where it was told so before.
        if shared > self._asked.get(kernel.handle.ptr, 0):
            self._check(self._driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared), kernel)
            self._asked[kernel.handle.ptr] = shared
        attribute = Attribute(PROGRAMMATIC_STREAM_SERIALIZATION)
        attribute.value[0] = 1
        dependent = int(self.dependent and self.thread.capturing)
        configuration = Configuration(*grid, block, 1, 1, shared, stream, ctypes.pointer(attribute), dependent)
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
        if status == OUT_OF_MEMORY:
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


class Staging:
    """Copies to the GPU through a few pieces of pinned memory: one is filled while others travel."""

    def __init__(self, cupy: Any, count: int, size: int) -> None:
        self.cupy, self.count, self.size = cupy, count, size
        self.pieces: list[tuple[Any, Any]] = []
        self.turn = 0
        self.lock = threading.Lock()

    def copy(self, target: Any, values: Array) -> None:
        """`values`, contiguous, into contiguous `target`, in the order of the current stream."""
        flat = values.reshape(-1).view(np.uint8) if values.size else np.empty(0, np.uint8)
        runtime, stream = self.cupy.cuda.runtime, self.cupy.cuda.get_current_stream()
        with self.lock:
            for begin in range(0, flat.size, self.size):
                memory, event = self._piece()
                part = flat[begin : begin + self.size]
                event.synchronize()
                pointer = int(memory.ptr)
                np.frombuffer(memory, np.uint8, part.size)[:] = part
                try:
                    runtime.memcpyAsync(target.data.ptr + begin, pointer, part.size, runtime.memcpyHostToDevice, stream.ptr)
                finally:
                    # Also where Ctrl-C comes between: the copy is on its way.
                    event.record(stream)

    def _piece(self) -> tuple[Any, Any]:
        while len(self.pieces) < self.count:
            self.pieces.append((pinned(self.cupy, self.size), self.cupy.cuda.Event(block=False, disable_timing=True)))
        self.turn = (self.turn + 1) % self.count
        return self.pieces[self.turn]


@functools.cache
def gpu() -> Cuda:
    """The current GPU, opened once; BackendError says in one line why it cannot be used."""
    try:
        return Cuda()
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(f"the NVIDIA GPU cannot be used ({reason(error)}): see what nvidia-smi says of it") from error
