"""Arrays of the emulated device: NumPy's memory with CuPy's manners.

They do not mix with NumPy arrays, a reduction gives an array, and reading one from the interpreter is noticed: on a GPU it
waits for all that was launched. While a graph is captured, what is done with them is kept and done again at each launch.

What a GPU does while the host goes on (a graph's launch, small copies) is done as late as may be: when the host waits for
it, or for something behind it. So a host that reads what has not come yet is found out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backends.cupy_gpu.device import CannotCaptureError
from tests.strict import STRICT


class Stream:
    """What happens to arrays: how often the host read one, what is still to be done, and the calls of the graph that is
    being captured. `log`: what was put off, by its number, and what the host waited for, as (what, number)."""

    def __init__(self) -> None:
        self.host_reads = 0
        self.calls: list[Callable[[], None]] | None = None
        self.todo: deque[Callable[[], None]] = deque()
        self.put_off = 0
        self.log: list[tuple[str, int]] = []

    def read(self, what: str) -> None:
        """The host moves numbers, and waits for all."""
        self.moves(what)
        self.finish(what)

    def moves(self, what: str) -> None:
        self.host_reads += 1
        if self.calls is not None:
            raise CannotCaptureError(f"{what} moves numbers between host and device")

    def later(self, what: str, function: Callable[[], None]) -> int:
        """Do something in its turn -> its number."""
        self.moves(what)
        self.todo.append(function)
        self.put_off += 1
        self.log.append((what, self.put_off))
        return self.put_off

    def wait(self, number: int) -> None:
        """Until that is done."""
        self.log.append(("wait", number))
        self._reach(number)

    def finish(self, what: str) -> None:
        if self.todo:
            self.log.append((what, self.put_off))
            self._reach(self.put_off)

    def _reach(self, number: int) -> None:
        while self.put_off - len(self.todo) < number:
            self.todo.popleft()()

    def do(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A function of NumPy's on arrays of the device."""
        self.finish("a function on arrays")
        check(args)
        check(tuple(kwargs.values()))
        args, kwargs = plain(args), plain(kwargs)
        result = function(*args, **kwargs)
        if self.calls is not None and not written_later(function):
            self.calls.append(lambda: copy(function(*args, **kwargs), result))
        return wrapped(result)


STREAM = Stream()


def written_later(function: Callable[..., Any]) -> bool:
    return function in (np.empty, np.empty_like, STRICT.empty, STRICT.empty_like)


def check(value: Any) -> None:
    """TypeError for a NumPy array among arrays of the device, as CuPy has it."""
    if isinstance(value, tuple | list):
        for each in value:
            check(each)
    elif isinstance(value, np.ndarray) and not isinstance(value, DeviceArray):
        raise TypeError("a NumPy array meets arrays of the device: upload it")


def plain(value: Any) -> Any:
    if isinstance(value, DeviceArray):
        return value.view(np.ndarray)
    if isinstance(value, tuple | list):
        return type(value)(map(plain, value))
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return value


def wrapped(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(wrapped, value))
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value).view(DeviceArray)
    return value


def copy(new: Any, old: Any) -> None:
    if isinstance(old, tuple | list):
        for one, other in zip(new, old, strict=True):
            copy(one, other)
    elif isinstance(old, np.ndarray) and new is not old and not np.may_share_memory(new, old):
        np.copyto(old, new)
    elif isinstance(old, np.generic):
        raise CannotCaptureError("a number that the interpreter holds")


class DeviceArray(np.ndarray[Any, Any]):
    """An array of the emulated device."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        function = ufunc if method == "__call__" else getattr(ufunc, method)
        return STREAM.do(as_cupy_has_it(function), inputs, kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return STREAM.do(as_cupy_has_it(function), args, kwargs)

    def __getitem__(self, index: Any) -> Any:
        part = plain(self)[plain(index)]
        if isinstance(part, np.ndarray) and np.may_share_memory(part, plain(self)):
            return part.view(DeviceArray)
        return STREAM.do(lambda x, i: np.asarray(x[i]), (self, index), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        STREAM.finish("an assignment")
        here, index, value = plain(self), plain(index), plain_checked(value)

        def assign() -> None:
            here[index] = value

        assign()
        if STREAM.calls is not None:
            STREAM.calls.append(assign)

    def copy(self, *args: Any, **kwargs: Any) -> Any:
        return STREAM.do(np.ndarray.copy, (self, *args), kwargs)

    def astype(self, *args: Any, **kwargs: Any) -> Any:
        return STREAM.do(np.ndarray.astype, (self, *args), kwargs)

    def reshape(self, *args: Any, **kwargs: Any) -> Any:
        shaped = plain(self).reshape(*args, **kwargs)
        if np.may_share_memory(shaped, plain(self)):
            return shaped.view(DeviceArray)
        return STREAM.do(np.ndarray.reshape, (self, *args), kwargs)

    def tolist(self) -> Any:
        STREAM.read("tolist")
        return plain(self).tolist()

    def item(self, *args: Any) -> Any:
        STREAM.read("item")
        return plain(self).item(*args)

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    @property
    def ctypes(self) -> Any:
        raise AttributeError("an array of CuPy's has no ctypes: download it")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("implicit conversion to a NumPy array is not allowed: download it")


def plain_checked(value: Any) -> Any:
    check(value)
    return plain(value)


# What CuPy has cuBLAS do.
PRODUCTS = (np.matmul, np.dot, np.vdot, np.inner, np.tensordot, np.einsum)


def as_cupy_has_it(function: Callable[..., Any]) -> Callable[..., Any]:
    """Reductions give arrays without axes, not numbers; products of matrices cannot be captured."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if STREAM.calls is not None and function in PRODUCTS:
            raise CannotCaptureError(f"{function.__name__}: CuPy calls cuBLAS in no capture")
        result = function(*args, **kwargs)
        return np.asarray(result) if isinstance(result, np.generic) else result

    return call if function not in (np.empty_like,) else function


class Module:
    """What the backend knows as `xp`: the functions that NumPy and CuPy share, on arrays of the device."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(STRICT, name)
        if name in ("asarray", "array"):
            return as_array
        if not callable(function):
            return function
        return lambda *args, **kwargs: STREAM.do(as_cupy_has_it(function), args, kwargs)


def as_array(x: Any, dtype: Any = None) -> Array:
    """`x` on the device: numbers of the host go there, which no graph can hold."""
    if isinstance(x, DeviceArray):
        return x if dtype is None or x.dtype == dtype else x.astype(dtype)
    STREAM.read("asarray of what the host holds")
    return np.array(x, dtype).view(DeviceArray)
