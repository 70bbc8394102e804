"""From the events of a recorded pass to the layers of a `Description`.

Nothing here asks which model it is. A norm stands before a branch if it reads the residual stream, and after one if it
reads what the branch computed; it is of queries if they went through it on their way from the projection to attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from npllm.blocks.ffn import ACTIVATIONS
from npllm.blocks.rope import Rope
from npllm.describing.description import (
    FFN,
    Attention,
    Embedding,
    Head,
    HeadNorm,
    Kind,
    Layer,
    Norm,
    Part,
    Run,
)
from npllm.describing.recorder import Event
from npllm.weights import MLP, GatedFFN, Spec

ATTENTION = ("attention", "latent_attention")

# Parts of the spec that every layer has a word for; others are the model's own.
COMMON = ("embedding", "attention", "ffn", "experts", "router", "norm", "head", "buffer")

# What the functions behind the names of activations are called.
ACTIVATION_BLOCKS = {function.__name__ for function in ACTIVATIONS.values()}


def layers_of(events: list[Event]) -> tuple[Layer, ...]:
    count = 1 + max(event.layer for event in events if event.layer is not None)
    grouped: list[list[Event]] = [[] for _ in range(count)]
    for event in events:
        if event.layer is not None:
            grouped[event.layer].append(event)
    return tuple(map(layer_of, grouped))


def layer_of(events: list[Event]) -> Layer:
    core = next(event for event in events if event.op in ATTENTION)
    norms = branch_norms(events, core)
    attention, ffn = ("attention",), ("ffn", "experts", "router")
    return Layer(
        attention=attention_of(core, events),
        ffn=ffn_of(events),
        pre_attention=_first(norms, "before", attention),
        post_attention=_first(norms, "after", attention),
        pre_ffn=_first(norms, "before", ffn),
        post_ffn=_first(norms, "after", ffn),
        parts=parts_of(events),
    )


# -- norms ------------------------------------------------------------------------------------------------------------


def norm_of(event: Event) -> Norm:
    rms = event.op == "rms_norm"
    gain = ("1 + w" if event.details["offset"] else "w") if event.weights else None
    return Norm("RMSNorm" if rms else "LayerNorm", event.shape[-1], gain, event.details["eps"], not rms)


def branch_norms(events: list[Event], core: Event) -> list[tuple[str, set[str], Event]]:
    """("before", the parts of the weights that read it, norm), or ("after", the part of the weights that made what it
    reads, norm); before the `core` of attention, the latter are norms of queries and keys."""
    found = []
    for norm in (event for event in events if event.is_norm and len(event.shape) == 2):
        source = norm.parents[0] if norm.parents else None
        if source is None or source.stream:
            readers = [event for event in events if event.weights and norm in _through(event)]
            found.append(("before", {weight.tensor.part for event in readers for weight in event.weights}, norm))
        elif source.weights and events.index(norm) > events.index(core):
            found.append(("after", {weight.tensor.part for weight in source.weights}, norm))
    return found


def _through(event: Event) -> Iterator[Event]:
    """What an event reads, through arithmetic in between."""
    waiting = list(event.parents)
    while waiting:
        each = waiting.pop()
        yield each
        if not each.op:
            waiting += each.parents


def _first(norms: Iterable[tuple[str, set[str], Event]], side: str, parts: tuple[str, ...]) -> Norm | None:
    return next((norm_of(norm) for where, near, norm in norms if where == side and near & set(parts)), None)


# -- attention --------------------------------------------------------------------------------------------------------


def attention_of(core: Event, events: list[Event]) -> Attention:
    d = core.details
    made_by: tuple[Event, ...] = d["made_by"]
    query, key = made_by[0], made_by[1]
    heads, (width, value) = core.shape[1], d["widths"]
    kv_heads, latent = (heads, d["latent"]) if "latent" in d else (d["kv_heads"], None)
    before = list(query.ancestors())
    rope = next((event for event in before if event.op == "rope"), None)
    query_norm = _head_norm(query, heads * width)
    return Attention(
        kind=_kind(heads, kv_heads, latent),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        value_dim=value,
        mask=d["mask"],
        rope=_rope(rope),
        interleaved=bool(rope and rope.details["interleaved"]),
        scale=d["scale"],
        query_norm=query_norm,
        key_norm=_head_norm(key, kv_heads * width),
        value_norm=_head_norm(made_by[2], kv_heads * value) if len(made_by) > 2 else None,
        biases=biases_of(events, "attention"),
        softcap=d["softcap"],
        sinks=bool(core.weights) and core.op == "attention",
        temperature=any(event.op == "temperature" and event.details["strength"] for event in before),
        shares_keys_of=None if key.layer == core.layer else key.layer,
        query_rank=query_norm.norm.width if query_norm and query_norm.over == "latent" else None,
        latent=latent,
        rope_dim=d.get("rope_dim"),
    )


def _kind(heads: int, kv_heads: int, latent: int | None) -> str:
    if latent is not None:
        return "MLA"
    return "MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else "GQA"


def _rope(event: Event | None) -> Rope | None:
    return None if event is None else event.details["rope"]


def _head_norm(event: Event, whole: int) -> HeadNorm | None:
    """The norm between the projection and attention, on the way of queries, keys or values."""
    for each in event.ancestors():
        if each.op == "latent":
            norm = Norm("RMSNorm", each.details["L"], "w", each.details["eps"])
            return HeadNorm(norm, "latent")
        if each.is_norm and each.parents and not each.parents[0].stream:
            turned = any(before.op == "rope" for before in each.ancestors())
            return HeadNorm(norm_of(each), _over(each, whole), turned)
    return None


def _over(norm: Event, whole: int) -> str:
    if len(norm.shape) == 3:
        return "head"
    return "all heads" if norm.shape[-1] == whole else "latent"


def biases_of(events: list[Event], part: str) -> tuple[str, ...]:
    """Modules of a part that have a bias, by the last word of their names."""
    weights = (weight for event in events for weight in event.weights if weight.tensor.part == part)
    return tuple(weight.name.split(".")[-2] for weight in weights if weight.name.endswith(".bias"))


# -- feed-forward -----------------------------------------------------------------------------------------------------


def ffn_of(events: list[Event]) -> FFN:
    dense = [event for event in events if event.op == "linear" and event.weights[0].tensor.part == "ffn"]
    wide = [event for event in dense if event.weights[0].tensor.bundle is not None]
    kinds = {bundle.kind for event in wide if (bundle := event.weights[0].tensor.bundle)}
    width = wide[0].shape[-1] if wide else 0
    bias = bool(biases_of(events, "ffn"))
    mixture = next((event for event in events if event.op == "moe"), None)
    if mixture is None:
        sparse = next((event.details["sparsity"] for event in events if event.op == "gaussian_topk"), None)
        return FFN(_activation(events, dense), width, MLP not in kinds, bias, sparse)
    choice = next(event for event in events if event.op == "route")
    gate = next(event for event in choice.ancestors() if event.op == "linear")
    experts, inner, _ = mixture.weights[0].shape
    return FFN(
        activation=ACTIVATIONS[mixture.details["act"]].__name__,
        width=inner,
        gated=True,
        bias=bias,
        experts=experts,
        chosen=mixture.details["chosen"],
        shared_width=width if GatedFFN in kinds else 0,
        shared_gate=len(dense) > len(wide),
        router=choice.details["router"],
        correction=any(weight.tensor.part == "buffer" for weight in (*gate.weights, *choice.weights)),
        weigh=mixture.details["weigh"],
    )


def _activation(events: list[Event], dense: list[Event]) -> str:
    """The activation on the way to the last projection."""
    return next(event.op for event in dense[-1].ancestors() if event.op in ACTIVATION_BLOCKS)


# -- the rest ---------------------------------------------------------------------------------------------------------


def parts_of(events: Iterable[Event]) -> tuple[Part, ...]:
    """Parts that are not common to all models, each with the sizes that its tensors' axes say."""
    sizes: dict[str, dict[str, int]] = {}
    for event in events:
        for weight in event.weights:
            tensor = weight.tensor
            if tensor.part not in COMMON:
                sizes.setdefault(tensor.part, {}).update(zip(tensor.axes, tensor.shape, strict=True))
    return tuple(Part(name, tuple(sorted(letters.items()))) for name, letters in sizes.items())


