"""The operation `attention`: rows of few queries by attention_few or in splits, rows of many by attention_tiles."""

from __future__ import annotations

import numpy as np

from npllm.arrays import Array
from npllm.backend import accelerates
from npllm.backends.numba_cpu.attention_few import attend_few
from npllm.backends.numba_cpu.attention_job import FEW, SPLIT_LANES, combine, record_bytes, splits_of
from npllm.backends.numba_cpu.attention_tiles import attend_tiles, fits
from npllm.backends.numba_cpu.base import Base, at
from npllm.backends.numba_cpu.tape import entry
from npllm.blocks.masks import Mask
from npllm.cache import Keys, Rows
from npllm.weights import Linear


def unreadable(be: Base, keys: Keys, scale: float) -> str | None:
    """Why kernels cannot attend to these keys."""
    k_BSGK, v_BSGV = keys.k_BSGK, keys.v_BSGV
    if be.dtype == "float64":
        return "kernels compute in float32 and bfloat16"
    if not scale > 0:
        return f"a scale of {scale}"
    if {k_BSGK.dtype, v_BSGV.dtype} != {np.dtype("float32" if keys.widen is None else "uint16")}:
        return f"keys of {k_BSGK.dtype}"
    if any(x.size and x.strides[-1] != x.itemsize for x in (k_BSGK, v_BSGV)):
        return "the numbers of a key do not lie side by side"
    if not fits(k_BSGK.shape[-1], v_BSGV.shape[-1]):
        return f"heads {max(k_BSGK.shape[-1], v_BSGV.shape[-1])} wide"
    return None


class Attention(Base):
    """Attention over cached keys."""

    @accelerates(lambda self, q_MHK, keys, rows, mask, scale, softcap=None, sinks=None: unreadable(self, keys, scale))
    def attention(
        self, q_MHK: Array, keys: Keys, rows: Rows, /, *,
        mask: Mask, scale: float, softcap: float | None = None, sinks: Linear | None = None,
    ) -> Array:  # fmt: skip
        q_MHK, plan = self.plain(q_MHK), self.plan(keys, rows)
        (M, H, K), (G, V) = q_MHK.shape, keys.v_BSGV.shape[2:]
        out_MHV = self.empty(M, H, V)
        lanes = [count * (H // G) for count in rows.counts]
        split = sum(count for count in lanes if count <= SPLIT_LANES)
        pages = None if keys.pages is None else _paged(keys.pages)
        size = keys.k_BSGK.shape[1]
        splits = splits_of(size if pages is None else size * pages.shape[1])
        records = self.room(split * G * splits * record_bytes.py_func(V))
        sinks_H = None if sinks is None else self.plain(self.dense(sinks.weight))
        arguments = (
            at(plan), len(plan), H, G, K, V, at(q_MHK), at(out_MHV), *_stored(keys.k_BSGK), *_stored(keys.v_BSGV),
            keys.widen is not None, size, at(pages), 0 if pages is None else pages.shape[1], mask.window or 0,
            mask.chunk or 0, at(sinks_H), at(records), splits, self.dtype != "float32", scale, softcap or 0.0,
        )  # fmt: skip
        kernels = []
        if any(0 < count < FEW for count in lanes):
            kernels.append(attend_few)
        if any(count >= FEW for count in lanes):
            kernels.append(attend_tiles)
        if split:
            kernels.append(combine)
        self.run(*(entry(each, *arguments) for each in kernels))
        return out_MHV


def _stored(x_BSGF: Array) -> tuple[int, ...]:
    """Where keys or values lie, and how many bytes apart slots, entries and heads are."""
    return at(x_BSGF), *x_BSGF.strides[:3]


def _paged(pages: tuple[tuple[int, ...], ...]) -> Array:
    """The pages of all rows, as many of each."""
    table = np.zeros((len(pages), max(map(len, pages), default=0)), np.int64)
    for numbers, row in zip(pages, table, strict=True):
        row[: len(numbers)] = numbers
    return table
