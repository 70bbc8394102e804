"""A forward pass that computes nothing and remembers everything: what a model does, read off the code that does it.

`record` runs a model's `forward` for a few tokens on a backend whose operations return arrays of the right shape. Weights
are their names and shapes. Activations are small arrays that know what made them (`Traced`), so the list of events that
comes out is a graph: which norm feeds which projection, what happened to the queries before attention.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.blocks.masks import Mask
from npllm.blocks.moe import Router
from npllm.blocks.rope import Angles, Rope
from npllm.cache import Keys, LayerSpec, Rows
from npllm.describing.description import Place
from npllm.errors import ConfigError
from npllm.weights import Experts, Gate, Linear, Spec, Tensor, build_tree

PACKAGE = Path(__file__).parent.parent
OWN, HERE, BLOCKS = (str(PACKAGE / part) + os.sep for part in ("", "describing", "blocks"))
# Where canonical bodies stand: the place that a reader wants to see is their caller's.
INNER = (str(PACKAGE / "backend.py"), BLOCKS, HERE)
# It widens small types around every block, and is none itself.
WIDENING = str(PACKAGE / "blocks" / "dtypes.py")

# Arguments of blocks that say how, not what.
PLAIN = (int, float, str, Mask, Router)

# Tokens of the recorded step, and of these those whose logits are wanted: they differ, so that a step's first axis tells
# what it runs over.
TOKENS, WANTED = 2, 1

# Numbers that a step may give per token: far beyond any published model, and still quick to make.
MOST_WIDTH = 1 << 24


@dataclass(eq=False)
class Event:
    """One step of the recorded pass.

    op        the backend's operation, the name of a block, or "" for arithmetic of the model's own text.
    layer     its index, or None before and after the layers.
    weights   what it reads of the model.
    shapes    of the activations that it takes, the tokens' axis among them; `shape` is that of the result.
    details   arguments that are no arrays (mask, scale, act, ...).
    products  multiply-adds of its matrix products, whole; attention's are counted by npllm.describing.costs.
    stream    the result is the residual stream: it still holds the embedding.
    place     where the model's text asks for it; `block` is the function in npllm.blocks that computes it,
              `inner` the line in a canonical body of the backend whose arithmetic it is.
    """

    op: str
    layer: int | None
    place: Place
    block: Callable[..., Any] | None = None
    inner: Place | None = None
    weights: list[Planned] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    products: int = 0
    stream: bool = False
    parents: list[Event] = field(default_factory=list)

    def take(self, arrays: Iterable[Any]) -> None:
        """Note what is read: weights, and activations that another event made."""
        for array in flattened(arrays):
            if array.weight is not None and array.weight not in self.weights:
                self.weights.append(array.weight)
            if array.event is not None and array.event is not self and array.event not in self.parents:
                self.parents.append(array.event)
                self.shapes.append(array.event.shape)

    @property
    def is_norm(self) -> bool:
        return self.op in ("rms_norm", "layer_norm")

    def ancestors(self) -> Iterator[Event]:
        """What went into the result, itself included, back to the residual stream (the stream's own events are left out)."""
        seen, waiting = set[int](), [self]
        while waiting:
            event = waiting.pop()
            if id(event) in seen or (event.stream and event is not self):
                continue
            seen.add(id(event))
            yield event
            waiting += event.parents


@dataclass(frozen=True)
class Planned:
    """A weight of which only the spec is known; a backend sees matrices as [out, in]."""

    name: str
    tensor: Tensor
    nbytes: ClassVar[int] = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[::-1] if self.tensor.stored == "io" else self.tensor.shape

    def __len__(self) -> int:
        return self.shape[0]


class Traced(np.ndarray[Any, Any]):
    """An array that knows the event which made it; views keep it, arithmetic makes a new one."""

    recorder: Recorder
    event: Event | None
    weight: Planned | None

    def __array_finalize__(self, source: Any) -> None:
        if isinstance(source, Traced):
            self.recorder = source.recorder
        self.event = getattr(source, "event", None)
        self.weight = getattr(source, "weight", None)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        operands = [plain(each) for each in inputs]
        if out is not None:
            options["out"] = tuple(plain(each) for each in out)
        result = getattr(ufunc, method)(*operands, **options)
        recorder = next(each.recorder for each in (*inputs, *(out or ())) if isinstance(each, Traced))
        made = recorder.computed(result, inputs, into=out[0] if out else None)
        event: Event = made.event
        if ufunc is np.matmul:
            event.products += result.size * operands[0].shape[-1]
        if ufunc is np.multiply and not event.op:
            event.details["factor"] = next((each for each in operands if isinstance(each, int | float | np.floating)), None)
        return made

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        result = function(*map(plain, args), **{name: plain(value) for name, value in options.items()})
        return self.recorder.computed(result, [*args, *options.values()])


def plain(value: Any) -> Any:
    """`value` with NumPy's own arrays in the place of Traced ones."""
    if isinstance(value, list | tuple) and any(isinstance(each, Traced) for each in value):
        return [plain(each) for each in value]
    return np.asarray(value) if isinstance(value, Traced) else value


def flattened(values: Iterable[Any]) -> Iterator[Traced]:
    for value in values:
        if isinstance(value, Traced):
            yield value
        elif isinstance(value, list | tuple):
            yield from flattened(value)


class Memory(NamedTuple):
    """The cache of one layer during the recording: what is appended is what is seen."""

    spec: LayerSpec

    def append(self, k_MGK: Array, v_MGV: Array | None, rows: Rows) -> Keys:
        values = k_MGK[..., : self.spec.latent] if v_MGV is None else v_MGV
        return Keys.of(np, k_MGK, values, 0)


class Memories(NamedTuple):
    """The caches of all layers, by the name that a `Cache` has for them."""

    layers: list[Memory]


@dataclass
class Log:
    """What the recorders of all layers share; `index` is the layer at work, `frame` that of the block at work."""

    events: list[Event] = field(default_factory=list)
    ropes: list[tuple[Angles, Rope]] = field(default_factory=list)
    index: int | None = None
    frame: FrameType | None = None


def check_width(op: str, numbers: int) -> None:
    """ConfigError where an operation gives more numbers per token than any model's."""
    if numbers > MOST_WIDTH:
        raise ConfigError(f"{op} would give {numbers:,} numbers per token: too wide")


class Recorder(Backend):
    """The backend of a recorded pass, or of one layer of it."""

    name = "recorder"

    def __init__(self, log: Log, index: int | None = None) -> None:
        super().__init__()
        self.log, self.index = log, index

    def layer(self, index: int) -> Backend:
        return Recorder(self.log, index)

    def mark(self, name: str, x: Array) -> Array:
        self.log.index = self.index
        return x

    # -- events -------------------------------------------------------------------------------------------------------

    def traced(self, array: Any, event: Event | None = None, weight: Planned | None = None) -> Traced:
        made: Traced = np.asarray(array).view(Traced)
        made.recorder, made.event, made.weight = self, event, weight
        return made

    def record(self, op: str, shape: tuple[int, ...], read: Iterable[Any], weights: Iterable[Any], **details: Any) -> Traced:
        """Note an operation -> zeros in the shape of its result; ConfigError where that is beyond any model."""
        check_width(op or "arithmetic", math.prod(shape) // TOKENS)
        self.log.index = self.index
        event = self._begin(op, sys._getframe(1))
        event.shape, event.details = shape, details
        event.weights += [weight for weight in weights if weight is not None]
        event.take(read)
        event.shapes = [array.shape for array in flattened(read)]
        return self.traced(np.zeros(shape, np.float32), event)

    def _begin(self, op: str, frame: FrameType, block: Callable[..., Any] | None = None) -> Event:
        event = Event(op, self.log.index, place_of(frame), block)
        self.log.events.append(event)
        return event

    def computed(self, result: Any, read: Iterable[Any], into: Any = None) -> Any:
        """`result` of NumPy's arithmetic as a Traced array, with an event for the block or line that it belongs to."""
        if not isinstance(result, np.ndarray | np.generic):
            return result
        read = list(flattened(read))
        event = self._current()
        event.take(read)
        event.shape = result.shape
        event.stream = event.stream or any(array.event is not None and array.event.stream for array in read)
        if into is None:
            return self.traced(result, event)
        if isinstance(into, Traced):
            into.event = event
        return into

    def _current(self) -> Event:
        """The event of the block that is running; arithmetic of the model's own text is one by itself."""
        frame, block = _below(sys._getframe(1)), None
        while frame.f_code.co_filename.startswith(BLOCKS):
            block = block if frame.f_code.co_filename == WIDENING else frame
            frame = _below(frame)
        if block is None:
            event = self._begin("", frame)
            inner = Place(shown_path(frame.f_code.co_filename), frame.f_lineno, frame.f_code.co_name)
            event.inner = None if inner == event.place else inner
            return event
        name = block.f_code.co_name
        if block is not self.log.frame:
            self.log.frame = block
            event = self._begin(name, frame, block.f_globals[name])
            event.details = {name: value for name, value in block.f_locals.items() if isinstance(value, PLAIN)}
        return next(event for event in reversed(self.log.events) if event.op == name)

    # -- services -----------------------------------------------------------------------------------------------------

    def prepare(self, bundle: Any) -> Any:
        return bundle

    def dense(self, weight: Planned) -> Array:
        return self.traced(np.zeros(weight.shape, np.float32), weight=weight)

    # -- operations ---------------------------------------------------------------------------------------------------

    def embed(self, tokens_M: Array, w: Linear, /) -> Array:
        made = self.record("embed", (len(tokens_M), *w.weight.shape[1:]), [tokens_M], w)
        assert made.event is not None
        made.event.stream = w.weight.tensor.part == "embedding"
        return made

    def rms_norm(self, x_D: Array, w: Linear | None, /, eps: float, offset: float = 0.0) -> Array:
        return self.record("rms_norm", x_D.shape, [x_D], w or (), eps=eps, offset=offset)

    def layer_norm(self, x_D: Array, w: Linear, /, eps: float) -> Array:
        return self.record("layer_norm", x_D.shape, [x_D], w, eps=eps, offset=0.0)

    def linear(self, x_MD: Array, w: Linear, /, residual_MF: Array | None = None) -> Array:
        out, into = w.weight.shape
        how = {"bias": w.bias is not None, "residual": residual_MF is not None}
        made = self.record("linear", (len(x_MD), out), [x_MD], w, **how)
        assert made.event is not None
        made.event.products, made.event.stream = len(x_MD) * out * into, residual_MF is not None
        return made

    def angles(self, rope: Rope, positions_M: Array, /) -> Angles:
        check_width("rope", rope.dim)
        made = super().angles(rope, np.asarray(positions_M))
        self.log.ropes.append((made, rope))
        return made

    def rope_of(self, angles: Angles) -> Rope:
        return next(rope for made, rope in self.log.ropes if made is angles)

    def rope(self, x_MHK: Array, angles: Angles, /, interleaved: bool = False) -> Array:
        return self.record("rope", x_MHK.shape, [x_MHK], (), rope=self.rope_of(angles), interleaved=interleaved)

    def attention(
        self, q_MHK: Array, keys: Keys, rows: Rows, /, *,
        mask: Mask, scale: float, softcap: float | None = None, sinks: Linear | None = None,
    ) -> Array:  # fmt: skip
        shape = (*q_MHK.shape[:2], keys.v_BSGV.shape[-1])
        inputs: tuple[Any, ...] = (q_MHK, keys.k_BSGK, keys.v_BSGV)
        return self.record(
            "attention", shape, inputs, sinks or (), mask=mask, scale=scale, softcap=softcap,
            made_by=tuple(each.event for each in inputs), kv_heads=keys.k_BSGK.shape[2], widths=(q_MHK.shape[2], shape[-1]),
        )  # fmt: skip

    def latent_attention(self, q_MHF: Array, keys: Keys, rows: Rows, w: Linear, /, *, mask: Mask, scale: float) -> Array:
        (out, L), (M, H, F) = w.weight.shape, q_MHF.shape
        turned = keys.k_BSGK.shape[-1] - L
        values = out // H - (F - turned)
        inputs: tuple[Any, ...] = (q_MHF, keys.k_BSGK)
        return self.record(
            "latent_attention", (M, H, values), inputs, w, mask=mask, scale=scale, softcap=None,
            made_by=tuple(each.event for each in inputs), kv_heads=1, widths=(F, values), latent=L, rope_dim=turned,
        )  # fmt: skip

    def route(self, h_MD: Array, w: Gate, /, router: Router) -> tuple[Array, Array]:
        logits_ME = self.linear(h_MD, w.gate)
        made = self.record("route", (len(h_MD), router.experts_per_token), [logits_ME], w.correction or (), router=router)
        return made, made

    def moe(
        self, x_MD: Array, w: Experts, index_MC: Array, weight_MC: Array, /, act: str, *, weigh: str = "output"
    ) -> Array:
        chosen, (_, inner, width) = index_MC.shape[1], w.gate_proj.weight.shape
        weights = [each for part in w for each in part]
        made = self.record("moe", x_MD.shape, [x_MD, weight_MC], weights, act=act, weigh=weigh, chosen=chosen)
        assert made.event is not None
        made.event.products = len(x_MD) * chosen * 3 * inner * width
        return made


def _below(frame: FrameType) -> FrameType:
    """The next frame of npllm's own that called this one, NumPy's and those of this recording left out."""
    at = frame.f_back
    while at is not None and (not at.f_code.co_filename.startswith(OWN) or at.f_code.co_filename.startswith(HERE)):
        at = at.f_back
    assert at is not None
    return at


def place_of(frame: FrameType) -> Place:
    """Where the model's own text is at, seen from a frame below it."""
    at = frame
    while at.f_code.co_filename.startswith(INNER):
        at = _below(at)
    line = at.f_lineno
    while at.f_code.co_name.startswith("<"):  # a comprehension, up to Python 3.11
        at = _below(at)
    return Place(shown_path(at.f_code.co_filename), line, at.f_code.co_name)


@functools.cache
def shown_path(file: str) -> str:
    """A file of the package, from its parent on."""
    return Path(file).relative_to(PACKAGE.parent).as_posix()


def record(architecture: Any, config: Any, spec: Spec) -> list[Event]:
    """The events of one step of `forward`: TOKENS new tokens after nothing, logits of the last WANTED."""
    be = Recorder(Log())
    planned: dict[str, Any] = {name: Planned(name, tensor) for name, tensor in spec.items() if tensor.alias is None}
    weights = build_tree(spec, planned, be.prepare)
    memories: Any = Memories([Memory(each) for each in architecture.cache_spec(config)])
    tokens_M, positions_M = be.traced(np.zeros(TOKENS, np.int64)), be.traced(np.arange(TOKENS))
    rows = Rows((0,), (0,), (TOKENS,), positions_M, np.arange(TOKENS - WANTED, TOKENS))
    architecture.forward(be, config, weights, tokens_M, rows, memories)
    return be.log.events
