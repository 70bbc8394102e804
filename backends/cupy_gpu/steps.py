"""`step`: a decode step is one CUDA graph.

A step that brings each row one token runs twice as any other does. Then it is captured, with room for the next power of two
of rows, and compared once with the step that ran. From there on a token costs the host one small copy and one launch: what
differs from step to step (tokens, positions, where keys lie and which are seen) is in one buffer that all kernels read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from npllm.arrays import Array, DTypeLike
from npllm.backend import log_once
from npllm.backends.cupy_gpu.base import PLAN, planned
from npllm.backends.cupy_gpu.cache import DeviceCache, DeviceLayerCache
from npllm.backends.cupy_gpu.device import CannotCaptureError, Device, Graph
from npllm.backends.cupy_gpu.sampling import SETTINGS, Draws
from npllm.cache import Cache, Keys, LayerSpec, Rows
from npllm.sampling import Drawn

if TYPE_CHECKING:
    from npllm.generation import State
    from npllm.model import Model

# The slot of a row that stands only for room in a graph: it has no keys, and stores none.
NOBODY = -1


@dataclass(frozen=True)
class StepRows(Rows):
    """Rows of a step whose plans lie in its buffer."""

    step: Step | None = None


class Step:
    """A decode step over a cache, for up to so many rows."""

    def __init__(self, device: Device, model: Model, cache: DeviceCache, room: int) -> None:
        self.device, self.model, self.cache, self.room = device, model, cache, room
        self.storage = [layer.stored for layer in cache.layers]
        self.kinds = list({(layer.spec.mask, layer.size): layer for layer in cache.layers}.items())
        self.buffer = device.empty((room * (2 + SETTINGS + len(self.kinds) * PLAN),), "int64")
        self.drawn_W = device.empty((room,), "int64")
        self.layers: dict[int, DeviceLayerCache] = {}
        self.kept: list[Keys] = []
        self.graph: Graph | None = None
        self.logits_WN: Array | None = None
        self.runs, self.problem = 0, ""

    def current(self) -> bool:
        """Whether the cache's memory is where it was."""
        return all(layer.stored is stored for layer, stored in zip(self.cache.layers, self.storage, strict=True))

    @property
    def tokens_M(self) -> Array:  # noqa: N802
        return self.buffer[: self.room]

    @property
    def positions_M(self) -> Array:  # noqa: N802
        return self.buffer[self.room : 2 * self.room]

    @property
    def settings_WS(self) -> Array:  # noqa: N802
        """What tokens are drawn by."""
        return self.buffer[-SETTINGS * self.room :].view("float64").reshape(self.room, SETTINGS)

    def rows(self, rows: Rows) -> StepRows:
        """The rows of a step, and room for others."""
        idle = self.room - len(rows.slots)
        return StepRows(
            rows.slots + (NOBODY,) * idle, rows.starts + (0,) * idle, (1,) * self.room, self.positions_M, None, self
        )

    def fill(self, tokens: Sequence[int], rows: Rows, settings_WS: Array | None) -> None:
        """Put what differs from step to step into the buffer."""
        values = np.zeros(len(self.buffer), np.int64)
        values[: len(tokens)] = tokens
        values[self.room : self.room + len(rows.starts)] = rows.starts
        wide = self.rows(rows)
        for number, (_, layer) in enumerate(self.kinds):
            begin = self.room * (2 + number * PLAN)
            values[begin : begin + self.room * PLAN] = planned(layer.keys(wide), wide).reshape(-1)
        if settings_WS is not None:
            begin = len(values) - SETTINGS * self.room
            values[begin : begin + settings_WS.size] = settings_WS.reshape(-1).view(np.int64)
        self.device.write(self.buffer, values)

    def appended(self, keys: Keys, layer: DeviceLayerCache) -> None:
        """`keys` are what this layer's `append` gave."""
        self.layers[id(keys)] = layer
        self.kept.append(keys)

    def plan(self, keys: Keys) -> Array:
        """The plan of the rows over these keys: layers whose queries see keys by the same rule share one."""
        layer = self.layers.get(id(keys))
        if layer is None:
            raise CannotCaptureError("attention reads keys that do not come from the cache")
        number = [kind for kind, _ in self.kinds].index((layer.spec.mask, layer.size))
        begin = self.room * (2 + number * PLAN)
        return self.buffer[begin : begin + self.room * PLAN].reshape(self.room, PLAN)


