"""Softmax attention with grouped heads, for the queries of one row."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from npllm.arrays import Array, DTypeLike, Namespace
from npllm.blocks.masks import Mask

# `attention_pieces` takes this many queries at a time, and heads until it has this many scores: they stay in the cache,
# and half of a causal square is skipped.
QUERY_BLOCK = 64
SCORES = 1 << 18

# With many heads to one key head (MLA has 128) and a long context it takes fewer queries, to have at most this many scores.
MOST_SCORES = 1 << 22


def softmax(xp: Namespace, scores_S: Array) -> Array:
    """Softmax over the last axis (any leading axes), in place, less the row's maximum; a row of nothing but -inf gives 0."""
    # CuPy's max has no `initial`, so rows without keys leave here.
    if not scores_S.shape[-1]:
        return scores_S
    top = xp.max(scores_S, axis=-1, keepdims=True)
    scores_S -= xp.where(top == -math.inf, scores_S.dtype.type(0), top)
    xp.exp(scores_S, out=scores_S)
    total = xp.sum(scores_S, axis=-1, keepdims=True)
    scores_S /= xp.where(total == 0, scores_S.dtype.type(1), total)
    return scores_S


def temperature(xp: Namespace, position_M: Array, span: int, strength: float, dtype: DTypeLike) -> Array:
    """What queries are multiplied by far from the start, `1 + strength ln(1 + floor(position / span))` -> factor_M.

    Softmax over ever more keys flattens; this sharpens it again (Nakanishi 2025, arXiv 2501.19399). Positions
    are integers, `dtype` is float32 or float64.
    """
    return 1.0 + strength * xp.log1p(xp.asarray(position_M // span, dtype=dtype))


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
) -> Array:
    """`softmax(mask(softcap(scale * q k^T))) v` per head -> o_THV (Vaswani et al. 2017; grouped heads: arXiv 2305.13245).

    Query head h reads key/value head `h // (H / G)`. The soft cap comes before the mask, else -inf would become -cap. The
    mask selects; it never adds or multiplies. A query that may see nothing gives 0. T = 0 and S = 0 are legal.
    """
    if q_THK.dtype.itemsize < 4:
        q, k, v = (xp.asarray(x, dtype="float32") for x in (q_THK, k_SGK, v_SGV))
        return softmax_attention(xp, q, k, v, allowed_TS, scale=scale, softcap=softcap).astype(q_THK.dtype)
    (T, H, K), (_, G, V) = q_THK.shape, v_SGV.shape
    q_GRTK = q_THK.reshape(T, G, H // G, K).transpose(1, 2, 0, 3) * q_THK.dtype.type(scale)
    scores_GRTS = q_GRTK @ k_SGK.transpose(1, 2, 0)[:, None]
    scores_GRTS = soft_cap(xp, scores_GRTS, softcap)
    xp.copyto(scores_GRTS, scores_GRTS.dtype.type(-math.inf), where=~allowed_TS)
    o_GRTV = softmax(xp, scores_GRTS) @ v_SGV.transpose(1, 0, 2)[:, None]
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
            pieces.append(functools.partial(_piece, xp, inputs, positions, mask, target, scale, softcap))
    return pieces


def _piece(
    xp: Namespace,
    inputs: tuple[Array, Array, Array],
    positions: tuple[range, range],
    mask: Mask,
    target: Array,
    scale: float,
    softcap: float | None,
) -> None:
    query_T, key_S = (xp.arange(each.start, each.stop, dtype="int64") for each in positions)
    allowed_TS = mask.allowed(xp, query_T, key_S)
    target[...] = softmax_attention(xp, *inputs, allowed_TS, scale=scale, softcap=softcap)


def blocked_attention(xp: Namespace, q_THK: Array, k_SGK: Array, v_SGV: Array, **place: Any) -> Array:
    """The named equal of `softmax_attention` with memory O(T + S): all `attention_pieces`, one after the other -> o_THV."""
    out_THV = xp.empty((*q_THK.shape[:2], v_SGV.shape[-1]), dtype=q_THK.dtype)
    for piece in attention_pieces(xp, q_THK, k_SGK, v_SGV, out_THV, **place):
        piece()
    return out_THV
