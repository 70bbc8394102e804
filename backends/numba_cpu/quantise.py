"""Weights turned into q8 and q4 when a model is loaded, rows side by side: the bits of npllm.grouped.quantise.

Numbers are float32 and every operation rounds once, in the order of the definition: the functions below are compiled without
any of the flags that let LLVM change that. Codes wait in the thread's scratch memory until the factor of a group is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from npllm.backends.numba_cpu.conversions import bits_of, from_bits
from npllm.backends.numba_cpu.emit import F32, I32, Emit
from npllm.backends.numba_cpu.jit import kernel
from npllm.backends.numba_cpu.matrix import COLUMNS, FORMATS, Q8, ROWS, Matrix
from npllm.backends.numba_cpu.memory import f32, i8, u8, u16, word
from npllm.backends.numba_cpu.rows import fill_rows
from npllm.backends.numba_cpu.tape import Entry, entry
from npllm.backends.numba_cpu.team import next_chunk, scratch
from npllm.grouped import GROUP, RANGE, REACHES, refuse, room_for
from npllm.handles import Weight

# Rows that a thread takes at a time.
ROWS_AT_ONCE = 8

# Added to a float32 below 2^22 and taken off again, it rounds to a whole number, ties to even.
TO_WHOLE = 1.5 * 2**23

# Where a thread's scratch memory holds a row; the codes of a group are at its beginning.
ROW = 4 * GROUP

GROUP_OF = ir.VectorType(F32, GROUP)

# What Numba takes for constants.
REACHES_8, REACHES_4 = REACHES["q8"], REACHES["q4"]
(LOW_8, HIGH_8), (LOW_4, HIGH_4) = (tuple(map(np.float32, RANGE[format])) for format in ("q8", "q4"))

Run = Callable[[Entry], None]


def quantised(weight: Weight, format: str, run: Run) -> Weight:
    """npllm.grouped.quantised of a matrix, by all threads: its codes and factors in memory; the file's pages are let go."""
    if weight.format not in FORMATS or weight.scale is not None:
        weight = weight.widened()
    made, matrix = room_for(weight, format), Matrix(weight)
    assert made.scale is not None
    factors, largest = made.scale.weight.data, np.zeros(len(weight), np.float32)
    places = made.data.ctypes.data, factors.ctypes.data, largest.ctypes.data
    run(entry(quantise, matrix.address, FORMATS[format], *places))
    refuse(weight, format, float(np.max(largest)))
    weight.release()
    return made


def exact(function: Any) -> Any:
    """Decorate a function whose every operation rounds as IEEE 754 says: left unsaid, it would have its caller's flags."""
    return numba.njit(error_model="numpy", fastmath=False)(function)


