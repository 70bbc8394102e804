"""`step`: a decode step is recorded at its first time, and played from then on."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from npllm import blocks
from npllm.arrays import Array
from npllm.backend import log_once
from npllm.backends.numba_cpu import tape
from npllm.backends.numba_cpu.base import Base, planned
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


@functools.lru_cache(maxsize=256)
def angles_of(rope: Rope, stretch: int, dtype: str) -> Angles:
    """The angles of the positions from `stretch` STRETCH on."""
    return blocks.angles(np, rope, np.arange(stretch * STRETCH, (stretch + 1) * STRETCH), dtype)


class StepRecorder(Recorder):
    """A recorder that knows which layer's keys attention reads, and so where their next plan comes from."""

    def __init__(self, be: Base) -> None:
        super().__init__()
        self.be = copy.copy(be)
        self.be.recorder = self
        self.layers: dict[int, KernelLayerCache] = {}
        self.plans: dict[tuple[Any, int], tuple[KernelLayerCache, Array]] = {}

    def appended(self, keys: Keys, layer: KernelLayerCache) -> None:
        self.kept.append(keys)
        self.layers[id(keys)] = layer

    def plan(self, keys: Keys, rows: Rows) -> Array:
        """Layers whose queries see keys by the same rule share a plan."""
        layer = self.layers.get(id(keys))
        if layer is None:
            self.problem = self.problem or "attention reads keys that do not come from the cache"
            return planned(keys, rows)
        kind = layer.spec.mask, layer.size
        if kind not in self.plans:
            self.plans[kind] = layer, planned(keys, rows)
        return self.plans[kind][1]


class Recording:
    """A decode step over some slots of a cache, as it ran once."""

    def __init__(self, be: Base, model: Model, rows: Rows, cache: KernelCache) -> None:
        small = len(rows.slots) * model.parameters < SMALL_STEP
        self.threads, self.cache = 1 if small else be.team_size, cache
        self.storage = [layer.stored for layer in cache.layers]
        self.tokens_M, self.positions_M = (np.zeros(len(rows.slots), np.int64) for _ in range(2))
        self.recorder = StepRecorder(be)

    def record(self, model: Model, tokens_M: Array, rows: Rows) -> Array:
        """Run the step -> logits_WN; `problem` then says whether it can be played."""
        recorder = self.recorder
        self.tokens_M[:], self.positions_M[:] = tokens_M, rows.positions_M
        rows = replace(rows, positions_M=recorder.remember(self.positions_M), wanted_W=None)
        logits_WN = model.run(recorder.be, recorder.remember(self.tokens_M), rows, self.cache)
        self.logits_WN, self.calls, self.problem = logits_WN.view(np.ndarray), recorder.finished(), recorder.problem
        return self.logits_WN

    def current(self) -> bool:
        """Whether the cache's memory is where it was."""
        return all(layer.stored is stored for layer, stored in zip(self.cache.layers, self.storage, strict=True))

    def play(self, tokens_M: Array, rows: Rows) -> Array:
        """The step with other tokens, at the rows' new positions -> logits_WN, in memory that the next one overwrites."""
        self.tokens_M[:], self.positions_M[:] = tokens_M, rows.positions_M
        for layer, plan in self.recorder.plans.values():
            plan[:] = planned(layer.keys(rows), rows)
        for layer in self.cache.layers:
            layer.reach(rows)
        with np.errstate(over="ignore", invalid="ignore"):
            for call in self.calls:
                if isinstance(call, tuple):
                    tape.play(*call, self.threads)
                else:
                    call()
        self.cache.advance(rows)
        return self.logits_WN


class Steps(Tops):
    """Caches and steps."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Models of which a played step gave the bits of one that ran, by their identity and the number of rows.
        self._trusted: weakref.WeakValueDictionary[tuple[int, int], Model] = weakref.WeakValueDictionary()

    def new_cache(self, specs: Sequence[LayerSpec], max_context: int, kv_dtype: str | None = None) -> Cache:
        return KernelCache(self, self.xp, specs, self.array_dtype, max_context, kv_dtype, self.available_memory)

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
        key = id(model), rows.slots
        recording = cache.recordings.get(key)
        if recording is None or not recording.current():
            cache.recordings[key] = recording = Recording(self, model, rows, cache)
            return recording.record(model, state.tokens_M, rows)
        if recording.problem:
            log_once(f"{self.name}.step runs every time: {recording.problem}")
            return None
        return self._played(recording, model, state.tokens_M, rows)

    def _played(self, recording: Recording, model: Model, tokens_M: Array, rows: Rows) -> Array:
        trust = id(model), len(rows.slots)
        if trust in self._trusted:
            return recording.play(tokens_M, rows)
        # Once for each model: what was missed in recording would be as it was at the first step.
        plain = replace(rows, wanted_W=None)
        logits_WN = np.array(model.run(self, tokens_M, plain, recording.cache))
        if np.array_equal(recording.play(tokens_M, rows).view(np.uint32), logits_WN.view(np.uint32)):
            self._trusted[trust] = model
        else:
            recording.problem = "a played step differs from one that ran"
        return logits_WN
