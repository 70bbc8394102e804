"""Key/value caches whose new entries a kernel stores, at places that it reads from a plan: so a graph can store them too.

A step ahead of its time (lookahead.py) stores keys of a row's next position. In a ring they would overwrite the oldest key,
which the row still needs if it is cut back by one token: so rings have an entry more than their mask can reach.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from npllm.arrays import Array
from npllm.backends.cupy_gpu.attention import BF16, F32
from npllm.backends.cupy_gpu.base import THREADS, Base, groups
from npllm.backends.cupy_gpu.device import InOut
from npllm.cache import Cache, Ints, Keys, LayerCache, LayerSpec, Rows, positions

if TYPE_CHECKING:
    from npllm.backends.cupy_gpu.lookahead import Ahead
    from npllm.backends.cupy_gpu.steps import Step


class DeviceRows(Rows):
    """The plan of a step whose arrays go to the device when somebody asks for them: a captured step never does.

    `ends`: as the wanted_W. `ahead`: the step that was launched before it was asked for, if this is to be it.
    """

    def __init__(
        self, be: Base, slots: Ints, starts: Ints, counts: Ints, ends: Sequence[int] | None, ahead: Ahead | None
    ) -> None:
        # Not by assignment, which a frozen class refuses.
        self.__dict__.update(be=be, slots=slots, starts=starts, counts=counts, ends=ends, ahead=ahead)

    be: Base
    ends: Sequence[int] | None
    ahead: Ahead | None

    def moved(self, tokens: int) -> DeviceRows:
        """The same rows, so many tokens further."""
        starts = tuple(start + tokens for start in self.starts)
        return DeviceRows(self.be, self.slots, starts, self.counts, self.ends, None)

    @functools.cached_property
    def positions_M(self) -> Array:  # noqa: N802
        return self.be.asarray(positions(self.starts, self.counts), dtype="int64")

    @functools.cached_property
    def wanted_W(self) -> Array | None:  # noqa: N802
        return None if self.ends is None else self.be.asarray(self.ends, dtype="int64")


class DeviceLayerCache(LayerCache):
    """A layer's keys and values, stored by `append` wherever nothing that a step still sees is overwritten."""

    def __init__(self, be: Base, *args: Any) -> None:
        self.be = be
        super().__init__(*args)

    def append(self, k_MGK: Array, v_MGV: Array | None, rows: Rows) -> Keys:
        wraps = any(start + end - begin > self.size for _, start, begin, end in rows)
        if (wraps and max(rows.counts) > 1) or self.kv_dtype == "float64" or self.compute_dtype == "float64":
            return super().append(k_MGK, v_MGV, rows)
        be, keys = self.be, self.keys(rows)
        step = getattr(rows, "step", None)
        if step is None:
            self.reach(rows)
        else:
            step.appended(keys, self)
        plan = be.plan(keys, rows)
        defines = {"STORED": BF16 if self.kv_dtype == "bfloat16" else F32}
        for x_MGF, storage in zip([x for x in (k_MGK, v_MGV) if x is not None], self.stored, strict=True):
            if not x_MGF.size:
                continue
            x_MGF = be.plain(x_MGF)
            arguments = (plan, len(rows.counts), *x_MGF.shape[:1], x_MGF, *x_MGF.shape[1:], InOut(storage), storage.shape[2])
            be.launch("append.cu", "append", defines, (groups(x_MGF.size, THREADS), 1, 1), THREADS, arguments)
        return keys

    def entries(self, tokens: int) -> int:
        kept = super().entries(tokens)
        return kept + 1 if kept < tokens and self.be.looks_ahead else kept

    def reach(self, rows: Rows) -> None:
        """The rows are about to be written that far; noted before, since the writing may be interrupted."""
        for slot, start, begin, end in rows:
            self.reached[slot] = max(self.reached[slot], start + end - begin)


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
        return DeviceRows(self.be, slots, starts, counts, ends, ahead)

    def truncate(self, slot: int, length: int) -> int:
        # Also where a slot is freed: without a plan between, it may be filled by `fork` or `restore` next.
        self.ahead = None
        return super().truncate(slot, length)
