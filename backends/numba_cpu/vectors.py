"""Vector code that LLVM's vectoriser would not find, emitted as intrinsics; generic vector IR wherever possible.

Addresses are integers, strides count bytes. Vectors are as wide as the path's registers (npllm.backends.numba_cpu.features).
"""

from __future__ import annotations

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
VF, VI = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


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

    def int(self, value: int) -> ir.Constant:
        return ir.Constant(I64, value)

    def at(self, base: ir.Value, *terms: ir.Value | int) -> ir.Value:
        """`base` plus byte offsets."""
        for term in terms:
            if not (isinstance(term, int) and term == 0):
                base = self.b.add(base, self.int(term) if isinstance(term, int) else term)
        return base

    def mul(self, x: ir.Value, y: ir.Value | int) -> ir.Value:
        return self.b.mul(x, self.int(y) if isinstance(y, int) else y)

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

    def loop(self, count: ir.Value, start: Sequence[ir.Value], body: Callable[[ir.Value, list[Any]], list[ir.Value]]) -> list[Any]:
        """`values = body(i, values)` for i in 0..count, with the values in registers; -> the last ones."""
        b = self.b
        before, head = b.block, b.append_basic_block("loop")
        inner, after = b.append_basic_block("body"), b.append_basic_block("after")
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(self.int(0), before)
        values = [b.phi(value.type) for value in start]
        for phi, value in zip(values, start, strict=True):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_signed("<", index, count), inner, after)
        b.position_at_end(inner)
        new = body(index, values)
        index.add_incoming(b.add(index, self.int(1)), b.block)
        for phi, value in zip(values, new, strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(after)
        return values

    def shuffle(self, x: ir.Value, y: ir.Value, lanes: Sequence[int]) -> ir.Value:
        return self.b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))

    def least(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)


# How numbers lie in memory, for `widened`: float32, half, bf16.
NUMBERS = {"f32": (F32, 4), "f16": (F16, 2), "bf16": (I16, 2)}


def widened(e: Emit, kind: str, address: ir.Value, lanes: int = LANES) -> ir.Value:
    """So many numbers at an address as a vector of float32."""
    stored, size = NUMBERS[kind]
    value = e.load(ir.VectorType(stored, lanes), address, size)
    if kind == "f16":
        return e.b.fpext(value, ir.VectorType(F32, lanes))
    if kind == "bf16":
        wide = ir.VectorType(I32, lanes)
        shifted = e.b.shl(e.b.zext(value, wide), ir.Constant(wide, [16] * lanes))
        return e.b.bitcast(shifted, ir.VectorType(F32, lanes))
    return value


def multiplied_pairs(e: Emit, total: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """total + x * y of pairs of bf16 in 32-bit lanes."""
    name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}"
    return e.call(name, VF, total, e.b.bitcast(x, VB), e.b.bitcast(y, VB))


# Independent sums of a dot product: enough to hide the latency of a multiply-add.
SUMS = 4


def _dot(e: Emit, kind: str, args: Sequence[ir.Value]) -> ir.Value:
    """The sum of w[k] x[k] over `count` numbers, w stored as `kind`, x float32."""
    w, x, count = args
    size = NUMBERS[kind][1]

    def step(lanes: int, sums: int, offset: ir.Value, values: list[Any]) -> list[ir.Value]:
        new = []
        for i, total in enumerate(values):
            at = e.b.add(offset, e.int(i * lanes))
            numbers = widened(e, kind, e.at(w, e.mul(at, size)), lanes)
            new.append(e.fma(numbers, widened(e, "f32", e.at(x, e.mul(at, 4)), lanes), total))
        return new

    return _stepped(e, count, LANES, step)


def _dot_pairs(e: Emit, args: Sequence[ir.Value]) -> ir.Value:
    """The sum of w[k] x[k] over `count` numbers, both bf16."""
    w, x, count = args

    def step(lanes: int, sums: int, offset: ir.Value, values: list[Any]) -> list[ir.Value]:
        new = []
        for i, total in enumerate(values):
            at = e.mul(e.b.add(offset, e.int(i * lanes)), 2)
            if lanes == 1:
                one, other = (widened(e, "bf16", e.at(base, at), 1) for base in (w, x))
                new.append(e.fma(one, other, total))
            else:
                new.append(multiplied_pairs(e, total, e.load(VI, e.at(w, at), 2), e.load(VI, e.at(x, at), 2)))
        return new

    return _stepped(e, count, 2 * LANES, step)


Step = Callable[[int, int, ir.Value, list[Any]], list[ir.Value]]


