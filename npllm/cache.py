"""Key/value caches as objects, and the plan of a step over their rows.

A cache holds rows (slots): one sequence each, of its own length. A step appends the new tokens of some rows, packed one
after the other, and attention reads what each row then holds. Rows come and go: `add`, `free`, `truncate`, `fork`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from npllm.arrays import Array, Namespace
from npllm.blocks.dtypes import round_to_bfloat16, widen_bfloat16
from npllm.blocks.masks import CAUSAL, Mask
from npllm.errors import ArgumentError, MemoryLimitError
from npllm.machine import available_for, available_memory, gibibytes

# The first allocation of a row, in tokens; doubled as the row grows, so that copies cost O(1) per token.
FIRST_CAPACITY = 256

# Bytes per number by the name of a cache's storage type.
KV_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2}


class LayerSpec(NamedTuple):
    """What one layer keeps per token: G key heads of width K and G value heads of width V.

    mask    the rule that its queries see keys by. Keys that it can reach no more are given up: a window or a chunk of w
            positions is a ring of w entries.
    latent  above 0, values are not stored: they are the first `latent` numbers of the key (MLA, DeepSeek V2,
            arXiv 2405.04434, section 2.1: the compressed vector, then the one rotated key).
    """

    heads: int
    key_dim: int
    value_dim: int
    mask: Mask = CAUSAL
    latent: int = 0

    @property
    def widths(self) -> dict[str, int]:
        """What is stored per head and token, by name."""
        return {"k": self.key_dim} if self.latent else {"k": self.key_dim, "v": self.value_dim}

    def bytes_per_token(self, kv_dtype: str) -> int:
        return self.heads * sum(self.widths.values()) * KV_BYTES[kv_dtype]

    def kept(self, tokens: int) -> int:
        """How many of a row's tokens are kept."""
        return tokens if self.mask.span is None else min(tokens, self.mask.span)


def capacity(length: int, max_context: int) -> int:
    """The growth rule: tokens that a row of `length` tokens has room for (256, 512, 1024, ... up to the context)."""
    size = FIRST_CAPACITY
    while size < length:
        size *= 2
    return max(length, min(size, max_context))


def cache_bytes(specs: Iterable[LayerSpec], kv_dtype: str, length: int, max_context: int, rows: int = 1) -> int:
    """Bytes that a cache of so many rows of up to `length` tokens allocates."""
    size = capacity(length, max_context) if length else 0
    return rows * sum(spec.kept(size) * spec.bytes_per_token(kv_dtype) for spec in specs)


Ints = tuple[int, ...]


def positions(starts: Ints, counts: Ints) -> list[int]:
    """Of each packed token of rows that bring `counts` tokens from `starts` on."""
    return [start + i for start, count in zip(starts, counts, strict=True) for i in range(count)]


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

    def only(self, r: int) -> Rows:
        """Row r alone; logits are not its matter."""
        begin = sum(self.counts[:r])
        positions_M = self.positions_M[begin : begin + self.counts[r]]
        return Rows((self.slots[r],), (self.starts[r],), (self.counts[r],), positions_M)

    def wanted(self, x_MD: Array) -> Array:
        """The rows of `x_MD` whose logits are wanted -> x_WD."""
        return x_MD if self.wanted_W is None else x_MD[self.wanted_W]


