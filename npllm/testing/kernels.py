"""Correct kernels at a declared precision, in plain NumPy: what the kit itself is tried on, and patterns for others."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.testing.rounding import Rounding


def flash(
    q: Array, k: Array, v: Array, sinks: Array | None = None, lengths: Array | None = None, pages: Array | None = None,
    query_offsets: Array | None = None, key_offsets: Array | None = None, *, scale: float, window: int | None = None,
    chunk: int | None = None, softcap: float | None = None, rounding: Rounding | None = None, block: int = 64,
) -> Array:  # fmt: skip
    """Attention in tiles of `block` keys with an online softmax (arXiv 2205.14135), for all forms of `attention`'s cases.

    It computes in float32 and rounds scores, probabilities and output where `rounding` says; probabilities are rounded
    relative to the largest so far. `rounding` None: that of the queries' type.
    """
    rounding = rounding or Rounding(q.dtype.name)
    how: dict[str, Any] = {"scale": scale, "window": window, "chunk": chunk, "softcap": softcap}
    how |= {"rounding": rounding, "block": block}
    out = np.zeros((*q.shape[:-1], v.shape[-1]), rounding.format("output").dtype)
    if query_offsets is not None and key_offsets is not None:
        for (first, last), (begin, end) in zip(pairwise(query_offsets), pairwise(key_offsets), strict=True):
            out[first:last] = one_row(q[first:last], k[begin:end], v[begin:end], sinks, **how)
        return out
    for r in range(len(q)):
        k_SGK, v_SGV = (x[r] if pages is None else x[pages[r]].reshape(-1, *x.shape[2:]) for x in (k, v))
        length = len(k_SGK) if lengths is None else int(lengths[r])
        out[r] = one_row(q[r], k_SGK[:length], v_SGV[:length], sinks, **how)
    return out


def one_row(
    q_THK: Array, k_SGK: Array, v_SGV: Array, sinks: Array | None, *, scale: float, window: int | None, chunk: int | None,
    softcap: float | None, rounding: Rounding, block: int,
) -> Array:  # fmt: skip
    """The queries of one row, which are its last positions, over its keys -> o_THV in the output's type."""
    (T, H, _), (S, G, V) = q_THK.shape, v_SGV.shape
    k_HKS, v_HSV = (np.repeat(x.astype(np.float32), H // G, axis=1).transpose(1, 0, 2) for x in (k_SGK, v_SGV))
    q_HTK = q_THK.astype(np.float32).transpose(1, 0, 2) * np.float32(scale)
    query_T1 = np.arange(S - T, S)[:, None]
    sum_HTV: Array = np.zeros((H, T, V), np.float32)
    top_HT1, total_HT1 = np.full((H, T, 1), -np.inf, np.float32), np.zeros((H, T, 1), np.float32)
    if sinks is not None:
        # A sink is what the softmax begins with: one key whose value is 0.
        top_HT1[:], total_HT1[:] = sinks.astype(np.float32)[:, None, None], 1.0
    for begin in range(0, S, block):
        key_1S = np.arange(begin, min(begin + block, S))[None, :]
        seen_TS = key_1S <= query_T1
        if window is not None:
            seen_TS &= query_T1 - key_1S < window
        if chunk is not None:
            seen_TS &= query_T1 // chunk == key_1S // chunk
        # Values that nobody may see may be anything, and 0 times NaN is NaN.
        some_S = seen_TS.any(axis=0)
        if not some_S.any():
            continue
        tile = begin + np.flatnonzero(some_S)
        s_HTS = q_HTK @ k_HKS[:, tile].transpose(0, 2, 1)
        if softcap is not None:
            s_HTS = np.float32(softcap) * np.tanh(s_HTS / np.float32(softcap))
        s_HTS = np.where(seen_TS[:, some_S], narrowed(s_HTS, rounding, "scores"), np.float32(-np.inf))
        new_HT1 = np.maximum(top_HT1, np.max(s_HTS, axis=-1, keepdims=True))
        # A query that has seen nothing yet has the maximum -inf; anything finite serves.
        base_HT1 = np.where(new_HT1 == -np.inf, np.float32(0), new_HT1)
        p_HTS, kept_HT1 = np.exp(s_HTS - base_HT1), np.exp(top_HT1 - base_HT1)
        total_HT1 = total_HT1 * kept_HT1 + np.sum(p_HTS, axis=-1, keepdims=True)
        sum_HTV = sum_HTV * kept_HT1 + narrowed(p_HTS, rounding, "probs") @ v_HSV[:, tile]
        top_HT1 = new_HT1
    o_HTV = sum_HTV / np.where(total_HT1 == 0, np.float32(1), total_HT1)
    return o_HTV.transpose(1, 0, 2).astype(rounding.format("output").dtype)


def narrowed(x: Array, rounding: Rounding, point: str) -> Array:
    """float32 rounded to the format at a rounding point, as float32."""
    to = rounding.format(point)
    return x if to.name in ("f32", "f64") else x.astype(to.dtype).astype(np.float32)
