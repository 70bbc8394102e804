"""How numbers lie in memory, and their conversion: vectors of float32 from every storage format, and back to bf16."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from npllm.backends.numba_cpu.emit import F16, F32, I8, I16, I32, LANES, Emit, emitting, same
from npllm.backends.numba_cpu.jit import PATH


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite's IR builder has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


VB = ir.VectorType(_BFloat(), 2 * LANES)

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


def _filling(kind: str, pairs: bool) -> Any:
    """What widens a stretch of numbers that share a factor."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _fill(Emit(builder), kind, pairs, args)
        return context.get_dummy_value()

    @intrinsic
    def fill(typingctx, w, at, out, count, factor):
        return types.void(*[types.intp] * 4, types.float32), codegen

    return fill


fill_f8, fill_q8, fill_q4 = (_filling(kind, False) for kind in ("f8", "q8", "q4"))
fill_f8_pairs, fill_q8_pairs, fill_q4_pairs = (_filling(kind, True) for kind in ("f8", "q8", "q4"))
