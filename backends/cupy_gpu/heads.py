"""`append_heads`: norms and RoPE of new queries and keys, and the places of keys and values in a cache, in one launch."""

from __future__ import annotations

from typing import Any

from npllm.arrays import Array
from npllm.backend import UNNORMED, HeadNorms, accelerates
from npllm.backends.cupy_gpu.base import Base
from npllm.backends.cupy_gpu.cache import NOT_TAKEN, WIDEST, DeviceLayerCache, Heads, place_heads
from npllm.blocks.rope import Angles
from npllm.cache import Keys, LayerCache, Rows


def not_placed(
    be: Base, q_MHK: Array, k_MGK: Array, v_MGV: Array, memory: LayerCache, rows: Rows, norms: HeadNorms = UNNORMED,
    **turning: Any,
) -> str | None:  # fmt: skip
    """Why a kernel cannot bring these to the cache."""
    if be.dtype == "float64" or not isinstance(memory, DeviceLayerCache):
        return NOT_TAKEN
    if norms.whole and norms.turned:
        return "one norm over all heads, after RoPE"
    widest = max(x.shape[2] for x in (q_MHK, k_MGK, v_MGV))
    return f"heads {widest} wide" if widest > WIDEST else None


class Placed(Base):
    """New heads."""

    @accelerates(not_placed)
    def append_heads(
        self, q_MHK: Array, k_MGK: Array, v_MGV: Array, memory: LayerCache, rows: Rows, /, *,
        norms: HeadNorms = UNNORMED, angles: Angles | None = None, interleaved: bool = False, scale_M: Array | None = None,
    ) -> tuple[Array, Keys]:  # fmt: skip
        assert isinstance(memory, DeviceLayerCache)
        how: dict[str, Any] = {"norms": norms, "angles": angles, "interleaved": interleaved, "scale_M": scale_M}
        if not memory.takes(rows):
            return super().append_heads(q_MHK, k_MGK, v_MGV, memory, rows, **how)
        keys = memory.place(rows)
        new = Heads(q_MHK, norms.q), Heads(k_MGK, norms.k), Heads(v_MGV, norms.v)
        placed_MHK = place_heads(self, memory, self.plan(keys, rows), *new, **how)
        assert placed_MHK is not None
        return placed_MHK, keys
