"""How kernels are compiled: one signature for all of them, each at its first use, kept in a folder for the next process.

A kernel is a function `kernel(args, team, thread, threads)` of four integers: the address of its arguments (64-bit numbers:
addresses, sizes, strides, bits of floats), that of its team's state, and which of how many threads it is. Every thread of a
team runs it at the same time; nothing in its type depends on a model's size, so nothing is ever compiled twice.

Numba's own cache goes by the times of source files, and neither survives a damaged file nor a full disk. What is kept here
is the compiled object, through the calls by which Numba's cache stores and loads it (npllm.backends.numba_cpu.store).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from numba import types
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys

from npllm.backends.numba_cpu.features import choose
from npllm.backends.numba_cpu.store import VARIABLE, Code, Store, reason

PATH = choose()
SIGNATURE = types.void(types.intp, types.intp, types.intp, types.intp)

# No `fastmath=True`: it would turn a softmax over nothing into NaN.
FLAGS = {"contract", "reassoc", "nsz", "arcp"}
OPTIONS: dict[str, Any] = {"fastmath": FLAGS, "error_model": "numpy", "boundscheck": False}

if PATH.cpu:
    # Numba compiles for the host unless told otherwise, and asks once per process.
    config: Any = numba.config
    config.CPU_NAME, config.CPU_FEATURES = PATH.cpu, ""

_lock = threading.RLock()


def _unlocked() -> None:
    """In the child of a fork: the thread that compiled is gone."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlocked)


@functools.cache
def store() -> Store:
    """Where compiled kernels are kept, for this version of their sources, of Numba and of the CPU."""
    codegen = cpu_target.target_context.codegen().magic_tuple()
    return Store(f"{numba.__version__} {llvmlite.__version__} {PATH} {codegen}")


@functools.cache
def say_that_it_compiles() -> None:
    """One line on stderr, before the first compilation of a process."""
    if sys.stderr is None:
        return
    try:
        store().make()
        then = f"once; kept in {store().folder}"
    except OSError as error:
        then = f"and again next time: {store().folder or 'nowhere'} cannot be written ({reason(error)}); set {VARIABLE}"
    with contextlib.suppress(OSError, ValueError):
        print(f"npllm: compiling kernels for this CPU, {then}", file=sys.stderr, flush=True)


class Compiled:
    """A function of integers that is compiled, or read from the store, when its address is first asked for."""

    # All that there are, by name.
    known: dict[str, Compiled] = {}  # noqa: RUF012 (it is meant to be shared)

    def __init__(self, function: Callable[..., Any], signature: Any) -> None:
        self.function, self.signature = function, signature
        self.name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        self.known[self.name] = self

    @functools.cached_property
    def address(self) -> int:
        with _lock:
            return self._load() or self._compile()

    def _load(self) -> int | None:
        code = store().read(self.name)
        if code is None:
            return None
        # Makes known what compiled code may call: without it, LLVM ends the process.
        rtsys.initialize(cpu_target.target_context)
        # Numba asks for the function's bitcode, too, in case that others are to be compiled into; its name is enough here.
        named = llvm.parse_assembly(f'define void @"{code.symbol}"() {{ ret void }}').as_bitcode()
        codegen = cpu_target.target_context.codegen()
        self._alive = codegen.unserialize_library((code.library, "object", (code.object, named)))
        return int(self._alive.get_pointer_to_function(code.symbol))

    def _compile(self) -> int:
        say_that_it_compiles()
        compiled: Any = numba.cfunc(self.signature, **OPTIONS)(self.function)
        self._alive = compiled
        library, _, (machine_code, _) = compiled._library.serialize_using_object_code()
        # Said before: that it will compile again.
        with contextlib.suppress(OSError):
            store().write(self.name, Code(library, compiled.native_name, bytes(machine_code)))
        return int(compiled.address)


class Kernel(Compiled):
    """A kernel. `pack` turns its arguments into the words that it reads; `form` says which they are, as `struct` does."""

    def __init__(self, function: Callable[[int, int, int, int], None], form: str) -> None:
        super().__init__(function, SIGNATURE)
        self.pack = struct.Struct("=" + form).pack


def kernel(form: str) -> Callable[[Callable[[int, int, int, int], None]], Kernel]:
    """Decorate a kernel whose arguments are `form`: q an integer or an address, d a float."""
    return functools.partial(Kernel, form=form)


class Called(Compiled):
    """A function that kernels call by its address, so that it is compiled once and not into each of them."""

    # All that there are.
    all: list[Called] = []  # noqa: RUF012 (it is meant to be shared)

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__(function, types.void(*[types.intp] * function.__code__.co_argcount))
        self.all.append(self)


def native(arguments: int) -> Callable[[Any], Any]:
    """Decorate a function of so many integers that Python calls and that lets other threads run meanwhile."""
    integers = [types.intp] * arguments
    # ctypes releases the interpreter's lock for the time of a call.
    form = ctypes.CFUNCTYPE(ctypes.c_ssize_t, *[ctypes.c_ssize_t] * arguments)

    def wrap(function: Any) -> Any:
        compiled = Compiled(function, types.intp(*integers))
        return functools.cache(lambda: form(compiled.address))

    return wrap


def inline(function: Any) -> Any:
    """Decorate a function that kernels call."""
    return numba.njit(**OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
