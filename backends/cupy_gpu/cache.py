"""Key/value caches whose new entries a kernel stores, at places that it reads from a plan: so a graph can store them too.

A step ahead of its time (lookahead.py) stores keys of a row's next position. In a ring they would overwrite the oldest key,
which the row still needs if it is cut back by one token: so rings have an entry more than their mask can reach.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.backend import RMS, UNNORMED, HeadNorms
from npllm.backends.cupy_gpu.attention import BF16, F32
from npllm.backends.cupy_gpu.base import Base, groups
from npllm.backends.cupy_gpu.device import Argument, InOut, Out
from npllm.blocks.rope import Angles
from npllm.cache import Cache, Ints, Keys, LayerCache, LayerSpec, Rows, positions

if TYPE_CHECKING:
    from npllm.backends.cupy_gpu.lookahead import Ahead
    from npllm.backends.cupy_gpu.steps import Step


def _when_asked(make: Callable[[DeviceRows], Any]) -> Any:
    """What a field is by default: made by the first who reads it."""
    return functools.cached_property(make)


def _positions(rows: DeviceRows) -> Array:
    return rows.be.asarray(positions(rows.starts, rows.counts), dtype="int64")


def _wanted(rows: DeviceRows) -> Array | None:
    return None if rows.ends is None else rows.be.asarray(rows.ends, dtype="int64")


@dataclass(frozen=True)
class DeviceRows(Rows):
    """The plan of a step whose arrays go to the device when somebody asks for them: a captured step never does.

    `ends`: as the wanted_W. `ahead`: the step that was launched before it was asked for, if this is to be it.
    """

    positions_M: Array = field(init=False, repr=False, compare=False, default=_when_asked(_positions))
    wanted_W: Array | None = field(init=False, repr=False, compare=False, default=_when_asked(_wanted))
    be: Base
    ends: Sequence[int] | None
    ahead: Ahead | None

    def moved(self, tokens: int) -> DeviceRows:
        """The same rows, so many tokens further."""
        return replace(self, starts=tuple(start + tokens for start in self.starts), ahead=None)


class DeviceLayerCache(LayerCache):
    """A layer's keys and values, stored by kernels wherever nothing that a step still sees is overwritten."""

    def __init__(self, be: Base, *args: Any) -> None:
        self.be = be
        super().__init__(*args)

    def append(self, k_MGK: Array, v_MGV: Array | None, rows: Rows) -> Keys:
        if not self.takes(rows):
            return super().append(k_MGK, v_MGV, rows)
        keys = self.place(rows)
        place_heads(self.be, self, self.be.plan(keys, rows), None, Heads(k_MGK), None if v_MGV is None else Heads(v_MGV))
        return keys

    def takes(self, rows: Rows) -> bool:
        """Whether a kernel can store the new tokens of these rows."""
        wraps = any(start + end - begin > self.size for _, start, begin, end in rows)
        return not (wraps and max(rows.counts) > 1) and "float64" not in (self.kv_dtype, self.compute_dtype)

    def place(self, rows: Rows) -> Keys:
        """What the rows' queries may attend to, once a kernel has stored the step's own keys."""
        keys, step = self.keys(rows), getattr(rows, "step", None)
        if step is None:
            self.reach(rows)
        else:
            step.appended(keys, self)
        return keys

    def contents(self, slot: int, length: int) -> dict[str, Array]:
        # To the host, which writes them to files; `restore` takes them from there.
        return {name: self.be.to_numpy(x_GSF) for name, x_GSF in super().contents(slot, length).items()}

    def restore(self, slot: int, contents: Mapping[str, Array], length: int, lost: int = 0) -> None:
        # Through our own pieces of pinned memory: CuPy would pin as much as it is given, and keep it.
        there = {name: self.be.device.upload(contents[name]) for name in self.spec.widths}
        super().restore(slot, there, length, lost)

    def entries(self, tokens: int) -> int:
        kept = super().entries(tokens)
        return kept + 1 if kept < tokens and self.be.looks_ahead else kept

    @property
    def defines(self) -> dict[str, int]:
        """The macro of kernels that store."""
        return {"STORED": BF16 if self.kv_dtype == "bfloat16" else F32}


# Heads that a block of heads.cu takes, a warp each, and the numbers of them that fit into shared memory unasked.
HEADS = 4
WIDEST = 48 * 1024 // 4 // HEADS


