"""A tape: kernels with their arguments, one after the other, for the team to run through."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from npllm.arrays import Array
from npllm.backends.numba_cpu.jit import Kernel
from npllm.backends.numba_cpu.team import team

Entry = tuple[int, bytes]


def entry(kernel: Kernel, *arguments: float, rest: Sequence[int] = ()) -> Entry:
    """One kernel with its arguments: integers, addresses and floats as its form says, then any number of integers."""
    packed = kernel.pack(*arguments)
    return kernel.address, packed + struct.pack(f"={len(rest)}q", *rest) if rest else packed


def bound(entries: list[Entry]) -> Array:
    """The entries as the team reads them: for each the kernel's address and where its arguments lie, then all arguments."""
    head, at = [], 16 * len(entries)
    for address, arguments in entries:
        head += [address, at]
        at += len(arguments)
    packed = struct.pack(f"={len(head)}q", *head)
    return np.frombuffer(b"".join([packed, *(arguments for _, arguments in entries)]), np.int64)


def play(tape: Array, length: int, threads: int) -> None:
    """Run a bound tape of so many entries."""
    team().run(tape.ctypes.data, length, threads)


def run(threads: int, *entries: Entry) -> None:
    """Run some entries now."""
    play(bound(list(entries)), len(entries), threads)
