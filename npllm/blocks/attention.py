"""Softmax attention with grouped heads, for the queries of one row."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from npllm.arrays import Array, DTypeLike, Namespace
from npllm.blocks.masks import Mask

# `attention_pieces` takes this many queries at a time, and heads until it has this many scores: they stay in the cache,
# and half of a causal square is skipped.
QUERY_BLOCK = 64
SCORES = 1 << 18

# With many heads to one key head (MLA has 128) and a long context it takes fewer queries, to have at most this many scores.
MOST_SCORES = 1 << 22


def softmax(xp: Namespace, scores_S: Array, sink: Array | None = None) -> Array:
    """Softmax over the last axis (any leading axes), in place, less the row's maximum; a row of nothing but -inf gives 0.

    `sink` is one more score per row (its last axis is 1), which takes its part of the sum and has no place in the result.
    """
    # CuPy's max has no `initial`, so rows without keys leave here.
    if not scores_S.shape[-1]:
        return scores_S
    top = xp.max(scores_S, axis=-1, keepdims=True)
    top = top if sink is None else xp.maximum(top, sink)
    top = xp.where(top == -math.inf, scores_S.dtype.type(0), top)
    scores_S -= top
    xp.exp(scores_S, out=scores_S)
    total = xp.sum(scores_S, axis=-1, keepdims=True)
    if sink is not None:
        total += xp.exp(sink - top)
    scores_S /= xp.where(total == 0, scores_S.dtype.type(1), total)
    return scores_S


def temperature(xp: Namespace, position_M: Array, span: int, strength: float, dtype: DTypeLike) -> Array:
    """What queries are multiplied by far from the start, `1 + strength ln(1 + floor(position / span))` -> factor_M.

    Softmax over ever more keys flattens; this sharpens it again (Nakanishi 2025, arXiv 2501.19399). Positions
    are integers, `dtype` is float32 or float64.
    """
    return 1.0 + strength * xp.log1p((position_M // span).astype(dtype))


def soft_cap(xp: Namespace, x: Array, cap: float | None) -> Array:
    """`cap tanh(x / cap)`, which stays between -cap and cap (Gemma 2, arXiv 2408.00118, section 2); elementwise, any shape.

    None caps nothing.
    """
    return x if cap is None else cap * xp.tanh(x / cap)


def softmax_attention(
    xp: Namespace,
    q_THK: Array,
    k_SGK: Array,
    v_SGV: Array,
    allowed_TS: Array,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_H: Array | None = None,
) -> Array:
    """`softmax(mask(softcap(scale * q k^T))) v` per head -> o_THV (Vaswani et al. 2017; grouped heads: arXiv 2305.13245).

    Query head h reads key/value head `h // (H / G)`. The soft cap comes before the mask, else -inf would become -cap. The
    mask selects; it never adds or multiplies. A query that may see nothing gives 0. T = 0 and S = 0 are legal.

    A head's sink is a learned score that joins each softmax of that head, as of a key without a value: attention may go
    nowhere (gpt-oss, arXiv 2508.10925; arXiv 2309.17453). It is neither scaled nor capped, and no mask hides it.
    """
    if q_THK.dtype.itemsize < 4:
        q, k, v = (xp.asarray(x, dtype="float32") for x in (q_THK, k_SGK, v_SGV))
        sinks = None if sinks_H is None else xp.asarray(sinks_H, dtype="float32")
        o_THV = softmax_attention(xp, q, k, v, allowed_TS, scale=scale, softcap=softcap, sinks_H=sinks)
        return o_THV.astype(q_THK.dtype)
    (T, H, K), (_, G, V) = q_THK.shape, v_SGV.shape
    q_GRTK = q_THK.reshape(T, G, H // G, K).transpose(1, 2, 0, 3) * q_THK.dtype.type(scale)
    scores_GRTS = q_GRTK @ k_SGK.transpose(1, 2, 0)[:, None]
    scores_GRTS = soft_cap(xp, scores_GRTS, softcap)
    xp.copyto(scores_GRTS, scores_GRTS.dtype.type(-math.inf), where=~allowed_TS)
    sink_GR11 = None if sinks_H is None else sinks_H.reshape(G, H // G, 1, 1)
    o_GRTV = softmax(xp, scores_GRTS, sink_GR11) @ v_SGV.transpose(1, 0, 2)[:, None]
    return o_GRTV.transpose(2, 0, 1, 3).reshape(T, H, V)


def attention_pieces(
    xp: Namespace,
    q_THK: Array,
    k_SGK: Array,
    v_SGV: Array,
    out_THV: Array,
    *,
    first_query: int,
    first_key: int,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks_H: Array | None = None,
    block: int = QUERY_BLOCK,
) -> list[Callable[[], None]]:
    """`softmax_attention` for consecutive positions, cut into pieces that each write their part of `out_THV`.

    Query t stands at position `first_query + t`, key s at `first_key + s`. A row of a softmax depends on its own scores
    only, so cutting queries and heads apart changes no sum; pieces may run in any order. Keys that a piece's queries
    cannot reach are not read.
    """
    (T, H, _), (S, G, _) = q_THK.shape, v_SGV.shape
    block = max(1, min(block, MOST_SCORES * G // max(1, H * S)))
    pieces: list[Callable[[], None]] = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        low, high = mask.reach(first_query + start, first_query + stop - 1)
        near = max(0, low - first_key)
        far = max(near, min(S, high - first_key))
        positions = range(first_query + start, first_query + stop), range(first_key + near, first_key + far)
        heads = max(1, SCORES * G // max(1, H * (stop - start) * (far - near)))
        for g in range(0, G, heads):
            queries = slice(g * H // G, (g + heads) * H // G)
            inputs = q_THK[start:stop, queries], k_SGK[near:far, g : g + heads], v_SGV[near:far, g : g + heads]
            target = out_THV[start:stop, queries]
            how = {"scale": scale, "softcap": softcap, "sinks_H": None if sinks_H is None else sinks_H[queries]}
            pieces.append(functools.partial(_piece, xp, inputs, positions, mask, target, how))
    return pieces


def _piece(
    xp: Namespace,
    inputs: tuple[Array, Array, Array],
    positions: tuple[range, range],
    mask: Mask,
    target: Array,
    how: Mapping[str, Any],
) -> None:
    query_T, key_S = (xp.arange(each.start, each.stop, dtype="int64") for each in positions)
    allowed_TS = mask.allowed(xp, query_T, key_S)
    target[...] = softmax_attention(xp, *inputs, allowed_TS, **how)


def blocked_attention(xp: Namespace, q_THK: Array, k_SGK: Array, v_SGV: Array, **place: Any) -> Array:
    """The named equal of `softmax_attention` with memory O(T + S): all `attention_pieces`, one after the other -> o_THV."""
    out_THV = xp.empty((*q_THK.shape[:2], v_SGV.shape[-1]), dtype=q_THK.dtype)
    for piece in attention_pieces(xp, q_THK, k_SGK, v_SGV, out_THV, **place):
        piece()
    return out_THV
