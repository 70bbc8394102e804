"""Vector code that LLVM's vectoriser would not find, emitted as intrinsics; generic vector IR wherever possible.

Addresses are integers, strides count bytes. Vectors are as wide as the path's registers (npllm.backends.numba_cpu.features).
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from npllm.backends.numba_cpu.jit import PATH

F32, F16 = ir.FloatType(), ir.HalfType()
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
LANES = PATH.lanes
VF, VI, ONE = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(F32, 1)


# Bytes that what streams by is asked for ahead of its use: at the end of each row or page, the CPU's own guesses begin anew.
# Rows abreast it guesses well, but not soon enough for a loop of which few turns are under way at once.
AHEAD, ABREAST_AHEAD, CACHE_LINE = 1536, 320, 64


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite's IR builder has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


VB = ir.VectorType(_BFloat(), 2 * LANES)


class Emit:
    """An IR builder with the few idioms that the kernels' inner loops are made of."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def i64(self, value: int) -> ir.Constant:
        return ir.Constant(I64, value)

    def at(self, base: ir.Value, *terms: ir.Value | int) -> ir.Value:
        """`base` plus byte offsets."""
        for term in terms:
            if not (isinstance(term, int) and term == 0):
                base = self.b.add(base, self.i64(term) if isinstance(term, int) else term)
        return base

    def mul(self, x: ir.Value, y: ir.Value | int) -> ir.Value:
        return self.b.mul(x, self.i64(y) if isinstance(y, int) else y)

    def load(self, kind: ir.Type, address: ir.Value, align: int = 1) -> ir.Value:
        value = self.b.load(self.b.inttoptr(address, ir.PointerType(kind)), typ=kind)
        value.align = align
        return value

    def store(self, value: ir.Value, address: ir.Value, align: int = 1) -> None:
        self.b.store(value, self.b.inttoptr(address, ir.PointerType(value.type))).align = align

    def call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        """A call of one of LLVM's own functions."""
        kind = ir.FunctionType(result, [each.type for each in arguments])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), arguments)

    def prefetch(self, address: ir.Value) -> None:
        """Ask for a cache line that will be read; the address need not be anyone's."""
        place = self.b.inttoptr(address, ir.PointerType(I8))
        kind = ir.FunctionType(ir.VoidType(), [place.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0")
        self.b.call(function, [place, *(ir.Constant(I32, flag) for flag in (0, 3, 1))])

    def stream(self, rows: Sequence[ir.Value], size: int, ahead: int) -> None:
        """Ask for what lies so many bytes ahead of some rows of which `size` bytes are about to be read."""
        for row in rows:
            for line in range(0, size, CACHE_LINE):
                self.prefetch(self.at(row, ahead + line))

    def splat(self, scalar: ir.Value, lanes: int) -> ir.Value:
        vector = ir.VectorType(scalar.type, lanes)
        lane = self.b.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        return self.b.shuffle_vector(lane, ir.Constant(vector, ir.Undefined), zeros)

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        return self.call(f"llvm.fma.v{z.type.count}f32", z.type, x, y, z)

    def zeros(self, kind: ir.VectorType) -> ir.Constant:
        return ir.Constant(kind, [0.0 if isinstance(kind.element, ir.FloatType) else 0] * kind.count)

    def total(self, vector: ir.Value) -> ir.Value:
        """The sum of a vector's lanes, pairwise."""
        name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
        start = ir.Constant(F32, -0.0)
        kind = ir.FunctionType(F32, [F32, vector.type])
        function = cgutils.get_or_insert_function(self.b.module, kind, name)
        return self.b.call(function, [start, vector], fastmath=("reassoc",))

    def loop(
        self, count: ir.Value, start: Sequence[ir.Value], body: Callable[[ir.Value, list[Any]], list[ir.Value]]
    ) -> list[Any]:
        """`values = body(i, values)` for i in 0..count, with the values in registers; -> the last ones."""
        b = self.b
        before, head = b.block, b.append_basic_block("loop")
        inner, after = b.append_basic_block("body"), b.append_basic_block("after")
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(self.i64(0), before)
        values = [b.phi(value.type) for value in start]
        for phi, value in zip(values, start, strict=True):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_signed("<", index, count), inner, after)
        b.position_at_end(inner)
        new = body(index, values)
        index.add_incoming(b.add(index, self.i64(1)), b.block)
        for phi, value in zip(values, new, strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(after)
        return values

    def hidden(self, value: ir.Value | int) -> ir.Value:
        """A number of which LLVM does not know where it comes from.

        A loop of so many turns stays one, and its sums in registers; and addresses that step by it stay a base and an
        offset, where LLVM would keep more pointers than there are registers.
        """
        given = self.i64(value) if isinstance(value, int) else value
        return self.b.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [given], False)

    def shuffle(self, x: ir.Value, y: ir.Value, lanes: Sequence[int]) -> ir.Value:
        return self.b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))

    def least(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)


