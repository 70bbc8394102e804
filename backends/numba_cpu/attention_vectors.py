"""The inner loops of attention as emitted vector code.

With few queries, numbers of a key lie side by side in a vector: `score` and `weigh` take up to four queries at a time, so
that each number that is read serves all of them. With many, queries do, one per lane, and keys follow each other down the
rows of a tile [keys, lanes]: `hide`, `soften` and `scale` treat one vector of lanes, all rows. Addresses are integers,
strides bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from npllm.backends.numba_cpu.activations import emit_exp, emit_weight
from npllm.backends.numba_cpu.conversions import NUMBERS, widened
from npllm.backends.numba_cpu.emit import CACHE_LINE, F32, I32, I64, LANES, VF, VI, Emit, emitting, rows_of
from npllm.backends.numba_cpu.team import called

# Rows of the state of a panel of lanes: the number that scores are taken relative to, the sum of their exponentials, what
# earlier sums were last multiplied by; what products are multiplied by to be scores; and the range of keys that the lane
# sees, as int32.
BASE, TOTAL, FACTOR, SHARPNESS, LOW, HIGH, STATE_ROWS = range(7)

# Scores that `score` sums up at a time: two queries with four keys, or four with two.
SCORES = 8

NEGATIVE_INFINITY = -math.inf


def _each(values: Any, lanes: int) -> ir.Constant:
    """A vector of one constant."""
    kind = ir.VectorType(F32 if isinstance(values, float) else I32, lanes)
    return ir.Constant(kind, [values] * lanes)


def _single(e: Emit, kind: str, address: ir.Value) -> ir.Value:
    """A number as the first of a vector of zeros."""
    number = e.b.extract_element(widened(e, kind, address, 1), ir.Constant(I32, 0))
    return e.b.insert_element(_each(0.0, LANES), number, ir.Constant(I32, 0))


def _totals(e: Emit, vectors: list[ir.Value]) -> list[ir.Value]:
    """The sums of the lanes of SCORES vectors, in order, in as few vectors as hold them."""
    while len(vectors) > 1 and vectors[0].type.count * len(vectors) > SCORES:
        vectors = [_folded(e, x, y) for x, y in zip(vectors[::2], vectors[1::2], strict=True)]
    while vectors[0].type.count * len(vectors) > SCORES:
        half = vectors[0].type.count
        vectors = [e.b.fadd(e.shuffle(x, x, range(0, half, 2)), e.shuffle(x, x, range(1, half, 2))) for x in vectors]
    return vectors


def _folded(e: Emit, x: ir.Value, y: ir.Value) -> ir.Value:
    """Sums of neighbours, those of x before those of y."""
    both = 2 * x.type.count
    return e.b.fadd(e.shuffle(x, y, range(0, both, 2)), e.shuffle(x, y, range(1, both, 2)))


# -- few queries ------------------------------------------------------------------------------------------------------


def _apart(e: Emit, first: ir.Value, row: ir.Value, j: ir.Value, apart: ir.Value, count: int) -> list[ir.Value]:
    """Where the rows j, j + apart, ... begin: each on another page, since memory gives more to several who read."""
    return [e.at(first, e.b.mul(row, e.b.add(j, e.mul(apart, n)))) for n in range(count)]


def _ask_for_next(e: Emit, kind: str, places: Sequence[ir.Value], row: ir.Value, width: ir.Value) -> None:
    """Ask for the rows that follow those at `places`, where widening these takes longer than memory does."""
    if kind != "bf16":
        return

    def line(i: ir.Value, _: list[Any]) -> list[ir.Value]:
        for place in places:
            e.prefetch(e.at(place, row, e.mul(i, CACHE_LINE)))
        return []

    e.loop(e.b.sdiv(e.at(e.mul(width, NUMBERS[kind][1]), CACHE_LINE - 1), e.i64(CACHE_LINE)), [], line)


def _score(e: Emit, kind: str, together: int, args: Sequence[ir.Value]) -> None:
    """out[h, j] = q[h] k[j] for `together` queries, the last+1 first of which count, and `count` keys."""
    k, k_row, count, q, q_row, last, out, out_row, width = args
    b, size, keys_at_once = e.b, NUMBERS[kind][1], SCORES // together
    whole = b.sdiv(width, e.i64(LANES))
    done = e.mul(whole, LANES)
    queries, outs = rows_of(e, q, q_row, last, together), rows_of(e, out, out_row, last, together)
    apart = b.sdiv(e.at(count, keys_at_once - 1), e.i64(keys_at_once))

    def added(numbers: list[ir.Value], with_q: list[ir.Value], totals: list[Any]) -> list[ir.Value]:
        pairs = [(number, query) for query in with_q for number in numbers]
        return [e.fma(number, query, total) for (number, query), total in zip(pairs, totals, strict=True)]

    def block(j: ir.Value, _: list[Any]) -> list[ir.Value]:
        # Behind the last key it is computed again, with the same result.
        places = [e.least(b.add(j, e.mul(apart, n)), b.sub(count, e.i64(1))) for n in range(keys_at_once)]
        keys = [e.at(k, b.mul(k_row, place)) for place in places]
        _ask_for_next(e, kind, keys, k_row, width)

        def step(n: ir.Value, totals: list[Any]) -> list[ir.Value]:
            numbers = [widened(e, kind, e.at(key, e.mul(n, size * LANES))) for key in keys]
            return added(numbers, [widened(e, "f32", e.at(query, e.mul(n, 4 * LANES))) for query in queries], totals)

        def step_single(n: ir.Value, totals: list[Any]) -> list[ir.Value]:
            at = b.add(done, n)
            numbers = [_single(e, kind, e.at(key, e.mul(at, size))) for key in keys]
            return added(numbers, [_single(e, "f32", e.at(query, e.mul(at, 4))) for query in queries], totals)

        sums = e.loop(whole, [_each(0.0, LANES)] * SCORES, step)
        totals = _totals(e, e.loop(b.sub(width, done), sums, step_single))
        for i in range(SCORES):
            wide, lane = divmod(i, totals[0].type.count)
            score = b.extract_element(totals[wide], ir.Constant(I32, lane))
            e.store(score, e.at(outs[i // keys_at_once], e.mul(places[i % keys_at_once], 4)), 4)
        return []

    e.loop(apart, [], block)


def _weigh(e: Emit, kind: str, together: int, args: Sequence[ir.Value]) -> None:
    """out[h] += sum over j of p[h, j] v[j] for `together` queries, as in `_score`, and `count` values [width]."""
    v, v_row, count, p, p_row, last, out, out_row, width = args
    b, size, values_at_once = e.b, NUMBERS[kind][1], SCORES // together
    weights, outs = rows_of(e, p, p_row, last, together), rows_of(e, out, out_row, last, together)
    whole = b.sdiv(width, e.i64(LANES))

    def weighed(first: ir.Value, apart: ir.Value, rows: int) -> None:
        """Add the values of rows `first`, `first + apart`, ... to the sums."""
        places = _apart(e, v, v_row, first, apart, rows)
        _ask_for_next(e, kind, places, v_row, width)
        factors = [[e.load(F32, each, 4) for each in _apart(e, w, e.i64(4), first, apart, rows)] for w in weights]

        def columns(at: ir.Value, lanes: int) -> list[ir.Value]:
            numbers = [widened(e, kind, e.at(place, e.mul(at, size)), lanes) for place in places]
            sums = [e.load(ir.VectorType(F32, lanes), e.at(to, e.mul(at, 4)), 4) for to in outs]
            for i, number in enumerate(numbers):
                sums = [e.fma(number, e.splat(row[i], lanes), total) for row, total in zip(factors, sums, strict=True)]
            # All are read before any is written: behind the last query the last is computed again.
            for to, total in zip(outs, sums, strict=True):
                e.store(total, e.at(to, e.mul(at, 4)), 4)
            return []

        e.loop(whole, [], lambda n, _: columns(e.mul(n, LANES), LANES))
        done = e.mul(whole, LANES)
        e.loop(b.sub(width, done), [], lambda n, _: columns(b.add(done, n), 1))

    def several(j: ir.Value, _: list[Any]) -> list[ir.Value]:
        weighed(j, apart, values_at_once)
        return []

    def one(j: ir.Value, _: list[Any]) -> list[ir.Value]:
        weighed(b.add(first, j), e.i64(0), 1)
        return []

    apart = b.sdiv(count, e.i64(values_at_once))
    first = e.mul(apart, values_at_once)
    e.loop(apart, [], several)
    e.loop(b.sub(count, first), [], one)


def _top(e: Emit, args: Sequence[ir.Value]) -> ir.Value:
    """The largest of `count` numbers, a multiple of LANES; -inf of none. NaN does not count."""
    x, count = args

    def step(i: ir.Value, values: list[Any]) -> list[ir.Value]:
        return [_larger(e, e.load(VF, e.at(x, e.mul(i, 4 * LANES)), 4), values[0])]

    (tops,) = e.loop(e.b.sdiv(count, e.i64(LANES)), [_each(NEGATIVE_INFINITY, LANES)], step)
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        tops = _larger(e, e.shuffle(tops, tops, range(lanes)), e.shuffle(tops, tops, range(lanes, 2 * lanes)))
    return e.b.extract_element(tops, ir.Constant(I32, 0))


def _larger(e: Emit, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger; y where x is NaN."""
    return e.b.select(e.b.fcmp_ordered(">", x, y), x, y)


