"""A description as named facts in words, the same names for every model: the rows of `npllm compare`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from npllm.blocks.rope import Rope
from npllm.describing.description import Description, HeadNorm, Layer
from npllm.describing.kinds import kind_names, pattern
from npllm.describing.limits import Machine, limit
from npllm.describing.units import binary, decimal, number, rounded
from npllm.describing.words import SCALING, activation, root

# Groups of key/value heads of the GQA that a cache is compared with.
GROUPS = 8

# What a window saves, of a token once it is full and at a context.
WINDOWS = ("per token, windows full", "without windows")

# Where there is nothing of the kind.
NONE = "-"


class Fact(NamedTuple):
    """`value` is a number where the fact is one, for programs."""

    section: str
    name: str
    text: str
    value: int | float | None = None


def facts_of(
    d: Description, context: int, kv_dtype: str = "bfloat16", weights: str | None = None, machine: Machine | None = None
) -> list[Fact]:
    """All facts; what depends on a context, storage format or machine is of these."""
    return [
        *_model(d),
        Fact("layers", "order", pattern(d.pattern, kind_names([kind.layer for kind in d.kinds]))),
        *(Fact("layers", name, layered(d, aspect)) for name, aspect in ASPECTS),
        *_parameters(d),
        *_cache(d, context, kv_dtype),
        *_work(d, context, kv_dtype, weights or d.stored, machine),
    ]


def _model(d: Description) -> Iterator[Fact]:
    yield Fact("model", "file", f"{d.file}.py")
    yield Fact("model", "layers", f"{len(d.layers):,}", len(d.layers))
    yield Fact("model", "hidden size", f"{d.hidden_size:,}", d.hidden_size)
    yield Fact("model", "vocabulary", f"{d.vocab_size:,}", d.vocab_size)
    yield Fact("model", "context", f"{d.context:,}", d.context)
    scale = "" if d.embedding.scale == 1 else f", times {root(d.embedding.scale)}"
    positions = "" if d.embedding.positions is None else f", {d.embedding.positions:,} learned positions"
    yield Fact("model", "embedding", f"{d.embedding.rows:,} x {d.embedding.width:,}{scale}{positions}")
    cap = "" if d.head.softcap is None else f", logits capped at {number(d.head.softcap)}"
    yield Fact("model", "output head", f"{'tied' if d.head.tied else 'own matrix'}{cap}")


# -- layers -----------------------------------------------------------------------------------------------------------


def layered(d: Description, aspect: Callable[[Layer], str]) -> str:
    """What an aspect is in each layer; where it differs, each with the number of its layers."""
    counts: dict[str, int] = {}
    for kind in d.kinds:
        text = aspect(kind.layer)
        counts[text] = counts.get(text, 0) + len(kind.indices)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(
        f"{'none' if text == NONE else text} ({count} layer{'s' * (count > 1)})" for text, count in counts.items()
    )


def _heads(layer: Layer) -> str:
    a = layer.attention
    return f"{a.heads:,}" if a.kind in ("MHA", "MLA") else f"{a.heads:,}, {a.kv_heads:,} of keys and values"


def _width(layer: Layer) -> str:
    a = layer.attention
    if a.rope_dim is not None:
        return f"keys {a.head_dim - a.rope_dim:,} + {a.rope_dim:,}, values {a.value_dim:,}"
    return f"{a.head_dim:,}" if a.head_dim == a.value_dim else f"keys {a.head_dim:,}, values {a.value_dim:,}"


def _latent(layer: Layer) -> str:
    a = layer.attention
    if a.latent is None:
        return NONE
    queries = "" if a.query_rank is None else f", queries by way of {a.query_rank:,}"
    return f"{a.latent:,} + {a.rope_dim:,} cached{queries}"


def _sees(layer: Layer) -> str:
    mask = layer.attention.mask
    told = [f"window of {mask.window:,}"] if mask.window is not None else []
    told += [f"chunks of {mask.chunk:,}"] if mask.chunk is not None else []
    return " and ".join(told) or "everything"


def _rope(layer: Layer) -> str:
    a = layer.attention
    return "none" if a.rope is None else f"{rope_words(a.rope)}, {'interleaved' if a.interleaved else 'half-split'}"


def rope_words(rope: Rope) -> str:
    scaling = "" if rope.kind == "default" else f", {SCALING.get(rope.kind, rope.kind)} x {number(rope.factor)}"
    return f"base {number(rope.theta)}{scaling}"


def _qk_norm(layer: Layer) -> str:
    a = layer.attention
    forms: dict[str, list[str]] = {}
    for letter, norm in (("q", a.query_norm), ("k", a.key_norm), ("v", a.value_norm)):
        if norm is not None:
            forms.setdefault(_form(norm), []).append(letter)
    return "; ".join(f"{', '.join(letters)}: {form}" for form, letters in forms.items()) or NONE


def _form(norm: HeadNorm) -> str:
    over = {"head": "per head", "all heads": "across heads", "latent": "of the latents"}[norm.over]
    gain = "" if norm.norm.gain else ", no gain"
    return f"{norm.norm.kind} {over}{gain}{', after RoPE' * norm.after_rope}"


def _norms(layer: Layer) -> str:
    """Norms of the stream by kind, with the places where they stand."""
    forms: dict[str, list[str]] = {}
    for place in ("pre_attention", "post_attention", "pre_ffn", "post_ffn"):
        norm = getattr(layer, place)
        if norm is not None:
            gain = " (1 + w)" if norm.gain == "1 + w" else ""
            forms.setdefault(f"{norm.kind}{gain}", []).append(place)
    return "; ".join(f"{form} {PLACES.get(tuple(places), ', '.join(places))}" for form, places in forms.items()) or NONE


PLACES = {
    ("pre_attention", "pre_ffn"): "before attention and FFN",
    ("post_attention", "post_ffn"): "after attention and FFN",
    ("pre_attention", "post_attention", "pre_ffn", "post_ffn"): "before and after attention and FFN",
}


def _scores(layer: Layer) -> str:
    a = layer.attention
    told = [] if abs(a.scale - a.head_dim**-0.5) < 1e-6 * a.scale else [f"scale {root(a.scale)}"]
    told += [] if a.softcap is None else [f"capped at {number(a.softcap)}"]
    told += ["queries grow with position"] * a.temperature + ["sinks"] * a.sinks
    return ", ".join(told) or NONE


def _keys(layer: Layer) -> str:
    of = layer.attention.shares_keys_of
    return NONE if of is None else f"those of layer {of}"


def _biases(layer: Layer) -> str:
    names = [name.removesuffix("_proj") for name in layer.attention.biases] + ["FFN"] * layer.ffn.bias
    return ", ".join(names) or NONE


def _ffn(layer: Layer) -> str:
    f = layer.ffn
    name = activation(f.activation, f.gated)
    cut = f", {100 * f.sparsity:.3g} % of gates cut" if f.sparsity else ""
    return f"{name}, {'experts ' * bool(f.experts)}{f.width:,} wide{cut}"


def _experts(layer: Layer) -> str:
    f = layer.ffn
    if not f.experts:
        return NONE
    shared = f", shared {f.shared_width:,} wide{' (gated)' * f.shared_gate}" if f.shared_width else ""
    return f"{f.chosen:,} of {f.experts:,}{shared}"


def _router(layer: Layer) -> str:
    r = layer.ffn.router
    if r is None:
        return NONE
    told = [f"{r.scores} scores"] + ["bias on the choice"] * layer.ffn.correction
    told += [f"best {r.kept_groups} of {r.groups} groups"] if r.groups > 1 else []
    told += ["normalised"] * r.normalise + ([f"times {number(r.scale)}"] if r.scale != 1 else [])
    return ", ".join(told + ["weighs the input"] * (layer.ffn.weigh == "input"))


def _own(layer: Layer) -> str:
    parts = {part.name: dict(part.sizes) for part in layer.parts}
    words = {"altup": ("AltUp, {} streams", "A"), "laurel": ("LAuReL, rank {}", "F"), "per-layer": ("input of {}", "P")}
    told = []
    for name, sizes in parts.items():
        text, letter = words.get(name, (name, ""))
        told.append(text.format(f"{sizes.get(letter, 0):,}"))
    return ", ".join(told) or NONE


ASPECTS: tuple[tuple[str, Callable[[Layer], str]], ...] = (
    ("attention", lambda layer: layer.attention.kind),
    ("heads", _heads),
    ("width of a head", _width),
    ("latent", _latent),
    ("sees", _sees),
    ("RoPE", _rope),
    ("qk-norm", _qk_norm),
    ("scores", _scores),
    ("shared keys", _keys),
    ("norms", _norms),
    ("FFN", _ffn),
    ("experts", _experts),
    ("router", _router),
    ("biases", _biases),
    ("also", _own),
)


# -- numbers ----------------------------------------------------------------------------------------------------------


def _parameters(d: Description) -> Iterator[Fact]:
    p = d.parameters
    yield _count("total", p.total)
    yield _count("active per token", p.active)
    yield _count("active, without input embedding", p.without(*INPUT).active)
    yield _count("active, without embedding and head", p.without(*INPUT, "head").active)
    if p["lookup"].total:
        yield _count("effective, without embedding tables", p.without(*INPUT).total)
    yield Fact("parameters", "published", d.claim or NONE)
    for part, count in p:
        more = "" if count.total == count.active else f", {decimal(count.active)} active"
        yield Fact("parameters", part, f"{decimal(count.total)}{more}", count.total)


# What is read by rows before the layers.
INPUT = ("embedding", "positions", "lookup")


def _count(name: str, value: int) -> Fact:
    return Fact("parameters", name, f"{value:,}", value)


def _bytes(section: str, name: str, value: int) -> Fact:
    return Fact(section, name, f"{value:,} B ({binary(value)})" if value < 1 << 30 else binary(value), value)


def _cache(d: Description, context: int, kv_dtype: str) -> Iterator[Fact]:
    section = f"keys and values, {kv_dtype}"
    yield _bytes(section, "per token", d.kv_bytes_per_token(kv_dtype))
    yield _bytes(section, WINDOWS[0], d.kv_growth_per_token(kv_dtype))
    yield _bytes(section, f"at {context:,}", d.kv_bytes(context, kv_dtype))
    yield _bytes(section, "as npllm allocates", d.kv_allocated(context, kv_dtype))
    yield _bytes(section, WINDOWS[1], d.kv_without_windows(context, kv_dtype))
    yield _bytes(section, "heads as MHA, per token", d.kv_bytes_as(None, 1, kv_dtype))
    yield _bytes(section, f"heads as GQA-{GROUPS}, per token", d.kv_bytes_as(GROUPS, 1, kv_dtype))


def _work(d: Description, context: int, kv_dtype: str, weights: str, machine: Machine | None) -> Iterator[Fact]:
    for format, size in d.weight_bytes:
        told = f"{binary(size)}, {binary(d.weights_read(format))} per token"
        yield Fact("weights", format, told + ", as published" * (format == d.stored), size)
    section, decode, prefill = f"work at {context:,}", d.decode_flops(context), d.prefill_flops(context)
    yield Fact(section, "FLOPs per decoded token", decimal(decode), decode)
    yield Fact(section, "FLOPs per prompt token", decimal(prefill / context), prefill / context)
    read = d.decode_bytes(context, weights, kv_dtype)
    yield Fact(section, "read per decoded token", f"{binary(read)} ({weights} weights)", read)
    if machine is not None:
        most = limit(d, machine, context, weights, kv_dtype)
        for name, rate, bound in (("decode", most.decode, most.decode_bound), ("prefill", most.prefill, most.prefill_bound)):
            yield Fact("speed limit", f"{name}, tokens/s", f"{rounded(rate)} ({bound})", rate)
