"""How kernels are compiled: one signature for all of them, each at its first use, kept in a folder for the next process.

A kernel is a function `kernel(args, team, thread, threads)` of four integers: the address of its arguments (64-bit numbers:
addresses, sizes, strides, bits of floats), that of its team's state, and which of how many threads it is. Every thread of a
team runs it at the same time; nothing in its type depends on a model's size, so nothing is ever compiled twice.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any

import numba
from numba import types

from npllm.backends.numba_cpu.features import choose
from npllm.errors import BackendError

PATH = choose()
SIGNATURE = types.void(types.intp, types.intp, types.intp, types.intp)

# No `fastmath=True`: it would turn a softmax over nothing into NaN.
FLAGS = {"contract", "reassoc", "nsz", "arcp"}

FOLDER_VARIABLE = "NPLLM_CACHE"

_lock = threading.RLock()


@functools.cache
def folder() -> FilePath | None:
    """Where compiled kernels are kept, for this version of their sources, of Numba and of the CPU; None: nowhere.

    `NPLLM_CACHE`, else `~/.cache/npllm` (or XDG_CACHE_HOME), in a folder of its own below.
    """
    import llvmlite

    digest = hashlib.blake2b(digest_size=8)
    for source in sorted(FilePath(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    digest.update(f"{numba.__version__} {llvmlite.__version__} {PATH} {sys.version_info[:2]}".encode())
    for root in _roots():
        place = root / "kernels" / digest.hexdigest()
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return place
    return None


def _roots() -> Iterator[FilePath]:
    if asked := os.environ.get(FOLDER_VARIABLE):
        yield FilePath(asked).expanduser()
        return
    base = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):
        yield (FilePath(base) if base else FilePath.home() / ".cache") / "npllm"


if PATH.cpu:
    # Numba compiles for the host unless told otherwise, and asks once per process.
    numba.config.CPU_NAME, numba.config.CPU_FEATURES = PATH.cpu, ""


@contextlib.contextmanager
def _kept() -> Iterator[bool]:
    """A block in which Numba keeps what it compiles in our folder; whether it can."""
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, str(folder() or "")
    try:
        yield folder() is not None
    finally:
        config.CACHE_DIR = before


OPTIONS = {"fastmath": FLAGS, "error_model": "numpy", "boundscheck": False}


class Kernel:
    """A kernel that is compiled, or read from its folder, when its address is first asked for.

    `pack` turns its arguments into the words that it reads; `form` says which they are, as `struct` does: "8q2d".
    """

    def __init__(self, function: Callable[[int, int, int, int], None], form: str) -> None:
        self.function, self.name, self.pack = function, function.__name__, struct.Struct("=" + form).pack

    @functools.cached_property
    def address(self) -> int:
        with _lock, _kept() as kept:
            self.compiled = numba.cfunc(SIGNATURE, cache=kept, **OPTIONS)(self.function)
            return int(self.compiled.address)


def kernel(form: str) -> Callable[[Callable[[int, int, int, int], None]], Kernel]:
    """Decorate a kernel whose arguments are `form`: q an integer or an address, d a float."""
    return functools.partial(Kernel, form=form)


def native(arguments: int) -> Callable[[Any], Any]:
    """Decorate a function of so many integers that Python calls and that lets other threads run meanwhile."""

    def wrap(function: Any) -> Any:
        @functools.cache
        def compiled() -> Any:
            signature = types.intp(*[types.intp] * arguments)
            with _lock, _kept() as kept:
                return numba.njit(signature, nogil=True, cache=kept, **OPTIONS)(function)

        return compiled

    return wrap


def inline(function: Any) -> Any:
    """Decorate a function that kernels call."""
    return numba.njit(**OPTIONS)(function)