class Keys(NamedTuple):
    """What attention reads: storage over all slots, and per row of the step where its keys lie.

    Key s of row r, for s < `counts[r]`, stands at position `firsts[r] + s` and lies in slot `slots[r]` at index
    `(begins[r] + s) % S`: storage may be a ring. `widen` names the dtype to widen bfloat16 bits (uint16) to, where that is
    how they are stored.

    Where `pages` has the numbers of each row's pages, storage lies as B pages of S entries each: key s of row r is entry
    `i % S` of page `pages[r][i // S]`, with `i = begins[r] + s`; `slots` mean nothing then (PagedAttention, arXiv
    2309.06180, section 4.1). Rows may share pages, and entries of pages that hold no key are not read.
    """

    k_BSGK: Array
    v_BSGV: Array
    slots: tuple[int, ...]
    counts: tuple[int, ...]
    firsts: tuple[int, ...]
    begins: tuple[int, ...]
    xp: Namespace
    widen: str | None = None
    pages: tuple[tuple[int, ...], ...] | None = None

    def row(self, r: int) -> tuple[Array, Array, int]:
        """Row r: k_SGK, v_SGV in the order of their positions (views where they can be), and the position of the first."""
        k_SGK, v_SGV = self._stored(self.k_BSGK, r), self._stored(self.v_BSGV, r)
        if self.widen is not None:
            k_SGK, v_SGV = widen_bfloat16(k_SGK, self.widen), widen_bfloat16(v_SGV, self.widen)
        return k_SGK, v_SGV, self.firsts[r]

    def _stored(self, x_BSGF: Array, r: int) -> Array:
        begin, count = self.begins[r], self.counts[r]
        if self.pages is None:
            return unrolled(self.xp, x_BSGF[self.slots[r]], begin, count)
        size = x_BSGF.shape[1]
        first, end = begin // size, -(-(begin + count) // size)
        filled = x_BSGF[self.xp.asarray(self.pages[r][first:end], dtype="int64")]
        in_order = filled.reshape(filled.shape[0] * size, *filled.shape[2:])
        return in_order[begin - first * size :][:count]

    @classmethod
    def of(cls, xp: Namespace, k_SGK: Array, v_SGV: Array, first: int) -> Keys:
        """The keys of a single row, the first at position `first`."""
        return cls(k_SGK[None], v_SGV[None], (0,), (len(k_SGK),), (first,), (0,), xp)

    def only(self, r: int) -> Keys:
        """Row r alone."""
        slots, counts, firsts, begins = ((each[r],) for each in (self.slots, self.counts, self.firsts, self.begins))
        pages = self.pages and (self.pages[r],)
        return self._replace(slots=slots, counts=counts, firsts=firsts, begins=begins, pages=pages)


def unrolled(xp: Namespace, ring: Array, begin: int, count: int) -> Array:
    """`count` entries of a ring's first axis from index `begin` on, in order: a view, or a copy where they wrap around."""
    over = begin + count - len(ring)
    return ring[begin : begin + count] if over <= 0 else xp.concatenate([ring[begin:], ring[:over]])


