"""A description's parts in the words of a figure: titles, numbers, what happens inside, and the drawing beside them."""

from __future__ import annotations

from npllm.describing.description import FFN, Attention, Embedding, Head, Norm
from npllm.describing.description import Part as Extra
from npllm.describing.units import number
from npllm.describing.words import SCALING, activation, root
from npllm.pictures.parts import Glyph, Part

ATTENTION = {
    "MHA": "Multi-head attention",
    "GQA": "Grouped-query attention",
    "MQA": "Multi-query attention",
    "MLA": "Multi-head latent attention",
}


def many(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


# -- attention --------------------------------------------------------------------------------------------------------


def attention(a: Attention, rotates: bool) -> Part:
    """`rotates`: some layer of the model has RoPE, so that its absence is worth a word."""
    inside = [*_head_norms(a, after_rope=False), *_rope(a, rotates), *_head_norms(a, after_rope=True)]
    if a.shares_keys_of is not None:
        inside.insert(0, "shared keys and values")
    return Part("attention", ATTENTION[a.kind], (*_heads(a), *_sight(a), *_scores(a)), tuple(inside), _drawn(a))


def _drawn(a: Attention) -> tuple[Glyph, ...]:
    sight = "window" if a.mask.window is not None else "chunk" if a.mask.chunk is not None else "causal"
    sharing = Glyph("latent", ()) if a.kind == "MLA" else Glyph("heads", (a.heads, a.kv_heads))
    return sharing, Glyph("mask", (sight,))


def _heads(a: Attention) -> list[str]:
    if a.kind == "MLA":
        turned = a.rope_dim or 0
        ranks = [] if a.query_rank is None else [f"queries through {a.query_rank:,}"]
        return [
            many(a.heads, "head"),
            f"keys {a.head_dim - turned:,} + {turned:,} RoPE, values {a.value_dim:,}",
            f"caches latent {a.latent or 0:,} + RoPE {turned:,}",
            *ranks,
        ]
    width = f"{a.head_dim:,} wide" if a.head_dim == a.value_dim else f"keys {a.head_dim:,}, values {a.value_dim:,} wide"
    shared = [] if a.kind == "MHA" else [many(a.kv_heads, "key/value head")]
    return [many(a.heads, "head"), *shared, width]


def _sight(a: Attention) -> list[str]:
    told = []
    if a.shares_keys_of is not None:
        told.append(f"reads those of layer {a.shares_keys_of:,}")
    if a.mask.window is not None:
        told.append(f"window {a.mask.window:,}")
    if a.mask.chunk is not None:
        told.append(f"chunks of {a.mask.chunk:,}")
    return told if a.mask.window is not None or a.mask.chunk is not None else [*told, "full context"]


def _scores(a: Attention) -> list[str]:
    told = []
    if a.rope is not None:
        told.append(f"RoPE base {number(a.rope.theta)}")
        if a.rope.kind != "default":
            told.append(f"{SCALING.get(a.rope.kind, a.rope.kind)} × {number(a.rope.factor)}")
    if abs(a.scale - a.head_dim**-0.5) > 1e-6 * a.scale:
        told.append(f"scale {root(a.scale)}")
    if a.softcap is not None:
        told.append(f"scores capped at {number(a.softcap)}")
    if a.biases:
        short = {f"{letter}_proj": letter for letter in "qkvo"}
        told.append(f"biases: {', '.join(short.get(name, name) for name in a.biases)}")
    return told + ["queries grow with position"] * a.temperature + ["attention sinks"] * a.sinks


def _rope(a: Attention, rotates: bool) -> list[str]:
    if a.rope is None:
        return ["no RoPE (NoPE)"] * rotates
    scaled = "" if a.rope.kind == "default" else f", {SCALING.get(a.rope.kind, a.rope.kind)} scaling"
    return [f"{'partial ' * (a.rope_dim is not None)}RoPE{scaled}"]


def _head_norms(a: Attention, *, after_rope: bool) -> list[str]:
    """Norms of q, k and v, those of one form in one line; a unit norm has no gain."""
    forms: dict[tuple[str, str], list[str]] = {}
    for letter, norm in (("q", a.query_norm), ("k", a.key_norm), ("v", a.value_norm)):
        if norm is not None and norm.after_rope == after_rope:
            forms.setdefault((f"{'' if norm.norm.gain else 'unit '}{norm.norm.kind}", norm.over), []).append(letter)
    over = {"head": "per head: {}", "all heads": "across heads: {}"}
    told = []
    for (kind, reach), letters in forms.items():
        if reach == "latent":
            told.append(f"{kind} of both latents" if len(letters) > 1 else f"{kind} of the latent")
        else:
            told.append(f"{kind} {over[reach].format(', '.join(letters))}")
    return told


# -- the rest ---------------------------------------------------------------------------------------------------------


def ffn(f: FFN) -> Part:
    name = activation(f.activation, f.gated)
    extras = ["biases"] * f.bias + ([f"{100 * f.sparsity:.3g} % of gates cut"] if f.sparsity else [])
    if not f.experts:
        return Part("ffn", f"Feed-forward, {name}", (f"{f.width:,} wide", *extras))
    shared = [f"shared expert {f.shared_width:,} wide"] * bool(f.shared_width) + ["gated"] * f.shared_gate
    facts = (f"{f.chosen:,} of {many(f.experts, 'expert')}", f"each {f.width:,} wide", *shared, *extras)
    glyph = Glyph("experts", (f.chosen, f.experts, f.shared_width))
    return Part("moe", f"Mixture of experts, {name}", (*facts, *_weights(f)), _router(f), (glyph,))


def _router(f: FFN) -> tuple[str, ...]:
    r = f.router
    if r is None:
        return ("Router",)
    grouped = f", {r.kept_groups:,} of {many(r.groups, 'group')}" if r.groups > 1 else ""
    correction = ", bias" if f.correction else ""
    return (f"Router: {r.scores}{grouped}{correction}",)


def _weights(f: FFN) -> list[str]:
    """How the scores of the chosen become weights."""
    r = f.router
    told = []
    if r is not None:
        told = [f"weights sum to {number(r.scale)}"] * r.normalise
        told += [f"weights × {number(r.scale)}"] * (r.scale != 1 and not r.normalise)
    return told + ["weights scale the input"] * (f.weigh == "input")


def norm(n: Norm) -> Part:
    return Part("norm", n.kind)


def embedding(e: Embedding) -> Part:
    scale = [] if e.scale == 1 else [f"× {root(e.scale)}"]
    positions = [] if e.positions is None else [f"{e.positions:,} learned positions"]
    return Part(
        "ends",
        "Token embedding",
        (f"{e.rows:,} × {e.width:,}", *scale, *positions, *filter(None, map(_beside_table, e.parts))),
    )


def _beside_table(part: Extra) -> str:
    """What Gemma 3n does before its first layer: tables are worth their sizes, projections are not."""
    sizes = dict(part.sizes)
    if part.name == "lookup":
        return f"per-layer table {sizes.get('N', 0):,} × {sizes.get('P', 0):,}"
    return {"altup": "into AltUp's streams", "per-layer": ""}.get(part.name, extra(part))


def head(h: Head) -> Part:
    cap = [] if h.softcap is None else [f"logits capped at {number(h.softcap)}"]
    return Part("ends", "Output head", ("tied to the embedding" if h.tied else "own matrix", *cap))


def extra(part: Extra) -> str:
    sizes = ", ".join(f"{letter} = {size:,}" for letter, size in part.sizes)
    return f"{part.name} ({sizes})" if sizes else part.name
