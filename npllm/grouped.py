"""q8 and q4: matrices in groups of 32 numbers of a row, each group with a factor of its own in float16.

q8   one code to a byte, -127..127; a number is its code times the factor of its group: 8.5 bits.
q4   two codes to a byte, element 2i in the low nibble of byte i and element 2i + 1 in the high one; a number is its nibble
     less 8, times the factor: 4.5 bits.

Factors have a sign: where the largest number of a group is positive, a negative factor gives it the code -8, of which there
is no +8 (in q8 likewise, for the sake of one rule). A factor of 11 bits times a code of 8 fits into a float32, so what the
codes stand for is exact there.

`quantise` is the definition, in NumPy: float32 arithmetic in a stated order, so that a kernel can give the same bits. A
group tries what takes its largest number to any of REACHES, then what least squares make of the best of those, and keeps the
factor with the least squared error. Codes are always those of the factor after it was rounded to float16. A group of zeros
has factor 0; no other has one below 2^-24, float16's least.

In a file, `X` is stored as I8 [F, D] (q8) or U8 [F, D/2] (q4), and its factors beside it as `X_factors`, F16 [F, D/32]
(npllm.quantise writes them, npllm.checkpoint reads them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from npllm.arrays import Array, DTypeLike
from npllm.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from npllm.handles import Handle, Weight
    from npllm.weights import Spec, Tensor

GROUP = 32

# Numbers of a row that lie in one element of the stored array.
PACKED = {"q8": 1, "q4": 2}

# The type of an element of the stored array.
CODES = {"q8": "int8", "q4": "uint8"}

# The least and the greatest code.
RANGE = {"q8": (-127, 127), "q4": (-8, 7)}

# Codes, without their minus, that the largest number of a group is taken to before rounding. Beyond the range it is cut, for
# the sake of the others. In q8 they are tried for where the others come to lie between two codes; 63.5 is for the smallest
# numbers, where float16 has few bits left and all factors but that one may round to the same, too small for the group.
REACHES = {
    "q8": (127.5, 127.0, 126.5, 126.0, 125.5, 125.0, 124.5, 124.0, 63.5),
    "q4": (6.5, 6.875, 7.25, 7.625, 8.0, 8.375, 8.75, 9.125, 9.5),
}

# The largest number that is stored: no factor that is tried may be beyond float16's 65504, and least squares may take the
# largest number of a q4 group to a code of 5.
LARGEST = {"q8": 63.5 * 65504.0, "q4": 4 * 65504.0}

# Bytes of a group's factor.
FACTOR = 2

# Bits of a code, as config.json says it (npllm.quantised).
BITS = {"q8": 8, "q4": 4}

# Parts of a model (npllm.weights.Tensor) whose matrices are multiplied with activations and take most of the memory. Norms
# and biases are vectors; a router decides by small differences; AltUp's matrices amplify rounding; a lookup table, and an
# embedding that is not the head too, are read row by row, which costs nothing.
PARTS = ("attention", "ffn", "experts", "head", "laurel", "per-layer")

# MLA's second projection of keys and values: absorption contracts over its rows, across the groups.
CONTRACTED_OVER_ROWS = ".kv_b_proj.weight"

# Numbers of a matrix that are quantised at a time, for the sake of memory.
PIECE = 1 << 20


def factors_name(name: str) -> str:
    """What a checkpoint calls the factors of tensor `name`."""
    return f"{name}_factors"


# -- which tensors ----------------------------------------------------------------------------------------------------


def marked(spec: Spec, handles: Mapping[str, Handle], format: str) -> dict[str, Handle]:
    """The handles of a model, those marked (`quantisable`) that quantising it to `format` means.

    Matrices of PARTS, with rows of whole groups and at least as many rows as a group has numbers (fewer are gates), and the
    embedding where it serves as the head. ArgumentError if the model is stored in another of these formats.
    """
    for stored in {handle.format for handle in handles.values()}:
        if stored in PACKED and stored != format:
            raise ArgumentError(f"quantize = {format!r}: the weights are in {stored} already; leave quantize None")
    heads = {tensor.alias for name, tensor in spec.items() if tensor.alias is not None and name not in handles}

    new = {
        name for name, handle in handles.items()
        if handle.format not in PACKED and worth_quantising(name, spec[name], is_head=name in heads)
    }  # fmt: skip
    return {name: handle.marked() if name in new else handle for name, handle in handles.items()}


def worth_quantising(name: str, tensor: Tensor, *, is_head: bool) -> bool:
    """Whether quantising a model means this tensor; `is_head`: it is an embedding that serves as the head too."""
    if len(tensor.shape) < 2 or name.endswith(CONTRACTED_OVER_ROWS):
        return False
    rows, width = tensor.shape[-2:] if tensor.stored == "oi" else tensor.shape[:-3:-1]
    return (tensor.part in PARTS or is_head) and width % GROUP == 0 and rows >= GROUP and width > 0


# -- to numbers -------------------------------------------------------------------------------------------------------


def ungrouped(codes: Array, factors: Array, format: str, axis: int, dtype: DTypeLike) -> Array:
    """Codes times the factors of their groups -> an array in `dtype`, laid out as `codes` is.

    codes    int8 (q8), or bytes of two nibbles (q4), grouped along `axis`; any other axes.
    factors  one for each group, with as many axes.
    """
    codes, factors = np.moveaxis(codes, axis, -1), np.moveaxis(factors, axis, -1)
    *lead, width = codes.shape
    out = np.empty((*lead, width * PACKED[format]), dtype)
    if format == "q4":
        out[..., 0::2], out[..., 1::2] = codes & 15, codes >> 4
        out -= 8
    else:
        out[...] = codes
    grouped = out.reshape(*lead, factors.shape[-1], GROUP)
    grouped *= factors[..., np.newaxis]
    return np.moveaxis(out, -1, axis)


# -- to codes ---------------------------------------------------------------------------------------------------------


def quantised(weight: Weight, format: str) -> Weight:
    """A matrix [F, D] in `format`, in memory, D a multiple of GROUP; CheckpointError if a number cannot be stored."""
    F, D = weight.shape
    made = room_for(weight, format)
    codes, factors = made.data, made.scale.weight.data if made.scale else made.data
    rows = max(1, PIECE // D)
    for begin in range(0, F, rows):
        part = slice(begin, begin + rows)
        x_FD = weight[part].array("float32")
        refuse(weight, format, float(np.max(np.abs(x_FD))))
        codes[part], factors[part] = quantise(x_FD, format)
    return made


def room_for(weight: Weight, format: str) -> Weight:
    """A handle on codes and factors for a matrix, not yet filled."""
    F, D = weight.shape
    return grouped(weight, format, np.empty((F, D // PACKED[format]), CODES[format]), np.empty((F, D // GROUP), np.float16))


def grouped(weight: Weight, format: str, codes: Array, factors: Array) -> Weight:
    """A handle like `weight` on its codes [F, D / PACKED] and factors [F, D / GROUP] in memory."""
    from npllm.handles import Scale

    scale = Scale(type(weight).of(factors_name(weight.name), factors), (1, GROUP), (0, 0))
    return replace(weight, format=format, data=codes, scale=scale, mapping=None, quantisable=False)


def refuse(weight: Weight, format: str, largest: float) -> None:
    """CheckpointError if the largest absolute value of a matrix (NaN if there is one) is beyond what `format` stores."""
    if not largest <= LARGEST[format]:
        what = f"holds {largest}" if not np.isfinite(largest) else f"holds {largest:.4g}, beyond {LARGEST[format]:.4g}"
        raise CheckpointError(f"{weight.source}: tensor {weight.name} {what}: it cannot be quantised to {format}")


def quantise(x_FD: Array, format: str) -> tuple[Array, Array]:
    """Finite float32 numbers [F, D] -> codes (int8 [F, D], or uint8 [F, D/2]) and factors, float16 [F, D/GROUP]."""
    x_NG = np.ascontiguousarray(x_FD, np.float32).reshape(-1, GROUP)
    factor_N = _factors(x_NG, format)
    q_FD = _codes(x_NG, factor_N, format).reshape(x_FD.shape)
    factors = factor_N.astype(np.float16).reshape(len(x_FD), -1)
    if format == "q8":
        return q_FD.astype(np.int8), factors
    nibbles = (q_FD + 8).astype(np.uint8)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4, factors


def _factors(x_NG: Array, format: str) -> Array:
    largest_N = x_NG[np.arange(len(x_NG)), np.argmax(np.abs(x_NG), axis=1)]
    best_N, least_N = np.zeros_like(largest_N), np.full_like(largest_N, np.inf)
    for reach in REACHES[format]:
        _keep_better(x_NG, _half(largest_N / np.float32(-reach)), best_N, least_N, format)
    q_NG = _codes(x_NG, best_N, format)
    squares_N = _sum(q_NG * q_NG)
    fitted_N = np.divide(_sum(x_NG * q_NG), squares_N, out=np.zeros_like(best_N), where=squares_N > 0)
    _keep_better(x_NG, _half(fitted_N), best_N, least_N, format)
    return best_N + np.float32(0)  # -0 becomes 0


def _keep_better(x_NG: Array, factor_N: Array, best_N: Array, least_N: Array, format: str) -> None:
    """Where `factor_N` has a smaller squared error than `least_N`, put both in the place of the best."""
    error_NG = x_NG - _codes(x_NG, factor_N, format) * factor_N[:, np.newaxis]
    error_N = _sum(error_NG * error_NG)
    better_N = error_N < least_N
    best_N[better_N], least_N[better_N] = factor_N[better_N], error_N[better_N]


def _codes(x_NG: Array, factor_N: Array, format: str) -> Array:
    """The codes of numbers under a factor, as float32."""
    low, high = RANGE[format]
    inverse_N = np.divide(np.float32(1), factor_N, out=np.zeros_like(factor_N), where=factor_N != 0)
    return np.rint(np.clip(x_NG * inverse_N[:, np.newaxis], np.float32(low), np.float32(high)))


def _half(x_N: Array) -> Array:
    """float32 numbers rounded to float16, to no zero unless they are zero."""
    least_N = np.copysign(np.float32(2.0**-24), x_N)
    rounded_N = x_N.astype(np.float16).astype(np.float32)
    return np.where((rounded_N == 0) & (x_N != 0), least_N, rounded_N)


def _sum(x_NG: Array) -> Array:
    """The sums of groups, by halves: 16 pairs that lie 16 apart, then 8, ...: any width of vectors gives the same."""
    while x_NG.shape[1] > 1:
        half = x_NG.shape[1] // 2
        x_NG = x_NG[:, :half] + x_NG[:, half:]
    return x_NG[:, 0]
