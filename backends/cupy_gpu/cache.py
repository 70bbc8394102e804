"""Key/value caches whose new entries a kernel stores, at places that it reads from a plan: so a graph can store them too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from npllm.arrays import Array
from npllm.backends.cupy_gpu.attention import BF16, F32
from npllm.backends.cupy_gpu.base import THREADS, Base, groups
from npllm.backends.cupy_gpu.device import InOut
from npllm.cache import Cache, Keys, LayerCache, LayerSpec, Rows

if TYPE_CHECKING:
    from npllm.backends.cupy_gpu.steps import Step


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

    def _layer(self, spec: LayerSpec) -> DeviceLayerCache:
        return DeviceLayerCache(self.be, self.xp, spec, self.kv_dtype, self.compute_dtype)
