"""From the events of a recorded pass to the steps of a `Description`: what each costs, and where its source is."""

from __future__ import annotations

import functools
import inspect
import linecache
import re
from collections.abc import Callable, Mapping
from typing import Any

from npllm import blocks
from npllm.backend import Backend
from npllm.describing.description import Place, Scores, Step
from npllm.describing.recorder import TOKENS, Event, Planned, shown_path
from npllm.describing.structure import ATTENTION
from npllm.describing.weights import FORMATS

# The definition behind an operation of the backend.
DEFINITIONS: dict[str, Callable[..., Any]] = {
    "embed": Backend.embed,
    "rms_norm": blocks.rms_norm,
    "layer_norm": blocks.layer_norm,
    "linear": Backend.linear,
    "attention": blocks.softmax_attention,
    "latent_attention": Backend.latent_attention,
    "route": blocks.route,
    "moe": blocks.moe_by_token,
}


# What a step is told with: the rest of an event's details are for npllm.describing.structure.
TOLD = """eps offset mask scale softcap rope interleaved router act weigh chosen sparsity quantile cap span strength active
    bias residual""".split()


NOTHING = tuple((format, 0) for format in FORMATS)


def steps_of(events: list[Event], sizes: Mapping[str, Mapping[str, int]]) -> tuple[Step, ...]:
    """`sizes` holds for each weight its bytes by storage format."""
    return tuple(step_of(event, sizes) for event in events)


def step_of(event: Event, sizes: Mapping[str, Mapping[str, int]]) -> Step:
    block = _block(event)
    rows, parameters = event.shape[0], [each for each in event.weights if each.tensor.part != "buffer"]
    return Step(
        op=event.op,
        layer=event.layer,
        reads=tuple(_per_token(shape) for shape in event.shapes),
        gives=_per_token(event.shape),
        weights=tuple(weight.name for weight in event.weights),
        parameters=sum(weight.tensor.size for weight in parameters),
        active=sum(_met(event, weight, weight.tensor.size) for weight in parameters),
        weight_bytes=_weight_bytes(event, sizes) if event.weights else NOTHING,
        details=tuple((name, value) for name, value in event.details.items() if name in TOLD),
        products=event.products // rows,
        scores=_scores(event) if event.op in ATTENTION else None,
        wanted=rows < TOKENS,
        place=event.place,
        block=event.inner if block is None else _defined(block),
        meaning="" if block is None else meaning(block),
    )


def _weight_bytes(event: Event, sizes: Mapping[str, Mapping[str, int]]) -> tuple[tuple[str, int], ...]:
    return tuple(
        (format, sum(_met(event, weight, sizes[weight.name][format]) for weight in event.weights)) for format in FORMATS
    )


def _met(event: Event, weight: Planned, size: int) -> int:
    """What one token meets of a weight's `size`: a row of a table, of a mixture the experts that it goes to."""
    met = {"embed": 1, "moe": event.details.get("chosen", 0)}.get(event.op)
    return size if met is None else size * met // weight.tensor.shape[0]


def _per_token(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the axis of tokens; keys lie behind one of rows."""
    return shape[2:] if len(shape) == 4 else shape[1:]


def _scores(event: Event) -> Scores:
    d = event.details
    key, value = d["widths"]
    return Scores(event.shape[1], d["kv_heads"], key, value, d["mask"], d.get("latent", 0), d.get("rope_dim", 0))


def _block(event: Event) -> Callable[..., Any] | None:
    """The function that defines what an event computes."""
    if event.op == "rope":
        return blocks.rotate_interleaved if event.details["interleaved"] else blocks.rotate_halves
    return event.block or DEFINITIONS.get(event.op)


@functools.cache
def _defined(function: Callable[..., Any]) -> Place:
    """Where a function's `def` stands; its code begins at its decorators."""
    code = inspect.unwrap(function).__code__
    line = code.co_firstlineno
    while (text := linecache.getline(code.co_filename, line)) and not text.lstrip().startswith("def "):
        line += 1
    return Place(shown_path(code.co_filename), line, code.co_name)


@functools.cache
def meaning(function: Callable[..., Any]) -> str:
    """What a function's docstring says first: the equation, and the paper that it is from."""
    paragraph = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
    first = re.match(r"(?:`[^`]*`|\([^)]*\)|[^`(;])*", paragraph)
    return first[0].rstrip(" .") if first else paragraph
