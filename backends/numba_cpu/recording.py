"""Decode steps recorded once and played again: a token then costs its kernels, and next to no interpreter.

While a step is recorded, the model's own text runs as always, on arrays that remember: kernels go to the recorder with the
addresses of their arguments, and what NumPy is asked to do with such an array is kept as a call that writes the same memory
again. Afterwards a step is: put the new tokens and positions into their buffers, and play. What depends on the values of
arrays in any other way cannot be recorded, and says so; the caller then goes on as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backends.numba_cpu import tape
from npllm.backends.numba_cpu.pool import Pool
from npllm.cache import Keys, Rows

# NumPy functions whose result is memory that nobody has written yet: playing them again would be idle.
EMPTY = (np.empty_like,)


class Recorder:
    """The calls of a step, in order: stretches of kernels, and functions of the interpreter between them."""

    def __init__(self) -> None:
        self.calls: list[list[tape.Entry] | Callable[[], None]] = []
        # Kernels know arrays by their addresses only.
        self.kept: list[Any] = []
        self.pool = Pool()
        # What functions of the interpreter read and write, apart from what is lent.
        self.touched: list[Array] = []
        self.problem = ""

    def plan(self, keys: Keys, rows: Rows) -> Array:
        """The plan that kernels read, refreshed before each playing."""
        raise NotImplementedError

    def kernels(self, entries: tuple[tape.Entry, ...]) -> None:
        if not self.calls or not isinstance(self.calls[-1], list):
            self.calls.append([])
        stretch = self.calls[-1]
        assert isinstance(stretch, list)
        stretch.extend(entries)

    def call(self, function: Callable[[], None]) -> None:
        self.calls.append(function)

    def remember(self, array: Array) -> Recorded:
        """`array` as one that remembers, in the same memory, which it keeps."""
        self.kept.append(array)
        return self.part(array)

    def lent(self, size: int) -> Recorded:
        """So many bytes that remember, until the last array over them is gone: whoever plays the step writes them anew."""
        return self.part(self.pool.take(size))

    def part(self, array: Array) -> Recorded:
        """`array`, over memory that is kept or lent already, as one that remembers."""
        recorded = array.view(Recorded)
        recorded.recorder = self
        return recorded

    def repeat(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a NumPy function now, and at every playing with the same memory for its arguments and results."""
        args, kwargs = _plain(args), {name: _plain(value) for name, value in kwargs.items()}
        result = function(*args, **kwargs)
        self.touched += [*_arrays(args), *_arrays(list(kwargs.values()))]
        if function not in EMPTY:
            self.call(_again(function, args, kwargs, result))
        return self._remembered(result)

    def _remembered(self, result: Any) -> Any:
        if isinstance(result, tuple | list):
            return type(result)(map(self._remembered, result))
        if isinstance(result, np.ndarray):
            return self.remember(result)
        self.problem = self.problem or "a number was taken out of an array"
        return result

    def finished(self) -> list[tuple[Array, int] | Callable[[], None]]:
        """The calls with their kernels bound."""
        return [tape.bound(call) if isinstance(call, list) else call for call in self.calls]


def _plain(value: Any) -> Any:
    """`value` with arrays that do not remember in the place of those that do."""
    if isinstance(value, Recorded):
        return value.view(np.ndarray)
    if isinstance(value, tuple | list):
        return type(value)(map(_plain, value))
    return value


def _arrays(value: Any) -> Iterator[Array]:
    """The arrays among arguments."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _arrays(each)


def _again(function: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> Callable[[], None]:
    """A call that writes `result`'s memory anew."""
    if isinstance(function, np.ufunc) and function.nout == 1 and function.signature is None and "out" not in kwargs:
        return lambda: function(*args, **kwargs, out=result)

    def again() -> None:
        _copy(function(*args, **kwargs), result)

    return again


def _copy(new: Any, old: Any) -> None:
    if isinstance(old, tuple | list):
        for one, other in zip(new, old, strict=True):
            _copy(one, other)
    elif new is not old and not np.may_share_memory(new, old):
        np.copyto(old, new)


class Recorded(np.ndarray[Any, Any]):
    """An array of a step that is being recorded: what is done with it, its recorder hears of."""

    recorder: Recorder

    def __array_finalize__(self, parent: Any) -> None:
        recorder = getattr(parent, "recorder", None)
        if recorder is None:
            return
        self.recorder = recorder
        if self.base is None:
            recorder.problem = recorder.problem or "an array was copied by a method that is not recorded"

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return self.recorder.repeat(ufunc if method == "__call__" else getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return self.recorder.repeat(function, args, kwargs)

    def __getitem__(self, index: Any) -> Any:
        plain = self.view(np.ndarray)
        index = _plain(index)
        part = plain[index]
        if isinstance(part, np.ndarray) and np.may_share_memory(part, plain):
            return self.recorder.part(part)
        return self.recorder.repeat(np.ndarray.__getitem__, (plain, index), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        plain, index, value = self.view(np.ndarray), _plain(index), _plain(value)

        self.recorder.touched += _arrays([plain, value])

        def assign() -> None:
            plain[index] = value

        assign()
        # `x[part] -= y` ends with the assignment of a part to itself.
        if not (isinstance(value, np.ndarray) and _same(plain[index], value)):
            self.recorder.call(assign)

    def copy(self, *args: Any, **kwargs: Any) -> Any:
        return self.recorder.repeat(np.ndarray.copy, (self, *args), kwargs)

    def astype(self, *args: Any, **kwargs: Any) -> Any:
        return self.recorder.repeat(np.ndarray.astype, (self, *args), kwargs)

    def reshape(self, *args: Any, **kwargs: Any) -> Any:
        plain = self.view(np.ndarray)
        shaped = plain.reshape(*args, **kwargs)
        if np.may_share_memory(shaped, plain):
            return self.recorder.part(shaped)
        return self.recorder.repeat(np.ndarray.reshape, (self, *args), kwargs)

    def tolist(self) -> Any:
        self.recorder.problem = self.recorder.problem or "an array was read by the interpreter"
        return self.view(np.ndarray).tolist()

    def item(self, *args: Any) -> Any:
        self.recorder.problem = self.recorder.problem or "a number was taken out of an array"
        return self.view(np.ndarray).item(*args)

    def __bool__(self) -> bool:
        return bool(self.item())


def _same(one: Any, other: Array) -> bool:
    return isinstance(one, np.ndarray) and one.ctypes.data == other.ctypes.data and one.strides == other.strides
