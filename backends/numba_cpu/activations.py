"""Activations and their functions on float32, for kernels: no branches, so that LLVM makes vectors of loops over them.

Each operation names its one flag, "contract", or Numba would give it all of the kernels': rounding by addition must not be
simplified away, and divisions stay divisions. exp and tanh are within 1.5 roundings of the exact functions; NaN stays NaN.
The `emit_` twins do the same with float32 values or whole vectors of them, in other emitted code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from npllm import blocks
from npllm.backends.numba_cpu.emit import I32, Emit
from npllm.backends.numba_cpu.memory import f32
from npllm.backends.numba_cpu.team import called
from npllm.blocks.ffn import FITTED, NO_TAIL, TERMS, Activation, _log_tail

# Activations by the numbers that kernels know them by.
SILU, GELU_TANH, GELU, RELU = range(4)
_NUMBERS: dict[Activation, int] = {blocks.silu: SILU, blocks.gelu_tanh: GELU_TANH, blocks.gelu: GELU, blocks.relu: RELU}
ACTIVATIONS = {name: _NUMBERS[function] for name, function in blocks.ACTIVATIONS.items()}

# ln 2 in two parts, the first of so few bits that its products with whole numbers are exact.
LN2_HIGH = 0.693359375
LN2_LOW = math.log(2.0) - LN2_HIGH

# Adding it rounds a small number to a whole one, which is then the sum's lower bits.
ROUNDING = 1.5 * 2**23
ROUNDING_BITS = int(np.float32(ROUNDING).view(np.int32))

# exp is 0 below, and infinity above.
LEAST, MOST = -104.0, 89.0

# A softmax's weight below exp of this, next to one of at least 1, is none.
NO_WEIGHT = -86.0

CONTRACT = ("contract",)


def _fitted(function: Callable[[Any], Any], low: float, high: float, degree: int) -> list[float]:
    """The Chebyshev interpolant of a function on an interval as a polynomial, highest power first."""
    fit = np.polynomial.Chebyshev.interpolate(function, degree, domain=[low, high])
    return [float(each) for each in fit.convert(kind=np.polynomial.Polynomial).coef[::-1]]


EXP = _fitted(np.exp, -math.log(2.0) / 2, math.log(2.0) / 2, 6)

# tanh(x) = x + x^3 P(x^2) below this.
SMALL = 0.625
TANH = _fitted(lambda s: (np.tanh(np.sqrt(s)) / np.sqrt(s) - 1.0) / s, 0.0, SMALL * SMALL, 5)


class _Reals:
    """Arithmetic on float32 values or vectors of them, as emitted code."""

    def __init__(self, e: Emit, like: ir.Value) -> None:
        self.b, self.kind = e.b, like.type
        self.whole = ir.VectorType(I32, like.type.count) if isinstance(like.type, ir.VectorType) else I32

    def real(self, value: float) -> ir.Constant:
        exact = float(np.float32(value))
        return ir.Constant(self.kind, [exact] * self.kind.count if isinstance(self.kind, ir.VectorType) else exact)

    def int(self, value: int) -> ir.Constant:
        return ir.Constant(self.whole, [value] * self.whole.count if isinstance(self.whole, ir.VectorType) else value)

    def _value(self, x: ir.Value | float) -> ir.Value:
        return self.real(x) if isinstance(x, float) else x

    def add(self, x: ir.Value | float, y: ir.Value | float) -> ir.Value:
        return self.b.fadd(self._value(x), self._value(y), flags=CONTRACT)

    def sub(self, x: ir.Value | float, y: ir.Value | float) -> ir.Value:
        return self.b.fsub(self._value(x), self._value(y), flags=CONTRACT)

    def mul(self, x: ir.Value | float, y: ir.Value | float) -> ir.Value:
        return self.b.fmul(self._value(x), self._value(y), flags=CONTRACT)

    def div(self, x: ir.Value | float, y: ir.Value | float) -> ir.Value:
        return self.b.fdiv(self._value(x), self._value(y), flags=CONTRACT)

    def below(self, x: ir.Value | float, y: ir.Value | float) -> ir.Value:
        """Whether x < y; of NaN it is not."""
        return self.b.fcmp_ordered("<", self._value(x), self._value(y))

    def least(self, x: ir.Value, y: float) -> ir.Value:
        """The smaller; NaN stays."""
        return self.b.select(self.below(y, x), self.real(y), x)

    def most(self, x: ir.Value, y: float) -> ir.Value:
        """The larger; NaN stays."""
        return self.b.select(self.below(x, y), self.real(y), x)

    def size(self, x: ir.Value) -> ir.Value:
        """|x|"""
        return self.b.bitcast(self.b.and_(self.b.bitcast(x, self.whole), self.int(0x7FFFFFFF)), self.kind)

    def polynomial(self, factors: list[float], x: ir.Value) -> ir.Value:
        """By Horner's rule, highest power first."""
        total: ir.Value = self.real(factors[0])
        for factor in factors[1:]:
            total = self.add(self.mul(total, x), factor)
        return total


def emit_exp(e: Emit, x: ir.Value) -> ir.Value:
    """exp of float32, 0 of -inf: 2^n times a polynomial of the rest. Numbers below 2^-126 come out right, too."""
    r, b = _Reals(e, x), e.b
    bounded = r.least(r.most(x, LEAST), MOST)
    shifted = r.add(r.mul(bounded, 1.0 / math.log(2.0)), ROUNDING)
    n = b.sub(b.bitcast(shifted, r.whole), r.int(ROUNDING_BITS))
    count = b.sitofp(n, r.kind)
    rest = r.sub(r.sub(bounded, r.mul(count, LN2_HIGH)), r.mul(count, LN2_LOW))
    value = r.polynomial(EXP, rest)
    # The power of two goes to the exponent as far as it fits there, and what remains is a factor.
    fits = _clamped(r, n)
    scaled = b.bitcast(b.add(b.bitcast(value, r.whole), b.shl(fits, r.int(23))), r.kind)
    remains = b.bitcast(b.shl(b.add(b.sub(n, fits), r.int(127)), r.int(23)), r.kind)
    result = r.mul(scaled, remains)
    return b.select(b.fcmp_unordered("uno", x, x), x, b.select(r.below(x, LEAST), r.real(0.0), result))


