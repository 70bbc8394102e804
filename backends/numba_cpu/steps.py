"""`step`: a decode step is recorded at its first time, and played from then on, as over the next cache laid out alike."""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from npllm import blocks
from npllm.arrays import Array
from npllm.backend import log_once
from npllm.backends.numba_cpu import tape
from npllm.backends.numba_cpu.base import Base, at, planned
from npllm.backends.numba_cpu.cache import KernelCache, KernelLayerCache
from npllm.backends.numba_cpu.recording import Recorder
from npllm.backends.numba_cpu.sampling import Tops
from npllm.blocks.rope import Angles, Rope
from npllm.cache import Cache, Keys, LayerSpec, Rows
from npllm.sampling import Drawn

if TYPE_CHECKING:
    from npllm.generation import State
    from npllm.model import Model

# Multiply-adds of a step below which threads would wait for each other longer than they work.
SMALL_STEP = 1 << 23

# Rows up to which a step takes its angles from those of this many positions, which are computed together.
FEW, STRETCH = 8, 64

# Recordings that are kept for caches to come.
RECORDINGS = 8


@functools.lru_cache(maxsize=256)
def angles_of(rope: Rope, stretch: int, dtype: str) -> Angles:
    """The angles of the positions from `stretch` STRETCH on."""
    return blocks.angles(np, rope, np.arange(stretch * STRETCH, (stretch + 1) * STRETCH), dtype)


class StepRecorder(Recorder):
    """A recorder that knows which layer's keys attention reads, and so where their next plan comes from."""

    def __init__(self, be: Base, cache: KernelCache) -> None:
        super().__init__()
        self.be = copy.copy(be)
        self.be.recorder = self
        self.numbers = {id(layer): number for number, layer in enumerate(cache.layers)}
        # What each layer gave attention to read, while the step is recorded.
        self.layers: dict[int, tuple[Keys, KernelLayerCache]] = {}
        self.plans: dict[tuple[Any, int], tuple[int, Array]] = {}

    def appended(self, keys: Keys, layer: KernelLayerCache) -> None:
        self.layers[id(keys)] = keys, layer

    def plan(self, keys: Keys, rows: Rows) -> Array:
        """Layers whose queries see keys by the same rule share a plan."""
        if id(keys) not in self.layers:
            self.problem = self.problem or "attention reads keys that do not come from the cache"
            return planned(keys, rows)
        _, layer = self.layers[id(keys)]
        kind = layer.spec.mask, layer.size
        if kind not in self.plans:
            self.plans[kind] = self.numbers[id(layer)], planned(keys, rows)
        return self.plans[kind][1]


class Recording:
    """A decode step over some slots of a cache, as it ran once."""

    def __init__(self, be: Base, model: Model, rows: Rows) -> None:
        small = len(rows.slots) * model.parameters < SMALL_STEP
        self.threads, self.model, self.slots = 1 if small else be.team_size, weakref.ref(model), rows.slots
        self.tokens_M, self.positions_M = (np.zeros(len(rows.slots), np.int64) for _ in range(2))

    def record(self, be: Base, model: Model, tokens_M: Array, rows: Rows, cache: KernelCache) -> Array:
        """Run the step -> logits_WN; `problem` then says whether it can be played."""
        recorder = StepRecorder(be, cache)
        self.tokens_M[:], self.positions_M[:] = tokens_M, rows.positions_M
        rows = replace(rows, positions_M=recorder.remember(self.positions_M), wanted_W=None)
        logits_WN = model.run(recorder.be, recorder.remember(self.tokens_M), rows, cache)
        self.logits_WN, self.calls, self.problem = logits_WN.view(np.ndarray), recorder.finished(), recorder.problem
        self.kept, self.plans = (recorder.kept, recorder.pool), list(recorder.plans.values())
        self.layout, self._storage = cache.layout(), [weakref.ref(stored) for stored in cache.storage()]
        self._places = self._found(cache.storage())
        # The interpreter's calls hold on to the arrays that they read.
        self.shared = not any(np.may_share_memory(x, stored) for x in recorder.touched for stored in cache.storage())
        # What remembers outlives the step; the cache need not.
        recorder.layers.clear()
        recorder.touched.clear()
        return self.logits_WN

    def _found(self, storage: Sequence[Array]) -> list[tuple[Array, Array, Array, int]]:
        """Where the tapes hold addresses of the cache's memory: a tape, its words, how far into which array they go.

        No other argument is as large a number as an address, and no other memory has one of these.
        """
        found = []
        for words, _ in (call for call in self.calls if isinstance(call, tuple)):
            for number, stored in enumerate(storage):
                places = np.flatnonzero((words >= at(stored)) & (words < at(stored) + stored.nbytes))
                if places.size:
                    found.append((words, places, words[places] - at(stored), number))
        return found

    def reads(self, model: Model, cache: KernelCache) -> bool:
        """Whether it is this cache's memory that is read and written."""
        storage = zip(self._storage, cache.storage(), strict=True)
        return self.model() is model and all(known() is stored for known, stored in storage)

    def fits(self, model: Model, slots: tuple[int, ...], layout: Any) -> bool:
        """Whether it can be of another cache that is laid out so."""
        return self.model() is model and (self.slots, self.layout) == (slots, layout)

    def bind(self, cache: KernelCache) -> None:
        """Let it be that of another cache, which is laid out like the last one."""
        storage = cache.storage()
        self._storage = [weakref.ref(stored) for stored in storage]
        for words, places, offsets, number in self._places:
            words[places] = at(storage[number]) + offsets

    def play(self, tokens_M: Array, rows: Rows, cache: KernelCache) -> Array:
        """The step with other tokens, at the rows' new positions -> logits_WN, in memory that the next one overwrites."""
        self.tokens_M[:], self.positions_M[:] = tokens_M, rows.positions_M
        for number, plan in self.plans:
            plan[:] = planned(cache.layers[number].keys(rows), rows)
        for layer in cache.layers:
            layer.reach(rows)
        with np.errstate(over="ignore", invalid="ignore"):
            for call in self.calls:
                if isinstance(call, tuple):
                    tape.play(*call, self.threads)
                else:
                    call()
        cache.advance(rows)
        return self.logits_WN