class LayerCache:
    """The keys and values of one layer: all since position 0, or those that its mask can still reach.

    Position p lies at index p % S. Storage is float32, float64, or bfloat16 bits in uint16; it lies as [B, G, S, K], so
    that the keys of one head are contiguous, and is seen as [B, S, G, K].
    """

    def __init__(self, xp: Namespace, spec: LayerSpec, kv_dtype: str, compute_dtype: str) -> None:
        self.xp, self.spec, self.kv_dtype, self.compute_dtype = xp, spec, kv_dtype, compute_dtype
        self.stored = self._empty(0, 0)
        # How far each row has been written: the entries of a ring that a shorter row needs may be gone.
        self.reached: list[int] = []

    def _empty(self, slots: int, size: int) -> tuple[Array, ...]:
        dtype = "uint16" if self.kv_dtype == "bfloat16" else self.kv_dtype
        heads = slots, self.spec.heads, size
        return tuple(self.xp.zeros((*heads, width), dtype=dtype) for width in self.spec.widths.values())

    @property
    def size(self) -> int:
        """Tokens that a row has room for."""
        return int(self.stored[0].shape[2])

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in self.stored)

    def entries(self, tokens: int) -> int:
        """Entries that a row with room for so many tokens is given."""
        return self.spec.kept(tokens)

    def resize(self, slots: int, size: int, used: int) -> None:
        """Make room for `slots` rows of `size` tokens, or of the ring, keeping the first `used` entries of each."""
        old, self.stored = self.stored, self._empty(slots, self.entries(size))
        for before, after in zip(old, self.stored, strict=True):
            after[: before.shape[0], :, :used] = before[:, :, :used]
        self.reached += [0] * (slots - len(self.reached))

    def append(self, k_MGK: Array, v_MGV: Array | None, rows: Rows) -> Keys:
        """Store the new tokens' keys and values; -> everything that the rows' queries may attend to.

        A latent cache takes no values. Where a ring would lose keys that the step's own first queries still see, these keys
        are put side by side with the new ones before they are overwritten.
        """
        new = tuple(self._encoded(x) for x in (k_MGK, v_MGV) if x is not None)
        wraps = any(start + end - begin > self.size for _, start, begin, end in rows)
        gathered = self._gather(new, rows) if wraps and max(rows.counts) > 1 else None
        self.reach(rows)
        for slot, start, begin, end in rows:
            for stored, x_MGF in zip(self.stored, new, strict=True):
                self._write(stored[slot], start, x_MGF[begin:end].transpose(1, 0, 2))
        return gathered or self.keys(rows)

    def _encoded(self, x_MGF: Array) -> Array:
        return round_to_bfloat16(self.xp, x_MGF) if self.kv_dtype == "bfloat16" else x_MGF

    def _write(self, ring_GSF: Array, start: int, x_GTF: Array) -> None:
        size = ring_GSF.shape[1]
        skipped = max(0, x_GTF.shape[1] - size)
        x_GTF, at = x_GTF[:, skipped:], (start + skipped) % max(1, size)
        straight = min(x_GTF.shape[1], size - at)
        ring_GSF[:, at : at + straight] = x_GTF[:, :straight]
        ring_GSF[:, : x_GTF.shape[1] - straight] = x_GTF[:, straight:]

    def _read(self, slot: int, start: int, stop: int) -> list[Array]:
        """Positions start..stop of one row, in order, from each stored array: [T, G, K] and [T, G, V]."""
        begin = start % max(1, self.size)
        return [unrolled(self.xp, stored[slot].transpose(1, 0, 2), begin, stop - start) for stored in self.stored]

    def reach(self, rows: Rows) -> None:
        """The rows are about to be written that far; noted before, since the writing may be interrupted."""
        for slot, start, count in zip(rows.slots, rows.starts, rows.counts, strict=True):
            self.reached[slot] = max(self.reached[slot], start + count)

    def keys(self, rows: Rows) -> Keys:
        """What the rows' queries may attend to, once the step's own keys are stored."""
        firsts, counts = self._visible(rows)
        return self._seen(self.stored, rows.slots, counts, firsts, tuple(first % max(1, self.size) for first in firsts))

    def _visible(self, rows: Rows) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """For each row, the position of the first key that its first new query sees, and the number of keys from there."""
        firsts = tuple(min(start, self.spec.mask.reach(start, start)[0]) for start in rows.starts)
        ends = (start + count for start, count in zip(rows.starts, rows.counts, strict=True))
        return firsts, tuple(end - first for first, end in zip(firsts, ends, strict=True))

    def _gather(self, new: tuple[Array, ...], rows: Rows) -> Keys:
        """For each row, the kept keys that its first new query sees, then the new ones, in storage made for this step."""
        firsts, counts = self._visible(rows)
        shape = len(counts), self.spec.heads, max(counts)
        storage = tuple(self.xp.zeros((*shape, x_MGF.shape[2]), dtype=x_MGF.dtype) for x_MGF in new)
        for r, (slot, start, begin, end) in enumerate(rows):
            past = start - firsts[r]
            for array, kept_TGF, x_MGF in zip(storage, self._read(slot, firsts[r], start), new, strict=True):
                array[r, :, :past] = kept_TGF.transpose(1, 0, 2)
                array[r, :, past : counts[r]] = x_MGF[begin:end].transpose(1, 0, 2)
        return self._seen(storage, tuple(range(len(counts))), counts, firsts, (0,) * len(counts))

    def _seen(
        self,
        stored: tuple[Array, ...],
        slots: tuple[int, ...],
        counts: tuple[int, ...],
        firsts: tuple[int, ...],
        begins: tuple[int, ...],
    ) -> Keys:
        seen = [array.transpose(0, 2, 1, 3) for array in stored]
        if self.spec.latent:
            seen.append(seen[0][..., : self.spec.latent])
        widen = self.compute_dtype if self.kv_dtype == "bfloat16" else None
        return Keys(seen[0], seen[1], slots, counts, firsts, begins, self.xp, widen)

    def holds(self, slot: int, length: int) -> bool:
        """Whether the row still has what a token at position `length` would see."""
        low, _ = self.spec.mask.reach(length, length)
        return low >= min(length, self.reached[slot] - self.size)

    def cut(self, slot: int, length: int) -> None:
        """The tokens from `length` on are forgotten, and if none of the others can be seen any more, all are."""
        if self.spec.mask.reach(length, length)[0] >= length:
            self.reached[slot] = length

    def copy(self, source: int, target: int, length: int) -> None:
        """Let row `target` begin with the first `length` tokens of row `source`."""
        used = min(length, self.size)
        for stored in self.stored:
            stored[target, :, :used] = stored[source, :, :used]
        self.reached[target] = self.reached[source]

    def contents(self, slot: int, length: int) -> dict[str, Array]:
        """Copies of what is kept of a row's first tokens, in order: `k` [G, S, K] and `v` [G, S, V], in the storage type."""
        arrays = self._read(slot, length - self.spec.kept(length), length)
        return {name: x_SGF.transpose(1, 0, 2).copy() for name, x_SGF in zip(self.spec.widths, arrays, strict=True)}

    def lost(self, slot: int, length: int) -> int:
        """How many of the oldest keys that `contents` gives a step has overwritten, one that failed or was undone."""
        return max(0, self.reached[slot] - self.size - (length - self.spec.kept(length)))

    def restore(self, slot: int, contents: Mapping[str, Array], length: int, lost: int = 0) -> None:
        """Fill an empty row with what `contents` gave, of which the `lost` oldest keys are not to be used."""
        for stored, name in zip(self.stored, self.spec.widths, strict=True):
            self._write(stored[slot], length - self.spec.kept(length), self.xp.asarray(contents[name]))
        oldest = length - self.spec.kept(length) + lost
        self.reached[slot] = oldest + self.size if oldest else length


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
        self.layers: Sequence[LayerCache] = [self._layer(spec) for spec in specs]
        self.lengths: list[int] = []
        self.unused: set[int] = set()
        self.size = 0

    def _layer(self, spec: LayerSpec) -> LayerCache:
        return LayerCache(self.xp, spec, self.kv_dtype, self.compute_dtype)

    def add(self) -> int:
        """A new empty row -> its slot."""
        return self._take(1)[0]

    def _take(self, count: int) -> list[int]:
        more = range(len(self.lengths), len(self.lengths) + count - len(self.unused))
        # First, since there may be no room.
        if more:
            self._resize(more.stop, self.size)
            self.lengths += [0] * len(more)
        return [self.unused.pop() for _ in range(count - len(more))] + list(more)

    def free(self, slot: int) -> None:
        """Give the row's slot back; its storage serves the next `add`."""
        self.truncate(slot, 0)
        self.unused.add(slot)

    def _check(self, *slots: int) -> None:
        for slot in slots:
            if slot in self.unused or not 0 <= slot < len(self.lengths):
                raise ArgumentError(f"slot {slot} is not in use")

    def truncate(self, slot: int, length: int) -> int:
        """Forget the tokens from position `length` on -> the row's length now.

        It is 0 where a ring has given up what the row would need to go on from `length`.
        """
        self._check(slot)
        if not 0 <= length <= self.lengths[slot]:
            raise ArgumentError(f"cannot truncate a row of {self.lengths[slot]} tokens to {length}")
        self.lengths[slot] = length if all(layer.holds(slot, length) for layer in self.layers) else 0
        for layer in self.layers:
            layer.cut(slot, self.lengths[slot])
        return self.lengths[slot]

    def fork(self, slot: int) -> int:
        """A new row that begins as a copy of `slot`."""
        return self.spread(slot, 1)[0]

    def spread(self, slot: int, copies: int) -> list[int]:
        """So many new rows that begin as copies of `slot`."""
        self._check(slot)
        new = self._take(copies)
        try:
            for target in new:
                self.lengths[target] = self.lengths[slot]
                for layer in self.layers:
                    layer.copy(slot, target, self.lengths[slot])
        except BaseException:
            for target in new:
                self.free(target)
            raise
        return new

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens, by the growth rule; MemoryLimitError when the machine has none."""
        if length > self.max_context:
            raise ArgumentError(f"{length} tokens do not fit into a context of {self.max_context}")
        if length > self.size:
            self._resize(len(self.lengths), capacity(length, self.max_context))

    def _resize(self, slots: int, size: int) -> None:
        row = sum(layer.entries(size) * layer.spec.bytes_per_token(self.kv_dtype) for layer in self.layers)
        needed = slots * row
        available = available_for(needed - self.nbytes, self.available)
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
        for slot, start in zip(slots, starts, strict=True):
            if not all(layer.reached[slot] <= start or layer.holds(slot, start) for layer in self.layers):
                raise ArgumentError(f"a step that failed has cost slot {slot} keys that it needs: truncate it to 0")
        self.reserve(max((start + count for start, count in zip(starts, counts, strict=True)), default=0))
        ends = None
        if last is not None:
            drawing = zip(accumulate(counts), counts, last, strict=True)
            ends = [end - 1 for end, count, wanted in drawing if wanted and count]
        return self._rows(tuple(slots), starts, tuple(counts), ends)

    def _rows(self, slots: Ints, starts: Ints, counts: Ints, ends: Sequence[int] | None) -> Rows:
        """The plan with its arrays; `ends` are the wanted among the packed tokens."""
        positions_M, wanted_W = positions(starts, counts), ends if ends is None else self.xp.asarray(ends, dtype="int64")
        return Rows(slots, starts, counts, self.xp.asarray(positions_M, dtype="int64"), wanted_W)

    def advance(self, rows: Rows) -> None:
        """The step is done: its tokens now belong to the rows. Until then a failed step leaves full caches as they were."""
        for slot, start, count in zip(rows.slots, rows.starts, rows.counts, strict=True):
            self.lengths[slot] = start + count

    @property
    def bytes_per_token(self) -> int:
        return sum(spec.bytes_per_token(self.kv_dtype) for spec in self.specs)

    @property
    def nbytes(self) -> int:
        """Allocated bytes: what `cache_bytes` says."""
        return sum(layer.nbytes for layer in self.layers)

    def contents(self, slot: int, length: int | None = None) -> dict[str, Array]:
        """Copies of what the row holds (of its first `length` tokens), in the storage type, as `layers.{i}.k` and `.v`."""
        self._check(slot)
        length = self.lengths[slot] if length is None else length
        if not all(layer.holds(slot, length) for layer in self.layers):
            raise ArgumentError(f"the row in slot {slot} no longer holds what stands before its token {length}")
        return {
            f"layers.{i}.{name}": array
            for i, layer in enumerate(self.layers)
            for name, array in layer.contents(slot, length).items()
        }

    def lost(self, slot: int, length: int) -> list[int]:
        """Of `contents` with this length, for each layer, how many of the oldest keys are no longer what they were."""
        return [layer.lost(slot, length) for layer in self.layers]

    def restore(self, slot: int, contents: Mapping[str, Array], length: int, lost: Sequence[int] | None = None) -> None:
        """Fill an empty row with what `contents` gave, and `lost` beside it (None: nothing)."""
        self.reserve(length)
        for i, (layer, count) in enumerate(zip(self.layers, lost or [0] * len(self.layers), strict=True)):
            layer.restore(slot, {name: contents[f"layers.{i}.{name}"] for name in layer.spec.widths}, length, count)
        self.lengths[slot] = length
