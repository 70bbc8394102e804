"""A tape: kernels with their arguments, one after the other, for the team to run through."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.backends.numba_cpu.jit import Kernel, kernel
from npllm.backends.numba_cpu.memory import call_kernel, store_word, word
from npllm.backends.numba_cpu.team import CHUNK, team


class Entry(NamedTuple):
    """A kernel's address, its arguments, and whether there is so little to do that one thread does it."""

    kernel: int
    arguments: bytes
    small: bool = False


@kernel("q")
def in_turn(args, team, thread, threads):
    """Small entries, by one thread, with nobody to wait for. Arguments: their number; then they, as a tape of its own."""
    if thread == 0:
        tape = args + 8
        for i in range(word(args, 0)):
            call_kernel(word(tape, 2 * i), tape + word(tape, 2 * i + 1), team, 0, 1)
            store_word(team, CHUNK, 0)


def entry(kernel: Kernel, *arguments: float, rest: Sequence[int] = ()) -> Entry:
    """One kernel with its arguments: integers, addresses and floats as its form says, then any number of integers."""
    packed = kernel.pack(*arguments)
    return Entry(kernel.address, packed + struct.pack(f"={len(rest)}q", *rest) if rest else packed)


def bound(entries: Sequence[Entry]) -> tuple[Array, int]:
    """The entries as the team reads them, and how many those are: small ones that follow one another are one."""
    together: list[Entry] = []
    for small, group in itertools.groupby(entries, lambda each: each.small):
        each = list(group)
        if small and len(each) > 1:
            each = [Entry(in_turn.address, in_turn.pack(len(each)) + _tape(each))]
        together += each
    return np.frombuffer(bytearray(_tape(together)), np.int64), len(together)


def _tape(entries: Sequence[Entry]) -> bytes:
    """For each entry the kernel's address and where its arguments lie, then all arguments."""
    head, at = [], 16 * len(entries)
    for each in entries:
        head += [each.kernel, at]
        at += len(each.arguments)
    return b"".join([struct.pack(f"={len(head)}q", *head), *(each.arguments for each in entries)])


def play(tape: Array, length: int, threads: int) -> None:
    """Run a bound tape of so many entries."""
    team().run(tape.ctypes.data, length, threads)


def run(threads: int, *entries: Entry) -> None:
    """Run some entries now."""
    play(*bound(entries), threads)
