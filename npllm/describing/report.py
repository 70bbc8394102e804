"""A description as text for a terminal: aligned, and no wider than WIDTH columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from npllm.describing.description import Description
from npllm.describing.facts import INPUT, NONE, WINDOWS, Fact, facts_of
from npllm.describing.limits import Machine
from npllm.describing.units import binary, decimal

WIDTH, LABEL = 100, 30

CONVENTIONS = (
    "A tied head counts once; buffers, and layers that predict further tokens, do not count. A multiply-add is 2 FLOPs, of "
    "matrix products and attention; norms, RoPE, softmax and activations are not counted. A prompt is computed in one step, "
    "with the logits of its last token."
)


def report(d: Description, context: int, kv_dtype: str, weights: str | None, machine: Machine | None) -> str:
    """All of it; `weights` is the storage format of what is read (None: as published)."""
    facts = facts_of(d, context, kv_dtype, weights, machine)
    lines = [*_head(d, context)]
    for section in dict.fromkeys(fact.section for fact in facts):
        if section == "parameters":
            lines += ["", *_parameters(d)]
        elif section == "weights":
            lines += ["", *_weights(d)]
        else:
            lines += ["", section, *rows(fact for fact in facts if fact.section == section and _told(d, fact))]
    if machine is not None:
        lines += _wrapped("on", machine.name)
    return "\n".join([*lines, "", *textwrap.wrap(CONVENTIONS, WIDTH, break_on_hyphens=False)]) + "\n"


def _told(d: Description, fact: Fact) -> bool:
    """Not what there is none of, nor what windows save in a model without any."""
    has_windows = d.kv_growth_per_token() < d.kv_bytes_per_token()
    return fact.text != NONE and (has_windows or fact.name not in WINDOWS)


def _head(d: Description, context: int) -> Iterator[str]:
    p = d.parameters
    active = "" if p.active == p.total else f", {decimal(p.active)} active per token"
    yield f"{d.name} ({d.model_type})"
    yield f"{decimal(p.total)} parameters{active}; {binary(d.kv_bytes_per_token())} of keys and values per token in bf16"
    if context > d.context:
        yield f"beyond the model: {context:,} tokens are asked for, it was made for {d.context:,}"


def rows(facts: Iterable[Fact]) -> Iterator[str]:
    for fact in facts:
        yield from _wrapped(fact.name, fact.text)


def _wrapped(name: str, text: str) -> list[str]:
    indent = " " * (LABEL + 4)
    room = textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False) or [""]
    first, *rest = room
    return [f"  {name:<{LABEL}}  {first}", *(indent + line for line in rest)]


def _parameters(d: Description) -> Iterator[str]:
    p = d.parameters
    yield from columns(("parameters", "all", "active per token"), [])
    named = [(part, count) for part, count in p]
    yield from columns((), [(part, f"{count.total:,}", f"{count.active:,}") for part, count in named])
    # A tied embedding is the head too.
    name = "without embedding tables" if p["lookup"].total else f"without {'' if d.head.tied else 'input '}embedding"
    sums = [("together", p.without()), (name, p.without(*INPUT))]
    if p["head"].total:
        sums.append(("without embedding and head", p.without(*INPUT, "head")))
    yield from columns((), [(name, f"{count.total:,}", f"{count.active:,}") for name, count in sums])
    if d.claim:
        yield from _wrapped("published", d.claim)


def _weights(d: Description) -> Iterator[str]:
    table = [
        (f"{format}{' (as published)' * (format == d.stored)}", binary(size), binary(d.weights_read(format)))
        for format, size in d.weight_bytes
    ]
    yield from columns(("weights", "all", "read per decoded token"), table)


def columns(heads: Sequence[str], table: Iterable[Sequence[str]]) -> Iterator[str]:
    """A label, then right-aligned cells."""
    if heads:
        yield f"{heads[0]:<{LABEL + 2}}" + "".join(f"{head:>24}" for head in heads[1:])
    for name, *cells in table:
        yield f"  {name:<{LABEL}}" + "".join(f"{cell:>24}" for cell in cells)
