"""What attention kernels are known to get wrong.

Most call the canon with something changed. Those that err between scores and values bring the formula along (`Plain`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from npllm.arrays import Array, Namespace
from npllm.backend import Backend
from npllm.blocks.masks import Mask
from npllm.cache import Keys, Rows
from npllm.testing.mistakes import Mistake
from npllm.testing.ops import attention_plain as plain
from npllm.testing.ops.attention_plain import TILE
from npllm.testing.rounding import FORMATS, Format
from npllm.weights import Linear

# What a mistake makes of a call's arguments, (q_MHK, keys, rows, the rest by name).
Call = tuple[Array, Keys, Rows, dict[str, Any]]


def changed(change: Callable[[Backend, Array, Keys, Rows, dict[str, Any]], Call]) -> type[Backend]:
    """The mistake of calling attention with other arguments."""

    class Changed(Backend):
        def attention(self, q_MHK: Array, keys: Keys, rows: Rows, /, **how: Any) -> Array:
            q_MHK, keys, rows, how = change(self, q_MHK, keys, rows, how)
            return super().attention(q_MHK, keys, rows, **how)

    return Changed


def other(**changes: Callable[[Any, float], Any]) -> type[Backend]:
    """Other arguments by name, each made of the right one and of the queries' width."""

    def change(be: Backend, q_MHK: Array, keys: Keys, rows: Rows, how: dict[str, Any]) -> Call:
        width = float(q_MHK.shape[-1])
        wrong = {name: make(how[name], width) for name, make in changes.items() if how.get(name) is not None}
        return q_MHK, keys, rows, how | wrong

    return changed(change)


def placed(change: Callable[[Keys, Rows, Array], tuple[Keys, Rows]]) -> type[Backend]:
    """Keys or rows that lie elsewhere than they do."""
    return changed(lambda be, q, keys, rows, how: (q, *change(keys, rows, q), how))


def each(values: tuple[int, ...], change: Callable[[int], int]) -> tuple[int, ...]:
    return tuple(map(change, values))


class Wider(Mask):
    """A mask whose queries stand `ahead` positions further on as far as causality goes."""

    ahead = 1

    def allowed(self, xp: Namespace, query_T: Array, key_S: Array) -> Array:
        seen_TS = (key_S[None, :] <= query_T[:, None] + self.ahead) & (query_T[:, None] >= 0)
        if self.window is not None:
            seen_TS &= query_T[:, None] - key_S[None, :] < self.window
        if self.chunk is not None:
            seen_TS &= query_T[:, None] // self.chunk == key_S[None, :] // self.chunk
        return xp.asarray(seen_TS)

    def reach(self, first: int, last: int) -> tuple[int, int]:
        low, _ = super().reach(first, last)
        return low, max(low, last + 1 + self.ahead)


class Strict(Wider):
    """A query does not see its own key."""

    ahead = -1


class Everything(Wider):
    """A query sees all later keys."""

    ahead = 1 << 40


class LateChunks(Mask):
    """Chunks begin one position late."""

    def allowed(self, xp: Namespace, query_T: Array, key_S: Array) -> Array:
        seen_TS = Mask(self.window).allowed(xp, query_T, key_S)
        if self.chunk is not None:
            seen_TS &= (query_T[:, None] + self.chunk - 1) // self.chunk == (key_S[None, :] + self.chunk - 1) // self.chunk
        return seen_TS

    def reach(self, first: int, last: int) -> tuple[int, int]:
        low, high = super().reach(first, last)
        return max(0, low - (self.chunk or 1)), high


def window(change: Callable[[int], int]) -> type[Backend]:
    return other(mask=lambda mask, _: mask if mask.window is None else mask._replace(window=max(1, change(mask.window))))


def one_shorter(keys: Keys, rows: Rows, q_MHK: Array) -> tuple[Keys, Rows]:
    return keys._replace(counts=each(keys.counts, lambda count: max(0, count - 1))), rows


def first_skipped(keys: Keys, rows: Rows, q_MHK: Array) -> tuple[Keys, Rows]:
    counts, firsts = each(keys.counts, lambda count: max(0, count - 1)), each(keys.firsts, lambda first: first + 1)
    begins = tuple(begin + min(1, count) for begin, count in zip(keys.begins, keys.counts, strict=True))
    return keys._replace(counts=counts, firsts=firsts, begins=begins), rows