def _stepped(e: Emit, count: ir.Value, lanes: int, step: Step) -> ir.Value:
    """Sums over `count` numbers: by SUMS vectors of `lanes`, then by one, then number by number."""
    b = e.b
    wide = SUMS * lanes
    sums = e.loop(b.sdiv(count, e.int(wide)), [e.zeros(VF)] * SUMS, lambda i, v: step(lanes, SUMS, e.mul(i, wide), v))
    done = e.mul(b.sdiv(count, e.int(wide)), wide)
    rest = b.sdiv(b.sub(count, done), e.int(lanes))
    (last,) = e.loop(rest, [sums[0]], lambda i, v: step(lanes, 1, b.add(done, e.mul(i, lanes)), v))
    done = b.add(done, e.mul(rest, lanes))
    one = ir.VectorType(F32, 1)
    (single,) = e.loop(b.sub(count, done), [e.zeros(one)], lambda i, v: step(1, 1, b.add(done, i), v))
    total = b.fadd(b.fadd(last, sums[1]), b.fadd(sums[2], sums[3]))
    return b.fadd(e.total(total), b.extract_element(single, ir.Constant(I32, 0)))


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
    so that a tile that hangs over computes its last row again. Rows of `b` and `c` are tokens side by side.
    """
    a, a_row, a_step, last, b, b_step, count, c, c_row, add = args
    scalar, vector = (I32, VI) if pairs else (F32, VF)
    starts = [e.at(a, e.mul(e.least(last, e.int(m)), a_row)) for m in range(rows)]
    places = [e.at(c, e.mul(c_row, m), v * LANES * 4) for m in range(rows) for v in range(vectors)]
    adds = e.b.icmp_signed("!=", add, e.int(0))
    old = [e.b.select(adds, e.load(VF, place, 4), e.zeros(VF)) for place in places]

    def body(k: ir.Value, values: list[Any]) -> list[ir.Value]:
        row, offset, new = e.at(b, e.mul(k, b_step)), e.mul(k, a_step), []
        columns = [e.load(vector, e.at(row, v * LANES * 4), 4) for v in range(vectors)]
        for m in range(rows):
            x = e.splat(e.load(scalar, e.at(starts[m], offset), 4), LANES)
            for v in range(vectors):
                total = values[m * vectors + v]
                new.append(multiplied_pairs(e, total, x, columns[v]) if pairs else e.fma(x, columns[v], total))
        return new

    for place, value in zip(places, e.loop(count, old, body), strict=True):
        e.store(value, place, 4)


def emitting(result: Any, arguments: int, emit: Callable[..., Any]) -> Any:
    """What an intrinsic returns: its type, of so many integers, and code that `emit` writes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = emit(Emit(builder), args)
        return context.get_dummy_value() if value is None else value

    return result(*[types.intp] * arguments), codegen


@intrinsic
def tile_wide(typingctx, a, a_row, a_step, last, b, b_step, count, c, c_row, add):  # type: ignore[no-untyped-def]
    return emitting(types.void, 10, lambda e, args: _tile(e, False, *PATH.tile, args))


@intrinsic
def tile_narrow(typingctx, a, a_row, a_step, last, b, b_step, count, c, c_row, add):  # type: ignore[no-untyped-def]
    return emitting(types.void, 10, lambda e, args: _tile(e, False, 2 * PATH.tile[0], 1, args))


@intrinsic
def tile_wide_pairs(typingctx, a, a_row, a_step, last, b, b_step, count, c, c_row, add):  # type: ignore[no-untyped-def]
    return emitting(types.void, 10, lambda e, args: _tile(e, True, *PATH.tile, args))


@intrinsic
def tile_narrow_pairs(typingctx, a, a_row, a_step, last, b, b_step, count, c, c_row, add):  # type: ignore[no-untyped-def]
    return emitting(types.void, 10, lambda e, args: _tile(e, True, 2 * PATH.tile[0], 1, args))


@intrinsic
def turn(typingctx, x, x_row, y, y_row):  # type: ignore[no-untyped-def]
    return emitting(types.void, 4, _turn)


@intrinsic
def dot_f32(typingctx, w, x, count):  # type: ignore[no-untyped-def]
    return emitting(types.float32, 3, lambda e, args: _dot(e, "f32", args))


@intrinsic
def dot_f16(typingctx, w, x, count):  # type: ignore[no-untyped-def]
    return emitting(types.float32, 3, lambda e, args: _dot(e, "f16", args))


@intrinsic
def dot_bf16(typingctx, w, x, count):  # type: ignore[no-untyped-def]
    return emitting(types.float32, 3, lambda e, args: _dot(e, "bf16", args))


@intrinsic
def dot_pairs(typingctx, w, x, count):  # type: ignore[no-untyped-def]
    return emitting(types.float32, 3, _dot_pairs)


@intrinsic
def bits_of(typingctx, x):  # type: ignore[no-untyped-def]
    """The bits of a float32."""
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], I32)


@intrinsic
def from_bits(typingctx, bits):  # type: ignore[no-untyped-def]
    """The float32 of some bits."""
    return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(args[0], F32)


@intrinsic
def widen_f16(typingctx, bits):  # type: ignore[no-untyped-def]
    """The float32 of the bits of a half."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], F16), F32)

    return types.float32(types.uint16), codegen
