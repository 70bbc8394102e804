"""Key/value caches as objects, and the plan of a step over their rows.

A cache holds rows (slots): one sequence each, of its own length. A step appends the new tokens of some rows, packed one
after the other, and attention reads what each row then holds. Rows come and go: `add`, `free`, `truncate`, `fork`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from npllm.arrays import Array, Namespace
from npllm.errors import ArgumentError, MemoryLimitError
from npllm.machine import available_memory, gibibytes

# The first allocation of a row, in tokens; doubled as the row grows, so that copies cost O(1) per token.
FIRST_CAPACITY = 256

# Bytes per number by the name of a cache's storage type.
KV_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2}


class LayerSpec(NamedTuple):
    """What one layer keeps per token: G key heads of width K and G value heads of width V."""

    heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, kv_dtype: str) -> int:
        return self.heads * (self.key_dim + self.value_dim) * KV_BYTES[kv_dtype]


def capacity(length: int, max_context: int) -> int:
    """The growth rule: tokens that a row of `length` tokens has room for (256, 512, 1024, ... up to the context)."""
    size = FIRST_CAPACITY
    while size < length:
        size *= 2
    return max(length, min(size, max_context))


@dataclass(frozen=True)
class Rows:
    """The plan of one step: for each row its slot, the position of its first new token and how many it brings.

    M = sum(counts) new tokens lie packed row after row; a row may bring none. `positions_M` is an array of the backend.
    `last` says whose logits are computed (W of them): those of all tokens (None), or for each row whether its last token's.
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    positions_M: Array
    last: tuple[bool, ...] | None = None

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """(slot, position of the first new token, begin, end) per row; begin:end cut the row out of the M tokens."""
        begin = 0
        for slot, start, count in zip(self.slots, self.starts, self.counts, strict=True):
            yield slot, start, begin, begin + count
            begin += count

    def wanted(self, x_MD: Array) -> Array:
        """The rows of `x_MD` whose logits are wanted -> x_WD."""
        if self.last is None or (all(self.last) and all(count == 1 for count in self.counts)):
            return x_MD
        ends = [end - 1 for (_, _, begin, end), wanted in zip(self, self.last, strict=True) if wanted and end > begin]
        return x_MD[ends]


class Keys(NamedTuple):
    """What attention reads: storage over all slots, and per row of the step which slot, how many keys, from which position.

    Key s of row r stands at position `firsts[r] + s`, for s < `counts[r]`.
    """

    k_BSGK: Array
    v_BSGV: Array
    slots: tuple[int, ...]
    counts: tuple[int, ...]
    firsts: tuple[int, ...]

    def row(self, r: int) -> tuple[Array, Array, int]:
        """Views of row r: k_SGK, v_SGV, and the position of their first key."""
        slot, count = self.slots[r], self.counts[r]
        return self.k_BSGK[slot, :count], self.v_BSGV[slot, :count], self.firsts[r]


class LayerCache:
    """The full cache of one layer: every key and value since position 0.

    Storage is float32, float64, or bfloat16 bits in uint16; it lies as [B, G, S, K], so that the keys of one head are
    contiguous, and is seen as [B, S, G, K].
    """

    def __init__(self, xp: Namespace, spec: LayerSpec, kv_dtype: str, compute_dtype: str) -> None:
        self.xp, self.spec, self.kv_dtype, self.compute_dtype = xp, spec, kv_dtype, compute_dtype
        self.resize(0, 0)

    def resize(self, slots: int, size: int) -> None:
        """Make room for `slots` rows of `size` tokens, keeping what is there."""
        old = getattr(self, "k_BGSK", None), getattr(self, "v_BGSV", None)
        dtype = "uint16" if self.kv_dtype == "bfloat16" else self.kv_dtype
        self.k_BGSK = self.xp.zeros((slots, self.spec.heads, size, self.spec.key_dim), dtype=dtype)
        self.v_BGSV = self.xp.zeros((slots, self.spec.heads, size, self.spec.value_dim), dtype=dtype)
        for before, after in zip(old, (self.k_BGSK, self.v_BGSV), strict=True):
            if before is not None:
                after[: before.shape[0], :, : before.shape[2]] = before

    def append(self, k_MGK: Array, v_MGV: Array, rows: Rows) -> Keys:
        """Store the new tokens' keys and values; -> everything that the rows' queries may attend to."""
        k_new, v_new = self._store(k_MGK), self._store(v_MGV)
        counts = []
        for slot, start, begin, end in rows:
            stop = start + end - begin
            self.k_BGSK[slot, :, start:stop] = k_new[begin:end].transpose(1, 0, 2)
            self.v_BGSV[slot, :, start:stop] = v_new[begin:end].transpose(1, 0, 2)
            counts.append(stop)
        return self._keys(rows.slots, tuple(counts))

    def _keys(self, slots: tuple[int, ...], counts: tuple[int, ...]) -> Keys:
        k, v = self.k_BGSK, self.v_BGSV
        if self.kv_dtype == "bfloat16":
            longest = max(counts, default=0)
            k, v = self._widen(k[list(slots), :, :longest]), self._widen(v[list(slots), :, :longest])
            slots = tuple(range(len(slots)))
        return Keys(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), slots, counts, (0,) * len(counts))

    def _store(self, x: Array) -> Array:
        if self.kv_dtype != "bfloat16":
            return x
        bits = self.xp.asarray(x, dtype="float32").view("uint32")
        # Round to nearest even; a NaN keeps its upper bits, with one set so that it stays a NaN.
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        return self.xp.where(self.xp.isnan(x), quiet, rounded).astype("uint16")

    def _widen(self, bits: Array) -> Array:
        wide = bits.astype("uint32") << 16
        return wide.view("float32").astype(self.compute_dtype, copy=False)

    @property
    def nbytes(self) -> int:
        return int(self.k_BGSK.nbytes + self.v_BGSV.nbytes)