# -- many queries -----------------------------------------------------------------------------------------------------


def _hide(e: Emit, args: Sequence[ir.Value]) -> None:
    """Products with keys that a lane does not see become -inf; row j is that of key `first + j`."""
    s, row, count, first, state = args
    b = e.b
    low, high = (e.load(VI, e.at(state, b.mul(row, e.i64(n))), 4) for n in (LOW, HIGH))

    def step(j: ir.Value, _: list[Any]) -> list[ir.Value]:
        place = e.at(s, b.mul(j, row))
        key = e.splat(b.trunc(b.add(first, j), I32), LANES)
        seen = b.and_(b.icmp_signed(">=", key, low), b.icmp_signed("<", key, high))
        e.store(b.select(seen, e.load(VF, place, 4), _each(NEGATIVE_INFINITY, LANES)), place, 4)
        return []

    e.loop(count, [], step)


def _soften(e: Emit, pairs: bool, args: Sequence[ir.Value]) -> ir.Value:
    """Products become exponentials of scores, relative to the lane's base, which rises where it must; its sum grows by them.

    With `pairs` two rows become one of pairs of bf16, and `count` is even. -> whether earlier sums need rescaling by FACTOR.
    """
    s, row, count, state = args
    b = e.b
    place = {n: e.at(state, b.mul(row, e.i64(n))) for n in (BASE, TOTAL, FACTOR)}
    sharpness = e.load(VF, e.at(state, e.mul(row, SHARPNESS)), 4)
    lowest, zero, one = _each(NEGATIVE_INFINITY, LANES), _each(0.0, LANES), _each(1.0, LANES)

    def load(j: ir.Value) -> ir.Value:
        return e.load(VF, e.at(s, b.mul(j, row)), 4)

    (top,) = e.loop(count, [lowest], lambda j, v: [_larger(e, b.fmul(load(j), sharpness), v[0])])
    base = e.load(VF, place[BASE], 4)
    rises = b.fcmp_ordered(">", top, base)
    new = b.select(rises, top, base)
    factor = b.select(rises, emit_exp(e, b.fsub(base, new)), one)
    away = b.select(b.fcmp_ordered("==", new, lowest), zero, new)

    less = b.fneg(away)

    def exponential(j: ir.Value) -> ir.Value:
        return emit_weight(e, e.fma(load(j), sharpness, less))

    def step(j: ir.Value, totals: list[Any]) -> list[ir.Value]:
        p = exponential(j)
        e.store(p, e.at(s, b.mul(j, row)), 4)
        return [b.fadd(totals[0], p)]

    def step_pairs(i: ir.Value, totals: list[Any]) -> list[ir.Value]:
        j = e.mul(i, 2)
        even, odd = exponential(j), exponential(e.at(j, 1))
        e.store(_paired(e, even, odd), e.at(s, b.mul(i, row)), 4)
        return [b.fadd(totals[0], b.fadd(even, odd))]

    total = b.fmul(e.load(VF, place[TOTAL], 4), factor)
    (total,) = e.loop(b.sdiv(count, e.i64(2)), [total], step_pairs) if pairs else e.loop(count, [total], step)
    for n, value in ((BASE, new), (TOTAL, total), (FACTOR, factor)):
        e.store(value, place[n], 4)
    any_rises = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(ir.IntType(1), [rises.type]), f"llvm.vector.reduce.or.v{LANES}i1"
    )
    return b.zext(b.call(any_rises, [rises]), I64)


