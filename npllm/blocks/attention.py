"""Softmax attention with grouped heads, for the queries of one row."""

from __future__ import annotations

import math

from npllm.arrays import Array, Namespace
from npllm.blocks.masks import Mask

# Queries per block of `blocked_attention`: scores of one block stay in the cache, and half of a causal square is skipped.
QUERY_BLOCK = 128


def softmax(xp: Namespace, scores_TS: Array) -> Array:
    """Softmax over the last axis, in place, minus the row's maximum; a row that is -inf throughout gives zeros."""
    top = xp.max(scores_TS, axis=-1, keepdims=True, initial=-math.inf)
    scores_TS -= xp.where(top == -math.inf, scores_TS.dtype.type(0), top)
    xp.exp(scores_TS, out=scores_TS)
    total = xp.sum(scores_TS, axis=-1, keepdims=True)
    scores_TS /= xp.where(total == 0, scores_TS.dtype.type(1), total)
    return scores_TS


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

    Query head h reads key/value head `h // (H / G)`. The soft cap `c tanh(s / c)` (Gemma 2, arXiv 2408.00118) comes before
    the mask, else -inf would become -c. The mask selects; it never adds or multiplies. A query that may see nothing gives 0.
    T = 0 and S = 0 are legal.
    """
    (T, H, K), (_, G, V) = q_THK.shape, v_SGV.shape
    q_GRTK = q_THK.reshape(T, G, H // G, K).transpose(1, 2, 0, 3) * q_THK.dtype.type(scale)
    scores_GRTS = q_GRTK @ k_SGK.transpose(1, 2, 0)[:, None]
    if softcap is not None:
        scores_GRTS = softcap * xp.tanh(scores_GRTS / softcap)
    scores_GRTS = xp.where(allowed_TS, scores_GRTS, scores_GRTS.dtype.type(-math.inf))
    o_GRTV = softmax(xp, scores_GRTS) @ v_SGV.transpose(1, 0, 2)[:, None]
    return o_GRTV.transpose(2, 0, 1, 3).reshape(T, H, V)


def blocked_attention(
    xp: Namespace,
    q_THK: Array,
    k_SGK: Array,
    v_SGV: Array,
    *,
    first_query: int,
    first_key: int,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    block: int = QUERY_BLOCK,
) -> Array:
    """The equal of `softmax_attention` for consecutive positions: memory O(block * S), and unreachable keys unread.

    Query t stands at position `first_query + t`, key s at `first_key + s`. A row of a softmax depends on its own scores
    only, so cutting the queries into blocks changes no sum.
    """
    T, S = q_THK.shape[0], k_SGK.shape[0]
    parts = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        low, high = mask.reach(first_query + start, first_query + stop - 1)
        near, far = max(0, low - first_key), max(0, min(S, high - first_key))
        allowed_TS = mask.allowed(
            xp,
            xp.arange(first_query + start, first_query + stop, dtype="int64"),
            xp.arange(first_key + near, first_key + max(near, far), dtype="int64"),
        )
        keys, values = k_SGK[near : max(near, far)], v_SGV[near : max(near, far)]
        parts.append(softmax_attention(xp, q_THK[start:stop], keys, values, allowed_TS, scale=scale, softcap=softcap))
    if not parts:
        return xp.zeros((0, q_THK.shape[1], v_SGV.shape[2]), dtype=q_THK.dtype)
    return parts[0] if len(parts) == 1 else xp.concatenate(parts)