def whole_tiles(keys: Keys, rows: Rows, q_MHK: Array) -> tuple[Keys, Rows]:
    """What is left over of a row that is no multiple of the tile is not read."""
    return keys._replace(counts=each(keys.counts, lambda count: count // TILE * TILE)), rows


def top_left(keys: Keys, rows: Rows, q_MHK: Array) -> tuple[Keys, Rows]:
    return keys, replace(rows, starts=(0,) * len(rows.starts))


def one_longer(keys: Keys, rows: Rows, q_MHK: Array) -> tuple[Keys, Rows]:
    """Every row one key longer, its queries one further on; what follows the last key of the storage is its first."""
    longer = keys._replace(counts=each(keys.counts, lambda count: count + 1))
    return longer, replace(rows, starts=each(rows.starts, lambda start: start + 1))


def whole_storage(keys: Keys, rows: Rows, q_MHK: Array) -> tuple[Keys, Rows]:
    """Lengths are not looked at: dense rows end where the storage does."""
    size = keys.k_BSGK.shape[1]
    if keys.pages is not None or len(keys.k_BSGK) != len(keys.counts):
        return keys, rows
    starts = tuple(size - count for count in rows.counts)
    return keys._replace(counts=(size,) * len(keys.counts)), replace(rows, starts=starts)


def neighbours(keys: Keys, rows: Rows, q_MHK: Array) -> tuple[Keys, Rows]:
    """Packed rows begin one key early: in the row before."""
    size = keys.k_BSGK.shape[1]
    return keys._replace(begins=each(keys.begins, lambda begin: (begin - 1) % size if size and begin else begin)), rows


def pages_in_order(keys: Keys, rows: Rows, q_MHK: Array) -> tuple[Keys, Rows]:
    if keys.pages is None:
        return keys, rows
    wide = len(keys.pages[0])
    return keys._replace(pages=tuple(tuple(range(r * wide, (r + 1) * wide)) for r in range(len(keys.pages)))), rows


def first_rows_pages(keys: Keys, rows: Rows, q_MHK: Array) -> tuple[Keys, Rows]:
    return keys._replace(pages=keys.pages and keys.pages[:1] * len(keys.pages)), rows


def other_values(be: Backend, q_MHK: Array, keys: Keys, rows: Rows, how: dict[str, Any]) -> Call:
    """Each key head's values are its neighbour's."""
    v_BSGV = keys.v_BSGV
    return q_MHK, keys._replace(v_BSGV=be.xp.concatenate([v_BSGV[:, :, 1:], v_BSGV[:, :, :1]], axis=2)), rows, how


def first_head(be: Backend, q_MHK: Array, keys: Keys, rows: Rows, how: dict[str, Any]) -> Call:
    return q_MHK, keys._replace(k_BSGK=keys.k_BSGK[:, :, :1], v_BSGV=keys.v_BSGV[:, :, :1]), rows, how


def narrow(be: Backend, q_MHK: Array, keys: Keys, rows: Rows, how: dict[str, Any]) -> Call:
    """Heads are read in pieces of 32 numbers; what remains is not read."""
    used = max(32, q_MHK.shape[-1] // 32 * 32)
    return q_MHK[..., :used], keys._replace(k_BSGK=keys.k_BSGK[..., :used]), rows, how


def sinks_made(make: Callable[[Array, Array, dict[str, Any]], Array]) -> type[Backend]:
    """Other sinks, made of the right ones, of the queries and of the other arguments."""

    def change(be: Backend, q_MHK: Array, keys: Keys, rows: Rows, how: dict[str, Any]) -> Call:
        if how.get("sinks") is None:
            return q_MHK, keys, rows, how
        return q_MHK, keys, rows, how | {"sinks": Linear(make(be.dense(how["sinks"].weight), q_MHK, how))}

    return changed(change)


class Interleaved(Backend):
    """Query head h reads key head h % G, not h // (H / G)."""

    def attention(self, q_MHK: Array, keys: Keys, rows: Rows, /, **how: Any) -> Array:
        H, G = q_MHK.shape[1], keys.k_BSGK.shape[2]
        order = np.arange(H).reshape(H // G, G).T.reshape(-1)
        if how.get("sinks") is not None:
            how["sinks"] = Linear(self.dense(how["sinks"].weight)[order])
        return super().attention(q_MHK[:, order], keys, rows, **how)[:, np.argsort(order)]


class FirstEight(Backend):
    """Query heads from the ninth on are given what the first eight have."""

    def attention(self, q_MHK: Array, keys: Keys, rows: Rows, /, **how: Any) -> Array:
        return super().attention(q_MHK, keys, rows, **how)[:, np.arange(q_MHK.shape[1]) % 8]


def cut(x: Array, to: Format) -> Array:
    """`x` rounded towards zero."""
    step = to.spacing(x.astype(np.float64))
    return (np.trunc(x / step) * step).astype(x.dtype)


class Truncated(Backend):
    """The output is cut to bfloat16 where it should be rounded."""

    def attention(self, q_MHK: Array, keys: Keys, rows: Rows, /, **how: Any) -> Array:
        return self.asarray(cut(self.to_numpy(super().attention(q_MHK, keys, rows, **how)), FORMATS["bf16"]))


MISTAKES = (
    Mistake("scale of a head one wider", other(scale=lambda scale, width: scale * (width / (width + 1.0)) ** 0.5)),
    Mistake("scale missing", other(scale=lambda scale, width: 1.0)),
    Mistake("scale applied twice", other(scale=lambda scale, width: scale**2)),
    Mistake("exponential to base 2", other(scale=lambda scale, width: scale * np.log(2.0))),
    Mistake("scale always 1/sqrt(width)", other(scale=lambda scale, width: width**-0.5)),
    Mistake("scale rounded to float16", other(scale=lambda scale, width: float(np.float16(scale)))),
    Mistake("soft cap omitted", other(softcap=lambda cap, _: None)),
    Mistake("soft cap of twice the size", other(softcap=lambda cap, _: 2.0 * cap)),
    Mistake("soft cap before the scale", plain.CapBeforeScale),
    Mistake("soft cap after the mask", plain.CapAfterMask),
    Mistake("window one key too wide", window(lambda w: w + 1)),
    Mistake("window one key too narrow", window(lambda w: w - 1)),
    Mistake("window ignored", other(mask=lambda mask, _: mask._replace(window=None))),
    Mistake("chunk one key too long", other(mask=lambda mask, _: mask._replace(chunk=mask.chunk and mask.chunk + 1))),
    Mistake("chunks begin one key late", other(mask=lambda mask, _: LateChunks(*mask))),
    Mistake("chunk ignored", other(mask=lambda mask, _: mask._replace(chunk=None))),
    Mistake("chunk taken for a window", other(mask=lambda mask, _: Mask(mask.window or mask.chunk))),
    Mistake("causal from the first key (top-left)", placed(top_left)),
    Mistake("own key not seen", other(mask=lambda mask, _: Strict(*mask))),
    Mistake("next key seen", other(mask=lambda mask, _: Wider(*mask))),
    Mistake("not causal", other(mask=lambda mask, _: Everything(*mask))),
    Mistake("sinks dropped", other(sinks=lambda sinks, _: None)),
    Mistake("sinks scaled", sinks_made(lambda sinks_H, q_MHK, how: sinks_H * how["scale"])),
    Mistake("sinks clamped to -20", sinks_made(lambda sinks_H, q_MHK, how: np.maximum(sinks_H, -20.0))),
    Mistake("sinks below -9 dropped", sinks_made(lambda sinks_H, q_MHK, how: np.where(sinks_H < -9.0, -1e4, sinks_H))),
    Mistake("sinks of the next head", sinks_made(lambda sinks_H, q_MHK, how: np.roll(sinks_H, -1))),
    Mistake("sink counted in every tile", plain.SinkPerTile),
    Mistake("grouped heads interleaved", Interleaved),
    Mistake("heads beyond the eighth taken from the first eight", FirstEight),
    Mistake("first key head for all", changed(first_head)),
    Mistake("values of the next key head", changed(other_values)),
    Mistake("width cut to a multiple of 32", changed(narrow)),
    Mistake("first key skipped", placed(first_skipped)),
    Mistake("last key skipped", placed(one_shorter)),
    Mistake("last tile skipped", placed(whole_tiles)),
    Mistake("length one too long", placed(one_longer)),
    Mistake("lengths ignored", placed(whole_storage)),
    Mistake("a key of the row before", placed(neighbours)),
    Mistake("page table ignored", placed(pages_in_order)),
    Mistake("page table of the first row for all", placed(first_rows_pages)),
    Mistake("masked by -10000", plain.Sentinel),
    Mistake("masked scores are 0", plain.ZeroScores),
    Mistake("masked keys in the denominator", plain.WholeDenominator),
    Mistake("masked row is the mean of all values", plain.MaskedMean),
    Mistake("masked row is NaN", plain.MaskedNaN),
    Mistake("maximum not subtracted", plain.NoMaximum),
    Mistake("sums not rescaled to a new maximum", plain.NoRescaling),
    Mistake("scores rounded to bfloat16", plain.CoarseScores),
    Mistake("scores rounded to float16", plain.HalfScores),
    Mistake("scores summed in bfloat16", plain.CoarseDots),
    Mistake("probabilities with four bits (e4m3)", plain.CoarseProbs),
    Mistake("values summed in bfloat16", plain.CoarseSums),
    Mistake("output cut to bfloat16, not rounded", Truncated),
)
