"""Arrays of other libraries: what a kernel is given, and what it gives back, as NumPy arrays of the same bits.

| library | bfloat16 in and out          | fp8        | given by                                            |
|---------|------------------------------|------------|-----------------------------------------------------|
| NumPy   | ml_dtypes.bfloat16           | its uint8  | a copy                                              |
| PyTorch | torch.bfloat16, by bit view  | its uint8  | from_numpy, then `device`                           |
| JAX     | jax.numpy.bfloat16           | its uint8  | jax.device_put                                      |
| CuPy    | its bits: uint16             | its uint8  | cupy.asarray; for kernels of Numba's CUDA target too |

Whatever the library, a result may be any array: one of these, or an object with `__cuda_array_interface__`, `__dlpack__` or
`__array__`; and uint16 stands for the bits of bfloat16. The libraries are imported when they are asked for, by name.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import import_module
from types import CodeType, ModuleType
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.config import nearest
from npllm.errors import ArgumentError

# What of an array library is called which way; jaxlib is JAX's compiled half.
LIBRARIES = {"numpy": "numpy", "torch": "torch", "jax": "jax", "jaxlib": "jax", "cupy": "cupy", "cupyx": "cupy"}

# Memory that no kernel wrote to holds this: quiet NaNs in bf16, f32 and f64, a large number as integer.
UNWRITTEN = {1: 0x7D, 2: 0x7FED, 4: 0x7FEDFEED, 8: 0x7FFDFEEDFEEDFEED}


class Framework:
    """NumPy, and what the others share. Arrays that it gives own their memory: a kernel may spoil them."""

    name = "numpy"
    host: tuple[str, ...] = ("cpu",)

    def __init__(self, device: str | None = None) -> None:
        if self.host and device is not None and device not in self.host:
            raise ArgumentError(f"{self.name} arrays have no device {device!r}: name the kernel's framework as framework=")
        self.device = device

    def put(self, x: Array) -> Any:
        """The same numbers as a new array of the framework, on the device."""
        return np.array(x, order="C")

    def get(self, x: Any) -> Array:
        """A result, whichever library it is of, as a new NumPy array of the same bits; TypeError if it is no array."""
        return as_numpy(x)

    def spoil(self, x: Any) -> None:
        """Fill a result with NaN once it has been copied: what it said cannot be found in its memory again."""
        if isinstance(x, np.ndarray) and x.flags.writeable:
            x.fill(np.nan if x.dtype.kind not in "iub" else 0)

    def wait(self, result: Any) -> None:
        """Return when the device has finished."""

    def scope(self) -> AbstractContextManager[Any]:
        """What the calling thread had set and another thread must set again."""
        return nullcontext()

    def poison(self, like: Array, count: int = 4) -> Any:
        """Leave memory of the array's size filled with UNWRITTEN where the allocator will look first.

        What it returns is to be held until after the call: else the freed memory may be at the end of the heap, and go.
        """
        *_, guard = (held := [self.put(unwritten(like.shape, like.dtype)) for _ in range(count + 1)])
        held.clear()
        return guard


class Torch(Framework):
    """PyTorch, on any device."""

    name, host = "torch", ()

    def __init__(self, device: str | None = None) -> None:
        super().__init__(device)
        self.torch = installed("torch", "pip install torch")

    def put(self, x: Array) -> Any:
        bits = x.view(np.int16) if x.dtype.name == "bfloat16" else x
        there = self.torch.from_numpy(np.array(bits, order="C"))
        there = there.view(self.torch.bfloat16) if bits is not x else there
        try:
            return there if self.device is None else there.to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise ArgumentError(f"PyTorch cannot use device {self.device!r}: {first_line(error)}") from None

    def spoil(self, x: Any) -> None:
        if not isinstance(x, self.torch.Tensor):
            return super().spoil(x)
        with suppress(RuntimeError), self.torch.inference_mode():  # some views cannot be written to
            x.detach().fill_(float("nan") if x.is_floating_point() else 0)

    def wait(self, result: Any) -> None:
        if self.device is not None and self.device.startswith("cuda"):
            self.torch.cuda.synchronize(self.device)

    def scope(self) -> AbstractContextManager[Any]:
        return _TorchScope(self.torch, self.device)


class _TorchScope(AbstractContextManager[None]):
    """Gradient mode and current device belong to a thread of PyTorch's."""

    def __init__(self, torch: ModuleType, device: str | None) -> None:
        self.torch, self.grad, self.device = torch, torch.is_grad_enabled(), device

    def __enter__(self) -> None:
        self.torch.set_grad_enabled(self.grad)
        if self.device is not None and self.device.startswith("cuda:"):
            self.torch.cuda.set_device(self.device)

    def __exit__(self, *_: object) -> None:
        """The thread ends with the call."""


