"""Addresses in kernels: arrays over them, shared words that threads meet by, and calls of other kernels."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from npllm.backends.numba_cpu.jit import inline

I64, I32, VOID = ir.IntType(64), ir.IntType(32), ir.VoidType()


@intrinsic
def _pointer(typingctx, address):
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.intp), codegen


@intrinsic
def word(typingctx, address, index):
    """The 64-bit number `index` words after `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_word(builder, *args), typ=I64)

    return types.intp(types.intp, types.intp), codegen


@intrinsic
def real(typingctx, address, index):
    """The double `index` words after `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        double = ir.DoubleType()
        return builder.load(builder.bitcast(_word(builder, *args), ir.PointerType(double)), typ=double)

    return types.float64(types.intp, types.intp), codegen


@intrinsic
def load_word(typingctx, address, index):
    """A word that another thread writes, and with it all that it wrote before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_word(builder, *args), "acquire", 8, typ=I64)

    return types.intp(types.intp, types.intp), codegen


@intrinsic
def store_word(typingctx, address, index, value):
    """Let other threads see `value`, and with it all that was written before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _word(builder, *args[:2]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@intrinsic
def add_word(typingctx, address, index, value):
    """Add to a shared word -> what it was before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _word(builder, *args[:2]), args[2], "seq_cst")

    return types.intp(types.intp, types.intp, types.intp), codegen


@intrinsic
def swap_word(typingctx, address, index, value):
    """Set a shared word -> what it was before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", _word(builder, *args[:2]), args[2], "seq_cst")

    return types.intp(types.intp, types.intp, types.intp), codegen


@intrinsic
def pause(typingctx):
    """Tell the core that this is a loop that waits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        triple = builder.module.triple
        if "86" in triple.partition("-")[0]:
            name = ir.FunctionType(VOID, [])
            builder.call(cgutils.get_or_insert_function(builder.module, name, "llvm.x86.sse2.pause"), [])
        elif triple.startswith(("aarch64", "arm64")):
            hint = ir.FunctionType(VOID, [ir.IntType(32)])
            function = cgutils.get_or_insert_function(builder.module, hint, "llvm.aarch64.hint")
            builder.call(function, [ir.Constant(ir.IntType(32), 1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_kernel(typingctx, address, args, team, thread, threads):
    """Call the kernel at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(VOID, [I64] * 4)
        builder.call(builder.inttoptr(values[0], ir.PointerType(kind)), values[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


def calling(function: Callable[..., None], place: int) -> Any:
    """What calls a function of integers by its address, which is word `place` after the first of them."""
    signature = inspect.signature(function)
    arguments = [types.intp] * len(signature.parameters)

    def codegen(context: Any, builder: Any, _: Any, values: Any) -> Any:
        address = builder.load(_word(builder, values[0], ir.Constant(I64, place)), typ=I64)
        kind = ir.FunctionType(VOID, [I64] * len(values))
        builder.call(builder.inttoptr(address, ir.PointerType(kind)), values)
        return context.get_dummy_value()

    @functools.wraps(function)
    def typed(*_: Any) -> Any:
        return types.void(*arguments), codegen

    # Numba asks for it, and then casts what it is given.
    context = inspect.Parameter("typingctx", inspect.Parameter.POSITIONAL_ONLY)
    typed.__signature__ = signature.replace(parameters=[context, *signature.parameters.values()])  # type: ignore[attr-defined]
    return intrinsic(typed)


@intrinsic
def call_c(typingctx, address, pointer, flag):
    """Call the C function at `address` with a pointer and an int; one that takes less ignores them."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(I32, [I64, I32])
        function = builder.inttoptr(values[0], ir.PointerType(kind))
        builder.call(function, [values[1], builder.trunc(values[2], I32)])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


def _word(builder: Any, address: Any, index: Any) -> Any:
    at = builder.add(address, builder.mul(index, ir.Constant(I64, 8)))
    return builder.inttoptr(at, ir.PointerType(I64))


@inline
def f32(address, *shape):
    """float32 numbers at an address, as an array of `shape`."""
    return carray(_pointer(address), shape, np.float32)


@inline
def u32(address, *shape):
    return carray(_pointer(address), shape, np.uint32)


@inline
def u16(address, *shape):
    return carray(_pointer(address), shape, np.uint16)


@inline
def u8(address, *shape):
    return carray(_pointer(address), shape, np.uint8)


@inline
def i8(address, *shape):
    return carray(_pointer(address), shape, np.int8)


@inline
def i32(address, *shape):
    return carray(_pointer(address), shape, np.int32)


@inline
def i64(address, *shape):
    return carray(_pointer(address), shape, np.int64)
