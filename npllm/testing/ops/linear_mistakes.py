"""What linear kernels get wrong: what is added, which terms of a sum, in how many bits, and how codes are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.handles import Weight
from npllm.testing.mistakes import Mistake
from npllm.testing.ops.quantised import centred, misread, nibbles
from npllm.testing.rounding import FORMATS, Format
from npllm.weights import Linear

Product = Callable[[Array, Array], Array]

TF32 = Format("tf32", 11, -126, 127)


def shortened(x: Array, to: Format) -> Array:
    """`x` rounded to fewer bits, in its own type."""
    return to.round(x.astype(np.float64)).astype(x.dtype)


# -- what is added ----------------------------------------------------------------------------------------------------


class NoBias(Backend):
    """Bias dropped."""

    def linear(self, x_MD: Array, w: Linear, /, residual_MF: Array | None = None) -> Array:
        return super().linear(x_MD, w._replace(bias=None), residual_MF)


class BiasTwice(Backend):
    """Bias added twice."""

    def linear(self, x_MD: Array, w: Linear, /, residual_MF: Array | None = None) -> Array:
        y_MF = super().linear(x_MD, w, residual_MF)
        return y_MF if w.bias is None else y_MF + self.dense(w.bias)


class NoResidual(Backend):
    """Residual dropped."""

    def linear(self, x_MD: Array, w: Linear, /, residual_MF: Array | None = None) -> Array:
        return super().linear(x_MD, w)


class NeighbourResidual(Backend):
    """Residual of the neighbouring token."""

    def linear(self, x_MD: Array, w: Linear, /, residual_MF: Array | None = None) -> Array:
        return super().linear(x_MD, w, None if residual_MF is None else np.roll(residual_MF, 1, axis=0))


class RoundedBeforeResidual(Backend):
    """Rounded to bf16 before the residual is added."""

    def linear(self, x_MD: Array, w: Linear, /, residual_MF: Array | None = None) -> Array:
        y_MF = super().linear(x_MD, w)
        return y_MF if residual_MF is None else shortened(y_MF, FORMATS["bf16"]) + residual_MF


# -- the product ------------------------------------------------------------------------------------------------------


def of_product(name: str, product: Product) -> Mistake:
    """A mistake in `x W^T` alone: `product` takes x [M, D] and W [F, D]."""

    class Wrong(Backend):
        def _product(self, x_MD: Array, weight: Any) -> Array:
            return product(x_MD, self.dense(weight))

    return Mistake(name, Wrong)


def transposed(x_MD: Array, w_FD: Array) -> Array:
    return x_MD @ (w_FD if w_FD.shape[0] == w_FD.shape[1] else w_FD.T)


def without_last(x_MD: Array, w_FD: Array) -> Array:
    return x_MD[:, :-1] @ w_FD[:, :-1].T


def whole_tiles(tile: int) -> Product:
    """Columns behind the last whole tile are left out; a matrix that is narrower than a tile is one."""

    def product(x_MD: Array, w_FD: Array) -> Array:
        end = x_MD.shape[1] // tile * tile or x_MD.shape[1]
        return x_MD[:, :end] @ w_FD[:, :end].T

    return product


def without_last_tile(x_MD: Array, w_FD: Array) -> Array:
    end = max(x_MD.shape[1] - 1, 0) // 64 * 64 or x_MD.shape[1]
    return x_MD[:, :end] @ w_FD[:, :end].T


def next_feature(x_MD: Array, w_FD: Array) -> Array:
    return x_MD @ np.roll(w_FD, 1, axis=0).T


def next_token(x_MD: Array, w_FD: Array) -> Array:
    return np.roll(x_MD, 1, axis=0) @ w_FD.T


def summed_in(of: str, step: int) -> Product:
    """Sums of `step` products, each added to an accumulator of a narrow type."""
    dtype = FORMATS[of]

    def product(x_MD: Array, w_FD: Array) -> Array:
        total = np.zeros((len(x_MD), len(w_FD)), x_MD.dtype)
        for begin in range(0, x_MD.shape[1], step):
            part = x_MD[:, begin : begin + step] @ w_FD[:, begin : begin + step].T
            with np.errstate(over="ignore"):
                total = (total + part).astype(dtype.dtype).astype(x_MD.dtype)
        return total

    return product


def in_tf32(x_MD: Array, w_FD: Array) -> Array:
    return shortened(x_MD, TF32) @ shortened(w_FD, TF32).T


def truncated(x_MD: Array, w_FD: Array) -> Array:
    y_MF = x_MD @ w_FD.T
    step = FORMATS["bf16"].spacing(y_MF)
    return (np.trunc(y_MF / step) * step).astype(y_MF.dtype)


# -- quantised weights ------------------------------------------------------------------------------------------------


def of_weight(name: str, change: Callable[[Weight], Weight]) -> Mistake:
    """A mistake in how a stored weight is read: `change` gives a weight that, read correctly, has the wrong values."""

    class Wrong(Backend):
        def prepare(self, bundle: Any) -> Any:
            return super().prepare(change(bundle) if isinstance(bundle, Weight) else bundle)

    return Mistake(name, Wrong)


def of_factors(name: str, change: Callable[[Array], Array]) -> Mistake:
    """A mistake in the factors of an FP8 weight, [rows of blocks, columns of blocks]."""

    def changed(weight: Weight) -> Weight:
        if weight.scale is None or weight.format != "f8_e4m3":
            return weight
        factors = weight.scale.weight
        data = change(factors.data).astype(np.float32)
        return replace(weight, scale=replace(weight.scale, weight=replace(factors, data=data)))

    return of_weight(name, changed)


def of_codes(name: str, change: Callable[[Array], Array]) -> Mistake:
    """A mistake in the codes of an FP8 weight."""
    return of_weight(name, lambda w: replace(w, data=change(w.data)) if w.format == "f8_e4m3" else w)


def of_groups(name: str, storage: str, decode: Callable[[Array], Array]) -> Mistake:
    """A mistake in reading the codes of a q8 or q4 weight."""
    return of_weight(name, lambda w: misread(w, decode) if w.format == storage else w)


def other_grid(factors: Array) -> Array:
    """The grid read as if it lay the other way round."""
    return factors.T.reshape(factors.shape)


def no_remainder(factors: Array) -> Array:
    """The last column of blocks goes without its factor, as if there were only whole blocks."""
    changed = factors.copy()
    changed[:, -1:] = 1.0
    return changed


def flushed(codes: Array) -> Array:
    """Subnormal numbers are taken for zero."""
    return np.where(codes & 0x78 == 0, codes & 0x80, codes).astype(np.uint8)


def unsaturated(codes: Array) -> Array:
    """The largest exponent is kept for infinity, as in IEEE formats: numbers above 240 become 240."""
    return np.where(codes & 0x7F > 0x77, codes & 0x80 | 0x77, codes).astype(np.uint8)


def in_bf16(weight: Weight) -> Weight:
    """A quantised weight whose values are rounded to bf16 before the product."""
    if weight.scale is None:
        return weight
    values = FORMATS["bf16"].round(weight.array(np.float64))
    return Weight(weight.name, weight.shape, "f32", values.astype(np.float32), weight.source)


def halves(codes: Array) -> Array:
    """The low nibbles of a group of 32 are its first half, the high ones its second (the order of GGUF's q4_0)."""
    F, bytes_per_row = codes.shape
    grouped = codes.reshape(F, bytes_per_row // 16, 1, 16)
    return np.concatenate([grouped & 15, grouped >> 4], axis=2).reshape(F, -1) - 8.0


def twos_complement(codes: Array) -> Array:
    numbers = nibbles(codes)
    return numbers - 16.0 * (numbers > 7.0)


def next_group(weight: Weight) -> Weight:
    """Every group of a q4 weight takes the factor of the next one of its row."""
    if weight.scale is None or weight.format != "q4":
        return weight
    return misread(weight, centred, np.roll(weight.scale.weight.data, -1, axis=1))


MISTAKES = (
    Mistake("bias dropped", NoBias),
    Mistake("bias added twice", BiasTwice),
    Mistake("residual dropped", NoResidual),
    Mistake("residual of the neighbouring token", NeighbourResidual),
    Mistake("rounded to bf16 before the residual is added", RoundedBeforeResidual),
    of_product("weight transposed where it is square", transposed),
    of_product("last column left out", without_last),
    of_product("columns behind the last whole tile of 32 left out", whole_tiles(32)),
    of_product("last tile of 64 columns left out", without_last_tile),
    of_product("weight row of the neighbouring feature", next_feature),
    of_product("input row of the neighbouring token", next_token),
    of_product("sums kept in half precision", summed_in("f16", 32)),
    of_product("sums kept in bf16 from block to block of 128", summed_in("bf16", 128)),
    of_product("products in tf32", in_tf32),
    of_product("sum truncated to bf16", truncated),
    of_weight("quantised weight rounded to bf16 before the product", in_bf16),
    of_factors("grid of block scales read transposed", other_grid),
    of_factors("scale of the neighbouring column of blocks", lambda factors: np.roll(factors, 1, axis=1)),
    of_factors("scale of the neighbouring row of blocks", lambda factors: np.roll(factors, 1, axis=0)),
    of_factors("last column of blocks not scaled", no_remainder),
    of_factors("divided by the block scale", lambda factors: 1.0 / factors),
    of_factors("block scale rounded to bf16", lambda factors: FORMATS["bf16"].round(factors.astype(np.float64))),
    of_factors("codes read as e4m3fnuz, half as large", lambda factors: 0.5 * factors),
    of_codes("subnormal FP8 codes taken for zero", flushed),
    of_codes("FP8 saturates at 240", unsaturated),
    of_groups("q8 codes read without their sign", "q8", lambda codes: codes.view(np.uint8).astype(float)),
    of_groups("nibbles exchanged", "q4", lambda codes: centred(codes >> 4 | codes << 4)),
    of_groups("nibbles in halves of a group", "q4", halves),
    of_groups("zero point 7", "q4", lambda codes: nibbles(codes) - 7.0),
    of_groups("no zero point", "q4", nibbles),
    of_groups("nibbles as two's complement", "q4", twos_complement),
    of_weight("factor of the next group", next_group),
)