class Steps(Draws):
    """Caches and steps."""

    # The list that went to the device last, and its array there.
    _uploaded: tuple[Any, list[int]] = (None, [])

    def new_cache(self, specs: Sequence[LayerSpec], max_context: int, kv_dtype: str | None = None) -> Cache:
        """Keys and values are kept in bfloat16 unless the arithmetic is float32 or wider, or `kv_dtype` says otherwise."""
        if kv_dtype is None and self.dtype in ("stored", "bfloat16"):
            kv_dtype = "bfloat16"
        return DeviceCache(self, self.xp, specs, self.array_dtype, max_context, kv_dtype, self.available_memory)

    def asarray(self, x: Any, dtype: DTypeLike | None = None) -> Array:
        array = super().asarray(x, dtype)
        if isinstance(x, list):
            self._uploaded = array, x
        return array

    def _on_host(self, tokens_M: Array) -> list[int]:
        """A step's tokens; those that were a list a moment ago need not come back for it."""
        array, given = self._uploaded
        return given if array is tokens_M else self.to_numpy(tokens_M).tolist()

    def plan(self, keys: Keys, rows: Rows) -> Array:
        if isinstance(rows, StepRows) and rows.step is not None:
            return rows.step.plan(keys)
        return super().plan(keys, rows)

    def step(self, model: Model, state: State, /) -> Drawn:
        settings_WS = self.settings(state, model.config.vocab_size)
        step = self._decoded(model, state, settings_WS)
        if step is None:
            return self.drawn(model.run(self, state.tokens_M, state.rows, state.cache), state, settings_WS)
        if settings_WS is not None:
            return self.taken(step.drawn_W, state.samplers)
        assert step.logits_WN is not None
        return self.drawn(step.logits_WN[: len(state.samplers)], state, None)

    def drawn(self, logits_WN: Array, state: State, settings_WS: Array | None) -> Drawn:
        """A token for each row that wants one."""
        if settings_WS is not None:
            tokens_W = self.empty(len(settings_WS), dtype="int64")
            self.sample(logits_WN, self.device.upload(settings_WS), tokens_W)
            return self.taken(tokens_W, state.samplers)
        logits_WN = self.to_numpy(logits_WN)
        tokens = [sampler.draw(logits_N) for sampler, logits_N in zip(state.samplers, logits_WN, strict=True)]
        return Drawn(np.array(tokens, dtype=np.int64), logits_WN if state.logprobs else None)

    def _decoded(self, model: Model, state: State, settings_WS: Array | None) -> Step | None:
        """A step that brings each row one token, done; or None if it is another, or cannot be captured."""
        rows, cache = state.rows, state.cache
        wanted = rows.wanted_W is not None and len(rows.wanted_W) == len(rows.counts)
        if self.dtype == "float64" or not isinstance(cache, DeviceCache) or not wanted or set(rows.counts) != {1}:
            return None
        room = 1 << (len(rows.slots) - 1).bit_length()
        key = id(model), room
        step = cache.steps.get(key)
        if step is None or not step.current():
            cache.steps.pop(key, None)
            cache.steps[key] = step = Step(self.device, model, cache, room)
        if step.problem:
            log_once(f"{self.name}.step runs every time: {step.problem}")
            return None
        tokens = self._on_host(state.tokens_M)
        with self.limited(len(tokens), model.parameters):
            for layer in cache.layers:
                layer.reach(rows)
            step.fill(tokens, rows, settings_WS)
            if step.graph is not None:
                self._played(step.graph)
            else:
                self._first(step, rows)
        cache.advance(rows)
        return step

    def _played(self, graph: Graph) -> None:
        """The step once more, with what the buffer holds now."""
        graph.launch()

    def _forward(self, step: Step, rows: Rows) -> Array:
        """The step's logits [room, N]; its tokens are drawn."""
        model = step.model
        step.layers.clear()
        step.kept.clear()
        logits_WN = model.architecture.forward(self, model.config, model.weights, step.tokens_M, step.rows(rows), step.cache)
        self.sample(logits_WN, step.settings_WS, step.drawn_W)
        return logits_WN

    def _first(self, step: Step, rows: Rows) -> None:
        """A step that runs as any other; the second one is captured too, and what a launch gives compared with it."""
        step.logits_WN = self._forward(step, rows)
        step.runs += 1
        if step.runs < 2:
            return
        want = self.to_numpy(step.logits_WN)[: len(rows.slots)]
        try:
            graph, logits_WN = self.device.capture(lambda: self._forward(step, rows))
        except CannotCaptureError as error:
            step.problem = str(error)
            return
        self._played(graph)
        if np.array_equal(self.to_numpy(logits_WN)[: len(rows.slots)], want, equal_nan=True):
            step.graph, step.logits_WN = graph, logits_WN
        else:
            step.problem = "a launched graph gives other logits than the step that ran"