class Jax(Framework):
    """JAX, on its default device or the first of a platform ("cpu", "gpu")."""

    name, host = "jax", ()

    def __init__(self, device: str | None = None) -> None:
        super().__init__(device)
        self.jax = installed("jax", "pip install jax")
        try:
            self.place = None if device is None else self.jax.devices(device)[0]
        except RuntimeError as error:
            raise ArgumentError(f"JAX cannot use device {device!r}: {first_line(error)}") from None

    def put(self, x: Array) -> Any:
        if x.dtype.itemsize == 8 and not self.jax.config.jax_enable_x64:
            raise ArgumentError("JAX has no 64-bit arrays here: set jax_enable_x64, or check float32")
        return self.jax.device_put(np.array(x, order="C"), self.place)

    def wait(self, result: Any) -> None:
        self.jax.block_until_ready(result)

    def poison(self, like: Array, count: int = 4) -> Any:
        """XLA lets nobody write to memory."""


class Cupy(Framework):
    """CuPy on the current GPU, or on that of `device` ("cuda:1"); CuPy has no bfloat16, so its bits are given."""

    name, host = "cupy", ()

    def __init__(self, device: str | None = None) -> None:
        super().__init__(device)
        self.cupy = installed("cupy", "pip install cupy-cuda12x")
        number = (device or "cuda").removeprefix("cuda").removeprefix(":")
        if device is not None and not (device.startswith("cuda") and number.isdecimal() | (not number)):
            raise ArgumentError(f"CuPy cannot use device {device!r}: say cuda or cuda:0")
        try:
            self.place = self.cupy.cuda.Device(int(number) if number else None)
        except self.cupy.cuda.runtime.CUDARuntimeError as error:
            raise ArgumentError(f"CuPy cannot use device {device!r}: {first_line(error)}") from None

    def put(self, x: Array) -> Any:
        with self.place:
            return self.cupy.array(x.view(np.uint16) if x.dtype.name == "bfloat16" else x, order="C")

    def spoil(self, x: Any) -> None:
        if isinstance(x, self.cupy.ndarray):
            x.fill(np.nan if x.dtype.kind == "f" else 0)
        else:
            super().spoil(x)

    def wait(self, result: Any) -> None:
        self.place.synchronize()

    def scope(self) -> AbstractContextManager[Any]:
        return self.cupy.cuda.Device(self.place.id)


FRAMEWORKS: Mapping[str, type[Framework]] = {"numpy": Framework, "torch": Torch, "jax": Jax, "cupy": Cupy}


def framework(kernel: Callable[..., Any], name: str | None = None, device: str | None = None) -> Framework:
    """The framework of that name, or the one that the kernel uses; ArgumentError if unknown, not installed or unclear."""
    name = guessed(kernel) if name is None else name
    if name not in FRAMEWORKS:
        raise ArgumentError(f"framework {name!r} is unknown; known: {nearest(str(name), FRAMEWORKS)}")
    return FRAMEWORKS[name](device)


def installed(name: str, how: str) -> Any:
    """The module of that name, imported; ArgumentError says how to get it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ArgumentError(f"framework {name} cannot be imported ({first_line(error)}): {how}") from None


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# -- which framework a kernel is written for --------------------------------------------------------------------------


def guessed(kernel: Callable[..., Any]) -> str:
    """The framework of a callable: what its code names decides, else what its file imports, else NumPy.

    ArgumentError if two of torch, jax and cupy are there.
    """
    function = plain_function(kernel)
    reached = list(reachable(function))
    used = set(libraries(value for each in reached for value in named_by(each)))
    whole = set(libraries(value for each in reached for value in getattr(each, "__globals__", {}).values()))
    of_package = LIBRARIES.get(str(getattr(function, "__module__", "")).partition(".")[0])
    found = used or {of_package or ""} - {""} or whole
    others = sorted(found - {"numpy"})
    if len(others) > 1:
        raise ArgumentError(f"the kernel could be for {' or '.join(others)}: say which as framework={others[0]!r}")
    return others[0] if others else "numpy"


def plain_function(kernel: Any) -> Any:
    """The function below partials, decorators, methods and instances with __call__ (or forward, of a torch module)."""
    while True:
        if isinstance(kernel, functools.partial):
            kernel = kernel.func
        elif hasattr(kernel, "__wrapped__"):
            kernel = kernel.__wrapped__
        elif hasattr(kernel, "py_func"):
            kernel = kernel.py_func
        elif inspect.ismethod(kernel):
            kernel = kernel.__func__
        elif hasattr(kernel, "__code__") or isinstance(kernel, type) or inspect.isroutine(kernel):
            return kernel
        else:
            forward = getattr(type(kernel), "forward", None)
            kernel = forward if inspect.isfunction(forward) else type(kernel).__call__


def reachable(function: Any, depth: int = 2) -> Iterator[Any]:
    """A function, and those that it names, but for those of the libraries themselves: wrappers hide what they wrap."""
    yield function
    for value in named_by(function) if depth else ():
        if inspect.isfunction(value) and not set(libraries([value])):
            yield from reachable(value, depth - 1)


def named_by(function: Any) -> Iterator[Any]:
    """What the names in a function's code stand for: globals, cells of its closure, modules that it imports itself."""
    code = getattr(function, "__code__", None)
    if code is None:
        return
    for name in names_in(code):
        if name in function.__globals__:
            yield function.__globals__[name]
        elif name.partition(".")[0] in LIBRARIES:
            yield ModuleType(name)  # it may be imported by the first call only
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a cell that is not filled yet
            yield cell.cell_contents


