"""CuPy, the driver and the GPU as they are found: what is missing, too old or for another CUDA; structures of the driver."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from npllm.errors import BackendError

# The least compute capability: cp.async and bf16 products.
LEAST_ARCHITECTURE = 80

# cuda.h: its number, CUlaunchAttributeID, and what a function may be told.
OUT_OF_MEMORY = 2
PROGRAMMATIC_STREAM_SERIALIZATION = 6
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

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