class Heads(NamedTuple):
    """New queries, keys or values [M, H, K], the numbers of a head side by side, and the norm of each head."""

    x_MHK: Array
    norm: RMS | None = None


# Why kernels do not store.
NOT_TAKEN = "kernels compute in float32, and store in caches of this backend"

NO_HEADS = (None, 0, 0, 0, 0, 0, None, 0.0, 0.0)


def place_heads(
    be: Base, memory: DeviceLayerCache, plan: Array, q: Heads | None, k: Heads, v: Heads | None, *,
    norms: HeadNorms = UNNORMED, angles: Angles | None = None, interleaved: bool = False, scale_M: Array | None = None,
) -> Array | None:  # fmt: skip
    """Queries normed and turned -> q_MHK; keys the same, and values, to the places of `memory` that the plan gives them."""
    storages = (*map(InOut, memory.stored), None)[:2]
    shape = None if q is None else q.x_MHK.shape
    q_MHK = None if shape is None else be.empty(*shape)
    each = [NO_HEADS if of is None else _heads(be, of) for of in (q, k, v)]
    cos_MJ, sin_MJ = (None, None) if angles is None else map(be.plain, angles)
    turning = (cos_MJ, sin_MJ, 0 if cos_MJ is None else cos_MJ.shape[1], int(interleaved))
    args = (
        plan, len(plan), *each[0], *each[1], *each[2], int(norms.whole), int(norms.turned), *turning,
        None if scale_M is None else be.plain(scale_M), memory.size, q_MHK if q_MHK is None else Out(q_MHK), *storages,
    )  # fmt: skip
    blocks = sum(groups(of.x_MHK.shape[1], HEADS) for of in (q, k, v) if of is not None)
    widest = max(of.x_MHK.shape[2] for of in (q, k, v) if of is not None)
    if len(k.x_MHK) and blocks and widest:
        grid = (len(k.x_MHK), blocks, 1)
        be.launch("heads.cu", "place_heads", memory.defines, grid, 32 * HEADS, args, 4 * HEADS * widest)
    return q_MHK


def _heads(be: Base, of: Heads) -> tuple[Argument, ...]:
    """HEADS of heads.cu."""
    x_MHK, norm = of
    if x_MHK.dtype != np.float32 or x_MHK.strides[2] != 4:
        x_MHK = be.plain(x_MHK)
    how = (0, None, 0.0, 0.0) if norm is None else (1, be.vector(norm.params, "weight"), float(norm.eps), float(norm.offset))
    return x_MHK, x_MHK.strides[0] // 4, x_MHK.strides[1] // 4, *x_MHK.shape[1:], *how


class DeviceCache(Cache):
    """A cache of such layers, with the captured steps over its memory."""

    layers: Sequence[DeviceLayerCache]

    def __init__(self, be: Base, *args: Any) -> None:
        self.be = be
        super().__init__(*args)
        self.steps: dict[Any, Step] = {}
        # Nothing but the next plan may make use of it, and that only while rows stay as they are.
        self.ahead: Ahead | None = None

    def _layer(self, spec: LayerSpec) -> DeviceLayerCache:
        return DeviceLayerCache(self.be, self.xp, spec, self.kv_dtype, self.compute_dtype)

    def _rows(self, slots: Ints, starts: Ints, counts: Ints, ends: Sequence[int] | None) -> DeviceRows:
        ahead, self.ahead = self.ahead, None
        return DeviceRows(slots, starts, counts, self.be, ends, ahead)

    def _resize(self, slots: int, size: int) -> None:
        # Captured steps know the old memory by its addresses, and would hold it beside the new.
        self.ahead = None
        self.steps.clear()
        with self.be.device.guarded():
            super()._resize(slots, size)

    def spread(self, slot: int, copies: int) -> list[int]:
        with self.be.device.guarded():
            return super().spread(slot, copies)

    def contents(self, slot: int, length: int | None = None) -> dict[str, Array]:
        with self.be.device.guarded():
            return super().contents(slot, length)

    def restore(self, slot: int, contents: Mapping[str, Array], length: int, lost: Sequence[int] | None = None) -> None:
        with self.be.device.guarded():
            super().restore(slot, contents, length, lost)

    def truncate(self, slot: int, length: int) -> int:
        # Also where a slot is freed: without a plan between, it may be filled by `fork` or `restore` next.
        self.ahead = None
        return super().truncate(slot, length)
