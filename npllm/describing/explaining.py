"""The forward pass step by step, with a model's numbers: what `npllm explain` prints.

Equations are what the functions' docstrings say, numbers are the arguments that they were called with, lines are those
that were running: nothing here is written down a second time.
"""

from __future__ import annotations

import ast
import functools
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, is_dataclass
from typing import Any, NamedTuple

from npllm.blocks.rope import Rope
from npllm.describing.description import Description, Place, Step
from npllm.describing.facts import rope_words
from npllm.describing.kinds import kind_names, ranges
from npllm.describing.recorder import PACKAGE
from npllm.describing.report import CONVENTIONS, WIDTH
from npllm.describing.units import binary, decimal, number
from npllm.describing.words import root

INDENT = " " * 6


class Section(NamedTuple):
    """Steps that come one after the other; those of layers stand for all of their kind."""

    title: str
    layers: tuple[int, ...]
    steps: tuple[Step, ...]


def sections_of(d: Description) -> list[Section]:
    """Before the layers, each kind of layer at its first, after the layers."""
    by_layer: dict[int | None, list[Step]] = {}
    for step in d.steps:
        by_layer.setdefault(step.layer, []).append(step)
    first = next(i for i, step in enumerate(d.steps) if step.layer is not None)
    sections = [Section("before the layers", (), d.steps[:first])]
    for name, kind in zip(kind_names([kind.layer for kind in d.kinds]), d.kinds, strict=True):
        where = ranges(kind.indices)
        where = f"{len(kind.indices)} layers, told of layer {kind.indices[0]}" if where.startswith("from") else where
        title = where if len(d.kinds) == 1 else f"{where}: {name}"
        sections.append(Section(title, kind.indices, tuple(by_layer[kind.indices[0]])))
    outside = tuple(step for step in d.steps[first:] if step.layer is None)
    return [*sections, Section("after the layers", (), outside)]


# -- text -------------------------------------------------------------------------------------------------------------


def explanation(d: Description, context: int, kv_dtype: str, weights: str | None) -> str:
    """All steps, with the FLOPs of one decoded token that sees `context` tokens and the bytes that it reads."""
    format = weights or d.stored
    stored = f"weights in {format}, keys and values in {kv_dtype}"
    lines = textwrap.wrap(f"{d.name} ({d.model_type}): one token at a context of {context:,}, {stored}", WIDTH)
    if context > d.context:
        lines.append(f"beyond the model: {context:,} tokens are asked for, it was made for {d.context:,}")
    for section in sections_of(d):
        lines += ["", section.title]
        for i, steps in enumerate(merged(section.steps), 1):
            lines += _step(i, steps, section, context, format, kv_dtype)
        lines += _wrapped(_together(section, context, format, kv_dtype))
    total = f"{decimal(d.decode_flops(context))} FLOPs, {binary(d.decode_bytes(context, format, kv_dtype))} read"
    lines += ["", f"in all: {d.parameters.total:,} parameters, {d.parameters.active:,} active; {total}"]
    return "\n".join([*lines, "", *textwrap.wrap(CONVENTIONS, WIDTH, break_on_hyphens=False)]) + "\n"


def _together(section: Section, context: int, format: str, kv_dtype: str) -> str:
    flops = sum(step.flops(1, context - 1) for step in section.steps)
    once = {step.weights: step for step in section.steps}.values()
    parameters, active = (sum(getattr(step, name) for step in once) for name in ("parameters", "active"))
    keys = sum(step.scores.bytes(context - 1, kv_dtype) for step in section.steps if step.scores)
    size = keys + sum(dict(step.weight_bytes)[format] for step in once)
    used = "" if active == parameters else f", {active:,} of them used"
    what = "each of these layers" if len(section.layers) > 1 else "together"
    return f"{what}: {parameters:,} parameters{used}; {decimal(flops)} FLOPs; {binary(size)} read"


def merged(steps: Iterable[Step]) -> Iterator[list[Step]]:
    """Arithmetic of one line of a model's text counts as one step."""
    group: list[Step] = []
    for step in steps:
        if group and (step.op or group[-1].op or step.place != group[-1].place):
            yield group
            group = []
        group.append(step)
    if group:
        yield group


