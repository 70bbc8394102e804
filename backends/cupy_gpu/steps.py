"""`step`: a decode step is one CUDA graph, and the next one is launched before its tokens are read.

A step that brings each row one token runs twice as any other does. Then it is captured, with room for the next power of two
of rows, and compared once with the step that ran. From there on a token costs the host one small copy and one launch: what
differs from step to step (tokens, positions, where keys lie and which are seen) is in one buffer that all kernels read. The
tokens that a step draws take the place there of those that it was given: lookahead.py says what for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from npllm.arrays import Array
from npllm.backend import log_once
from npllm.backends.cupy_gpu.base import PLAN, planned
from npllm.backends.cupy_gpu.cache import DeviceCache, DeviceLayerCache, DeviceRows
from npllm.backends.cupy_gpu.device import CannotCaptureError, Device, Graph, Turn
from npllm.backends.cupy_gpu.history import History
from npllm.backends.cupy_gpu.lookahead import Ahead
from npllm.backends.cupy_gpu.sampling import SETTINGS, Draws, settings_of
from npllm.cache import Cache, Keys, LayerSpec, Rows
from npllm.errors import MemoryLimitError
from npllm.sampling import Drawn, Sampler

if TYPE_CHECKING:
    from npllm.generation import State
    from npllm.model import Model

# Tokens that are drawn at most before the host has learned of the first of them.
AHEAD = 2

# The slot of a row that stands only for room in a graph: it has no keys, and stores none.
NOBODY = -1


@dataclass(frozen=True)
class StepRows(Rows):
    """Rows of a step whose plans lie in its buffer."""

    step: Step | None = None


class Step:
    """A decode step over a cache, for up to so many rows; with a history where any of them has penalties or biases."""

    def __init__(
        self, device: Device, model: Model, cache: DeviceCache, room: int, adjusting: Sequence[Sampler] = ()
    ) -> None:
        self.device, self.model, self.room = device, model, room
        # Not the cache, which holds its steps: its memory would wait for the garbage collector.
        self.layer_caches = cache.layers
        self.kinds = list({(layer.spec.mask, layer.size): layer for layer in cache.layers}.items())
        self.buffer = device.empty((room * (2 + SETTINGS + len(self.kinds) * PLAN),), "int64")
        self.layers: dict[int, DeviceLayerCache] = {}
        self.kept: list[Keys] = []
        self.graph: Graph | None = None
        self.logits_WN: Array | None = None
        self.runs, self.problem = 0, ""
        self.looks_ahead = cache.be.looks_ahead
        # No row gets more tokens than the cache has room for, before it moves.
        self.history = History(device, adjusting, room, cache.size + AHEAD) if adjusting else None

    def serves(self, samplers: Sequence[Sampler]) -> bool:
        """Whether the memory of the history has room for these rows."""
        return self.history is None or self.history.holds(samplers, AHEAD)

    @property
    def tokens_M(self) -> Array:  # noqa: N802
        """The step's tokens, and once it is done, those that it drew."""
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

    def fill(self, tokens: Sequence[int] | None, rows: Rows, settings_WS: Array | None, samplers: Sequence[Sampler]) -> None:
        """Put what differs from step to step into the buffer. Without tokens, those stay that the step before drew."""
        if tokens is not None and self.history is not None:
            self.history.tell(samplers)
        for layer in self.layer_caches:
            layer.reach(rows)
        values = np.zeros(len(self.buffer), np.int64)
        values[: len(tokens or ())] = tokens or ()
        values[self.room : self.room + len(rows.starts)] = rows.starts
        wide = self.rows(rows)
        for number, (_, layer) in enumerate(self.kinds):
            begin = self.room * (2 + number * PLAN)
            values[begin : begin + self.room * PLAN] = planned(layer.keys(wide), wide).reshape(-1)
        if settings_WS is not None:
            begin = len(values) - SETTINGS * self.room
            values[begin : begin + settings_WS.size] = settings_WS.reshape(-1).view(np.int64)
        known = self.room if tokens is None else 0
        self.device.write(self.buffer[known:], values[known:])

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

    def new_cache(self, specs: Sequence[LayerSpec], max_context: int, kv_dtype: str | None = None) -> Cache:
        """Keys and values are kept in bfloat16 unless the arithmetic is float32 or wider, or `kv_dtype` says otherwise."""
        if kv_dtype is None and self.dtype in ("stored", "bfloat16"):
            kv_dtype = "bfloat16"
        return DeviceCache(self, self.xp, specs, self.array_dtype, max_context, kv_dtype, self.available_memory)

    def plan(self, keys: Keys, rows: Rows) -> Array:
        if isinstance(rows, StepRows) and rows.step is not None:
            return rows.step.plan(keys)
        return super().plan(keys, rows)

    def step(self, model: Model, state: State, /) -> Drawn:
        settings_WS = self.settings(state, model.config.vocab_size)
        step = self._step_of(model, state, settings_WS is not None and any(each.adjusts for each in state.samplers))
        if step is None:
            logits_WN = model.run(self, self.asarray(state.tokens_M), state.rows, state.cache)
            return self.drawn(logits_WN, state, settings_WS)
        if step.graph is not None and settings_WS is not None:
            return self._with_the_next(step, state, settings_WS)
        with self.limited(len(state.rows.slots), model.parameters):
            step.fill(state.tokens_M.tolist(), state.rows, settings_WS, state.samplers)
            if step.graph is None:
                tokens_W = self._first(step, state, settings_WS)
            else:
                step.graph.launch()
        state.cache.advance(state.rows)
        assert step.logits_WN is not None
        logits_WN = step.logits_WN[: len(state.samplers)]
        if settings_WS is None:
            return self.drawn(logits_WN, state, None)
        shown_WN = self.to_numpy(logits_WN) if state.logprobs else None
        return self.taken(tokens_W, shown_WN, state.samplers, history=step.history)

    def drawn(self, logits_WN: Array, state: State, settings_WS: Array | None) -> Drawn:
        """A token for each row that wants one."""
        if settings_WS is not None:
            tokens_W, entries_WT2 = self.empty(len(settings_WS), dtype="int64"), None
            if any(sampler.adjusts for sampler in state.samplers):
                history = History(self.device, state.samplers, len(state.samplers), 1)
                history.tell(state.samplers)
                entries_WT2 = history.entries_WT2
            self.sample(logits_WN, self.device.upload(settings_WS), tokens_W, entries_WT2)
            shown_WN = self.to_numpy(logits_WN) if state.logprobs else None
            return self.taken(self.to_numpy(tokens_W), shown_WN, state.samplers)
        logits_WN = self.to_numpy(logits_WN)
        tokens = [sampler.draw(logits_N) for sampler, logits_N in zip(state.samplers, logits_WN, strict=True)]
        return Drawn(np.array(tokens, dtype=np.int64), logits_WN if state.logprobs else None)

    def _step_of(self, model: Model, state: State, adjusting: bool) -> Step | None:
        """The step of so many rows with one token each; None where it is another kind, or cannot be captured."""
        rows, cache = state.rows, state.cache
        if self.dtype == "float64" or not isinstance(cache, DeviceCache) or not isinstance(rows, DeviceRows):
            return None
        if rows.ends is None or len(rows.ends) < len(rows.counts) or set(rows.counts) != {1}:
            return None
        room = 1 << (len(rows.slots) - 1).bit_length()
        key = id(model), room, adjusting
        step = cache.steps.get(key)
        if step is None or not step.serves(state.samplers):
            cache.steps.pop(key, None)
            cache.steps[key] = step = Step(self.device, model, cache, room, state.samplers if adjusting else ())
        if step.problem:
            log_once(f"{self.name}.step runs every time: {step.problem}")
            return None
        return step

    def _with_the_next(self, step: Step, state: State, settings_WS: Array) -> Drawn:
        """A captured step, and the one after it launched before this one's tokens are waited for."""
        rows, cache, tokens = state.rows, state.cache, state.tokens_M.tolist()
        assert isinstance(rows, DeviceRows)
        assert isinstance(cache, DeviceCache)
        if rows.ahead is not None and rows.ahead.is_for(step, rows, tokens, settings_WS, state):
            turn = rows.ahead.turn
        else:
            turn = self._played(step, tokens, rows, settings_WS, state)
        cache.advance(rows)
        ahead = self._ahead(step, rows.moved(1), state)
        (tokens_W, *logits), seconds = turn.wait()
        drawn = self.taken(tokens_W, logits[0] if logits else None, state.samplers, seconds, step.history)
        cache.ahead = ahead and ahead._replace(tokens=drawn.tokens_W.tolist())
        return drawn

    def _ahead(self, step: Step, rows: DeviceRows, state: State) -> Ahead | None:
        """The step over these rows, launched without knowing its tokens; None where it will not be, or has no room."""
        if state.ends or not step.looks_ahead or max(rows.starts) >= state.cache.size:
            return None
        settings_WS = settings_of(state.samplers, 1)
        try:
            turn = self._played(step, None, rows, settings_WS, state)
        except MemoryLimitError:
            # Nobody has asked for it yet, and the tokens of the step before it are on their way.
            step.looks_ahead = False
            return None
        return Ahead(step, rows.slots, rows.starts, settings_WS, state.samplers, state.logprobs, turn)

    def _played(self, step: Step, tokens: Sequence[int] | None, rows: DeviceRows, settings_WS: Array, state: State) -> Turn:
        """The captured step once more; without tokens, with those that the launch before it draws."""
        assert step.graph is not None
        assert step.logits_WN is not None
        with self.limited(len(rows.slots), step.model.parameters):
            step.fill(tokens, rows, settings_WS, state.samplers)
            results = [step.tokens_M, step.logits_WN[: len(rows.slots)]]
            return self.device.turn(step.graph, results if state.logprobs else results[:1])

    def _forward(self, step: Step, state: State) -> Array:
        """The step's logits [room, N]; its tokens are drawn."""
        model, rows = step.model, step.rows(state.rows)
        step.layers.clear()
        step.kept.clear()
        logits_WN = model.architecture.forward(self, model.config, model.weights, step.tokens_M, rows, state.cache)
        logits_WN = self.plain(logits_WN)
        entries_WT2 = None if step.history is None else step.history.entries_WT2
        self.sample(logits_WN, step.settings_WS, step.tokens_M, entries_WT2)
        return logits_WN

    def _first(self, step: Step, state: State, settings_WS: Array | None) -> Array:
        """A step that runs as any other -> tokens_W; the second one is captured too."""
        step.logits_WN = self._forward(step, state)
        tokens_W = self.to_numpy(step.tokens_M)
        step.runs += 1
        if step.runs == 2:
            self._capture(step, state, settings_WS)
        return tokens_W

    def _capture(self, step: Step, state: State, settings_WS: Array | None) -> None:
        """Capture the step that has just run; what a launch gives is compared with what it gave."""
        W = len(state.rows.slots)
        assert step.logits_WN is not None
        want_WN = self.to_numpy(step.logits_WN)[:W]
        try:
            step.fill(state.tokens_M.tolist(), state.rows, settings_WS, state.samplers)
            graph, logits_WN = self.device.capture(lambda: self._forward(step, state))
        except CannotCaptureError as error:
            step.problem = str(error)
            return
        # The step that ran has drawn, and its tokens lie in the place of those that it was given.
        step.fill(state.tokens_M.tolist(), state.rows, settings_WS, state.samplers)
        graph.launch()
        if np.array_equal(self.to_numpy(logits_WN)[:W], want_WN, equal_nan=True):
            step.graph, step.logits_WN = graph, logits_WN
        else:
            step.problem = "a launched graph gives other logits than the step that ran"
