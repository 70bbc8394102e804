"""PyTorch's scaled_dot_product_attention as a kernel of `npllm.testing`: a correct one that npllm had no hand in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# What PyTorch's operation has no argument for.
WITHOUT = "softcap,sinks"


def sdpa(
    q: Any, k: Any, v: Any, lengths: Any = None, pages: Any = None, query_offsets: Any = None, key_offsets: Any = None, *,
    scale: float, window: int | None = None, chunk: int | None = None,
) -> Any:  # fmt: skip
    """Every form of the operation `attention`, a row at a time: keys gathered, masks written out."""
    import torch

    out = torch.zeros((*q.shape[:-1], v.shape[-1]), dtype=q.dtype)
    flat = out.reshape(-1, *out.shape[-2:])
    for queries, index in rows(q, k, lengths, pages, query_offsets, key_offsets):
        T, S = queries.stop - queries.start, len(index)
        position, key = torch.arange(S - T, S)[:, None], torch.arange(S)[None]
        seen = (key <= position) & (position - key < (window or S + T)) & (position >= 0)
        if chunk is not None:
            seen &= position // chunk == key // chunk
        parts = (x.reshape(-1, *x.shape[-2:])[at].transpose(0, 1)[None] for x, at in ((q, queries), (k, index), (v, index)))
        got = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=seen, scale=scale, enable_gqa=True)
        flat[queries] = torch.where(seen.any(1)[:, None, None], got[0].transpose(0, 1), 0) if S else 0
    return out


def rows(q: Any, k: Any, lengths: Any, pages: Any, query_offsets: Any, key_offsets: Any) -> Iterator[tuple[slice, Any]]:
    """The queries of each row, and where its keys lie when rows or pages stand one after the other."""
    import torch

    if query_offsets is not None:
        queries, keys = query_offsets.tolist(), key_offsets.tolist()
        for a, b, c, d in zip(queries, queries[1:], keys, keys[1:], strict=False):
            yield slice(a, b), torch.arange(c, d)
        return
    (B, T), size = q.shape[:2], k.shape[1]
    for r in range(B):
        s = torch.arange(size if lengths is None else int(lengths[r]))
        yield slice(r * T, (r + 1) * T), s + r * size if pages is None else pages[r].long()[s // size] * size + s % size
