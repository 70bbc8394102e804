"""Masks as rules on positions, never arrays with a life of their own.

A rule says which absolute key positions a query position may see. The canon turns it into booleans; a kernel skips what
it excludes. All rules are causal: a query sees keys up to its own position, so with T new queries and S keys the last T
keys are the queries' own (bottom-right alignment).
"""

from __future__ import annotations

from typing import NamedTuple

from npllm.arrays import Array, Namespace


class Mask(NamedTuple):
    """`window=w`: keys with `query - key < w` (w keys, the query's own included). `chunk=c`: `query // c == key // c`."""

    window: int | None = None
    chunk: int | None = None

    def allowed(self, xp: Namespace, query_T: Array, key_S: Array) -> Array:
        """Booleans [T, S] from positions; a key position below zero marks an empty cache entry and is never seen."""
        query_T1, key_1S = query_T[:, None], key_S[None, :]
        seen_TS = (key_1S <= query_T1) & (key_1S >= 0)
        if self.window is not None:
            seen_TS &= query_T1 - key_1S < self.window
        if self.chunk is not None:
            seen_TS &= query_T1 // self.chunk == key_1S // self.chunk
        return xp.asarray(seen_TS)

    @property
    def span(self) -> int | None:
        """The most keys that a query can see, its own included; None: all."""
        return min((each for each in self if each is not None), default=None)

    def reach(self, first: int, last: int) -> tuple[int, int]:
        """The key positions [low, high) that queries at `first..last` can see at all; outside, nothing need be read."""
        low = 0
        if self.window is not None:
            low = max(low, first - self.window + 1)
        if self.chunk is not None:
            low = max(low, first // self.chunk * self.chunk)
        return low, last + 1

    def pairs(self, start: int, stop: int) -> int:
        """How many (query, key) pairs queries at the positions start..stop - 1 see, over keys from position 0 on."""
        return self._pairs_before(stop) - self._pairs_before(start)

    def _pairs_before(self, stop: int) -> int:
        """Chunk by chunk: the first query of a chunk sees one key, each next one more, up to the window."""
        chunk = min(self.chunk or stop, stop)
        full, rest = divmod(stop, max(1, chunk))
        return full * _ramp(chunk, self.window) + _ramp(rest, self.window)


def _ramp(count: int, most: int | None) -> int:
    """1 + 2 + 3 + ... of `count` terms, none above `most`."""
    rising = count if most is None else min(count, most)
    return rising * (rising + 1) // 2 + (count - rising) * rising


CAUSAL = Mask()


def sliding(window: int | None) -> Mask:
    """Sliding-window attention (config field `sliding_window`; Mistral 7B, arXiv 2310.06825, section 2); None: CAUSAL."""
    return Mask(window=window)


def chunked(chunk: int) -> Mask:
    """Attention inside aligned chunks of positions (config field `attention_chunk_size`; Llama 4)."""
    return Mask(chunk=chunk)
