"""The threads that run kernels: a team that meets at barriers of its own, and needs no threading library.

A caller hands the team a tape, a list of kernels with their arguments (npllm.backends.numba_cpu.tape). All threads, the
caller's among them, run through it side by side and wait for each other after every kernel: a microsecond, with no
interpreter in between. Work within a kernel
is dealt out by `next_chunk`. A thread without a job spins for a while, then sleeps on one of the interpreter's locks, which
need no interpreter to be taken or released: nothing that Python can be interrupted in lies between a job and its end.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from npllm.arrays import Array, DTypeLike
from npllm.backend import log_once
from npllm.backends.numba_cpu.jit import Called, inline, native
from npllm.backends.numba_cpu.memory import (
    add_word,
    call_c,
    call_kernel,
    calling,
    load_word,
    pause,
    store_word,
    swap_word,
    word,
)
from npllm.machine import cores

# Words of a team's state, each on a cache line of its own: the barrier's round and how many have come to it; the next chunk;
# the job (its number times MOST, plus its threads), its tape and length. Then what does not change: the functions that
# yield, take and release a lock, the memory of the threads, and the functions that kernels call. Then, per thread, whether
# it sleeps, its lock, and whether a thread has taken this place.
ROUND, ARRIVED, CHUNK, JOB, TAPE, LENGTH, YIELD, TAKE, RELEASE, SCRATCH, FUNCTIONS = (8 * i for i in range(11))
MOST = 1024
STOP = -1

# The functions that kernels call, in the order of their addresses: compiled kernels that are kept know only the place.
CALLED = """
    activations.activate arithmetic.prepare_row attention_job.combine_lane attention_vectors.score attention_vectors.weigh
    dots.multiply_few_rows dots.multiply_places rows.fill_rows source.read_row tiles.multiply tiles.spread
""".split()
SLEEPERS = FUNCTIONS + (len(CALLED) + 7) // 8 * 8

# Seconds that the interpreter's end waits for a job that another thread has under way.
LAST_JOB = 10

# Bytes of memory that each thread has to itself, and where a small part of it begins that no rows of activations reach.
SPARE = 4 << 20
SCRATCH_BYTES = SPARE + (1 << 12)

# How often a thread looks before it lets others run, and, without a job, before it goes to sleep (about 1 ms: the
# interpreter's part of a decode step).
PATIENCE = 4000
SPINS = 30000


@inline
def barrier(team, threads):
    """Wait until all threads are here; the chunks then begin at 0 again."""
    turn = load_word(team, ROUND)
    if add_word(team, ARRIVED, 1) == threads - 1:
        store_word(team, CHUNK, 0)
        store_word(team, ARRIVED, 0)
        store_word(team, ROUND, turn + 1)
        return
    looks = 0
    while load_word(team, ROUND) == turn:
        pause()
        looks += 1
        if looks == PATIENCE:
            call_c(word(team, YIELD), 0, 0)
            looks = 0


@inline
def next_chunk(team):
    """The number of the next chunk of work that nobody has taken."""
    return add_word(team, CHUNK, 1)


@inline
def scratch(team, thread):
    """The address of SCRATCH_BYTES that only this thread uses; 64-byte aligned."""
    return word(team, SCRATCH) + thread * SCRATCH_BYTES


def called(function: Callable[..., None]) -> Any:
    """Decorate a function of integers, the team's address first, that is compiled once and not into each kernel."""
    return calling(function, FUNCTIONS + CALLED.index(Called(function).name))


@inline
def _run(team, tape, length, thread, threads):
    for i in range(length):
        call_kernel(word(tape, 2 * i), tape + word(tape, 2 * i + 1), team, thread, threads)
        barrier(team, threads)


@native(4)
def _lead(team, tape, length, threads):
    """Run a tape with the threads 1, 2, ... of the team."""
    if threads > 1:
        store_word(team, TAPE, tape)
        store_word(team, LENGTH, length)
        number = load_word(team, JOB) // MOST + 1
        swap_word(team, JOB, number * MOST + threads)
        for other in range(1, threads):
            _wake(team, other)
    _run(team, tape, length, 0, threads)
    return 0


@inline
def _wake(team, thread):
    if swap_word(team, SLEEPERS + 8 * thread, 0) == 1:
        call_c(word(team, RELEASE), word(team, SLEEPERS + 8 * thread + 1), 0)


