"""Quantised weights of a case: what the codes of each storage format stand for, and their handles.

fp8  e4m3fn codes, and one float32 factor for each block of (rows, columns), counted from the first element.
q8   int8 codes, and one float16 factor for each group of columns of a row.
q4   two codes to a byte, the first in the low nibble; a code stands for itself less 8, times its group's factor.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from npllm.arrays import Array
from npllm.fp8 import TABLES
from npllm.grouped import PACKED
from npllm.handles import Scale, Weight
from npllm.testing.operation import Arrays, Settings
from npllm.testing.ops import feed

Decode = Callable[[Array], Array]


def misread(weight: Weight, decode: Decode, factors: Array | None = None) -> Weight:
    """The float32 weight that a q8 or q4 one becomes when its codes, or its factors, are taken for something else."""
    assert weight.scale is not None
    groups = weight.scale.weight.data if factors is None else factors
    numbers = ungrouped(decode(weight.data), groups, weight.scale.block[1]).astype(np.float32)
    return Weight(weight.name, weight.shape, "f32", numbers, weight.source)


def whole(codes: Array) -> Array:
    """q8 codes as float64."""
    return codes.astype(np.float64)


def nibbles(codes: Array) -> Array:
    """The codes 0..15 in bytes [F, D/2] -> float64 [F, D]."""
    pairs = np.stack([codes & 15, codes >> 4], axis=-1)
    return pairs.reshape(len(codes), -1).astype(np.float64)


def centred(codes: Array) -> Array:
    """q4 codes as the numbers -8..7."""
    return nibbles(codes) - 8.0


DECODE: dict[str, Decode] = {"q8": whole, "q4": centred}


def packed(codes_FD: Array) -> Array:
    """q4 codes 0..15 [F, D] -> bytes [F, D/2]."""
    return (codes_FD[:, 0::2] | codes_FD[:, 1::2] << 4).astype(np.uint8)


def ungrouped(numbers_FD: Array, factors: Array, group: int) -> Array:
    """Numbers times the factors of their groups, float64."""
    return numbers_FD * np.repeat(factors.astype(np.float64), group, axis=1)[:, : numbers_FD.shape[1]]


def unblocked(codes_FD: Array, factors: Array, block: tuple[int, int]) -> Array:
    """e4m3 codes times the factors of their blocks, float64: exact."""
    F, D = codes_FD.shape
    wide = np.repeat(np.repeat(factors.astype(np.float64), block[0], axis=0)[:F], block[1], axis=1)[:, :D]
    return TABLES["f8_e4m3"].astype(np.float64)[codes_FD] * wide


def values(inputs: Arrays, settings: Settings) -> Array:
    """The weight [F, D] that a case's arrays stand for, float64."""
    storage = settings.get("storage")
    if storage is None:
        return inputs["weight"].astype(np.float64)
    if storage == "fp8":
        return unblocked(inputs["weight"], inputs["scales"], settings["block"])
    return ungrouped(DECODE[storage](inputs["weight"]), inputs["scales"], settings["group"])


def handle(inputs: Arrays, settings: Settings) -> Weight:
    """The weight of a case as its storage format's handle."""
    weight, storage = inputs["weight"], settings.get("storage")
    if storage is None:
        return feed.handle("weight", weight)
    if storage == "fp8":
        scale = Scale(feed.handle("scales", inputs["scales"]), tuple(settings["block"]), (0, 0))
        return Weight("weight", weight.shape, "f8_e4m3", weight, "a case", scale=scale)
    shape = (len(weight), weight.shape[1] * PACKED[storage])
    scale = Scale(feed.handle("scales", inputs["scales"]), (1, settings["group"]), (0, 0))
    return Weight("weight", shape, storage, weight, "a case", scale=scale)