def _step(i: int, steps: list[Step], section: Section, context: int, format: str, kv_dtype: str) -> Iterator[str]:
    step = steps[-1]
    said = step.meaning if step.op else f"`{statement(step.block or step.place)}`"
    shapes = f"{', '.join(map(shape, steps[0].reads)) or '[]'} -> {shape(step.gives)}"
    title = f"{i:>4}  {name_of(step, section)}"
    if len(title) + len(shapes) < WIDTH:
        yield f"{title:<{WIDTH - len(shapes)}}{shapes}"
    else:
        yield from (title, f"{shapes:>{WIDTH}}")
    yield from _wrapped(said)
    if numbers := told(step):
        yield from _wrapped(", ".join(f"{name} = {value}" for name, value in numbers.items()))
    costs = [f"{step.parameters:,} parameters"] if step.parameters else []
    costs += [f"{step.active:,} of them used"] if step.active < step.parameters else []
    flops = sum(each.flops(1, context - 1) for each in steps)
    costs += [f"{decimal(flops)} FLOPs"] if flops else []
    size = sum(each.bytes(context - 1, format, kv_dtype) for each in steps)
    costs += [f"{binary(size)} read"] if size else []
    where = str(step.place) + (f" -> {step.block} {step.block.function}" if step.block else "")
    yield from _wrapped("; ".join([*costs, where]))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT + "  ", break_on_hyphens=False, break_long_words=False
    )


def name_of(step: Step, section: Section) -> str:
    """The operation and the weights that it reads, by their names within the layer."""
    modules = dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in step.weights)
    if section.layers:
        within = f".{section.layers[0]}."
        modules = dict.fromkeys(name.partition(within)[2] or name for name in modules)
    paths = dict.fromkeys(module.rpartition(".")[0] for module in modules)
    if len(modules) > 1 and len(paths) == 1 and "" not in paths:
        modules = {f"{next(iter(paths))}.({', '.join(module.rpartition('.')[2] for module in modules)})": None}
    return " ".join(filter(None, (step.op or "arithmetic", ", ".join(modules))))


def shape(sizes: tuple[int, ...]) -> str:
    return f"[{' x '.join(f'{size:,}' for size in sizes)}]"


def told(step: Step) -> dict[str, str]:
    """The numbers of a step in words; what is absent or without effect is left out."""
    return {name: _word(value) for name, value in step.details if value is not None and value is not False and value != 0}


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes"
    if isinstance(value, int | float):
        return f"{value:g}" if 0 < value < 1e-3 else number(value) if value == round(value) else root(value)
    if isinstance(value, str):
        return value
    if isinstance(value, Rope):
        return f"({rope_words(value)})"
    fields = {name: part for name, part in value._asdict().items() if part not in (None, False)}
    return f"({', '.join(f'{name} {_word(part)}' for name, part in fields.items())})" if fields else "(causal)"


@functools.cache
def statement(place: Place) -> str:
    """The statement of the source that a line belongs to, on one line."""
    text, nodes = _parsed(place.file)
    within = [node for node in nodes if node.lineno <= place.line <= (node.end_lineno or 0)]
    closest = min(within, key=lambda node: (node.end_lineno or 0) - node.lineno)
    return " ".join((ast.get_source_segment(text, closest) or "").split())


@functools.cache
def _parsed(file: str) -> tuple[str, list[ast.stmt]]:
    text = (PACKAGE.parent / file).read_text(encoding="utf-8")
    return text, [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]


# -- document ---------------------------------------------------------------------------------------------------------


def document(d: Description, context: int, kv_dtype: str, weights: str | None) -> dict[str, Any]:
    """What `npllm explain --json` writes, but for its schema (npllm.cli.explain says what is in it)."""
    format = weights or d.stored
    return {
        "name": d.name,
        "model_type": d.model_type,
        "context": context,
        "weights": format,
        "kv_dtype": kv_dtype,
        "flops": d.decode_flops(context),
        "bytes": d.decode_bytes(context, format, kv_dtype),
        "sections": [
            {
                "title": section.title,
                "layers": list(section.layers),
                "steps": [_entry(step, context, format, kv_dtype) for step in section.steps],
            }
            for section in sections_of(d)
        ],
    }


def _entry(step: Step, context: int, format: str, kv_dtype: str) -> dict[str, Any]:
    return {
        "operation": step.op or "arithmetic",
        "meaning": step.meaning or statement(step.block or step.place),
        "weights": list(step.weights),
        "reads": [list(each) for each in step.reads],
        "gives": list(step.gives),
        "numbers": {name: plain(value) for name, value in step.details},
        "parameters": step.parameters,
        "active": step.active,
        "flops": step.flops(1, context - 1),
        "bytes": step.bytes(context - 1, format, kv_dtype),
        "place": step.place._asdict(),
        "block": step.block and step.block._asdict(),
    }


def plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value._asdict() if hasattr(value, "_asdict") else value
