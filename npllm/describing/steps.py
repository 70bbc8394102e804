"""From the events of a recorded pass to the steps of a `Description`: what each costs, and where its source is."""

from __future__ import annotations

import functools
import inspect
import linecache
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

from npllm import blocks
from npllm.backend import Backend
from npllm.describing.description import Place, Scores, Step
from npllm.describing.recorder import PACKAGE, TOKENS, Event, Planned
from npllm.describing.structure import ATTENTION

# The definition behind an operation of the backend.
DEFINITIONS: dict[str, Callable[..., Any]] = {
    "embed": Backend.embed,
    "rms_norm": blocks.rms_norm,
    "layer_norm": blocks.layer_norm,
    "linear": Backend.linear,
    "attention": blocks.softmax_attention,
    "latent_attention": Backend.latent_attention,
    "moe": blocks.moe_by_token,
}


def steps_of(events: list[Event]) -> tuple[Step, ...]:
    return tuple(map(step_of, events))


def step_of(event: Event) -> Step:
    # Of a mixture, a token meets the experts that it goes to.
    chosen = event.details.get("chosen") if event.op == "moe" else None
    parameters = [weight.tensor.size for weight in event.weights if weight.tensor.part != "buffer"]
    met = [_met(weight, chosen, event.op == "embed") for weight in event.weights if weight.tensor.part != "buffer"]
    rows = event.shape[0]
    return Step(
        op=event.op,
        layer=event.layer,
        reads=tuple(_per_token(shape) for shape in event.shapes),
        gives=_per_token(event.shape),
        weights=tuple(weight.name for weight in event.weights),
        parameters=sum(parameters),
        active=sum(met),
        products=event.products // rows,
        scores=_scores(event) if event.op in ATTENTION else None,
        wanted=rows < TOKENS,
        place=event.place,
        block=_block(event),
    )


def _met(weight: Planned, chosen: int | None, looked_up: bool) -> int:
    size, count = weight.tensor.size, weight.tensor.shape[0]
    return size // count if looked_up else size if chosen is None else size // count * chosen


def _per_token(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the axis of tokens; keys lie behind one of rows."""
    return shape[2:] if shape[:2] == (1, TOKENS) else shape[1:]


def _scores(event: Event) -> Scores:
    d = event.details
    return Scores(event.shape[1], *d["widths"], d["mask"], d.get("latent", 0), d.get("rope_dim", 0))


def _block(event: Event) -> Place | None:
    if event.code is not None:
        return _defined(event.code)
    if event.op == "rope":
        return _defined(_code(blocks.rotate_interleaved if event.details["interleaved"] else blocks.rotate_halves))
    return _defined(_code(DEFINITIONS[event.op])) if event.op else None


def _code(function: Callable[..., Any]) -> CodeType:
    code: CodeType = inspect.unwrap(function).__code__
    return code


@functools.cache
def _defined(code: CodeType) -> Place:
    """Where a function's `def` stands; its code begins at its decorators."""
    line = code.co_firstlineno
    while (text := linecache.getline(code.co_filename, line)) and not text.lstrip().startswith("def "):
        line += 1
    return Place(Path(code.co_filename).relative_to(PACKAGE.parent).as_posix(), line, code.co_name)
