"""Products of weights of 8 and 4 bits with activations of 8 bits: sums of integers within a group, floats across groups.

Activations are quantised per group of 32: code = round(x / scale), scale = max |x| / 127. What x86 multiplies is unsigned
by signed bytes, so weights are taken with their offset (128 of 8 bits, 8 of 4), and every sum begins with what that adds.
Sums are exact whichever instructions make them: `vpdpbusd`; `vpmaddubsw`, whose sums of two must fit into 16 bits, so that
weights of 8 bits give their signs to the activations in place of the offset; or any CPU's.

Prepared activations lie where their float32 numbers lay, in blocks of BLOCK groups, then, of what is left over, of one. A
block has, of all its groups: the codes in order (CODES); those with even and with odd indices, as a byte of 4-bit weights
holds them in its low and its high half (EVEN, ODD); the sums to begin with, int32, for each four codes (START8) and each
eight (START4); the groups' scales, float32 (SCALES); what a group of 4-bit weights begins with, int32 (START).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from npllm.backends.numba_cpu.conversions import from_halves
from npllm.backends.numba_cpu.emit import F32, I8, I16, I32, LANES, Emit, emitting, rows_of, same, store_each, totals
from npllm.backends.numba_cpu.jit import PATH
from npllm.backends.numba_cpu.vectors import ABREAST, SEVERAL, ahead_of

GROUP, BLOCK = 32, 4

# 32-bit sums that are kept side by side: a group of 8-bit weights has 8.
ACROSS = max(LANES, 8)
ACROSS_OF = ir.VectorType(F32, ACROSS)

# Whether sums of two products are kept in 16 bits on the way.
SIXTEEN = PATH.int8 == "maddubs"

# Where a block's parts begin, in bytes for each of its groups, and the bytes from one group to the next.
CODES, EVEN, ODD, START8, START4, SCALES, START, GROUP_BYTES = 0, 32, 48, 64, 96, 112, 116, 128

# Of a format: the bytes of a group of weights, the activations that they meet, and the sums to begin with.
FORMATS: dict[str, tuple[int, tuple[int, ...], int]] = {"q8": (32, (CODES,), START8), "q4": (16, (EVEN, ODD), START4)}

# Whether the sums of two rows of 4-bit weights, of a block's groups each, become the lanes of one vector (`_Pairs`).
PAIRED = SIXTEEN and LANES == 2 * BLOCK

# x + 1.5 * 2^23 holds x rounded to an integer in its low bits.
ROUNDER = 12582912.0
# Below this, 127 / max |x| may overflow: such groups count as zeros.
LEAST = 2.0**-100


Pairs = Sequence[tuple[ir.Value, ir.Value]]


def summed(e: Emit, total: ir.Value, pairs: Pairs) -> ir.Value:
    """total + the products of four unsigned with four signed bytes in each lane of 32 bits, of all pairs of vectors.

    Where SIXTEEN, four products of the largest numbers must fit into 16 bits.
    """
    begin = e.zeros(ir.VectorType(I16, 2 * total.type.count)) if SIXTEEN else total
    sums = functools.reduce(lambda sums, pair: dot_bytes(e, sums, *pair), pairs, begin)
    return e.b.add(total, sum_pairs(e, sums)) if SIXTEEN else sums


def dot_bytes(e: Emit, total: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    """total + the products of unsigned with signed bytes: of four in each lane of 32 bits; where SIXTEEN, of two in 16."""
    if SIXTEEN:
        name = {128: "ssse3.pmadd.ub.sw.128", 256: "avx2.pmadd.ub.sw", 512: "avx512.pmaddubs.w.512"}[8 * unsigned.type.count]
        return e.b.add(total, e.call(f"llvm.x86.{name}", total.type, unsigned, signed))
    if PATH.int8:
        name, kind = f"llvm.x86.avx512.vpdpbusd.{32 * total.type.count}", total.type
        return e.call(name, kind, total, e.b.bitcast(unsigned, kind), e.b.bitcast(signed, kind))
    return e.b.add(total, _summed_anywhere(e, unsigned, signed))


def sum_pairs(e: Emit, sums: ir.Value) -> ir.Value:
    """The sums of neighbouring lanes of 16 bits in 32, where SIXTEEN."""
    name = {8: "sse2.pmadd.wd", 16: "avx2.pmadd.wd", 32: "avx512.pmaddw.d.512"}[sums.type.count]
    return e.call(f"llvm.x86.{name}", ir.VectorType(I32, sums.type.count // 2), sums, same(sums.type, 1))


def _summed_anywhere(e: Emit, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    """By products of 16 bits, in the form in which LLVM finds what a CPU has for them."""
    b, size = e.b, unsigned.type.count
    short, whole = ir.VectorType(I16, size), ir.VectorType(I32, size // 2)
    twos = (b.zext(unsigned, short), b.sext(signed, short))
    products = [b.mul(*(b.sext(e.shuffle(x, x, range(odd, size, 2)), whole) for x in twos)) for odd in (0, 1)]
    pairs = b.add(*products)
    return b.add(*(e.shuffle(pairs, pairs, range(odd, size // 2, 2)) for odd in (0, 1)))


def sizes_of(e: Emit, w: ir.Value) -> ir.Value:
    """The absolute values of signed bytes, unsigned."""
    return e.call(f"llvm.abs.v{w.type.count}i8", w.type, w, ir.Constant(ir.IntType(1), 0))


def signs_given(e: Emit, x: ir.Value, w: ir.Value) -> ir.Value:
    """x with its sign turned where w is negative, bytes; anything where it is 0."""
    if name := {16: "ssse3.psign.b.128", 32: "avx2.psign.b"}.get(x.type.count):
        return e.call(f"llvm.x86.{name}", x.type, x, w)
    return e.b.select(e.b.icmp_signed("<", w, same(w.type, 0)), e.b.neg(x), x)


Body = Callable[[int, ir.Value, list[Any]], list[ir.Value]]


def _blocks(e: Emit, width: ir.Value, whole: list[Any], single: list[Any], body: Body) -> tuple[list[Any], list[Any]]:
    """`values = body(groups of the block, its first group, values)` over a row: for whole blocks, then for single groups."""
    b = e.b
    blocks, done = b.sdiv(width, e.i64(BLOCK * GROUP)), e.mul(b.sdiv(width, e.i64(BLOCK * GROUP)), BLOCK)
    whole = e.loop(blocks, whole, lambda i, v: body(BLOCK, e.mul(i, BLOCK), v))
    rest = b.sub(b.sdiv(width, e.i64(GROUP)), done)
    return whole, e.loop(rest, single, lambda i, v: body(1, b.add(done, i), v))


def _quantise(e: Emit, args: Sequence[ir.Value]) -> None:
    """Prepare float32 numbers in their place."""
    x, width = args

    def body(groups: int, first: ir.Value, values: list[Any]) -> list[ir.Value]:
        block = e.at(x, e.mul(first, GROUP_BYTES))
        numbers = [e.load(ir.VectorType(F32, GROUP), e.at(block, i * GROUP_BYTES), 4) for i in range(groups)]
        quantised = [_quantised(e, each) for each in numbers]
        for i, (codes, scale) in enumerate(quantised):
            _store(e, block, groups, i, codes, scale)
        return values

    _blocks(e, width, [], [], body)


def _quantised(e: Emit, numbers: ir.Value) -> tuple[ir.Value, ir.Value]:
    """32 numbers -> their codes and scale. If one is not finite, neither is the scale."""
    b, kind = e.b, ir.VectorType(I32, GROUP)
    sizes = b.and_(b.bitcast(numbers, kind), same(kind, 0x7FFFFFFF))
    # As integers, the bits of NaN are above those of infinity, and those above all others.
    top = b.bitcast(e.call(f"llvm.vector.reduce.umax.v{GROUP}i32", I32, sizes), F32)
    zero, limit = ir.Constant(F32, 0.0), ir.Constant(F32, 127.0)
    small = b.fcmp_ordered("<", top, ir.Constant(F32, LEAST))
    scale = b.select(small, zero, b.fdiv(top, limit))
    inverse = e.splat(b.select(small, zero, b.fdiv(limit, top)), GROUP)
    shifted = b.fadd(b.fmul(numbers, inverse), same(numbers.type, ROUNDER))
    return b.trunc(b.bitcast(shifted, kind), ir.VectorType(I8, GROUP)), scale


def _store(e: Emit, block: ir.Value, groups: int, i: int, codes: ir.Value, scale: ir.Value) -> None:
    """Group i of a block."""
    b, eight, four = e.b, ir.VectorType(I32, 8), ir.VectorType(I32, 4)
    sums = summed(e, e.zeros(eight), [(same(codes.type, 1), codes)])
    pairs = b.add(e.shuffle(sums, sums, range(0, 8, 2)), e.shuffle(sums, sums, range(1, 8, 2)))
    parts = {
        CODES: codes,
        EVEN: e.shuffle(codes, codes, range(0, GROUP, 2)),
        ODD: e.shuffle(codes, codes, range(1, GROUP, 2)),
        START8: b.mul(sums, same(eight, -128)),
        START4: b.mul(pairs, same(four, -8)),
    }
    for part, value in parts.items():
        size = 32 if part in (CODES, START8) else 16
        e.store(value, e.at(block, part * groups + size * i))
    e.store(scale, e.at(block, SCALES * groups + 4 * i), 4)
    start = e.call("llvm.vector.reduce.add.v4i32", I32, parts[START4])
    e.store(start, e.at(block, START * groups + 4 * i), 4)


class _Rows:
    """The products of rows of weights with prepared rows of activations: of one with several, or of several with one."""

    def __init__(
        self, e: Emit, kind: str, weights: Sequence[ir.Value], factors: Sequence[ir.Value], rows: Sequence[ir.Value],
        width: ir.Value,
    ) -> None:  # fmt: skip
        self.e, self.weights, self.factors, self.rows, self.width = e, weights, factors, rows, width
        self.size, self.parts, self.start = FORMATS[kind]

    def sums(self) -> list[ir.Value]:
        """A vector for each row of weights and each of activations."""
        e, lanes = self.e, self.size // 4
        one = ir.VectorType(F32, lanes)
        products = len(self.weights) * len(self.rows)
        whole, single = _blocks(e, self.width, [e.zeros(ACROSS_OF)] * products, [e.zeros(one)] * products, self._block)
        if lanes < ACROSS:
            spread = [*range(lanes), *[lanes] * (ACROSS - lanes)]
            single = [e.shuffle(each, e.zeros(one), spread) for each in single]
        return [e.b.fadd(x, y) for x, y in zip(whole, single, strict=True)]

    def _block(self, groups: int, first: ir.Value, values: list[Any]) -> list[ir.Value]:
        count = len(self.rows)
        if groups > 1:
            self._stream(groups, first)
        new = []
        for i, (w, factors) in enumerate(zip(self.weights, self.factors, strict=True)):
            new += self._row(w, factors, groups, first, values[i * count : (i + 1) * count])
        return new

    def _stream(self, groups: int, first: ir.Value) -> None:
        places = [self.e.at(w, self.e.mul(first, self.size)) for w in self.weights]
        self.e.stream(places, groups * self.size, ahead_of(self.weights))

    def _row(self, w: ir.Value, at: ir.Value, groups: int, first: ir.Value, values: list[Any]) -> list[Any]:
        """`values` plus the products of one row of weights."""
        e, b = self.e, self.e.b
        per = min(groups, ACROSS * 4 // self.size)  # groups of a vector
        lanes, kind = per * self.size // 4, ir.VectorType(F32, groups)
        factors = from_halves(e, e.load(ir.VectorType(I16, groups), e.at(at, e.mul(first, 2)), 2))
        blocks = [e.at(row, e.mul(first, GROUP_BYTES)) for row in self.rows]
        scales = [b.fmul(factors, e.load(kind, e.at(block, SCALES * groups), 4)) for block in blocks]
        for i in range(0, groups, per):
            place = e.at(w, e.mul(b.add(first, e.i64(i)), self.size))
            stored = e.load(ir.VectorType(I8, 4 * lanes), place)
            weights = self._unsigned(stored)
            spread = [i + lane * per // lanes for lane in range(lanes)]
            products = [self._product(block, groups, i, stored, weights) for block in blocks]
            spreads = [e.shuffle(scale, scale, spread) for scale in scales]
            values = [e.fma(*each) for each in zip(products, spreads, values, strict=True)]
        return values

    def _unsigned(self, stored: ir.Value) -> list[ir.Value]:
        """A vector of stored bytes as unsigned ones, for each part of the activations that they meet."""
        b, kind = self.e.b, stored.type
        if len(self.parts) > 1:
            return [b.and_(stored, same(kind, 15)), b.lshr(stored, same(kind, 4))]
        if SIXTEEN:
            return [sizes_of(self.e, stored)]
        return [b.xor(stored, same(kind, -128))]

    def _product(self, block: ir.Value, groups: int, i: int, stored: ir.Value, weights: Sequence[ir.Value]) -> ir.Value:
        """Of a vector of stored bytes, as weights, that begins with group i of a block."""
        e, sums = self.e, ir.VectorType(I32, stored.type.count // 4)
        met = [e.load(stored.type, e.at(block, part * groups + self.size * i)) for part in self.parts]
        if SIXTEEN and len(self.parts) == 1:
            total, met = e.zeros(sums), [signs_given(e, met[0], stored)]
        else:
            total = e.load(sums, e.at(block, self.start * groups + self.size * i), 4)
        return e.b.sitofp(summed(e, total, list(zip(weights, met, strict=True))), ir.VectorType(F32, sums.count))


def _dot_several(e: Emit, kind: str, tokens: int, args: Sequence[ir.Value]) -> None:
    """The products of one row of weights with some tokens; row i of x lies at `x + min(i, last) x_row`."""
    w, factors, x, x_row, last, width, out = args
    rows = _Rows(e, kind, [w], [factors], rows_of(e, x, x_row, last, tokens), width)
    e.store(totals(e, rows.sums()), out, 4)


class _Pairs(_Rows):
    """The products of ABREAST rows of 4-bit weights with one row: sums are packed until those of two rows fill a vector."""

    def totals(self) -> ir.Value:
        e, one = self.e, ir.VectorType(F32, self.size // 4)
        start = [e.zeros(ACROSS_OF)] * (ABREAST // 2), [e.zeros(one)] * ABREAST
        (first, second), single = _blocks(e, self.width, *start, self._block)
        # Of a pair's lanes, 2, 3, 6 and 7 are the second row's.
        lanes = (0, 2, 8, 10, 4, 6, 12, 14)
        both = e.b.fadd(e.shuffle(first, second, lanes), e.shuffle(first, second, [lane + 1 for lane in lanes]))
        whole_rows = e.b.fadd(e.shuffle(both, both, range(4)), e.shuffle(both, both, range(4, 8)))
        return e.b.fadd(whole_rows, totals(e, single))

    def _block(self, groups: int, first: ir.Value, values: list[Any]) -> list[ir.Value]:
        if groups == 1:
            return super()._block(groups, first, values)
        self._stream(groups, first)
        e, b, (x,) = self.e, self.e.b, self.rows
        block, order = e.at(x, e.mul(first, GROUP_BYTES)), [0, 2, 0, 2, 1, 3, 1, 3]
        scales = e.load(ir.VectorType(F32, BLOCK), e.at(block, SCALES * BLOCK), 4)
        starts = e.load(ir.VectorType(I32, BLOCK), e.at(block, START * BLOCK), 4)
        scales, starts = e.shuffle(scales, scales, order), e.shuffle(starts, starts, order)
        new = []
        for pair, value in enumerate(values):
            rows = range(2 * pair, 2 * pair + 2)
            halves = [self._halves(e.at(self.weights[row], e.mul(first, self.size)), block) for row in rows]
            sums = b.sitofp(b.add(sum_pairs(e, packed(e, *halves)), starts), ACROSS_OF)
            places = [e.at(self.factors[row], e.mul(first, 2)) for row in rows]
            one, other = (e.load(ir.VectorType(I16, BLOCK), each, 2) for each in places)
            factors = from_halves(e, e.shuffle(one, other, [0, 2, 4, 6, 1, 3, 5, 7]))
            new.append(e.fma(sums, b.fmul(factors, scales), value))
        return new

    def _halves(self, w: ir.Value, block: ir.Value) -> ir.Value:
        """A block of one row: the sums of half a group each, int32, of groups 0, 0, 2, 2, 1, 1, 3, 3."""
        e, parts = self.e, []
        for i in (0, 2):
            stored = e.load(ir.VectorType(I8, 32), e.at(w, i * self.size))
            sums: ir.Value = e.zeros(ir.VectorType(I16, 16))
            for weights, part in zip(self._unsigned(stored), self.parts, strict=True):
                sums = dot_bytes(e, sums, weights, e.load(stored.type, e.at(block, part * BLOCK + self.size * i)))
            parts.append(sum_pairs(e, sums))
        return sum_pairs(e, packed(e, *parts))


def packed(e: Emit, x: ir.Value, y: ir.Value) -> ir.Value:
    """Lanes of 32 bits in 16, which they fit into: of x and of y in turn, 64 bits of each."""
    return e.call("llvm.x86.avx2.packssdw", ir.VectorType(I16, 16), x, y)


def _dot_abreast(e: Emit, kind: str, args: Sequence[ir.Value]) -> None:
    """The products of rows of weights in ABREAST places with one row; as npllm.backends.numba_cpu.vectors has them."""
    w, w_apart, factors, factors_apart, last, w_row, factor_row, times, x, width, out, out_apart = args
    places, scales = rows_of(e, w, w_apart, last, ABREAST), rows_of(e, factors, factors_apart, last, ABREAST)
    to = rows_of(e, out, out_apart, last, ABREAST)

    def body(i: ir.Value, values: list[Any]) -> list[ir.Value]:
        weights, factors = (
            [e.at(place, e.mul(row, i)) for place in each] for each, row in ((places, w_row), (scales, factor_row))
        )
        rows = weights, factors, [x], width
        sums = _Pairs(e, kind, *rows).totals() if PAIRED and kind == "q4" else totals(e, _Rows(e, kind, *rows).sums())
        store_each(e, sums, to, i)
        return values

    e.loop(times, [], body)


@intrinsic
def quantise(typingctx, x, width):
    return emitting(types.void, 2, _quantise)


@intrinsic
def abreast_q8(
    typingctx, w, w_apart, factors, factors_apart, last, w_row, factor_row, times, x, width, out, out_apart,
):  # fmt: skip
    return emitting(types.void, 12, lambda e, args: _dot_abreast(e, "q8", args))


@intrinsic
def abreast_q4(
    typingctx, w, w_apart, factors, factors_apart, last, w_row, factor_row, times, x, width, out, out_apart,
):  # fmt: skip
    return emitting(types.void, 12, lambda e, args: _dot_abreast(e, "q4", args))


@intrinsic
def twos_q8(typingctx, w, factors, x, x_row, last, width, out):
    return emitting(types.void, 7, lambda e, args: _dot_several(e, "q8", 2, args))


@intrinsic
def twos_q4(typingctx, w, factors, x, x_row, last, width, out):
    return emitting(types.void, 7, lambda e, args: _dot_several(e, "q4", 2, args))


@intrinsic
def dots_q8(typingctx, w, factors, x, x_row, last, width, out):
    return emitting(types.void, 7, lambda e, args: _dot_several(e, "q8", SEVERAL, args))


@intrinsic
def dots_q4(typingctx, w, factors, x, x_row, last, width, out):
    return emitting(types.void, 7, lambda e, args: _dot_several(e, "q4", SEVERAL, args))