# How numbers lie in memory, for `widened`: float32, half, bf16.
NUMBERS = {"f32": (F32, 4), "f16": (I16, 2), "bf16": (I16, 2)}

# Whether the CPU converts halves; without, LLVM would call a function that may not be there.
HALVES = bool({"f16c", "avx512f"} & set(PATH.needs)) or platform.machine().lower() in ("aarch64", "arm64")


def from_halves(e: Emit, bits: ir.Value) -> ir.Value:
    """The float32 numbers of the bits of halves, int16."""
    b, lanes = e.b, bits.type.count
    wide, floats = ir.VectorType(I32, lanes), ir.VectorType(F32, lanes)
    if HALVES:
        return b.fpext(b.bitcast(bits, ir.VectorType(F16, lanes)), floats)
    bits = b.zext(bits, wide)
    size = b.and_(bits, same(wide, 0x7FFF))
    # Shifted into a float32 they are 2^112 too small, subnormal ones too.
    number = b.fmul(b.bitcast(b.shl(size, same(wide, 13)), floats), same(floats, 2.0**112))
    special = b.select(b.icmp_unsigned(">=", size, same(wide, 0x7C00)), same(wide, 0x7F800000), same(wide, 0))
    sign = b.shl(b.and_(bits, same(wide, 0x8000)), same(wide, 16))
    return b.bitcast(b.or_(b.or_(b.bitcast(number, wide), special), sign), floats)


def widened(e: Emit, kind: str, address: ir.Value, lanes: int = LANES) -> ir.Value:
    """So many numbers at an address as a vector of float32."""
    stored, size = NUMBERS[kind]
    value = e.load(ir.VectorType(stored, lanes), address, size)
    if kind == "f16":
        return from_halves(e, value)
    if kind == "bf16":
        wide = ir.VectorType(I32, lanes)
        shifted = e.b.shl(e.b.zext(value, wide), ir.Constant(wide, [16] * lanes))
        return e.b.bitcast(shifted, ir.VectorType(F32, lanes))
    return value