def _paired(e: Emit, even: ir.Value, odd: ir.Value) -> ir.Value:
    """Probabilities of two keys as pairs of bf16, rounded to nearest; of NaN, whose sum is NaN anyway, anything."""
    b, half = e.b, _each(0x8000, LANES)
    low, high = (b.add(b.bitcast(x, VI), half) for x in (even, odd))
    return b.or_(b.lshr(low, _each(16, LANES)), b.and_(high, _each(-0x10000, LANES)))


def _scale(e: Emit, args: Sequence[ir.Value]) -> None:
    """`count` rows of a vector of lanes times the lanes' FACTOR."""
    x, row, count, state = args
    factor = e.load(VF, e.at(state, e.mul(row, FACTOR)), 4)

    def step(j: ir.Value, _: list[Any]) -> list[ir.Value]:
        place = e.at(x, e.b.mul(j, row))
        e.store(e.b.fmul(e.load(VF, place, 4), factor), place, 4)
        return []

    e.loop(count, [], step)


@intrinsic
def _score_two_f32(typingctx, k, k_row, count, q, q_row, last, out, out_row, width):
    return emitting(types.void, 9, lambda e, args: _score(e, "f32", 2, args))


@intrinsic
def _score_two_bf16(typingctx, k, k_row, count, q, q_row, last, out, out_row, width):
    return emitting(types.void, 9, lambda e, args: _score(e, "bf16", 2, args))


