"""What a token costs in the KV cache: one model's heads as MHA, GQA, MQA and MLA, and published models side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from npllm.config import printable
from npllm.describing.description import Attention, Description
from npllm.describing.units import binary, number
from npllm.pictures import metrics
from npllm.pictures.diagram import textures
from npllm.pictures.drawing import Drawing
from npllm.pictures.svg import Element, element, group, path, rect, text

MARGIN, WIDTH = 30.0, 904.0
PANEL, PANEL_GAP = 200.0, 14.67
HEADS, GROUPS = 8, 2
SIZE, SMALL = 12.0, 11.0
BAR, STEP = 18.0, 30.0


class Way(NamedTuple):
    """A way to keep keys and values: its name, what it keeps per layer in words, bytes per token of all layers."""

    name: str
    kept: str
    bytes: int
    keys: int


class Bar(NamedTuple):
    """A model's bytes per token: all, and those that go on growing when every window is full."""

    name: str
    kind: str
    whole: int
    growing: int


def ways(d: Description, groups: int = 8) -> list[Way]:
    """The heads of a model with latent attention as MHA, GQA with `groups` key/value heads, MQA, and as they are."""
    a = d.layers[0].attention
    both = a.head_dim + a.value_dim
    told = [
        Way("Multi-head", f"{a.heads:,} × ({a.head_dim:,} + {a.value_dim:,}) numbers", d.kv_bytes_as(None, 1), HEADS),
        Way("Grouped-query", f"{groups:,} × ({a.head_dim:,} + {a.value_dim:,}) numbers", d.kv_bytes_as(groups, 1), GROUPS),
        Way("Multi-query", f"{both:,} numbers", d.kv_bytes_as(1, 1), 1),
    ]
    kept = f"{a.latent or 0:,} + {a.rope_dim or 0:,} numbers"
    return [*told, Way("Multi-head latent", kept, d.kv_bytes_per_token(), 0)]


def bars(descriptions: Sequence[Description]) -> list[Bar]:
    """Bytes per token of models, the most first."""
    told = [Bar(printable(d.name), _kinds(d), d.kv_bytes_per_token(), d.kv_growth_per_token()) for d in descriptions]
    return sorted(told, key=lambda bar: -bar.whole)


def _kinds(d: Description) -> str:
    kinds: dict[str, Attention] = {}
    for layer in d.layers:
        kinds.setdefault(layer.attention.kind, layer.attention)
    heads = {
        "MHA": "{h:,} heads",
        "GQA": "{h:,} heads, {k:,} KV heads",
        "MQA": "{h:,} heads, 1 KV head",
        "MLA": "latent of {n:,}",
    }
    told = [
        f"{kind}: {heads[kind].format(h=a.heads, k=a.kv_heads, n=(a.latent or 0) + (a.rope_dim or 0))}"
        for kind, a in kinds.items()
    ]
    return "; ".join(told)


def drawing(model: Description, descriptions: Sequence[Description], prefix: str = "kept") -> Drawing:
    """Above, the ways to keep one model's keys and values; below, what models keep."""
    elements = [
        textures(prefix),
        *_heading(MARGIN, f"The heads of {model.name}, four ways", "what the KV cache keeps of a token"),
    ]
    told = ways(model)
    for i, way in enumerate(told):
        elements.append(
            group(_panel(way, told[0].bytes, len(model.layers)), "box", MARGIN + i * (PANEL + PANEL_GAP), MARGIN + 50)
        )
    top = MARGIN + 50 + 216 + 44
    elements += _heading(
        top,
        "Published models",
        "bytes per token in bfloat16; hatched: layers with a window, which stop growing when it is full",
    )
    told_bars = bars(descriptions)
    elements.append(group(_chart(told_bars, prefix), y=top + 44))
    return Drawing(elements, WIDTH, top + 44 + len(told_bars) * STEP + MARGIN - 6)


def _heading(y: float, title: str, subtitle: str) -> list[Element]:
    return [text(MARGIN, y + 14, title, 15, bold=True), text(MARGIN, y + 32, subtitle, SIZE, "soft")]


def _panel(way: Way, most: int, layers: int) -> Iterator[Element]:
    """One way: who reads what, what is kept, and its share of the most expensive one as an area."""
    yield rect(0, 0, PANEL, 216, "frame edge", 6)
    yield text(12, 22, way.name, 13, bold=True)
    yield group(_heads(way.keys), "glyph", 12, 36)
    yield text(12, 122, way.kept, SMALL)
    yield text(12, 138, f"× {layers:,} layers × 2 bytes", SMALL)
    yield text(12, 164, binary(way.bytes), 16, bold=True)
    if way.bytes < most:
        yield text(PANEL - 12, 164, f"1/{number(round(most / way.bytes, 1))}", SMALL, "soft", anchor="end")
    room = PANEL - 24
    yield rect(12, 178, room, 20, "paper edge", 2)
    yield rect(12, 178, room * way.bytes / most, 20, "ink")


def _heads(keys: int) -> Iterator[Element]:
    """Query heads above; below, heads of keys and values, or one latent vector (keys of 0)."""
    wide, each = PANEL - 24, (PANEL - 24) / HEADS
    for i in range(HEADS):
        x = (i + 0.5) * each
        target = x if not keys else (i * keys // HEADS + 0.5) * wide / keys
        yield path([(x, 18), (target, 44)], "thin")
        yield rect(x - 6, 4, 12, 14, "attention edge", 2)
    if not keys:
        yield rect(6, 44, wide - 12, 14, "ends edge", 7)
        return
    for g in range(keys):
        x = (g + 0.5) * wide / keys
        yield rect(x - 8, 44, 7, 14, "ends edge", 1.5)
        yield rect(x + 1, 44, 7, 14, "ends edge", 1.5)


def _chart(told: list[Bar], prefix: str) -> Iterator[Element]:
    names = max(metrics.width(bar.name, SIZE, bold=True) for bar in told) + 12
    kinds = max(metrics.width(bar.kind, SMALL) for bar in told) + 16
    left = MARGIN + names + kinds
    room = WIDTH - MARGIN - left - 96
    most = max(bar.whole for bar in told)
    for i, bar in enumerate(told):
        y = i * STEP
        whole, growing = room * bar.whole / most, room * bar.growing / most
        yield text(MARGIN, y + 13.5, bar.name, SIZE, bold=True)
        yield text(MARGIN + names, y + 13.5, bar.kind, SMALL, "soft")
        if bar.growing < bar.whole:
            yield element(
                "rect", x=left + growing, y=y, width=whole - growing, height=BAR, fill=f"url(#{prefix}2)", class_="edge"
            )
        yield rect(left, y, growing, BAR, "ink")
        later = "" if bar.growing == bar.whole else f", {binary(bar.growing)}"
        yield text(left + whole + 8, y + 13.5, f"{binary(bar.whole)}{later}", SMALL)
