"""Key/value caches as objects, and the plan of a step over their rows.

A cache holds rows (slots): one sequence each, of its own length. A step appends the new tokens of some rows, packed one
after the other, and attention reads what each row then holds. Rows come and go: `add`, `free`, `truncate`, `fork`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from npllm.arrays import Array, Namespace
from npllm.blocks.masks import CAUSAL, Mask
from npllm.errors import ArgumentError, MemoryLimitError
from npllm.machine import available_memory, gibibytes

# The first allocation of a row, in tokens; doubled as the row grows, so that copies cost O(1) per token.
FIRST_CAPACITY = 256

# Bytes per number by the name of a cache's storage type.
KV_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2}


class LayerSpec(NamedTuple):
    """What one layer keeps per token: G key heads of width K and G value heads of width V.

    `mask` is the rule that its queries see keys by: keys that it can reach no more are not kept.
    """

    heads: int
    key_dim: int
    value_dim: int
    mask: Mask = CAUSAL

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
    `wanted_W` are the indices, among the M, of the tokens whose logits are computed; None means all of them.
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    positions_M: Array
    wanted_W: Array | None = None

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """(slot, position of the first new token, begin, end) per row; begin:end cut the row out of the M tokens."""
        begin = 0
        for slot, start, count in zip(self.slots, self.starts, self.counts, strict=True):
            yield slot, start, begin, begin + count
            begin += count

    def wanted(self, x_MD: Array) -> Array:
        """The rows of `x_MD` whose logits are wanted -> x_WD."""
        return x_MD if self.wanted_W is None else x_MD[self.wanted_W]


class Keys(NamedTuple):
    """What attention reads: storage over all slots, and per row of the step which slot, how many keys, from which position.

    Key s of row r stands at position `firsts[r] + s`, for s < `counts[r]`. `widen` names the dtype to widen bfloat16 bits
    (uint16) to, where that is how they are stored.
    """

    k_BSGK: Array
    v_BSGV: Array
    slots: tuple[int, ...]
    counts: tuple[int, ...]
    firsts: tuple[int, ...]
    widen: str | None = None

    def row(self, r: int) -> tuple[Array, Array, int]:
        """Row r: k_SGK, v_SGV (views, or widened copies), and the position of their first key."""
        slot, count = self.slots[r], self.counts[r]
        k_SGK, v_SGV = self.k_BSGK[slot, :count], self.v_BSGV[slot, :count]
        if self.widen is not None:
            k_SGK, v_SGV = widen_bfloat16(k_SGK, self.widen), widen_bfloat16(v_SGV, self.widen)
        return k_SGK, v_SGV, self.firsts[r]


def round_to_bfloat16(xp: Namespace, x: Array) -> Array:
    """The bits, uint16, of `x` (float32 or float64) rounded to nearest even; a NaN stays a NaN."""
    bits = xp.asarray(x, dtype="float32").view("uint32")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding could carry a NaN's bits into infinity: it keeps the upper ones, with one set.
    quiet = (bits >> 16) | 0x40
    return xp.where(xp.isnan(x), quiet, rounded).astype("uint16")


def widen_bfloat16(bits: Array, dtype: str) -> Array:
    """The exact values of bfloat16 bits in `dtype`."""
    return (bits.astype("uint32") << 16).view("float32").astype(dtype, copy=False)


class LayerCache:
    """The full cache of one layer: every key and value since position 0.

    Storage is float32, float64, or bfloat16 bits in uint16; it lies as [B, G, S, K], so that the keys of one head are
    contiguous, and is seen as [B, S, G, K].
    """

    def __init__(self, xp: Namespace, spec: LayerSpec, kv_dtype: str, compute_dtype: str) -> None:
        self.xp, self.spec, self.kv_dtype, self.compute_dtype = xp, spec, kv_dtype, compute_dtype
        self.k_BGSK, self.v_BGSV = self._empty(0, 0)

    def _empty(self, slots: int, size: int) -> tuple[Array, Array]:
        dtype = "uint16" if self.kv_dtype == "bfloat16" else self.kv_dtype
        heads = slots, self.spec.heads, size
        return (
            self.xp.zeros((*heads, self.spec.key_dim), dtype=dtype),
            self.xp.zeros((*heads, self.spec.value_dim), dtype=dtype),
        )

    def resize(self, slots: int, size: int, used: int) -> None:
        """Make room for `slots` rows of `size` tokens, keeping the first `used` tokens of each."""
        old, (self.k_BGSK, self.v_BGSV) = (self.k_BGSK, self.v_BGSV), self._empty(slots, size)
        for before, after in zip(old, (self.k_BGSK, self.v_BGSV), strict=True):
            after[: before.shape[0], :, :used] = before[:, :, :used]

    def append(self, k_MGK: Array, v_MGV: Array, rows: Rows) -> Keys:
        """Store the new tokens' keys and values; -> everything that the rows' queries may attend to."""
        if self.kv_dtype == "bfloat16":
            k_MGK, v_MGV = round_to_bfloat16(self.xp, k_MGK), round_to_bfloat16(self.xp, v_MGV)
        counts = []
        for slot, start, begin, end in rows:
            stop = start + end - begin
            self.k_BGSK[slot, :, start:stop] = k_MGK[begin:end].transpose(1, 0, 2)
            self.v_BGSV[slot, :, start:stop] = v_MGV[begin:end].transpose(1, 0, 2)
            counts.append(stop)
        k_BSGK, v_BSGV = self.k_BGSK.transpose(0, 2, 1, 3), self.v_BGSV.transpose(0, 2, 1, 3)
        widen = self.compute_dtype if self.kv_dtype == "bfloat16" else None
        return Keys(k_BSGK, v_BSGV, rows.slots, tuple(counts), (0,) * len(counts), widen)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let row `target` begin with the first `length` tokens of row `source`."""
        self.k_BGSK[target, :, :length] = self.k_BGSK[source, :, :length]
        self.v_BGSV[target, :, :length] = self.v_BGSV[source, :, :length]

    def contents(self, slot: int, length: int) -> dict[str, Array]:
        """Copies of a row's first tokens: `k` [G, S, K] and `v` [G, S, V], in the storage type."""
        return {"k": self.k_BGSK[slot, :, :length].copy(), "v": self.v_BGSV[slot, :, :length].copy()}

    def restore(self, slot: int, contents: Mapping[str, Array], length: int) -> None:
        """Fill a row's first tokens with what `contents` gave."""
        self.k_BGSK[slot, :, :length] = self.xp.asarray(contents["k"])
        self.v_BGSV[slot, :, :length] = self.xp.asarray(contents["v"])

    @property
    def nbytes(self) -> int:
        return int(self.k_BGSK.nbytes + self.v_BGSV.nbytes)


