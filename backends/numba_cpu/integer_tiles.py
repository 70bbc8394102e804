"""Products of weights of 8 and 4 bits with panels of 8-bit activations: sums of integers within a group, for many tokens.

A panel of P tokens holds, for each group of 32 numbers, ROWS_OF_GROUP rows of P words of 32 bits: eight of codes, four of a
token to a word; the groups' scales, float32; and -8 times the sums of the codes, int32. A group is quantised as
npllm.backends.numba_cpu.integers does it, so a token's codes do not depend on how many others there are.

A block of weights is widened to unsigned bytes. The rows of a tile lie side by side: for each group, four bytes of each
row, the next four of each, and so on, then the rows' factors, float32. A weight of 4 bits is stored with 8 added, which -8
times the activations' sum takes away again. Weights of 8 bits are one plane of bytes, with 128 for 8, where four products
are summed at once; where the sums of two must fit into 16 bits (`vpmaddubsw`) they are two planes, their sizes and they
themselves, which give their signs to the activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from npllm.backends.numba_cpu.conversions import from_halves
from npllm.backends.numba_cpu.emit import F32, I8, I16, I32, LANES, VF, VI, Emit, emitting, same
from npllm.backends.numba_cpu.integers import (
    GROUP,
    LEAST,
    ROUNDER,
    SIXTEEN,
    dot_bytes,
    signs_given,
    sizes_of,
    sum_pairs,
)
from npllm.backends.numba_cpu.jit import PATH
from npllm.backends.numba_cpu.vectors import BLOCK

# A register tile, rows times vectors of tokens: sums, a vector of weights and products share sixteen registers, or 32.
TILE = PATH.tile if LANES == 16 else (4, PATH.tile[1])

# Words of a codes' row hold so many codes; and where a group's rows of scales and of sums lie.
QUAD = 4
SCALES = GROUP // QUAD
SUMS, ROWS_OF_GROUP = SCALES + 1, SCALES + 2


class Format(NamedTuple):
    """How a format's codes are summed: from how many planes, and how often -8 times the activations' sum comes to it."""

    planes: int
    start: int


FORMATS = {"q8": Format(2, 0) if SIXTEEN else Format(1, 16), "q4": Format(1, 1)}

# Bytes of a group of a tile's rows: planes and factors.
Q8_BYTES, Q4_BYTES = (TILE[0] * (GROUP * FORMATS[kind].planes + 4) for kind in ("q8", "q4"))
GROUP_BYTES = {"q8": Q8_BYTES, "q4": Q4_BYTES}

BYTES, CODES_OF = ir.VectorType(I8, GROUP), ir.VectorType(I8, QUAD * LANES)


# -- activations ------------------------------------------------------------------------------------------------------


def _quantise_columns(e: Emit, args: Sequence[ir.Value]) -> None:
    """A group of float32 numbers [GROUP, tokens], a multiple of LANES of them, to the rows of a group of a panel."""
    x, x_row, tokens, out, out_row = args

    def columns(i: ir.Value, values: list[Any]) -> list[ir.Value]:
        offset = e.mul(i, LANES * 4)
        numbers = [e.load(VF, e.at(x, e.mul(x_row, k), offset), 4) for k in range(GROUP)]
        places = [e.at(out, e.mul(out_row, row), offset) for row in range(ROWS_OF_GROUP)]
        _quantise_column(e, numbers, places)
        return values

    e.loop(e.b.sdiv(tokens, e.i64(LANES)), [], columns)


def _quantise_column(e: Emit, numbers: Sequence[ir.Value], places: Sequence[ir.Value]) -> None:
    """As npllm.backends.numba_cpu.integers quantises a group, of LANES tokens side by side."""
    b, top = e.b, e.zeros(VI)
    for each in numbers:
        # As integers, the bits of NaN are above those of infinity, and those above all others.
        size = b.and_(b.bitcast(each, VI), same(VI, 0x7FFFFFFF))
        top = b.select(b.icmp_unsigned(">", size, top), size, top)
    top = b.bitcast(top, VF)
    small = b.fcmp_ordered("<", top, same(VF, LEAST))
    scale = b.select(small, e.zeros(VF), b.fdiv(top, same(VF, 127.0)))
    inverse = b.select(small, e.zeros(VF), b.fdiv(same(VF, 127.0), top))
    least, total = b.bitcast(same(VF, ROUNDER), VI), e.zeros(VI)
    for row in range(SCALES):
        quad = e.zeros(VI)
        for i, each in enumerate(numbers[QUAD * row : QUAD * (row + 1)]):
            code = b.sub(b.bitcast(b.fadd(b.fmul(each, inverse), same(VF, ROUNDER)), VI), least)
            total = b.add(total, code)
            quad = b.or_(quad, b.shl(b.and_(code, same(VI, 255)), same(VI, 8 * i)))
        e.store(quad, places[row], 4)
    e.store(scale, places[SCALES], 4)
    e.store(b.mul(total, same(VI, -8)), places[SUMS], 4)


# -- weights ----------------------------------------------------------------------------------------------------------


def _widen_groups(e: Emit, kind: str, args: Sequence[ir.Value]) -> None:
    """`groups` groups of a row, from where its bytes and its factors lie, widened to its place in a tile's first group."""
    w, factors, groups, out = args
    size, rows = GROUP if kind == "q8" else GROUP // 2, TILE[0]

    def group(i: ir.Value, values: list[Any]) -> list[ir.Value]:
        stored = e.load(ir.VectorType(I8, size), e.at(w, e.mul(i, size)))
        place = e.at(out, e.mul(i, GROUP_BYTES[kind]))
        for plane, codes in enumerate(_planes(e, kind, stored)):
            quads = e.b.bitcast(codes, ir.VectorType(I32, GROUP // QUAD))
            for q in range(GROUP // QUAD):
                quad = e.b.extract_element(quads, ir.Constant(I32, q))
                e.store(quad, e.at(place, rows * (GROUP * plane + QUAD * q)), 4)
        factor = from_halves(e, e.load(ir.VectorType(I16, 1), e.at(factors, e.mul(i, 2)), 2))
        e.store(factor, e.at(place, rows * GROUP * FORMATS[kind].planes), 4)
        return values

    e.loop(groups, [], group)


def _planes(e: Emit, kind: str, stored: ir.Value) -> list[ir.Value]:
    """A group's bytes as those of its planes."""
    b = e.b
    if kind == "q8":
        return [sizes_of(e, stored), stored] if SIXTEEN else [b.xor(stored, same(BYTES, -128))]
    low, high = b.and_(stored, same(stored.type, 15)), b.lshr(stored, same(stored.type, 4))
    return [e.shuffle(low, high, [half * GROUP // 2 + i for i in range(GROUP // 2) for half in (0, 1)])]


# -- products ---------------------------------------------------------------------------------------------------------


class _Tile:
    """A register tile `c[rows, W] (+)= a[rows, groups] b[groups, W]`, W = vectors x LANES tokens, one of BLOCK / rows.

    Widened weights of TILE rows lie at `a`, those of the next at `a + a_tile`. Sums of a group are in registers, those
    across groups in `c`, which is in the nearest cache. Meanwhile what will be read next comes from memory: `ahead`, so many
    bytes for each group.
    """

    def __init__(self, e: Emit, kind: str, rows: int, vectors: int, args: Sequence[ir.Value]) -> None:
        a, a_tile, self.b, self.b_step, groups, c, c_row, add, self.ahead, self.ahead_step = args
        self.e, self.kind, self.rows, self.vectors = e, kind, rows, vectors
        self.tiles = [e.at(a, e.mul(a_tile, m)) for m in range(rows // TILE[0])]
        self.places = [e.at(c, e.mul(c_row, m), v * LANES * 4) for m in range(rows) for v in range(vectors)]
        # Lines of the next panel that come with each group.
        self.lines = -(-ROWS_OF_GROUP * 4 * vectors * LANES * rows // BLOCK // 64)
        adds = e.b.icmp_signed("!=", add, e.i64(0))
        for place in self.places:
            e.store(e.b.select(adds, e.load(VF, place, 4), e.zeros(VF)), place, 4)
        e.loop(groups, [], self._group)

    def _group(self, g: ir.Value, values: list[Any]) -> list[ir.Value]:
        e, b = self.e, self.e.b
        next_place, offset = e.at(self.ahead, e.mul(g, self.ahead_step)), e.mul(g, GROUP_BYTES[self.kind])
        for line in range(self.lines):
            e.prefetch(e.at(next_place, 64 * line))
        panel = e.at(self.b, e.mul(e.mul(g, ROWS_OF_GROUP), self.b_step))
        weights = [e.at(tile, offset) for tile in self.tiles]
        totals = self._totals(panel, weights)
        scales, factors = self._row(panel, SCALES, VF), TILE[0] * GROUP * FORMATS[self.kind].planes
        for i, (place, total) in enumerate(zip(self.places, totals, strict=True)):
            factor = e.splat(e.load(F32, e.at(self._of_row(weights, i // self.vectors), factors), 4), LANES)
            scale = b.fmul(factor, scales[i % self.vectors])
            e.store(e.fma(b.sitofp(total, VF), scale, e.load(VF, place, 4)), place, 4)
        return values

    def _row(self, panel: ir.Value, row: int | ir.Value, kind: ir.Type) -> list[ir.Value]:
        """A row of a group of the panel."""
        start = self.e.at(panel, self.e.mul(self.b_step, row))
        return [self.e.load(kind, self.e.at(start, v * LANES * 4), 4) for v in range(self.vectors)]

    def _of_row(self, weights: Sequence[ir.Value], m: int) -> ir.Value:
        """Where the first of four bytes of each row are row m's."""
        return self.e.at(weights[m // TILE[0]], m % TILE[0] * QUAD)

    def _totals(self, panel: ir.Value, weights: Sequence[ir.Value]) -> list[ir.Value]:
        """A group's sums, int32, for each row and vector of tokens."""
        e, form, short = self.e, FORMATS[self.kind], ir.VectorType(I16, 2 * LANES)
        starts = [e.b.mul(each, same(VI, form.start)) for each in self._row(panel, SUMS, VI)] * self.rows
        if form.planes > 1 or not SIXTEEN:
            return self._sums(panel, weights, starts)
        sums = self._sums(panel, weights, [e.zeros(short)] * len(starts))
        return [e.b.add(start, sum_pairs(e, each)) for start, each in zip(starts, sums, strict=True)]

    def _sums(self, panel: ir.Value, weights: Sequence[ir.Value], begin: Sequence[ir.Value]) -> list[ir.Value]:
        """`begin` plus a group's products, four numbers of each row at a time."""
        e = self.e

        def quad(q: ir.Value, values: list[Any]) -> list[ir.Value]:
            codes, new, offset = self._row(panel, q, CODES_OF), [], e.mul(q, TILE[0] * QUAD)
            for m in range(self.rows):
                place = e.at(self._of_row(weights, m), offset)
                fours = [self._spread(e.at(place, plane * TILE[0] * GROUP)) for plane in range(FORMATS[self.kind].planes)]
                sums = values[m * self.vectors : (m + 1) * self.vectors]
                new += [self._product(total, fours, each) for total, each in zip(sums, codes, strict=True)]
            return new

        return e.loop(e.hidden(SCALES), begin, quad)

    def _spread(self, place: ir.Value) -> ir.Value:
        """Four bytes, for each token."""
        return self.e.b.bitcast(self.e.splat(self.e.load(I32, place, 4), LANES), CODES_OF)

    def _product(self, total: ir.Value, fours: Sequence[ir.Value], codes: ir.Value) -> ir.Value:
        """total + the products of four numbers of a row, of each plane, with those of a vector of tokens."""
        e, (unsigned, *signed) = self.e, fours
        if not signed:
            return dot_bytes(e, total, unsigned, codes)
        twos = dot_bytes(e, e.zeros(ir.VectorType(I16, 2 * LANES)), unsigned, signs_given(e, codes, *signed))
        return e.b.add(total, sum_pairs(e, twos))


def _tiling(kind: str, wide: bool) -> Any:
    rows, vectors = TILE if wide else (2 * TILE[0], 1)

    def emit(e: Emit, args: Sequence[ir.Value]) -> None:
        _Tile(e, kind, rows, vectors, args)

    return emitting(types.void, 10, emit)


@intrinsic
def quantise_columns(typingctx, x, x_row, tokens, out, out_row):
    return emitting(types.void, 5, _quantise_columns)


@intrinsic
def widen_groups_q8(typingctx, w, factors, groups, out):
    return emitting(types.void, 4, lambda e, args: _widen_groups(e, "q8", args))


@intrinsic
def widen_groups_q4(typingctx, w, factors, groups, out):
    return emitting(types.void, 4, lambda e, args: _widen_groups(e, "q4", args))


@intrinsic
def tile_wide_q8(typingctx, a, a_tile, b, b_step, groups, c, c_row, add, ahead, ahead_step):
    return _tiling("q8", True)


@intrinsic
def tile_narrow_q8(typingctx, a, a_tile, b, b_step, groups, c, c_row, add, ahead, ahead_step):
    return _tiling("q8", False)


@intrinsic
def tile_wide_q4(typingctx, a, a_tile, b, b_step, groups, c, c_row, add, ahead, ahead_step):
    return _tiling("q4", True)


@intrinsic
def tile_narrow_q4(typingctx, a, a_tile, b, b_step, groups, c, c_row, add, ahead, ahead_step):
    return _tiling("q4", False)
