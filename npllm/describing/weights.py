"""Parameters by part, and bytes of weights in each storage format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from npllm import grouped
from npllm.describing.description import Count, Parameters
from npllm.describing.recorder import Event
from npllm.quantised import BLOCK, OWN, Block
from npllm.weights import Spec, Tensor

# In the order of a forward pass; parts of a model's own come before the head.
ORDER = ("embedding", "positions", "lookup", "attention", "dense", "shared", "experts", "router", "norms", "head")

# Bytes of a number in the formats that store all of them alike.
WIDTHS = {"f32": 4, "bf16": 2}

# In an FP8 checkpoint the matrices of these parts are codes of one byte; a block of them has a float32 factor.
CODED, FACTOR = ("attention", "ffn", "experts"), 4

# The formats that `Description.weight_bytes` has, by the names of npllm.handles.
FORMATS = ("f32", "bf16", "f8_e4m3", "q8", "q4")


def parameters_of(spec: Spec, events: list[Event]) -> Parameters:
    """Counted by part: `ffn` is "dense", or "shared" in a layer with experts, where every token meets it."""
    chosen = {weight.name: event.details["chosen"] for event in events if event.op == "moe" for weight in event.weights}
    mixtures = {event.layer for event in events if event.op == "moe"}
    shared = {weight.name for event in events if event.layer in mixtures for weight in event.weights}
    totals: dict[str, list[int]] = {}
    for name, tensor in spec.items():
        if tensor.alias is not None or tensor.part == "buffer":
            continue
        count = totals.setdefault(_word(tensor, name in shared), [0, 0])
        count[0] += tensor.size
        count[1] += tensor.size // tensor.shape[0] * chosen[name] if tensor.part == "experts" else tensor.size
    own = [part for part in totals if part not in ORDER]
    order = [*ORDER[:-1], *own, ORDER[-1]]
    return Parameters(tuple((part, Count(*totals[part])) for part in order if part in totals))


def _word(tensor: Tensor, in_mixture: bool) -> str:
    if tensor.part == "embedding" and tensor.axes.startswith("T"):
        return "positions"
    words = {"ffn": "shared" if in_mixture else "dense", "norm": "norms"}
    return words.get(tensor.part, tensor.part)


def weight_bytes(spec: Spec, block: Block = BLOCK) -> dict[str, dict[str, int]]:
    """For each tensor, its bytes in each of FORMATS, as npllm stores them.

    FP8, q8 and q4 are of the matrices that such files hold so; what they leave is bfloat16.
    """
    heads = {tensor.alias for tensor in spec.values() if tensor.alias is not None}
    return {
        name: {format: stored_bytes(name, tensor, format, block, is_head=name in heads) for format in FORMATS}
        for name, tensor in spec.items()
        if tensor.alias is None
    }


def stored_bytes(name: str, tensor: Tensor, format: str, block: Block | None = None, *, is_head: bool = False) -> int:
    """Bytes of a tensor in a checkpoint of such a format; `block` is FP8's, `is_head` as in npllm.grouped."""
    if tensor.part == "buffer":
        return 4 * tensor.size
    if format in grouped.BITS and grouped.worth_quantising(name, tensor, is_head=is_head):
        return tensor.size * grouped.BITS[format] // 8 + tensor.size // grouped.GROUP * grouped.FACTOR
    if format == "f8_e4m3" and tensor.part in CODED and len(tensor.shape) > 1:
        rows, columns = (block or BLOCK)[:2]
        *lead, height, width = tensor.shape
        return tensor.size + FACTOR * math.prod(lead) * -(-height // rows) * -(-width // columns)
    return WIDTHS.get(format, 2) * tensor.size


def stored_format(values: Mapping[str, Any]) -> str:
    """The format of the files that a config.json belongs to, as far as it says; bfloat16 where it does not."""
    quantised = values.get("quantization_config") or {}
    if quantised.get("quant_method") == OWN:
        return next(format for format, bits in grouped.BITS.items() if bits == quantised.get("bits"))
    if quantised:
        return "f8_e4m3"
    return "f32" if (values.get("dtype") or values.get("torch_dtype")) == "float32" else "bf16"