@intrinsic
def _score_four_f32(typingctx, k, k_row, count, q, q_row, last, out, out_row, width):
    return emitting(types.void, 9, lambda e, args: _score(e, "f32", 4, args))


@intrinsic
def _score_four_bf16(typingctx, k, k_row, count, q, q_row, last, out, out_row, width):
    return emitting(types.void, 9, lambda e, args: _score(e, "bf16", 4, args))


@intrinsic
def _weigh_two_f32(typingctx, v, v_row, count, p, p_row, last, out, out_row, width):
    return emitting(types.void, 9, lambda e, args: _weigh(e, "f32", 2, args))


@intrinsic
def _weigh_two_bf16(typingctx, v, v_row, count, p, p_row, last, out, out_row, width):
    return emitting(types.void, 9, lambda e, args: _weigh(e, "bf16", 2, args))


@intrinsic
def _weigh_four_f32(typingctx, v, v_row, count, p, p_row, last, out, out_row, width):
    return emitting(types.void, 9, lambda e, args: _weigh(e, "f32", 4, args))


@intrinsic
def _weigh_four_bf16(typingctx, v, v_row, count, p, p_row, last, out, out_row, width):
    return emitting(types.void, 9, lambda e, args: _weigh(e, "bf16", 4, args))


@intrinsic
def top(typingctx, x, count):
    return emitting(types.float32, 2, _top)


@intrinsic
def hide(typingctx, s, row, count, first, state):
    return emitting(types.void, 5, _hide)


@intrinsic
def soften(typingctx, s, row, count, state):
    return emitting(types.intp, 4, lambda e, args: _soften(e, False, args))


@intrinsic
def soften_pairs(typingctx, s, row, count, state):
    return emitting(types.intp, 4, lambda e, args: _soften(e, True, args))


@intrinsic
def scale(typingctx, x, row, count, state):
    return emitting(types.void, 4, _scale)


@called
def score(team, bits, k, k_row, count, q, q_row, queries, out, out_row, width):
    """out[h, j] = q[h] k[j] for some queries and `count` keys, float32 or bf16 bits; rows are so many bytes apart."""
    h = 0
    while h < queries:
        at, last = out + h * out_row, queries - h - 1
        if last > 1 and bits:
            _score_four_bf16(k, k_row, count, q + h * q_row, q_row, last, at, out_row, width)
        elif last > 1:
            _score_four_f32(k, k_row, count, q + h * q_row, q_row, last, at, out_row, width)
        elif bits:
            _score_two_bf16(k, k_row, count, q + h * q_row, q_row, last, at, out_row, width)
        else:
            _score_two_f32(k, k_row, count, q + h * q_row, q_row, last, at, out_row, width)
        h += 4 if last > 1 else 2


@called
def weigh(team, bits, v, v_row, count, p, p_row, queries, out, out_row, width):
    """out[h] += sum over j of p[h, j] v[j] for some queries and `count` values [width], float32 or bf16 bits."""
    h = 0
    while h < queries:
        at, last = out + h * out_row, queries - h - 1
        if last > 1 and bits:
            _weigh_four_bf16(v, v_row, count, p + h * p_row, p_row, last, at, out_row, width)
        elif last > 1:
            _weigh_four_f32(v, v_row, count, p + h * p_row, p_row, last, at, out_row, width)
        elif bits:
            _weigh_two_bf16(v, v_row, count, p + h * p_row, p_row, last, at, out_row, width)
        else:
            _weigh_two_f32(v, v_row, count, p + h * p_row, p_row, last, at, out_row, width)
        h += 4 if last > 1 else 2
