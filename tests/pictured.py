"""Descriptions to draw: random small ones of every architecture, and some with the numbers and names that do most harm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from npllm.describing import Description, description_of
from npllm.describing.description import Kind, Layer
from npllm.describing.structure import kinds_of, pattern_of
from tests import strategies as our

# What a file, a terminal, a right-to-left reader, a page or XML would stumble over.
NAMES = (
    "<script>alert(1)</script> & \"quotes\" 'too' ]]> <!-- -->",
    "a/very/long/name/of/a/folder/that/no/column/is/wide/enough/for/since/it/goes/on/and/on/config.json",
    "模型 بيت \u202eevil\x00\x07\ud800 e\u0301 🚀",
    "Qwen3",
)


def random_descriptions(examples: int) -> list[list[Description]]:
    """One to three models side by side, so many times for each architecture as the first."""
    found: list[list[Description]] = []

    def take(name: str) -> None:
        @settings(max_examples=examples)
        @given(our.tiny_config(name), st.lists(our.tiny_config(), max_size=2), st.permutations(NAMES))
        def draw(first: Any, others: list[Any], names: list[str]) -> None:
            found.append([description_of(each, title) for each, title in zip([first, *others], names, strict=False)])

        draw()

    for name in our.CONFIGS:
        take(name)
    return found


def inflated(d: Description) -> Description:
    """The same with numbers as long as a config may have them."""
    factor = 10**7 + 3
    layers = tuple(_larger(layer, factor) for layer in d.layers)
    kinds = kinds_of(layers)
    order = [next(k for k, kind in enumerate(kinds) if kind.layer == layer) for layer in layers]
    embedding = replace(d.embedding, rows=d.embedding.rows * factor, width=d.embedding.width * factor)
    return replace(d, layers=layers, kinds=kinds, pattern=pattern_of(order), embedding=embedding, context=d.context * factor)


def _larger(layer: Layer, factor: int) -> Layer:
    a, f = layer.attention, layer.ffn
    names = ("heads", "kv_heads", "head_dim", "value_dim", "query_rank", "latent", "rope_dim")
    attention = replace(a, **{name: value * factor for name in names if (value := getattr(a, name))})
    sizes = ("width", "experts", "chosen", "shared_width")
    ffn = replace(f, **{name: value * factor for name in sizes if (value := getattr(f, name))})
    return replace(layer, attention=attention, ffn=ffn)


def many_kinds(d: Description, count: int) -> Description:
    """`count` layers like the model's, no two alike: as many widths, and every other one without RoPE."""
    layers = []
    for i in range(count):
        like = d.layers[i % len(d.layers)]
        rope = None if i % 2 else like.attention.rope
        layers.append(replace(like, attention=replace(like.attention, rope=rope), ffn=replace(like.ffn, width=17 + i)))
    kinds = tuple(Kind(layer, (i,)) for i, layer in enumerate(layers))
    return replace(d, layers=tuple(layers), kinds=kinds, pattern=pattern_of(list(range(count))))
