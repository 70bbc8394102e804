"""Where a kernel rounds: floating-point formats, and the declaration of a kernel's rounding points.

A reference that is not told where a kernel may round has to guess a tolerance. `Rounding` tells it: the type of the inputs,
in what sums are kept, and which intermediates are rounded to fewer bits on the way. The error budget follows from that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.config import nearest
from npllm.errors import ArgumentError

# The exponent bits of a float64; and NumPy's own types, to which it rounds float64 once, by bits and exponent range.
EXPONENT = np.int64(0x7FF << 52)
NATIVE = {(11, -14, 15): np.float16, (24, -126, 127): np.float32}


class Format(NamedTuple):
    """A binary floating-point format: its name, significand bits (the hidden one included), and exponent range."""

    name: str
    bits: int
    least: int
    most: int

    @property
    def unit(self) -> float:
        """The unit roundoff: no rounding to nearest changes a normal number by a larger fraction."""
        return 2.0**-self.bits

    @property
    def largest(self) -> float:
        return math.ldexp(2.0 - 2.0 ** (1 - self.bits), self.most)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """NumPy's type of that format; ml_dtypes has the one for bfloat16."""
        if self.name == "bf16":
            import ml_dtypes

            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype({"f16": "float16", "f32": "float32", "f64": "float64"}[self.name])

    def spacing(self, x: Array) -> Array:
        """The distance of neighbouring numbers of the format at `|x|` (float64, any shape), subnormal numbers included.

        At what is not finite it is that of the largest float64.
        """
        # A number without its significand is the power of two below it; this is what takes time in a budget.
        power = (np.asarray(x, np.float64).view(np.int64) & EXPONENT).view(np.float64)
        return np.clip(power, math.ldexp(1.0, self.least), math.ldexp(1.0, 1023)) * 2.0 ** (1 - self.bits)

    def round(self, x: Array) -> Array:
        """`x` (float64) to the nearest number of the format, ties to even, as float64; beyond the largest: infinity."""
        if self.name == "f64":
            return x
        with np.errstate(over="ignore", invalid="ignore"):
            if native := NATIVE.get(self[1:]):
                return x.astype(native).astype(np.float64)
            step = self.spacing(x)
            near = np.where(np.isfinite(x), np.rint(x / step) * step, x)
        return np.where(np.abs(near) > self.largest, np.copysign(np.inf, near), near)


def in_format(x: Array, to: Format) -> Array:
    """`x` rounded to a format, in its own dtype."""
    return to.round(x.astype(np.float64)).astype(x.dtype)


FORMATS = {
    each.name: each
    for each in (
        Format("bf16", 8, -126, 127),
        Format("f16", 11, -14, 15),
        Format("f32", 24, -126, 127),
        Format("f64", 53, -1022, 1023),
    )
}

SPELLINGS = {
    "bfloat16": "bf16", "float16": "f16", "half": "f16", "fp16": "f16", "float32": "f32", "float": "f32", "fp32": "f32",
    "float64": "f64", "double": "f64", "fp64": "f64",
}  # fmt: skip


def format_of(name: str) -> Format:
    """The format `name`, in any usual spelling (bf16, bfloat16, fp16, float32, ...); ArgumentError for others."""
    known = SPELLINGS.get(name, name)
    if known not in FORMATS:
        raise ArgumentError(f"format {name!r} is unknown; known: {nearest(str(name), [*FORMATS, *SPELLINGS])}")
    return FORMATS[known]


@dataclass(frozen=True)
class Rounding:
    """The declared rounding points of a kernel, each a format's name (bf16, f16, f32, f64).

    inputs      type of the arrays that the kernel is given.
    factors     what it rounds inputs to, to nearest, before it multiplies them with one another: activations and weights,
                queries, keys and values; None: as `inputs`. Gains, biases, residuals and a router's weights are no factors.
    accumulate  type in which sums are kept and elementwise arithmetic is done; None: f32 (f64 for f64 inputs).
    output      type of what it returns; None: that of the inputs.
    scores      attention scores, after scale and soft cap; None: as `accumulate`. Where they are coarser than that, each
                step towards them may be rounded: the product, the scale, the cap, and the maximum taken off.
    probs       what multiplies the values in attention; None: as `inputs`, as tensor cores ask.
    hidden      what a product of one kernel takes from the step before it: normed rows, activated features of an FFN or an
                expert, keys and values made of latents, queries in the latent space; None: as `inputs`.
    features    gate and up before the activation, and the activation before it is multiplied, as where an FFN is several
                kernels; None: as `accumulate`.
    partial     a product before what is added to it (a bias, a residual), as where adding is a kernel of its own; and in a
                mixture an expert's output, that times its weight, and the sum after each expert; None: as `accumulate`.
    normed      x / rms(x) before it is multiplied by the gain; None: as `accumulate`.
    angles      RoPE's cosines and sines; None: as `accumulate`.
    weights     a quantised weight, code times scale, before the product; None: as `accumulate`.
    activations "int8" or "fp8": the input of operation `linear` is quantised on the fly, by token in groups of 32 (int8, the
                largest of a group becomes 127) or 128 (e4m3, it becomes 448); None: it is not.

    `Rounding("bf16")` is a kernel for bf16 arrays as they usually are.
    """

    inputs: str = "f32"
    accumulate: str | None = None
    output: str | None = None
    scores: str | None = None
    probs: str | None = None
    hidden: str | None = None
    normed: str | None = None
    angles: str | None = None
    features: str | None = None
    weights: str | None = None
    activations: str | None = None
    partial: str | None = None
    factors: str | None = None

    def __post_init__(self) -> None:
        inputs = format_of(self.inputs).name
        filled = {"accumulate": "f64" if inputs == "f64" else "f32", "output": inputs, "probs": inputs, "hidden": inputs}
        accumulate = format_of(self.accumulate or filled["accumulate"]).name
        filled |= {"inputs": inputs, "scores": accumulate, "normed": accumulate, "angles": accumulate}
        filled |= {"features": accumulate, "weights": accumulate, "partial": accumulate, "factors": inputs}
        if self.activations not in (None, "int8", "fp8"):
            raise ArgumentError(f"activations {self.activations!r} are unknown; known: int8, fp8, None")
        for each in fields(self):
            if each.name == "activations":
                continue
            given = getattr(self, each.name)
            object.__setattr__(self, each.name, format_of(given).name if given else filled[each.name])

    def format(self, point: str) -> Format:
        """The format at a rounding point."""
        return FORMATS[getattr(self, point)]

    def __str__(self) -> str:
        return ", ".join(f"{each.name} {at}" for each in fields(self) if (at := getattr(self, each.name)))