@native(2)
def _serve(team, thread):
    """The life of a thread: run the jobs that it takes part in. Of two with the same number, the second ends at once."""
    if swap_word(team, SLEEPERS + 8 * thread + 2, 1) == 1:
        return 0
    seen = 0
    while True:
        job = _next_job(team, thread, seen)
        if job == STOP:
            return 0
        seen = job
        if thread < job % MOST:
            _run(team, load_word(team, TAPE), load_word(team, LENGTH), thread, job % MOST)


@inline
def _next_job(team, thread, seen):
    while True:
        for _ in range(SPINS):
            job = load_word(team, JOB)
            if job != seen:
                return job
            pause()
        swap_word(team, SLEEPERS + 8 * thread, 1)
        # A job may have come in between; who clears the mark decides whether the lock is released.
        if load_word(team, JOB) == seen or swap_word(team, SLEEPERS + 8 * thread, 0) == 0:
            call_c(word(team, TAKE), word(team, SLEEPERS + 8 * thread + 1), 1)


@native(2)
def _stop(team, threads):
    swap_word(team, JOB, STOP)
    for other in range(1, threads):
        _wake(team, other)
    return 0


class Team:
    """All threads that this process computes with; they start when they are first needed."""

    def __init__(self) -> None:
        # A signal's handler may compute while the thread that it interrupts is between two jobs.
        self.lock, self.size, self.process = threading.RLock(), cores(), os.getpid()
        self._threads: list[threading.Thread] = []
        self._ended = False
        self._state = aligned(SLEEPERS + 8 * self.size, np.int64)
        self._state[:] = 0
        self._scratch = aligned(self.size * SCRATCH_BYTES, np.uint8)
        self._state[SCRATCH], self.address = self._scratch.ctypes.data, self._state.ctypes.data
        api = ctypes.pythonapi
        api.PyThread_allocate_lock.restype = ctypes.c_void_p
        functions = _yield_function(), api.PyThread_acquire_lock, api.PyThread_release_lock
        for place, function in zip((YIELD, TAKE, RELEASE), functions, strict=True):
            self._state[place] = ctypes.cast(function, ctypes.c_void_p).value
        for thread in range(self.size):
            lock = api.PyThread_allocate_lock()
            api.PyThread_acquire_lock(ctypes.c_void_p(lock), 1)
            self._state[SLEEPERS + 8 * thread + 1] = lock

    def run(self, tape: int, length: int, threads: int) -> None:
        """Run the `length` entries of the tape at an address, with so many threads, this one among them."""
        if self._ended and threading.current_thread() is not threading.main_thread():
            threading.Event().wait()  # a daemon, when the interpreter ends: it must not keep the lock from `stop`
        with self.lock:
            if len(self._threads) < threads - 1:
                threads = self._grown(threads)
            self._lead(self.address, tape, length, threads)

    @functools.cached_property
    def _lead(self) -> Any:
        for function in Called.all:
            self._state[FUNCTIONS + CALLED.index(function.name)] = function.address
        return _lead()

    def _grown(self, threads: int) -> int:
        """Start what is missing of so many threads -> how many there are, where the system gives no more."""
        if self._ended:
            return 1
        serve = _serve()
        for thread in range(len(self._threads) + 1, threads):
            worker = threading.Thread(target=serve, args=(self.address, thread), name=f"npllm-{thread}", daemon=True)
            try:
                worker.start()
            except RuntimeError as error:
                log_once(f"{thread} threads in place of {threads}: {error}", logging.WARNING)
                return thread
            # An interrupt before this line leaves a thread that nobody knows of; its successor of the same number ends.
            self._threads.append(worker)
        return threads

    def stop(self) -> None:
        """End the threads, for good: they must not run compiled code that the interpreter takes down.

        In the child of a fork there are none. A job of another thread's that does not end is left to the system.
        """
        self._ended = self.process == os.getpid()
        if self._threads and self._ended and self.lock.acquire(timeout=LAST_JOB):
            _stop()(self.address, self.size)
            for thread in self._threads:
                thread.join()
            self._threads = []


def aligned(length: int, dtype: DTypeLike) -> Array:
    """An uninitialised array that begins on a cache line."""
    size = np.dtype(dtype).itemsize
    raw = np.empty(length * size + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    return raw[skip : skip + length * size].view(dtype)


def _yield_function() -> Any:
    """What lets another thread of the system run; neither takes an argument, nor minds one."""
    if sys.platform == "win32":
        return ctypes.WinDLL("kernel32").SwitchToThread
    return ctypes.CDLL(None).sched_yield


@functools.cache
def team() -> Team:
    """The team of this process."""
    made = Team()
    atexit.register(made.stop)
    return made


if hasattr(os, "register_at_fork"):
    # In the child of a fork the threads are gone.
    os.register_at_fork(after_in_child=team.cache_clear)
