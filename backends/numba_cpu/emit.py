"""An IR builder for what the kernels' inner loops are made of: vectors, loops in registers, memory asked for ahead.

Addresses are integers, strides count bytes. Vectors are as wide as the path's registers (npllm.backends.numba_cpu.features).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from npllm.backends.numba_cpu.jit import PATH

F32, F16 = ir.FloatType(), ir.HalfType()
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
LANES = PATH.lanes
VF, VI, ONE = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(F32, 1)

# Bytes that what streams by is asked for ahead of its use: at the end of each row or page, the CPU's own guesses begin anew.
# Rows abreast it guesses well, but not soon enough for a loop of which few turns are under way at once.
AHEAD, ABREAST_AHEAD, CACHE_LINE = 1536, 320, 64


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


def same(kind: ir.VectorType, value: float) -> ir.Constant:
    """A vector of one value."""
    return ir.Constant(kind, [value] * kind.count)


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


def emitting(result: Any, arguments: int, emit: Callable[..., Any]) -> Any:
    """What an intrinsic returns: its type, of so many integers, and code that `emit` writes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = emit(Emit(builder), args)
        return context.get_dummy_value() if value is None else value

    return result(*[types.intp] * arguments), codegen
