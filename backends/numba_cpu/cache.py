"""Key/value caches whose new entries a kernel stores, so that a recorded step can store them too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from npllm.arrays import Array
from npllm.backends.numba_cpu.base import PLAN, Base, at
from npllm.backends.numba_cpu.jit import inline, kernel
from npllm.backends.numba_cpu.memory import f32, u16, word
from npllm.backends.numba_cpu.source import bf16
from npllm.backends.numba_cpu.tape import entry
from npllm.backends.numba_cpu.team import next_chunk
from npllm.cache import Cache, Keys, LayerCache, LayerSpec, Rows

if TYPE_CHECKING:
    from npllm.backends.numba_cpu.steps import Recording

# Tokens that a thread stores at a time.
TOKENS = 16

# Columns of a plan (npllm.backends.numba_cpu.base) that are read here.
SLOT, QUERY, END, PLACE = 0, 4, 5, 7

# What is stored, STORED_WORDS in a list: the new tokens' numbers [M, G, F], G and F; the storage [B, G, S, F], S.
NEW, HEADS, WIDTH, STORAGE, SIZE, STORED_WORDS = range(6)


@kernel("5q")
def append(args, team, thread, threads):
    """Store new tokens. Arguments: a plan, its rows, all their tokens, whether to round to bf16, the number of arrays."""
    plan, rows, tokens, rounds, count = word(args, 0), word(args, 1), word(args, 2), word(args, 3), word(args, 4)
    while True:
        begin = next_chunk(team) * TOKENS
        if begin >= tokens:
            break
        for row in range(rows):
            line = plan + row * PLAN * 8
            first = word(line, QUERY)
            for token in range(max(begin, first), min(begin + TOKENS, word(line, END))):
                for i in range(count):
                    stored = args + 8 * (5 + i * STORED_WORDS)
                    index = (word(line, PLACE) + token - first) % word(stored, SIZE)
                    _store(stored, word(line, SLOT), token, index, rounds)


@inline
def _store(stored, slot, token, index, rounds):
    heads, width, size = word(stored, HEADS), word(stored, WIDTH), word(stored, SIZE)
    for head in range(heads):
        new = f32(word(stored, NEW) + (token * heads + head) * width * 4, width)
        place = ((slot * heads + head) * size + index) * width
        if rounds:
            bits = u16(word(stored, STORAGE) + place * 2, width)
            for k in range(width):
                bits[k] = np.uint16(bf16(new[k]))
        else:
            numbers = f32(word(stored, STORAGE) + place * 4, width)
            for k in range(width):
                numbers[k] = new[k]


class KernelLayerCache(LayerCache):
    """A layer's keys and values, stored by `append` wherever nothing that a step still sees is overwritten."""

    def __init__(self, be: Base, *args: Any) -> None:
        super().__init__(*args)
        self.be = be

    def append(self, k_MGK: Array, v_MGV: Array | None, rows: Rows) -> Keys:
        wraps = any(start + end - begin > self.size for _, start, begin, end in rows)
        if (wraps and max(rows.counts) > 1) or self.kv_dtype == "float64" or self.compute_dtype == "float64":
            return super().append(k_MGK, v_MGV, rows)
        recorder = getattr(k_MGK, "recorder", None)
        be = self.be if recorder is None else recorder.be
        keys = self.keys(rows)
        if recorder is not None:
            recorder.appended(keys, self)
        self.reach(rows)
        plan, arrays = be.plan(keys, rows), []
        new = [be.plain(x) for x in (k_MGK, v_MGV) if x is not None]
        for x_MGF, storage in zip(new, self.stored, strict=True):
            arrays += [at(x_MGF), *x_MGF.shape[1:], at(storage), storage.shape[2]]
        rounds = self.kv_dtype == "bfloat16"
        stores = entry(append, at(plan), len(plan), len(k_MGK), rounds, len(new), rest=arrays)
        be.run(stores, numbers=sum(x_MGF.size for x_MGF in new))
        return keys


class KernelCache(Cache):
    """A cache of such layers, with the recordings of steps over its memory."""

    layers: Sequence[KernelLayerCache]

    def __init__(self, be: Base, *args: Any) -> None:
        self.be = be
        super().__init__(*args)
        self.recordings: dict[Any, Recording] = {}

    def storage(self) -> list[Array]:
        """The memory of all layers."""
        return [stored for layer in self.layers for stored in layer.stored]

    def layout(self) -> Any:
        """What two caches have in common in which kernels find keys at the same places."""
        return tuple((layer.spec, layer.kv_dtype, layer.compute_dtype, layer.size) for layer in self.layers)

    def _layer(self, spec: LayerSpec) -> KernelLayerCache:
        return KernelLayerCache(self.be, self.xp, spec, self.kv_dtype, self.compute_dtype)
