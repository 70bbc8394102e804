"""A description as a document of plain values, for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from npllm.describing.description import Description, Layer
from npllm.describing.facts import GROUPS, INPUT
from npllm.describing.limits import Machine, limit


def document(
    d: Description, context: int, kv_dtype: str = "bfloat16", weights: str | None = None, machine: Machine | None = None
) -> dict[str, Any]:
    """What `npllm inspect --json` writes, but for its schema (npllm.cli.inspect says what is in it)."""
    p = d.parameters
    return {
        "name": d.name,
        "model_type": d.model_type,
        "hidden_size": d.hidden_size,
        "vocab_size": d.vocab_size,
        "max_context": d.context,
        "embedding": asdict(d.embedding),
        "head": asdict(d.head),
        "layers": len(d.layers),
        "kinds": [{"layers": list(kind.indices), **layer(kind.layer)} for kind in d.kinds],
        "pattern": [{"times": run.times, "kinds": [list(each) for each in run.kinds]} for run in d.pattern],
        "parameters": {
            "total": p.total,
            "active": p.active,
            "active_without_input_embedding": p.without(*INPUT).active,
            "active_without_embedding_and_head": p.without(*INPUT, "head").active,
            "total_without_input_embedding": p.without(*INPUT).total,
            "parts": {part: count._asdict() for part, count in p},
            "published": d.claim or None,
        },
        "weight_bytes": {format: {"total": size, "per_token": d.weights_read(format)} for format, size in d.weight_bytes},
        "stored": d.stored,
        "kv_bytes_per_token_bf16": d.kv_bytes_per_token(),
        "kv": _cache(d, context, kv_dtype),
        "work": _work(d, context, kv_dtype, weights or d.stored, machine),
    }


def layer(one: Layer) -> dict[str, Any]:
    """Named tuples inside become objects with their fields' names."""
    values: dict[str, Any] = asdict(one)
    values["attention"]["mask"] = one.attention.mask._asdict()
    values["attention"]["scale"] = one.attention.scale
    values["ffn"]["router"] = one.ffn.router and one.ffn.router._asdict()
    values["parts"] = {part.name: dict(part.sizes) for part in one.parts}
    return values


def _cache(d: Description, context: int, kv_dtype: str) -> dict[str, Any]:
    return {
        "dtype": kv_dtype,
        "context": context,
        "beyond_max_context": context > d.context,
        "bytes_per_token": d.kv_bytes_per_token(kv_dtype),
        "bytes_per_token_windows_full": d.kv_growth_per_token(kv_dtype),
        "bytes": d.kv_bytes(context, kv_dtype),
        "bytes_allocated": d.kv_allocated(context, kv_dtype),
        "bytes_without_windows": d.kv_without_windows(context, kv_dtype),
        "bytes_per_token_as_mha": d.kv_bytes_as(None, 1, kv_dtype),
        f"bytes_per_token_as_gqa{GROUPS}": d.kv_bytes_as(GROUPS, 1, kv_dtype),
    }


def _work(d: Description, context: int, kv_dtype: str, weights: str, machine: Machine | None) -> dict[str, Any]:
    most = machine and limit(d, machine, context, weights, kv_dtype)
    return {
        "context": context,
        "weights": weights,
        "decode_flops": d.decode_flops(context),
        "prefill_flops": d.prefill_flops(context),
        "decode_bytes": d.decode_bytes(context, weights, kv_dtype),
        "machine": machine and asdict(machine),
        "limit": most and asdict(most),
    }
