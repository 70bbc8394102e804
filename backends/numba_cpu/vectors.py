"""Products as vector code that LLVM's vectoriser would not find: rows of weights with few tokens, tiles, and squares turned.

Generic vector IR wherever possible, intrinsics elsewhere; npllm.backends.numba_cpu.emit has the builder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from npllm.backends.numba_cpu.conversions import NUMBERS, VB, coded, widened
from npllm.backends.numba_cpu.emit import (
    ABREAST_AHEAD,
    AHEAD,
    F32,
    I32,
    LANES,
    ONE,
    VF,
    VI,
    Emit,
    emitting,
    gathered,
    rows_of,
    same,
    store_each,
    totals,
)
from npllm.backends.numba_cpu.jit import PATH

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
def dot_f8(typingctx, w, x, count, factors, block, origin):
    return emitting(types.float32, 6, lambda e, args: _dot_f8(e, "f32", args))


@intrinsic
def dot_f8_bf16(typingctx, w, x, count, factors, block, origin):
    return emitting(types.float32, 6, lambda e, args: _dot_f8(e, "bf16", args))