def emit_weight(e: Emit, x: ir.Value) -> ir.Value:
    """exp of float32 numbers of which none is much above 0, as weights of a softmax: 0 below NO_WEIGHT."""
    r, b = _Reals(e, x), e.b
    bounded = r.most(x, NO_WEIGHT)
    shifted = r.add(r.mul(bounded, 1.0 / math.log(2.0)), ROUNDING)
    count = r.sub(shifted, ROUNDING)
    rest = r.sub(r.sub(bounded, r.mul(count, LN2_HIGH)), r.mul(count, LN2_LOW))
    # The lower bits of `shifted` are the exponent; those of ROUNDING, and of NaN, are pushed out.
    exponent = b.shl(b.bitcast(shifted, r.whole), r.int(23))
    value = b.bitcast(b.add(b.bitcast(r.polynomial(EXP, rest), r.whole), exponent), r.kind)
    return b.select(r.below(x, NO_WEIGHT), r.real(0.0), value)


def _clamped(r: _Reals, n: ir.Value) -> ir.Value:
    b, low, high = r.b, r.int(-100), r.int(126)
    n = b.select(b.icmp_signed("<", n, low), low, n)
    return b.select(b.icmp_signed(">", n, high), high, n)


def emit_sigmoid(e: Emit, x: ir.Value) -> ir.Value:
    """1 / (1 + exp(-x))"""
    r = _Reals(e, x)
    return r.div(1.0, r.add(emit_exp(e, e.b.fneg(x)), 1.0))


def emit_tanh(e: Emit, x: ir.Value) -> ir.Value:
    """tanh: by a polynomial near 0, and by exp elsewhere."""
    r, b = _Reals(e, x), e.b
    size, square = r.size(x), r.mul(x, x)
    near = r.add(r.mul(r.mul(r.polynomial(TANH, square), square), x), x)
    far = r.sub(1.0, r.div(2.0, r.add(emit_exp(e, r.add(size, size)), 1.0)))
    signed = b.select(r.below(x, 0.0), b.fneg(far), far)
    return b.select(r.below(size, SMALL), near, signed)


def emit_silu(e: Emit, x: ir.Value) -> ir.Value:
    """x sigmoid(x), npllm.blocks.silu; as there, by an exp that stays finite."""
    r = _Reals(e, x)
    return r.div(x, r.add(emit_exp(e, r.least(e.b.fneg(x), 88.0)), 1.0))


def emit_gelu_tanh(e: Emit, x: ir.Value) -> ir.Value:
    """npllm.blocks.gelu_tanh, as `x sigmoid(2 u)`, since `(1 + tanh u) / 2` is that and cancels nothing."""
    r = _Reals(e, x)
    inner = r.mul(x, r.add(r.mul(r.mul(x, x), 0.044715), 1.0))
    twice = r.mul(inner, -2.0 * math.sqrt(2.0 / math.pi))
    return r.div(x, r.add(emit_exp(e, r.least(twice, 88.0)), 1.0))


def emit_gelu(e: Emit, x: ir.Value) -> ir.Value:
    """npllm.blocks.gelu, by the same fit of the normal tail."""
    r = _Reals(e, x)
    size = r.least(r.size(x), NO_TAIL)
    place = r.most(r.sub(r.div(4.0 * FITTED, r.add(size, FITTED)), 3.0), -1.0)
    log_tail = r.sub(r.polynomial(_log_tail(TERMS[4]), place), r.mul(r.mul(size, size), 0.5))
    tail = r.mul(emit_exp(e, log_tail), size)
    return r.sub(r.most(x, 0.0), tail)


def emit_relu(e: Emit, x: ir.Value) -> ir.Value:
    return _Reals(e, x).most(x, 0.0)


def _of_one(emit: Callable[[Emit, ir.Value], ir.Value]) -> Any:
    """What an intrinsic float32 -> float32 returns."""
    return types.float32(types.float32), lambda context, builder, signature, args: emit(Emit(builder), args[0])


@intrinsic
def exp(typingctx, x):
    return _of_one(emit_exp)


@intrinsic
def sigmoid(typingctx, x):
    return _of_one(emit_sigmoid)


@intrinsic
def tanh(typingctx, x):
    return _of_one(emit_tanh)


@intrinsic
def silu(typingctx, x):
    return _of_one(emit_silu)


@intrinsic
def gelu_tanh(typingctx, x):
    return _of_one(emit_gelu_tanh)


@intrinsic
def gelu(typingctx, x):
    return _of_one(emit_gelu)


@intrinsic
def relu(typingctx, x):
    return _of_one(emit_relu)


@called
def activate(team, act, place, count):
    """An activation, by its number, on `count` numbers in place."""
    x = f32(place, count)
    if act == SILU:
        for k in range(count):
            x[k] = silu(x[k])
    elif act == GELU_TANH:
        for k in range(count):
            x[k] = gelu_tanh(x[k])
    elif act == GELU:
        for k in range(count):
            x[k] = gelu(x[k])
    else:
        for k in range(count):
            x[k] = relu(x[k])