class Steps(Tops):
    """Caches and steps."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Models of which a played step gave the bits of one that ran, by their identity and the number of rows.
        self._trusted: weakref.WeakValueDictionary[tuple[int, int], Model] = weakref.WeakValueDictionary()
        # Recordings whose caches are gone: a cache has its own, since others may be in use by other threads.
        self._free: list[Recording] = []

    def new_cache(self, specs: Sequence[LayerSpec], max_context: int, kv_dtype: str | None = None) -> Cache:
        cache = KernelCache(self, self.xp, specs, self.array_dtype, max_context, kv_dtype, self.available_memory)
        weakref.finalize(cache, self._take_back, cache.recordings).atexit = False
        return cache

    def angles(self, rope: Rope, positions_M: Array, /) -> Angles:
        def turned(positions_M: Array) -> tuple[Array, Array]:
            if not 0 < len(positions_M) <= FEW:
                cos_MJ, sin_MJ = blocks.angles(np, rope, positions_M, self.array_dtype)
                return cos_MJ, sin_MJ
            stretches = [(angles_of(rope, p // STRETCH, self.array_dtype), p % STRETCH) for p in positions_M.tolist()]
            return np.stack([cos[i] for (cos, _), i in stretches]), np.stack([sin[i] for (_, sin), i in stretches])

        return Angles(*self.called(turned, positions_M))

    def step(self, model: Model, state: State, /) -> Drawn:
        logits_WN = self._decoded(model, state)
        if logits_WN is None:
            return super().step(model, state)
        if all(sampler.greedy for sampler in state.samplers):
            tokens = self.likeliest(logits_WN)
            for sampler, token in zip(state.samplers, tokens, strict=True):
                sampler.take(token)
        else:
            tokens = [sampler.draw(logits_N) for sampler, logits_N in zip(state.samplers, logits_WN, strict=True)]
        return Drawn(np.array(tokens, dtype=np.int64), logits_WN.copy() if state.logprobs else None)

    def _decoded(self, model: Model, state: State) -> Array | None:
        """The logits of a step that brings each row one token, or None if it is another, or cannot be recorded."""
        rows, cache = state.rows, state.cache
        wanted = rows.wanted_W is not None and len(rows.wanted_W) == len(rows.counts)
        if self.dtype == "float64" or not isinstance(cache, KernelCache) or not wanted or set(rows.counts) != {1}:
            return None
        recording = self._recording(model, rows, cache)
        if recording is None:
            recording = Recording(self, model, rows)
            logits_WN = recording.record(self, model, state.tokens_M, rows, cache)
            cache.recordings[id(model), rows.slots] = recording
            return logits_WN
        if recording.problem:
            log_once(f"{self.name}.step runs every time: {recording.problem}")
            return None
        return self._played(recording, model, state.tokens_M, rows, cache)

    def _recording(self, model: Model, rows: Rows, cache: KernelCache) -> Recording | None:
        """The cache's own, or one that a cache has left that was laid out alike."""
        key = id(model), rows.slots
        own = cache.recordings.get(key)
        if own is not None:
            if own.reads(model, cache):
                return own
            self._take_back({key: cache.recordings.pop(key)})
        layout = cache.layout()
        for free in reversed(self._free.copy()):
            if free.fits(model, rows.slots, layout):
                with contextlib.suppress(ValueError):  # another thread took it
                    self._free.remove(free)
                    free.bind(cache)
                    cache.recordings[key] = free
                    return free
        return None

    def _take_back(self, recordings: Mapping[Any, Recording]) -> None:
        self._free += [each for each in recordings.values() if each.shared]
        del self._free[:-RECORDINGS]

    def _played(self, recording: Recording, model: Model, tokens_M: Array, rows: Rows, cache: KernelCache) -> Array:
        trust = id(model), len(rows.slots)
        if trust in self._trusted:
            return recording.play(tokens_M, rows, cache)
        # Once for each model: what was missed in recording would be as it was at the first step.
        plain = replace(rows, wanted_W=None)
        logits_WN = np.array(model.run(self, tokens_M, plain, cache))
        if np.array_equal(recording.play(tokens_M, rows, cache).view(np.uint32), logits_WN.view(np.uint32)):
            self._trusted[trust] = model
        else:
            recording.problem = "a played step differs from one that ran"
        return logits_WN
