"""Memory between pages that nobody may touch: a kernel that leaves its arrays ends the process, and the case is known.

`install` puts every array that kernels are given there: inputs and weights as they are drawn, results, room that operations
ask for, caches, arguments, plans, and a thread's scratch memory. "after" lays them flush against the page behind,
"before" against the page in front.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np

from npllm.arrays import Array

PAGE = mmap.PAGESIZE
POISON = 0xFF  # as float32, float16 and bfloat16: NaN

SIDES = ("after", "before")

# What lies between an array and its page where alignment leaves a gap: it must stay as it is.
gaps: list[Array] = []

protect = ctypes.CDLL(None, use_errno=True).mprotect
protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def guarded(shape: tuple[int, ...], dtype: Any, side: str, align: int = 1) -> Array:
    """A poisoned array that ends where a page begins which cannot be touched ("after"), or begins where one ends.

    align   bytes: it begins at a multiple of that, with a gap behind it if need be.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    body = max(1, -(-size // PAGE)) * PAGE
    whole = np.frombuffer(mmap.mmap(-1, body + 2 * PAGE), np.uint8)
    for page in (0, PAGE + body):
        if protect(whole.ctypes.data + page, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    begin = PAGE + ((body - size) // align * align if side == "after" else 0)
    whole[PAGE : PAGE + body] = POISON
    if side == "after" and begin + size < PAGE + body:
        gaps.append(whole[begin + size : PAGE + body])
    return whole[begin : begin + size].view(dtype).reshape(shape)


def moved(x: Array, side: str) -> Array:
    """A copy of `x`, contiguous, between guards."""
    there = guarded(x.shape, x.dtype, side, x.dtype.alignment)
    there[...] = x
    return there


def overwritten() -> bool:
    """Whether somebody wrote into a gap since this was asked before."""
    found = any((gap != POISON).any() for gap in gaps)
    gaps.clear()
    return found


class Guarding:
    """NumPy, but for `empty`."""

    def __init__(self, side: str) -> None:
        self.side = side

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any = float) -> Array:
        return guarded(shape if isinstance(shape, tuple) else (shape,), dtype, self.side, np.dtype(dtype).alignment)


def install(side: str) -> None:
    """Move everything that kernels of this process will see, which computes with a single thread from now on."""
    from npllm.backends.numba_cpu import base, pool, tape, team
    from npllm.cache import LayerCache
    from npllm.handles import Weight
    from npllm.testing.case import Case

    def move(x: Array) -> Array:
        return moved(x, side)

    def aligned(length: int, dtype: Any) -> Array:
        return guarded((length,), dtype, side, 64)

    team.cores = lambda: 1
    team.aligned = base.aligned = pool.aligned = aligned
    base.np = Guarding(side)
    tape.bound = then(tape.bound, lambda bound: (move(bound[0]), bound[1]))
    Base: Any = base.Base
    Base.plain, Base.plan = (unless_recorded(each, move) for each in (Base.plain, Base.plan))
    Base.asarray = then(Base.asarray, move)
    Case.inputs = then(Case.inputs, lambda drawn: {name: move(x) for name, x in drawn.items()})  # type: ignore[method-assign]
    LayerCache._empty = then(LayerCache._empty, lambda arrays: tuple(map(move, arrays)))  # type: ignore[method-assign]
    of = Weight.of
    Weight.of = staticmethod(lambda name, array: of(name, move(array)))  # type: ignore[assignment, method-assign]


def then(function: Callable[..., Any], last: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: last(function(*args, **kwargs))


def unless_recorded(method: Callable[..., Array], move: Callable[[Array], Array]) -> Callable[..., Array]:
    """The method, its result moved: but not while a step is recorded, which knows arrays by where they lie."""

    def wrapped(be: Any, *args: Any) -> Array:
        result = method(be, *args)
        return move(result) if be.recorder is None else result

    return wrapped
