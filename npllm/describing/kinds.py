"""Names for the distinct layers of a model, and how they follow each other in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

from npllm.describing.description import Layer, Run
from npllm.describing.units import number


def _sight(layer: Layer) -> str:
    mask = layer.attention.mask
    return "sliding window" if mask.window is not None else "chunked" if mask.chunk is not None else "global"


def _numbers(layer: Layer) -> str:
    """All that layers may still differ in, for telling them apart."""
    a = layer.attention
    seen = a.mask.window or a.mask.chunk
    base = f"RoPE base {number(a.rope.theta)}" if a.rope else "no RoPE"
    return ", ".join([f"{layer.ffn.width:,} wide", *([f"sees {seen:,}"] if seen else []), base])


# From what matters most: an aspect joins the names only if it tells apart what those before it do not.
ASPECTS: tuple[Callable[[Layer], str], ...] = (
    _sight,
    lambda layer: "MoE" if layer.ffn.experts else "dense",
    lambda layer: "NoPE" if layer.attention.rope is None else "",
    lambda layer: "" if layer.attention.shares_keys_of is None else "shared keys",
    lambda layer: "sparse gates" if layer.ffn.sparsity else "",
    lambda layer: layer.attention.kind,
    lambda layer: f"FFN {layer.ffn.width:,}",
    _numbers,
)


def kind_names(layers: list[Layer]) -> list[str]:
    """A short name for each of several kinds of layers, no two alike."""
    told: list[tuple[str, ...]] = [()] * len(layers)
    for aspect in ASPECTS:
        finer = [(*words, aspect(layer)) for words, layer in zip(told, layers, strict=True)]
        if len(set(finer)) > len(set(told)):
            told = finer
    names = [", ".join(filter(None, words)) or "plain" for words in told]
    return [name if names.count(name) == 1 else f"{name}, kind {i + 1}" for i, name in enumerate(names)]


def pattern(runs: Iterable[Run], names: list[str]) -> str:
    """How the kinds of layers follow each other: "10 × (5 sliding window, 1 global), then 2 sliding window"."""
    if len(names) == 1:
        return "all alike"
    told = []
    names = [name.replace(", ", " ") for name in names]
    for times, kinds in runs:
        if len(kinds) == 1:
            told.append(f"{times * kinds[0][1]:,} {names[kinds[0][0]]}")
            continue
        inner = ", ".join(f"{count:,} {names[kind]}" for kind, count in kinds)
        told.append(inner if times == 1 else f"{times:,} × ({inner})")
    return ", then ".join(told)


def ranges(layers: tuple[int, ...]) -> str:
    """Indices as a short text: "layers 3–60", "layer 5", "every 4th from 3"."""
    if len(layers) == 1:
        return f"layer {layers[0]:,}"
    steps = {later - former for former, later in pairwise(layers)}
    if steps == {1}:
        return f"layers {layers[0]:,}–{layers[-1]:,}"
    if len(layers) < 4:
        return f"layers {', '.join(map(str, layers))}"
    step = steps.pop()
    return f"from {layers[0]:,} on" if steps else f"every {ordinal(step)} from {layers[0]:,}"


def ordinal(value: int) -> str:
    ending = "th" if value % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")
    return f"{value:,}{ending}"