@kernel("5q")
def quantise(args, team, thread, threads):
    """The rows of a matrix in groups. Arguments: a matrix, the format; codes, factors, the largest number of each row."""
    matrix, kind, space = word(args, 0), word(args, 1), scratch(team, thread)
    rows, width = word(matrix, ROWS), word(matrix, COLUMNS)
    groups, row_bytes = width // GROUP, width if kind == Q8 else width // 2
    largest = f32(word(args, 4), rows)
    while True:
        begin = next_chunk(team) * ROWS_AT_ONCE
        if begin >= rows:
            break
        for n in range(begin, min(rows, begin + ROWS_AT_ONCE)):
            fill_rows(team, matrix, n, n + 1, 0, width, False, space + ROW, 0)
            largest[n] = _largest(space + ROW, width)
            codes, factors = word(args, 2) + n * row_bytes, u16(word(args, 3) + n * groups * 2, groups)
            # Of what cannot be stored, nothing is: the caller refuses it.
            if largest[n] < np.inf:
                for group in range(groups):
                    x = space + ROW + group * GROUP * 4
                    if kind == Q8:
                        factors[group] = _q8(x, space, codes + group * GROUP)
                    else:
                        factors[group] = _q4(x, space, codes + group * GROUP // 2)


@exact
def _largest(x_at, count):
    """The largest absolute value; infinity also in the place of NaN."""
    x, largest, fine = f32(x_at, count), np.float32(0), True
    for k in range(count):
        size = abs(x[k])
        largest = size if size > largest else largest
        fine = fine and size < np.inf
    return largest if fine else np.float32(np.inf)


@exact
def _q8(x_at, space, codes_at):
    """A group of numbers to codes of a byte -> the bits of the factor."""
    best = _factor(x_at, REACHES_8, LOW_8, HIGH_8)
    _encode(x_at, _widened(best), LOW_8, HIGH_8, space)
    q, codes = f32(space, GROUP), i8(codes_at, GROUP)
    for k in range(GROUP):
        codes[k] = np.int8(q[k])
    return np.uint16(best)


@exact
def _q4(x_at, space, codes_at):
    """A group of numbers to nibbles -> the bits of the factor."""
    best = _factor(x_at, REACHES_4, LOW_4, HIGH_4)
    _encode(x_at, _widened(best), LOW_4, HIGH_4, space)
    q, codes = f32(space, GROUP), u8(codes_at, GROUP // 2)
    for k in range(GROUP // 2):
        codes[k] = np.uint8(np.int32(q[2 * k]) + 8 | (np.int32(q[2 * k + 1]) + 8) << 4)
    return np.uint16(best)


@exact
def _factor(x_at, reaches, low, high):
    """The bits of the factor of a group."""
    best, least = np.uint32(0), np.float32(np.inf)
    largest = _signed_largest(x_at)
    for reach in reaches:
        half = _half(largest / np.float32(-reach))
        error = _error(x_at, _widened(half), low, high)
        if error < least:
            best, least = half, error
    fitted = _fitted(x_at, _widened(best), low, high)
    if fitted == fitted and _error(x_at, _widened(_half(fitted)), low, high) < least:
        best = _half(fitted)
    return np.uint32(0) if best == np.uint32(0x8000) else best


@exact
def _signed_largest(x_at):
    """The first of the numbers of a group whose absolute value is the largest."""
    x, largest = f32(x_at, GROUP), np.float32(0)
    for k in range(GROUP):
        if abs(x[k]) > abs(largest):
            largest = x[k]
    return largest


@intrinsic
def _encode(typingctx, x, factor, low, high, out):
    """The codes of a group at `x` under a factor, float32 numbers between `low` and `high`, to `out`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> None:
        e = Emit(builder)
        e.store(_coded(e, e.load(GROUP_OF, args[0], 4), *args[1:4]), args[4], 4)
        return context.get_dummy_value()

    return types.void(types.intp, *[types.float32] * 3, types.intp), codegen


@intrinsic
def _error(typingctx, x, factor, low, high):
    """The squared error of a group at `x` under a factor, with codes between `low` and `high`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, numbers = Emit(builder), Emit(builder).load(GROUP_OF, args[0], 4)
        codes = _coded(e, numbers, *args[1:])
        error = builder.fsub(numbers, builder.fmul(codes, e.splat(args[1], GROUP)))
        return _summed(e, builder.fmul(error, error))

    return types.float32(types.intp, *[types.float32] * 3), codegen


@intrinsic
def _fitted(typingctx, x, factor, low, high):
    """The factor of least squared error for the codes that a group at `x` has under `factor`; NaN if all are 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, numbers = Emit(builder), Emit(builder).load(GROUP_OF, args[0], 4)
        codes = _coded(e, numbers, *args[1:])
        return builder.fdiv(_summed(e, builder.fmul(numbers, codes)), _summed(e, builder.fmul(codes, codes)))

    return types.float32(types.intp, *[types.float32] * 3), codegen


def _coded(e: Emit, numbers: ir.Value, factor: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    """The codes of a group under a factor, as float32."""
    b, zero, whole = e.b, ir.Constant(F32, 0.0), e.splat(ir.Constant(F32, TO_WHOLE), GROUP)
    inverse = b.select(b.fcmp_unordered("!=", factor, zero), b.fdiv(ir.Constant(F32, 1.0), factor), zero)
    low, high, scaled = e.splat(low, GROUP), e.splat(high, GROUP), b.fmul(numbers, e.splat(inverse, GROUP))
    scaled = b.select(b.fcmp_ordered("<", scaled, low), low, scaled)
    scaled = b.select(b.fcmp_ordered(">", scaled, high), high, scaled)
    return b.fsub(b.fadd(scaled, whole), whole)


def _summed(e: Emit, terms: ir.Value) -> ir.Value:
    """The sum of a group, by halves."""
    half = GROUP // 2
    while half:
        low, high = (e.shuffle(terms, terms, range(begin, begin + half)) for begin in (0, half))
        terms, half = e.b.fadd(low, high), half // 2
    return e.b.extract_element(terms, ir.Constant(I32, 0))


@exact
def _half(x):
    """The bits of a number rounded to float16 (ties to even), of no zero unless it is zero; it must be below 65520."""
    bits = bits_of(x)
    sign, size = bits >> np.uint32(16) & np.uint32(0x8000), bits & np.uint32(0x7FFFFFFF)
    if size >= np.uint32(113 << 23):
        rounded = size + np.uint32(0xFFF) + (size >> np.uint32(13) & np.uint32(1))
        return sign | (rounded >> np.uint32(13)) - np.uint32(112 << 10)
    steps = np.uint32(np.rint(from_bits(size) * np.float32(2.0**24)))
    return sign | (np.uint32(1) if steps == 0 and size != 0 else steps)


@exact
def _widened(half):
    """The float32 of the bits of a float16 that is no infinity."""
    size = half & np.uint32(0x7FFF)
    number = from_bits((size << np.uint32(13)) + np.uint32(112 << 23))
    if size < np.uint32(0x400):
        number = np.float32(size) * np.float32(2.0**-24)
    return -number if half & np.uint32(0x8000) else number