class Cache:
    """The caches of all layers, and the lengths of their rows (host integers; positions reach kernels through `Rows`).

    specs          one LayerSpec per layer.
    kv_dtype       how keys and values are stored: float32, float64 or bfloat16; None: as they are computed.
    max_context    no row grows beyond.
    """

    def __init__(
        self, xp: Namespace, specs: Sequence[LayerSpec], compute_dtype: str, max_context: int, kv_dtype: str | None = None
    ) -> None:
        kv_dtype = kv_dtype or compute_dtype
        if kv_dtype not in KV_BYTES:
            raise ArgumentError(f"kv_dtype {kv_dtype!r} is unknown; choose one of {', '.join(KV_BYTES)}")
        self.xp, self.specs, self.kv_dtype, self.max_context = xp, tuple(specs), kv_dtype, max_context
        self.layers = [LayerCache(xp, spec, kv_dtype, compute_dtype) for spec in specs]
        self.lengths: list[int] = []
        self.unused: list[int] = []
        self.size = 0

    def add(self) -> int:
        """A new empty row -> its slot."""
        if self.unused:
            return self.unused.pop()
        self.lengths.append(0)
        self._resize(len(self.lengths), self.size)
        return len(self.lengths) - 1

    def free(self, slot: int) -> None:
        """Give the row's slot back; its storage serves the next `add`."""
        if slot in self.unused or not 0 <= slot < len(self.lengths):
            raise ArgumentError(f"slot {slot} is not in use")
        self.lengths[slot] = 0
        self.unused.append(slot)

    def truncate(self, slot: int, length: int) -> None:
        """Forget the tokens from position `length` on."""
        if not 0 <= length <= self.lengths[slot]:
            raise ArgumentError(f"cannot truncate a row of {self.lengths[slot]} tokens to {length}")
        self.lengths[slot] = length

    def fork(self, slot: int) -> int:
        """A new row that begins as a copy of `slot`."""
        new = self.add()
        length = self.lengths[new] = self.lengths[slot]
        for layer in self.layers:
            layer.k_BGSK[new, :, :length] = layer.k_BGSK[slot, :, :length]
            layer.v_BGSV[new, :, :length] = layer.v_BGSV[slot, :, :length]
        return new

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens, by the growth rule; MemoryLimitError when the machine has none."""
        if length > self.max_context:
            raise ArgumentError(f"{length} tokens do not fit into a context of {self.max_context}")
        if length > self.size:
            self._resize(len(self.lengths), capacity(length, self.max_context))

    def _resize(self, slots: int, size: int) -> None:
        needed = slots * size * self.bytes_per_token
        if needed > self.nbytes + available_memory():
            raise MemoryLimitError(
                f"the key/value cache of {slots} rows of {size} tokens needs {gibibytes(needed)}, "
                f"{gibibytes(available_memory())} is available: lower max_context or the batch, or use kv_dtype='bfloat16'"
            )
        for layer in self.layers:
            layer.resize(slots, size)
        self.size = size

    def plan(self, slots: Sequence[int], counts: Sequence[int], last: Sequence[bool] | None = None) -> Rows:
        """A step that brings `counts[r]` new tokens to the row in `slots[r]`; `last` as in `Rows`."""
        starts = tuple(self.lengths[slot] for slot in slots)
        self.reserve(max((start + count for start, count in zip(starts, counts, strict=True)), default=0))
        positions = [start + i for start, count in zip(starts, counts, strict=True) for i in range(count)]
        positions_M = self.xp.asarray(positions, dtype="int64")
        return Rows(tuple(slots), starts, tuple(counts), positions_M, None if last is None else tuple(last))

    def advance(self, rows: Rows) -> None:
        """The step is done: its tokens now belong to the rows. Until then a failed step leaves the cache as it was."""
        for slot, start, count in zip(rows.slots, rows.starts, rows.counts, strict=True):
            self.lengths[slot] = start + count

    @property
    def bytes_per_token(self) -> int:
        return sum(spec.bytes_per_token(self.kv_dtype) for spec in self.specs)

    @property
    def nbytes(self) -> int:
        """Allocated bytes: rows x capacity x bytes_per_token."""
        return sum(layer.nbytes for layer in self.layers)

    def contents(self, slot: int) -> dict[str, Any]:
        """Copies of what the row holds: `layers.{i}.k` and `.v`, [G, S, K] and [G, S, V], in the storage type."""
        length = self.lengths[slot]
        return {
            f"layers.{i}.{name}": array[slot, :, :length].copy()
            for i, layer in enumerate(self.layers)
            for name, array in (("k", layer.k_BGSK), ("v", layer.v_BGSV))
        }

    def restore(self, slot: int, contents: dict[str, Any], length: int) -> None:
        """Fill an empty row with what `contents` gave."""
        self.reserve(length)
        for i, layer in enumerate(self.layers):
            layer.k_BGSK[slot, :, :length] = self.xp.asarray(contents[f"layers.{i}.k"])
            layer.v_BGSV[slot, :, :length] = self.xp.asarray(contents[f"layers.{i}.v"])
        self.lengths[slot] = length
