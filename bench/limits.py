"""What the machine can do, measured in the same run as what is compared with it: C loops, or NumPy where no compiler is.

read_anonymous, read_mapped   bytes per second read from allocated memory, and from a mapped file in the page cache, by one
                              stream or by four of each thread, whichever is faster;
float32, bfloat16, int8       operations per second of products and sums in registers (FMA, `vdpbf16ps`, `vpdpbusd`);
                              None where the CPU lacks the instruction, or NumPy stands in;
read_sustained, float32_sustained, ...
                              the mean of a second of the former, about as long as engines are timed: what is left where
                              others share the memory and the cores.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from npllm import parallel
from npllm.arrays import Array

SOURCE = Path(__file__).with_name("limits.c")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
COMPILERS = ("gcc", "cc", "clang")
ARITHMETIC = ("float32", "bfloat16", "int8")
READS = ("read_anonymous", "read_mapped")

# Bytes that are read at a time: many times any cache. Seconds that a loop of arithmetic runs, and how often each is taken.
SIZE, SECONDS, TIMES = 512 << 20, 0.1, 3

# Places that a thread reads from at a time, and what its part is a multiple of.
STREAMS, WHOLE = (1, 4), 2048

# Seconds of reading, or of arithmetic, without a pause.
SUSTAINED = 1.0

# Side of the matrices that NumPy multiplies where there is no compiler.
SIDE = 2048

Limits = dict[str, float | None]


class Machine:
    """The limits of so many threads; `folder` keeps the file that is mapped, and the compiled loops."""

    def __init__(self, folder: Path, threads: int, size: int = SIZE) -> None:
        self.threads, self.size = threads, size
        self.loops, self.how = compiled(folder)
        memory = np.zeros(size + 64, np.uint8)
        start = -memory.ctypes.data % 64
        self.memory = {"read_anonymous": memory[start : start + size], "read_mapped": mapped(folder / "read.bin", size)}
        self.memory["read_anonymous"][:] = self.memory["read_mapped"]

    def measure(self) -> Limits:
        """Every limit, the best of a few times."""
        found: Limits = {
            name: max(self.best(functools.partial(read, array), array.size) for read in self.reads())
            for name, array in self.memory.items()
        }
        found["read_sustained"] = max(
            self._sustained(functools.partial(read, self.memory["read_anonymous"]), self.size) for read in self.reads()
        )
        for name in ARITHMETIC:
            loop, amount = self._arithmetic(name)
            found[name] = self.best(loop, amount) if amount else None
            found[f"{name}_sustained"] = self._sustained(loop, amount) if amount else None
        return found

    def reads(self) -> list[Callable[[Array], None]]:
        """Ways to read an array."""
        if self.loops is None:
            return [self._read_numpy]
        return [functools.partial(self._read_c, streams=streams) for streams in STREAMS]

    def best(self, work: Callable[[], Any], amount: float) -> float:
        return amount / min(timed(work) for _ in range(TIMES))

    def _sustained(self, work: Callable[[], Any], amount: float) -> float:
        times, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < SUSTAINED or not times:
            work()
            times += 1
        return times * amount / seconds

    def _arithmetic(self, name: str) -> tuple[Callable[[], Any], float]:
        """What computes for some SECONDS, and how many operations that are; none where it cannot."""
        if self.loops is None:
            x = np.ones((SIDE, SIDE), np.float32)
            return (lambda: x @ x), 2 * SIDE**3 if name == "float32" else 0
        work = getattr(self.loops, f"{name}_work")()
        if not work:
            return (lambda: None), 0.0
        rounds, seconds = 1000, 0.0
        while seconds < SECONDS / 4:
            rounds *= 4
            seconds = timed(functools.partial(self._loop, name, rounds))
        rounds = int(rounds * SECONDS / seconds) + 1
        return functools.partial(self._loop, name, rounds), self.threads * rounds * work

    def _loop(self, name: str, rounds: int) -> None:
        loop = getattr(self.loops, name)
        parallel.each(lambda thread: loop(rounds, 0.5, 1.0), range(self.threads), self.threads)

    def _read_c(self, array: Array, streams: int) -> None:
        loop, part = self.loops.read_bytes, array.size // self.threads // WHOLE * WHOLE
        starts = [array.ctypes.data + thread * part for thread in range(self.threads)]
        parallel.each(lambda start: loop(start, part, streams), starts, self.threads)

    def _read_numpy(self, array: Array) -> None:
        words = array.view(np.uint64)
        parts = [words[each] for each in parallel.split(words.size, self.threads)]
        parallel.each(np.bitwise_xor.reduce, parts, self.threads)


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compiled(folder: Path) -> tuple[Any, str]:
    """The loops, and what compiled them; None, and what stands in, where no compiler does."""
    library = folder / "limits.so"
    for compiler in filter(shutil.which, COMPILERS):
        built = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(library)], capture_output=True, check=False)
        if built.returncode == 0:
            return declared(ctypes.CDLL(str(library))), f"C loops, {version(compiler)}"
    return None, "NumPy, no C compiler"


def declared(library: Any) -> Any:
    library.read_bytes.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.read_bytes.restype = ctypes.c_uint64
    for name in ARITHMETIC:
        getattr(library, f"{name}_work").restype = ctypes.c_double
        loop = getattr(library, name)
        loop.argtypes, loop.restype = (ctypes.c_long, ctypes.c_float, ctypes.c_float), ctypes.c_double
    return library


def version(compiler: str) -> str:
    asked = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=False)
    return f"{compiler} {asked.stdout.strip()}"


def mapped(path: Path, size: int) -> Array:
    """A file of so many bytes, mapped, in the page cache."""
    if not path.exists() or path.stat().st_size != size:
        np.random.default_rng(0).integers(0, 1 << 63, size // 8, np.uint64).tofile(path)
    with path.open("rb") as file:
        array = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    np.bitwise_xor.reduce(array)
    return array


def better(one: Limits, other: Limits) -> Limits:
    """The larger of each limit."""
    return {name: max(filter(None, (one.get(name), value)), default=None) for name, value in other.items()}


def burst(limits: Limits) -> float:
    """Bytes per second at best: of allocated memory or of a mapped file, whichever is read faster."""
    return max(limits[name] or 0.0 for name in READS)


def bandwidth(limits: Limits) -> float:
    """Bytes per second of reading for a second: where memory is shared, whatever takes as long cannot get more."""
    return limits.get("read_sustained") or burst(limits)


def peak(limits: Limits, dtype: str) -> float:
    """Operations per second in `dtype` at best; those of float32 where the CPU has none of that type."""
    return limits[dtype] or limits["float32"] or 0.0


def arithmetic(limits: Limits, dtype: str) -> float:
    """The same, of computing for a second."""
    return limits.get(f"{dtype}_sustained") or limits.get("float32_sustained") or peak(limits, dtype)


def described(limits: Limits, how: str) -> list[str]:
    """The limits as lines of a Markdown table: limit, figure."""
    units = dict.fromkeys(READS, "GB/s") | {"read": "GB/s"} | dict.fromkeys(ARITHMETIC, "GFLOP/s") | {"int8": "GOP/s"}
    names = [each for name in units for each in (name, f"{name}_sustained")]
    rows = [
        (name, f"{value / 1e9:.1f} {units[name.removesuffix('_sustained')]}")
        for name in names
        if (value := limits.get(name)) is not None
    ]
    return [f"| limit ({how}) | figure |", "|---|---|", *(f"| {name.replace('_', ', ')} | {text} |" for name, text in rows)]