def coded(e: Emit, kind: str, w: ir.Value, at: ir.Value, lanes: int) -> ir.Value:
    """The numbers that some codes stand for before their factor: those from number `at` on of a row (of q4, an even one)."""
    b, wide, floats = e.b, ir.VectorType(I32, lanes), ir.VectorType(F32, lanes)
    if kind == "q4":
        bytes_ = e.load(ir.VectorType(I8, lanes // 2), e.at(w, b.ashr(at, e.i64(1))))
        low, high = b.and_(bytes_, same(bytes_.type, 15)), b.lshr(bytes_, same(bytes_.type, 4))
        order = [i // 2 + i % 2 * (lanes // 2) for i in range(lanes)]
        return b.sitofp(b.sub(b.zext(e.shuffle(low, high, order), wide), same(wide, 8)), floats)
    codes = e.load(ir.VectorType(I8, lanes), e.at(w, at))
    if kind == "q8":
        return b.sitofp(b.sext(codes, wide), floats)
    return _e4m3(e, codes)


def _e4m3(e: Emit, codes: ir.Value) -> ir.Value:
    """The numbers of e4m3 codes: shifted into a half they are 2^8 too small, subnormal ones too."""
    b, lanes = e.b, codes.type.count
    short, floats = ir.VectorType(I16, lanes), ir.VectorType(F32, lanes)
    bits = b.zext(codes, short)
    size = b.and_(bits, same(short, 0x7F))
    half = b.or_(b.shl(b.and_(bits, same(short, 0x80)), same(short, 8)), b.shl(size, same(short, 7)))
    none = b.icmp_unsigned("==", size, same(short, 0x7F))
    half = b.select(none, same(short, 0x7E00), half)
    return b.fmul(from_halves(e, half), same(floats, 256.0))


def same(kind: ir.VectorType, value: float) -> ir.Constant:
    """A vector of one value."""
    return ir.Constant(kind, [value] * kind.count)


def multiplied_pairs(e: Emit, total: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """total + x * y of pairs of bf16 in 32-bit lanes."""
    if PATH.twin:
        for part in (_low_of_pairs, _high_of_pairs):
            total = e.fma(part(e, x), part(e, y), total)
        return total
    name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}"
    return e.call(name, VF, total, e.b.bitcast(x, VB), e.b.bitcast(y, VB))


def _low_of_pairs(e: Emit, pairs: ir.Value) -> ir.Value:
    return e.b.bitcast(e.b.shl(pairs, same(VI, 16)), VF)


def _high_of_pairs(e: Emit, pairs: ir.Value) -> ir.Value:
    return e.b.bitcast(e.b.and_(pairs, same(VI, -0x10000)), VF)


# Independent sums at once: enough to hide the latency of a multiply-add.
SUMS = 8

# Rows of weights that one token meets at once, each from another page: memory gives more to several who read than to one.
ABREAST = 4

# Rows of weights and tokens that meet at once, where tokens are few; or one row and MORE tokens.
TOGETHER, SEVERAL, MORE = 2, 4, 8

# Steps of a tile in one turn of its loop, and for each line of what comes next: no step asks for more than half of one.
STEPS_AT_ONCE, STEPS_OF_LINE = 4, 2

# Rows of weights that a thread takes at a time, where tokens are many: they meet one panel, then the next.
BLOCK = 48


def ahead_of(weights: Sequence[ir.Value]) -> int:
    """How far ahead rows of weights that stream by together are asked for, in bytes."""
    return ABREAST_AHEAD if len(weights) == ABREAST else AHEAD


def _dots(e: Emit, kind: str, weights: Sequence[ir.Value], rows: Sequence[ir.Value], count: ir.Value) -> list[ir.Value]:
    """The sums of w[k] x[k] over `count` numbers for each row w of weights and each row x: vectors, then single numbers of
    what is left over.

    w is stored as `kind`, x float32; or, where kind is "pairs", both are bf16.
    """
    b, lanes = e.b, 2 * LANES if kind == "pairs" else LANES
    products = len(weights) * len(rows)
    each = max(1, SUMS // products)

    def step(size: int, offset: ir.Value, values: list[Any]) -> list[ir.Value]:
        new = []
        for i in range(len(values) // products):
            at = b.add(offset, e.i64(i * size))
            new += _multiplied(e, kind, weights, rows, at, size, values[i * products : (i + 1) * products])
        return new

    wide = each * lanes

    def several(i: ir.Value, values: list[Any]) -> list[ir.Value]:
        offset, size = e.mul(i, wide), 2 if kind == "pairs" else NUMBERS[kind][1]
        e.stream([e.at(w, e.mul(offset, size)) for w in weights], wide * size, ahead_of(weights))
        return step(lanes, offset, values)

    sums = e.loop(b.sdiv(count, e.i64(wide)), [e.zeros(VF)] * (each * products), several)
    done = e.mul(b.sdiv(count, e.i64(wide)), wide)
    rest = b.sdiv(b.sub(count, done), e.i64(lanes))
    last = e.loop(rest, sums[:products], lambda i, v: step(lanes, b.add(done, e.mul(i, lanes)), v))
    done = b.add(done, e.mul(rest, lanes))
    single = e.loop(b.sub(count, done), [e.zeros(ONE)] * products, lambda i, v: step(1, b.add(done, i), v))
    for i in range(1, each):
        last = [b.fadd(x, y) for x, y in zip(last, sums[i * products : (i + 1) * products], strict=True)]
    return [*last, *single]


def _multiplied(
    e: Emit, kind: str, weights: Sequence[ir.Value], rows: Sequence[ir.Value], at: ir.Value, size: int,
    totals: Sequence[ir.Value],
) -> list[ir.Value]:  # fmt: skip
    """totals + w[at..] x[at..] of `size` numbers, for each row w of weights and each row x."""
    pairs = kind == "pairs" and size > 1
    stored, given = ("bf16", "bf16") if kind == "pairs" else (kind, "f32")

    def numbers(kind: str, row: ir.Value) -> ir.Value:
        address = e.at(row, e.mul(at, NUMBERS[kind][1]))
        return e.load(VI, address, 2) if pairs else widened(e, kind, address, size)

    others = [numbers(given, x) for x in rows]
    factors = [(w, x) for w in (numbers(stored, w) for w in weights) for x in others]
    if pairs:
        return [multiplied_pairs(e, total, w, x) for (w, x), total in zip(factors, totals, strict=True)]
    return [e.fma(w, x, total) for (w, x), total in zip(factors, totals, strict=True)]


def _fill(e: Emit, kind: str, pairs: bool, args: Sequence[ir.Value]) -> None:
    """`count` numbers of a row, from number `at` on, times one factor, as float32 or bf16."""
    w, at, out, count, factor = args
    size = 2 if pairs else 4

    def step(lanes: int, offset: ir.Value) -> list[ir.Value]:
        number = e.b.fmul(coded(e, kind, w, e.b.add(at, offset), lanes), e.splat(factor, lanes))
        e.store(narrowed(e, number) if pairs else number, e.at(out, e.mul(offset, size)), size)
        return []

    whole = e.b.sdiv(count, e.i64(LANES))
    e.loop(whole, [], lambda i, v: step(LANES, e.mul(i, LANES)))
    if kind == "f8":
        done = e.mul(whole, LANES)
        e.loop(e.b.sub(count, done), [], lambda i, v: step(1, e.b.add(done, i)))


def narrowed(e: Emit, numbers: ir.Value) -> ir.Value:
    """float32 numbers as bf16, ties to even."""
    b, count = e.b, numbers.type.count
    if not PATH.twin:
        return b.fptrunc(numbers, ir.VectorType(_BFloat(), count))
    wide = ir.VectorType(I32, count)
    bits = b.bitcast(numbers, wide)
    odd = b.and_(b.lshr(bits, same(wide, 16)), same(wide, 1))
    rounded = b.lshr(b.add(bits, b.add(odd, same(wide, 0x7FFF))), same(wide, 16))
    nan = b.fcmp_unordered("uno", numbers, numbers)
    return b.trunc(b.select(nan, same(wide, 0x7FC0), rounded), ir.VectorType(I16, count))


def _narrow(e: Emit, args: Sequence[ir.Value]) -> None:
    """`count` numbers of float32 as bf16; in their own place as well."""
    x, out, count = args

    def step(lanes: int, at: ir.Value) -> list[ir.Value]:
        e.store(narrowed(e, widened(e, "f32", e.at(x, e.mul(at, 4)), lanes)), e.at(out, e.mul(at, 2)), 2)
        return []

    whole = e.b.sdiv(count, e.i64(LANES))
    e.loop(whole, [], lambda i, v: step(LANES, e.mul(i, LANES)))
    done = e.mul(whole, LANES)
    e.loop(e.b.sub(count, done), [], lambda i, v: step(1, e.b.add(done, i)))


def _dot_f8(e: Emit, given: str, args: Sequence[ir.Value]) -> ir.Value:
    """The product of a row of e4m3 codes with numbers that lie as `given`: the sums of blocks times their factors.

    Block i has `block` numbers, of which `origin` lie before the row's first.
    """
    w, x, count, factors, block, origin = args
    b, single = e.b, ir.Constant(F32, 0.0)
    blocks = b.sdiv(b.add(b.add(count, origin), b.sub(block, e.i64(1))), block)

    def step(lanes: int, at: ir.Value, total: ir.Value) -> ir.Value:
        return e.fma(coded(e, "f8", w, at, lanes), widened(e, given, e.at(x, e.mul(at, NUMBERS[given][1])), lanes), total)

    def body(i: ir.Value, values: list[Any]) -> list[ir.Value]:
        start = b.sub(e.mul(i, block), origin)
        end, begin = e.least(count, b.add(start, block)), b.select(b.icmp_signed("<", start, e.i64(0)), e.i64(0), start)
        twos = b.sdiv(b.sub(end, begin), e.i64(2 * LANES))
        sums = e.loop(
            twos, [e.zeros(VF)] * 2,
            lambda i, v: [step(LANES, b.add(begin, e.at(e.mul(i, 2 * LANES), j * LANES)), v[j]) for j in range(2)],
        )  # fmt: skip
        done = b.add(begin, e.mul(twos, 2 * LANES))
        rest = e.loop(b.sub(end, done), [e.zeros(ONE)], lambda i, v: [step(1, b.add(done, i), v[0])])
        factor = e.load(F32, e.at(factors, e.mul(i, 4)), 4)
        return [e.fma(b.fadd(*sums), e.splat(factor, LANES), values[0]), e.fma(rest[0], e.splat(factor, 1), values[1])]

    vector, one = e.loop(blocks, [e.zeros(VF), ir.Constant(ONE, [single])], body)
    return b.fadd(e.total(vector), b.extract_element(one, ir.Constant(I32, 0)))


def _dot(e: Emit, kind: str, args: Sequence[ir.Value]) -> ir.Value:
    w, x, count = args
    vector, single = _dots(e, kind, [w], [x], count)
    return e.b.fadd(e.total(vector), e.b.extract_element(single, ir.Constant(I32, 0)))


def _dot_several(e: Emit, kind: str, together: int, tokens: int, args: Sequence[ir.Value]) -> None:
    """The products of some rows of weights with some tokens, those of a row side by side, rows `out_row` bytes apart.

    Row i of weights lies at `w + min(i, w_last) w_row`, and so those of x.
    """
    w, w_row, w_last, x, x_row, x_last, count, out, out_row = args
    weights, rows = rows_of(e, w, w_row, w_last, together), rows_of(e, x, x_row, x_last, tokens)
    sums = _dots(e, kind, weights, rows, count)
    vectors, singles = sums[: len(sums) // 2], sums[len(sums) // 2 :]
    # Of four sums at once: the narrowest vectors have as many lanes.
    for i in range(0, len(vectors), SEVERAL):
        part = slice(i, i + SEVERAL)
        numbers = gathered(e, [e.b.extract_element(single, ir.Constant(I32, 0)) for single in singles[part]])
        e.store(e.b.fadd(totals(e, vectors[part]), numbers), e.at(out, e.mul(out_row, i // tokens), i % tokens * 4), 4)


def _dot_abreast(e: Emit, kind: str, args: Sequence[ir.Value]) -> None:
    """The products of `times` rows of weights in each of ABREAST places, which follow one another, with one token.

    Place i is `w + min(i, last) w_apart`, and so those of the products.
    """
    w, w_apart, last, w_row, times, x, count, out, out_apart = args
    places, to = rows_of(e, w, w_apart, last, ABREAST), rows_of(e, out, out_apart, last, ABREAST)

    def body(i: ir.Value, values: list[Any]) -> list[ir.Value]:
        sums = _dots(e, kind, [e.at(place, e.mul(w_row, i)) for place in places], [x], count)
        singles = [e.b.extract_element(single, ir.Constant(I32, 0)) for single in sums[ABREAST:]]
        store_each(e, e.b.fadd(totals(e, sums[:ABREAST]), gathered(e, singles)), to, i)
        return values

    e.loop(times, [], body)


def store_each(e: Emit, vector: ir.Value, places: Sequence[ir.Value], index: ir.Value) -> None:
    """Each number of a vector becomes number `index` of a place."""
    for i, place in enumerate(places):
        e.store(e.b.extract_element(vector, ir.Constant(I32, i)), e.at(place, e.mul(index, 4)), 4)


def rows_of(e: Emit, x: ir.Value, x_row: ir.Value, last: ir.Value, count: int) -> list[ir.Value]:
    """Where `count` rows begin; those behind the last are the last."""
    return [e.at(x, e.mul(e.least(last, e.i64(i)), x_row)) for i in range(count)]


def gathered(e: Emit, numbers: Sequence[ir.Value]) -> ir.Value:
    """Single numbers as a vector."""
    vector: ir.Value = ir.Constant(ir.VectorType(F32, len(numbers)), ir.Undefined)
    for i, number in enumerate(numbers):
        vector = e.b.insert_element(vector, number, ir.Constant(I32, i))
    return vector


def totals(e: Emit, vectors: Sequence[ir.Value]) -> ir.Value:
    """The sums of the lanes of some vectors (a power of two, at most their lanes), as one vector."""
    lanes, vectors = vectors[0].type.count, list(vectors)
    count = len(vectors)
    even, odd = range(0, 2 * lanes, 2), range(1, 2 * lanes, 2)
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [e.b.fadd(e.shuffle(x, y, even), e.shuffle(x, y, odd)) for x, y in pairs]
    (vector,) = vectors
    while vector.type.count > count:
        half = vector.type.count
        vector = e.b.fadd(e.shuffle(vector, vector, range(0, half, 2)), e.shuffle(vector, vector, range(1, half, 2)))
    return vector


def _turned(e: Emit, rows: list[ir.Value]) -> list[ir.Value]:
    """A square of vectors with rows and columns exchanged."""
    width = len(rows)
    half = width // 2
    while half:
        low = [i for i in range(width) if not i & half]
        new = list(rows)
        for i in low:
            first = [j if not j & half else width + (j ^ half) for j in range(width)]
            second = [j | half if not j & half else width + j for j in range(width)]
            new[i] = e.shuffle(rows[i], rows[i | half], first)
            new[i | half] = e.shuffle(rows[i], rows[i | half], second)
        rows, half = new, half // 2
    return rows


def _turn(e: Emit, args: Sequence[ir.Value]) -> None:
    """y[i, j] = x[j, i] for LANES x LANES numbers of 32 bits."""
    x, x_row, y, y_row = args
    rows = _turned(e, [e.load(VF, e.at(x, e.mul(x_row, j)), 4) for j in range(LANES)])
    for i, row in enumerate(rows):
        e.store(row, e.at(y, e.mul(y_row, i)), 4)


def _tile(e: Emit, pairs: bool, rows: int, vectors: int, args: Sequence[ir.Value]) -> None:
    """A register tile `c[rows, W] (+)= a[rows, k] b[k, W]`, W = vectors x LANES.

    `a` is read a number (or a pair of bf16) at a time and spread over the lanes. Its row i lies at `a + min(i, last) a_row`,
    so that a tile that hangs over computes its last row again. Rows of `b` and `c` are tokens side by side. Meanwhile what
    will be read next comes from memory: `ahead`, so many bytes for each step.
    """
    a, a_row, a_step, last, b, b_step, count, c, c_row, add, ahead, ahead_step = args
    scalar, vector = (I32, VI) if pairs else (F32, VF)
    starts = [e.at(a, e.mul(e.least(last, e.i64(m)), a_row)) for m in range(rows)]
    places = [e.at(c, e.mul(c_row, m), v * LANES * 4) for m in range(rows) for v in range(vectors)]
    adds = e.b.icmp_signed("!=", add, e.i64(0))
    old = [e.b.select(adds, e.load(VF, place, 4), e.zeros(VF)) for place in places]

    def step(values: list[Any]) -> list[ir.Value]:
        row, offset, ahead, *sums = values
        columns = [e.load(vector, e.at(row, v * LANES * 4), 4) for v in range(vectors)]
        new = [e.hidden(e.at(row, b_step)), e.hidden(e.at(offset, a_step)), ahead]
        for m in range(rows):
            x = e.splat(e.load(scalar, e.at(starts[m], offset), 4), LANES)
            for v in range(vectors):
                total = sums[m * vectors + v]
                new.append(multiplied_pairs(e, total, x, columns[v]) if pairs else e.fma(x, columns[v], total))
        return new

    # Narrow tiles have twice as many rows: twice as much is asked for at a step.
    steps_of_line = STEPS_OF_LINE if vectors > 1 else STEPS_OF_LINE // 2

    def several(k: ir.Value, values: list[Any]) -> list[ir.Value]:
        for i in range(STEPS_AT_ONCE):
            if i % steps_of_line == 0:
                row, offset, ahead, *sums = values
                e.prefetch(ahead)
                values = [row, offset, e.hidden(e.at(ahead, e.mul(ahead_step, steps_of_line))), *sums]
            values = step(values)
        return values

    turns = e.b.sdiv(count, e.i64(STEPS_AT_ONCE))
    values = e.loop(turns, [b, e.i64(0), ahead, *old], several)
    last_ones = e.loop(e.b.sub(count, e.mul(turns, STEPS_AT_ONCE)), values, lambda k, values: step(values))
    for place, value in zip(places, last_ones[3:], strict=True):
        e.store(value, place, 4)


def emitting(result: Any, arguments: int, emit: Callable[..., Any]) -> Any:
    """What an intrinsic returns: its type, of so many integers, and code that `emit` writes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = emit(Emit(builder), args)
        return context.get_dummy_value() if value is None else value

    return result(*[types.intp] * arguments), codegen


@intrinsic
def tile_wide(typingctx, a, a_row, a_step, last, b, b_step, count, c, c_row, add, ahead, ahead_step):
    return emitting(types.void, 12, lambda e, args: _tile(e, False, *PATH.tile, args))


@intrinsic
def tile_narrow(typingctx, a, a_row, a_step, last, b, b_step, count, c, c_row, add, ahead, ahead_step):
    return emitting(types.void, 12, lambda e, args: _tile(e, False, 2 * PATH.tile[0], 1, args))


@intrinsic
def tile_wide_pairs(typingctx, a, a_row, a_step, last, b, b_step, count, c, c_row, add, ahead, ahead_step):
    return emitting(types.void, 12, lambda e, args: _tile(e, True, *PATH.tile, args))


@intrinsic
def tile_narrow_pairs(typingctx, a, a_row, a_step, last, b, b_step, count, c, c_row, add, ahead, ahead_step):
    return emitting(types.void, 12, lambda e, args: _tile(e, True, 2 * PATH.tile[0], 1, args))


@intrinsic
def turn(typingctx, x, x_row, y, y_row):
    return emitting(types.void, 4, _turn)


@intrinsic
def dot_f32(typingctx, w, x, count):
    return emitting(types.float32, 3, lambda e, args: _dot(e, "f32", args))


@intrinsic
def dot_pairs(typingctx, w, x, count):
    return emitting(types.float32, 3, lambda e, args: _dot(e, "pairs", args))


@intrinsic
def abreast_f32(typingctx, w, w_apart, last, w_row, times, x, count, out, out_apart):
    return emitting(types.void, 9, lambda e, args: _dot_abreast(e, "f32", args))


@intrinsic
def abreast_f16(typingctx, w, w_apart, last, w_row, times, x, count, out, out_apart):
    return emitting(types.void, 9, lambda e, args: _dot_abreast(e, "f16", args))


@intrinsic
def abreast_bf16(typingctx, w, w_apart, last, w_row, times, x, count, out, out_apart):
    return emitting(types.void, 9, lambda e, args: _dot_abreast(e, "bf16", args))


@intrinsic
def abreast_pairs(typingctx, w, w_apart, last, w_row, times, x, count, out, out_apart):
    return emitting(types.void, 9, lambda e, args: _dot_abreast(e, "pairs", args))


@intrinsic
def dots_f32(typingctx, w, w_row, w_last, x, x_row, x_last, count, out, out_row):
    return emitting(types.void, 9, lambda e, args: _dot_several(e, "f32", TOGETHER, SEVERAL, args))


@intrinsic
def more_dots_f32(typingctx, w, w_row, w_last, x, x_row, x_last, count, out, out_row):
    return emitting(types.void, 9, lambda e, args: _dot_several(e, "f32", 1, MORE, args))


@intrinsic
def dots_bf16(typingctx, w, w_row, w_last, x, x_row, x_last, count, out, out_row):
    return emitting(types.void, 9, lambda e, args: _dot_several(e, "bf16", TOGETHER, SEVERAL, args))


@intrinsic
def more_dots_bf16(typingctx, w, w_row, w_last, x, x_row, x_last, count, out, out_row):
    return emitting(types.void, 9, lambda e, args: _dot_several(e, "bf16", 1, MORE, args))


@intrinsic
def dots_pairs(typingctx, w, w_row, w_last, x, x_row, x_last, count, out, out_row):
    return emitting(types.void, 9, lambda e, args: _dot_several(e, "pairs", TOGETHER, SEVERAL, args))


@intrinsic
def more_dots_pairs(typingctx, w, w_row, w_last, x, x_row, x_last, count, out, out_row):
    return emitting(types.void, 9, lambda e, args: _dot_several(e, "pairs", 1, MORE, args))


@intrinsic
def bits_of(typingctx, x):
    """The bits of a float32."""
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], I32)


@intrinsic
def from_bits(typingctx, bits):
    """The float32 of some bits."""
    return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(args[0], F32)


@intrinsic
def widen_f16(typingctx, bits):
    """The float32 of the bits of a half."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        number = from_halves(e, builder.bitcast(args[0], ir.VectorType(I16, 1)))
        return builder.extract_element(number, ir.Constant(I32, 0))

    return types.float32(types.uint16), codegen


@intrinsic
def narrow(typingctx, x, out, count):
    return emitting(types.void, 3, _narrow)


@intrinsic
def dot_f8(typingctx, w, x, count, factors, block, origin):
    return emitting(types.float32, 6, lambda e, args: _dot_f8(e, "f32", args))


@intrinsic
def dot_f8_bf16(typingctx, w, x, count, factors, block, origin):
    return emitting(types.float32, 6, lambda e, args: _dot_f8(e, "bf16", args))


def filling(kind: str, pairs: bool) -> Any:
    """The signature and code of what widens a stretch of numbers that share a factor."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _fill(Emit(builder), kind, pairs, args)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, types.float32), codegen


@intrinsic
def fill_f8(typingctx, w, at, out, count, factor):
    return filling("f8", False)


@intrinsic
def fill_q8(typingctx, w, at, out, count, factor):
    return filling("q8", False)


@intrinsic
def fill_q4(typingctx, w, at, out, count, factor):
    return filling("q4", False)


@intrinsic
def fill_f8_pairs(typingctx, w, at, out, count, factor):
    return filling("f8", True)


@intrinsic
def fill_q8_pairs(typingctx, w, at, out, count, factor):
    return filling("q8", True)


@intrinsic
def fill_q4_pairs(typingctx, w, at, out, count, factor):
    return filling("q4", True)