class Cache:
    """The caches of all layers, and the lengths of their rows (host integers; positions reach kernels through `Rows`).

    specs           one LayerSpec per layer.
    compute_dtype   float32 or float64: what attention computes in.
    kv_dtype        how keys and values are stored: float32, float64 or bfloat16; None: as they are computed.
    max_context     no row grows beyond.
    available       tells how many bytes can still be taken.
    """

    def __init__(
        self,
        xp: Namespace,
        specs: Sequence[LayerSpec],
        compute_dtype: str,
        max_context: int,
        kv_dtype: str | None = None,
        available: Callable[[], int] = available_memory,
    ) -> None:
        kv_dtype = kv_dtype or compute_dtype
        if kv_dtype not in KV_BYTES:
            raise ArgumentError(f"kv_dtype {kv_dtype!r} is unknown; choose one of {', '.join(KV_BYTES)}")
        self.xp, self.specs, self.max_context, self.available = xp, tuple(specs), max_context, available
        self.compute_dtype, self.kv_dtype = compute_dtype, kv_dtype
        self.layers = [LayerCache(xp, spec, kv_dtype, compute_dtype) for spec in specs]
        self.lengths: list[int] = []
        self.unused: set[int] = set()
        self.size = 0

    def add(self) -> int:
        """A new empty row -> its slot."""
        return self._take(1)[0]

    def _take(self, count: int) -> list[int]:
        slots = [self.unused.pop() for _ in range(min(count, len(self.unused)))]
        more = range(len(self.lengths), len(self.lengths) + count - len(slots))
        if more:
            self._resize(more.stop, self.size)
            self.lengths += [0] * len(more)
        return slots + list(more)

    def free(self, slot: int) -> None:
        """Give the row's slot back; its storage serves the next `add`."""
        self._check(slot)
        self.lengths[slot] = 0
        self.unused.add(slot)

    def _check(self, *slots: int) -> None:
        for slot in slots:
            if slot in self.unused or not 0 <= slot < len(self.lengths):
                raise ArgumentError(f"slot {slot} is not in use")

    def truncate(self, slot: int, length: int) -> None:
        """Forget the tokens from position `length` on."""
        self._check(slot)
        if not 0 <= length <= self.lengths[slot]:
            raise ArgumentError(f"cannot truncate a row of {self.lengths[slot]} tokens to {length}")
        self.lengths[slot] = length

    def fork(self, slot: int) -> int:
        """A new row that begins as a copy of `slot`."""
        return self.spread(slot, 1)[0]

    def spread(self, slot: int, copies: int) -> list[int]:
        """So many new rows that begin as copies of `slot`."""
        self._check(slot)
        new = self._take(copies)
        for target in new:
            self.lengths[target] = self.lengths[slot]
            for layer in self.layers:
                layer.copy(slot, target, self.lengths[slot])
        return new

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens, by the growth rule; MemoryLimitError when the machine has none."""
        if length > self.max_context:
            raise ArgumentError(f"{length} tokens do not fit into a context of {self.max_context}")
        if length > self.size:
            self._resize(len(self.lengths), capacity(length, self.max_context))

    def _resize(self, slots: int, size: int) -> None:
        needed, available = slots * size * self.bytes_per_token, self.available()
        if needed > self.nbytes + available:
            raise MemoryLimitError(
                f"the key/value cache of {slots} rows of {size} tokens needs {gibibytes(needed)}, "
                f"{gibibytes(available)} is available: lower max_context or the batch, or use kv_dtype='bfloat16'"
            )
        used = max(self.lengths, default=0)
        for layer in self.layers:
            layer.resize(slots, size, used)
        self.size = size

    def plan(self, slots: Sequence[int], counts: Sequence[int], last: Sequence[bool] | None = None) -> Rows:
        """A step that brings `counts[r]` new tokens to the row in `slots[r]`.

        `last` says for each row whether its last token's logits are wanted; None wants those of all tokens.
        """
        self._check(*slots)
        if len(set(slots)) < len(slots):
            raise ArgumentError("a step cannot hold one slot twice")
        starts = tuple(self.lengths[slot] for slot in slots)
        self.reserve(max((start + count for start, count in zip(starts, counts, strict=True)), default=0))
        positions = [start + i for start, count in zip(starts, counts, strict=True) for i in range(count)]
        rows = Rows(tuple(slots), starts, tuple(counts), self.xp.asarray(positions, dtype="int64"))
        if last is None:
            return rows
        ends = [end - 1 for (_, _, begin, end), wanted in zip(rows, last, strict=True) if wanted and end > begin]
        return replace(rows, wanted_W=self.xp.asarray(ends, dtype="int64"))

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

    def contents(self, slot: int) -> dict[str, Array]:
        """Copies of what the row holds, in the storage type: `layers.{i}.{name}` for each name of the layer's cache."""
        return {
            f"layers.{i}.{name}": array
            for i, layer in enumerate(self.layers)
            for name, array in layer.contents(slot, self.lengths[slot]).items()
        }

    def restore(self, slot: int, contents: Mapping[str, Array], length: int) -> None:
        """Fill an empty row with what `contents` gave."""
        self.reserve(length)
        for i, layer in enumerate(self.layers):
            names = layer.contents(slot, 0)
            layer.restore(slot, {name: contents[f"layers.{i}.{name}"] for name in names}, length)
        self.lengths[slot] = length