def embedding_of(events: list[Event]) -> Embedding:
    outside = [event for event in events if event.layer is None]
    tables = [event for event in outside if event.op == "embed"]
    words = tables[0].weights[0]
    positions = [each.weights[0] for each in tables[1:] if each.weights[0].tensor.axes.startswith("T")]
    scaled = (each for each in outside if not each.op and tables[0] in each.parents and each.details.get("factor"))
    scale = next((each.details["factor"] for each in scaled), 1.0)
    first = events.index(next(event for event in events if event.layer is not None))
    rows, width = words.shape
    return Embedding(rows, width, float(scale), positions[0].shape[0] if positions else None, parts_of(events[:first]))


def head_of(events: list[Event], spec: Spec) -> Head:
    last = 1 + max(i for i, event in enumerate(events) if event.layer is not None)
    after = events[last:]
    norm = next(event for event in reversed(after) if event.is_norm)
    cap = next((event.details["cap"] for event in after if event.op == "soft_cap"), None)
    return Head(norm_of(norm), any(tensor.alias for tensor in spec.values()), cap)


def kinds_of(layers: tuple[Layer, ...]) -> tuple[Kind, ...]:
    where: dict[Layer, list[int]] = {}
    for i, layer in enumerate(layers):
        where.setdefault(layer, []).append(i)
    return tuple(Kind(layer, tuple(indices)) for layer, indices in where.items())


def pattern_of(sequence: list[Any]) -> tuple[Run, ...]:
    """`sequence` of kinds as the fewest runs: [0, 0, 1, 0, 0, 1, 0] is twice (0 twice, 1 once), then 0 once.

    From the left, the period that covers most is taken; of equal ones, the shortest.
    """
    runs, at = [], 0
    while at < len(sequence):
        best = max(range(1, len(sequence) - at + 1), key=lambda period: (_covered(sequence, at, period), -period))
        times = _covered(sequence, at, best) // best
        runs.append(Run(times, tuple(_lengths(sequence[at : at + best]))))
        at += times * best
    return tuple(runs)


def _covered(sequence: list[Any], at: int, period: int) -> int:
    """How many entries from `at` on whole repetitions of the next `period` cover; a single one counts as nothing much."""
    times = 1
    while sequence[at : at + period] == sequence[at + times * period : at + (times + 1) * period]:
        times += 1
    return times * period if times > 1 else min(1, period)


def _lengths(sequence: list[Any]) -> Iterator[tuple[Any, int]]:
    from itertools import groupby

    for kind, group in groupby(sequence):
        yield kind, len(list(group))