def names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def libraries(values: Any) -> Iterator[str]:
    """The array libraries that these values are modules of, or come from."""
    for value in list(values):
        module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        root = str(module).partition(".")[0]
        if root in LIBRARIES:
            yield LIBRARIES[root]


# -- results ----------------------------------------------------------------------------------------------------------


def as_numpy(x: Any) -> Array:
    """Any array as a new NumPy array of the same bits; TypeError for what is none."""
    root = type(x).__module__.partition(".")[0]
    if isinstance(x, np.ndarray | np.generic):
        return np.array(x)
    if root == "torch" or any(base.__module__.partition(".")[0] == "torch" for base in type(x).__mro__):
        return of_torch(x)
    if root == "cupy":
        return np.array(x.get())
    if hasattr(x, "__cuda_array_interface__"):
        return on_gpu(x, "asarray")
    if hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
        return of_dlpack(x)
    if hasattr(x, "__array__") or hasattr(x, "__array_interface__"):
        return np.array(np.asarray(x))
    raise TypeError(f"{type(x).__name__} is no array")


def of_torch(x: Any) -> Array:
    x = x.detach().resolve_conj().resolve_neg().to_dense() if x.layout != sys.modules["torch"].strided else x.detach()
    x = x.cpu().contiguous()
    name = str(x.dtype).removeprefix("torch.")
    if name == "bfloat16":
        import ml_dtypes

        return np.array(x.view(sys.modules["torch"].int16).numpy().view(ml_dtypes.bfloat16))
    if name.startswith("float8"):
        return np.array(x.view(sys.modules["torch"].uint8).numpy())
    return np.array(x.numpy())


def of_dlpack(x: Any) -> Array:
    """By DLPack: NumPy takes what is on the host; torch or CuPy what is on a GPU, and bfloat16, which NumPy refuses."""
    if x.__dlpack_device__()[0] != 1:
        return on_gpu(x, "from_dlpack")
    try:
        return np.array(np.from_dlpack(x))
    except (BufferError, RuntimeError) as error:
        if "torch" in sys.modules:
            return of_torch(sys.modules["torch"].from_dlpack(x))
        raise TypeError(f"NumPy cannot take this DLPack array ({first_line(error)}): return its bits as uint16") from None


def on_gpu(x: Any, by: str) -> Array:
    """A foreign GPU array, fetched by whichever of CuPy and PyTorch is installed."""
    with suppress(ImportError):
        cupy = import_module("cupy")
        return np.array(getattr(cupy, by)(x).get())
    with suppress(ImportError):
        torch = import_module("torch")
        return of_torch(torch.as_tensor(x, device="cuda") if by == "asarray" else torch.from_dlpack(x))
    raise TypeError(f"{type(x).__name__} lies on a GPU: CuPy or PyTorch is needed to fetch it")


def address(x: Any) -> int | None:
    """Where the first element lies; None for arrays that tell nobody, and for those without elements."""
    if hasattr(x, "data_ptr"):
        return int(x.data_ptr()) or None
    facts = getattr(x, "__array_interface__", None) or getattr(x, "__cuda_array_interface__", None)
    return int(facts["data"][0]) or None if facts and 0 not in facts["shape"] else None


def unwritten(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array that holds nothing but UNWRITTEN."""
    return np.full(shape, UNWRITTEN[dtype.itemsize], dtype=f"u{dtype.itemsize}").view(dtype)


def is_unwritten(x: Array) -> Array:
    """Booleans: the elements that still hold UNWRITTEN."""
    bits = x.view(f"u{x.dtype.itemsize}") if x.dtype.itemsize in UNWRITTEN else np.zeros(x.shape, "u8")
    return np.asarray(bits == UNWRITTEN.get(x.dtype.itemsize, 1))
