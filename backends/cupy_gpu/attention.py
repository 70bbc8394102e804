"""`attention`: queries over cached keys, in splits where they are few (attention.cu), in tensor-core tiles where many."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.backend import accelerates
from npllm.backends.cupy_gpu.base import Base, groups
from npllm.backends.cupy_gpu.device import Argument, Out
from npllm.blocks.masks import Mask
from npllm.cache import Keys, Rows
from npllm.weights import Linear

THREADS = 128

# Queries of a block: the least that holds a token's heads of one key head.
LANES = (4, 8, 16)

# Bytes of a key or value, at most, and the keys of a tile by it: the tiles of a block take less than 72 KiB. Fewer where a
# block may not have as much, and at least four.
TILES = ((256, 64), (512, 32), (2048, 16), (4096, 8))
LEAST_TILE = 4

# Blocks per multiprocessor that a step is cut into, and keys that a split should have.
BLOCKS = 2
LEAST_KEYS = 128

BF16, F32 = 2, 0

# The most queries of a row that goes through attention.cu where attention_tiles.cu could take it; queries of a block there,
# and widths of heads that it is compiled for.
FEW = 15
QUERIES = 64
TILE_WIDTHS = (32, 64, 96, 128, 192, 256)


def unreadable(be: Base, keys: Keys) -> str | None:
    """Why kernels cannot attend to these keys."""
    k_BSGK, v_BSGV = keys.k_BSGK, keys.v_BSGV
    if be.dtype == "float64":
        return "kernels compute in float32 and bfloat16"
    if {k_BSGK.dtype, v_BSGV.dtype} != {np.dtype("float32" if keys.widen is None else "uint16")}:
        return f"keys of {k_BSGK.dtype}"
    if any(x.size and x.strides[-1] != x.itemsize for x in (k_BSGK, v_BSGV)):
        return "the numbers of a key do not lie side by side"
    if max(k_BSGK.shape[-1], v_BSGV.shape[-1]) * k_BSGK.itemsize > TILES[-1][0] or v_BSGV.shape[-1] > 4 * THREADS:
        return f"heads {max(k_BSGK.shape[-1], v_BSGV.shape[-1])} wide"
    return None


class Shape(NamedTuple):
    """Of a block of attention.cu: its queries, the keys of a tile, and its bytes of shared memory: what it asks for, and
    what its arrays take besides."""

    lanes: int
    tile: int
    shared: int
    arrays: int


def shape_of(widths: tuple[int, int], stored: int, lanes: int, limit: int) -> Shape:
    """The largest block for keys and values of these widths, in numbers of `stored` bytes, that has room."""
    tile, per_vector = next(count for size, count in TILES if max(widths) * stored <= size), 16 // stored
    queries = 4 * groups(widths[0], per_vector) * per_vector
    key = 2 * 16 * sum(groups(width, per_vector) | 1 for width in widths)
    # Fewer queries before fewer keys: a tile costs three barriers, however many keys it has.
    sizes = [(n, t) for t in (tile, tile // 2, LEAST_TILE) for n in reversed(LANES) if n <= lanes and t >= LEAST_TILE]
    shapes = [Shape(n, t, n * queries + t * key, 4 * n * (t + 5) + 16) for n, t in sizes]
    return next((each for each in shapes if each.shared + each.arrays <= limit), shapes[-1])


class Attention(Base):
    """Attention over cached keys."""

    @accelerates(lambda self, q_MHK, keys, rows, mask, scale, softcap=None, sinks=None: unreadable(self, keys))
    def attention(
        self, q_MHK: Array, keys: Keys, rows: Rows, /, *,
        mask: Mask, scale: float, softcap: float | None = None, sinks: Linear | None = None,
    ) -> Array:  # fmt: skip
        q_MHK = self.plain(q_MHK)
        out_MHV = self.empty(*q_MHK.shape[:2], keys.v_BSGV.shape[-1])
        if not out_MHV.size:
            return out_MHV
        plan = (self.plan(keys, rows), *self._pages(keys))
        rule = (mask.window or 0, mask.chunk or 0, float(scale), float(softcap or 0.0))
        ends = (*rule, None if sinks is None else self.plain(self.dense(sinks.weight)))
        few = FEW if self.dtype != "float32" and _fits_tiles(keys) else max(rows.counts)
        if any(0 < count <= few for count in rows.counts):
            self._attend_few(q_MHK, keys, rows, few, plan, ends, out_MHV)
        if max(rows.counts) > few:
            self._attend_many(q_MHK, keys, rows, few, plan, ends, out_MHV)
        return out_MHV

    def _attend_few(
        self, q_MHK: Array, keys: Keys, rows: Rows, few: int, plan: tuple[Argument, ...], ends: tuple[Argument, ...],
        out_MHV: Array,
    ) -> None:  # fmt: skip
        """The rows of at most `few` queries."""
        k_BSGK, v_BSGV = keys.k_BSGK, keys.v_BSGV
        (_, H, K), (G, V) = q_MHK.shape, v_BSGV.shape[2:]
        most, per = max(count for count in rows.counts if count <= few), H // G
        lanes = next((each for each in LANES if each >= per), LANES[-1]) if most == 1 else LANES[-1]
        lanes, tile, shared, _ = shape_of((K, V), k_BSGK.itemsize, lanes, self.device.shared_limit)
        tiles = groups(most * per, lanes)
        splits = self._splits(keys, len(rows.counts) * G * tiles)
        values = 1 << (groups(V, THREADS) - 1).bit_length()
        defines = {"STORED": _stored(keys), "LANES": lanes, "KEYS": tile, "VALUES": values}
        partial = self.empty(len(rows.counts) * G * tiles * splits * lanes * (V + 2)) if splits > 1 else None
        arguments = (
            *plan, few, q_MHK, H, G, K, V, *_both(self, keys), *ends, None if partial is None else Out(partial),
            self.tickets(len(rows.counts) * G * tiles), Out(out_MHV),
        )  # fmt: skip
        self.launch("attention.cu", "attend", defines, (G * tiles, splits, len(rows.counts)), THREADS, arguments, shared)

    def _attend_many(
        self, q_MHK: Array, keys: Keys, rows: Rows, few: int, plan: tuple[Argument, ...], ends: tuple[Argument, ...],
        out_MHV: Array,
    ) -> None:  # fmt: skip
        """The rows of more than `few` queries, on tensor cores."""
        (_, H, K), (G, V) = q_MHK.shape, keys.v_BSGV.shape[2:]
        head, values = _tile_width(K), _tile_width(V)
        defines = {"STORED": _stored(keys), "HEAD": head, "VALUES": values, "CAPPED": int(ends[3] != 0.0)}
        shared = 2 * QUERIES * (2 * (head + 8) + values + 8)
        arguments = (*plan, few, q_MHK, H, G, K, V, *_both(self, keys), *ends, Out(out_MHV))
        grid = (groups(max(rows.counts), QUERIES), H, len(rows.counts))
        self.launch("attention_tiles.cu", "attend_tiles", defines, grid, THREADS, arguments, shared)

    def _splits(self, keys: Keys, blocks: int) -> int:
        """Parts that keys are cut into. A step that is recorded once serves any length: it goes by the room in storage."""
        size = keys.k_BSGK.shape[1] * (1 if keys.pages is None else max(map(len, keys.pages), default=1))
        return max(1, min(groups(BLOCKS * self.device.multiprocessors, blocks), groups(size, LEAST_KEYS)))

    def _pages(self, keys: Keys) -> tuple[Argument, ...]:
        if keys.pages is None:
            return None, 0
        table = np.zeros((len(keys.pages), max(map(len, keys.pages), default=0)), np.int64)
        for numbers, row in zip(keys.pages, table, strict=True):
            row[: len(numbers)] = numbers
        return self.device.upload(table), table.shape[1]


def _storage(x_BSGF: Array) -> tuple[Argument, ...]:
    """STORAGE of keys.cuh: where keys or values lie, and how many numbers apart slots, entries and heads are."""
    return x_BSGF, *(step // x_BSGF.itemsize for step in x_BSGF.strides[:3])


def aligned(be: Base, x_BSGF: Array) -> bool:
    """Whether every key begins at a multiple of 16 bytes, where vectors can be read, and is a whole number of them."""
    numbers = (be.device.address(x_BSGF), *x_BSGF.strides[:3], x_BSGF.shape[3] * x_BSGF.itemsize)
    return all(number % 16 == 0 for number in numbers)


def _both(be: Base, keys: Keys) -> tuple[Argument, ...]:
    """The storage of keys and of values, the entries of a slot, and whether both can be read in vectors."""
    k_BSGK, v_BSGV = keys.k_BSGK, keys.v_BSGV
    whole = int(aligned(be, k_BSGK) and aligned(be, v_BSGV))
    return *_storage(k_BSGK), *_storage(v_BSGV), max(1, k_BSGK.shape[1]), whole


def _stored(keys: Keys) -> int:
    return BF16 if keys.k_BSGK.dtype == np.uint16 else F32


def _tile_width(width: int) -> int:
    """The width that attention_tiles.cu is compiled for; 0 if it is too wide."""
    return next((each for each in TILE_WIDTHS if each >= width), 0)


def _fits_tiles(keys: Keys) -> bool:
    return all(_tile_width(x.shape[-1]) for x in (keys.k_BSGK, keys.v_BSGV))
