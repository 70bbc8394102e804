"""Rotary embedding: the angles of positions, and turning heads by them.

The truth of both is the definition, `cos(position * frequency)` in float64, with frequencies that are rounded nowhere.
Kernels get cosines and sines that are rounded to float32 once, or make their own from positions and float32 frequencies:
what rounding a frequency and a phase to float32 costs, `position * frequency * 2^-24` and more, is in the budget, for either
way. It is far below the rounding of a 16-bit output up to some thousand positions, and above it at a hundred thousand.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.blocks.rope import Rope, frequencies
from npllm.testing.estimate import Estimate, cosine_and_sine, exact, handed_on, plus, rounded, times
from npllm.testing.operation import Arrays, Operation, Settings
from npllm.testing.ops import feed
from npllm.testing.ops.rope_cases import ANGLES_CASES, ROPE_CASES
from npllm.testing.ops.rope_mistakes import PHASE_MISTAKES, ROPE_MISTAKES, SCALING_MISTAKES, pairs
from npllm.testing.rounding import FORMATS, Format, Rounding

# -- angles: budget ---------------------------------------------------------------------------------------------------


def frequency_budget(rope: Rope, at: Format) -> Estimate:
    """Frequencies [J] and how far those of a kernel may be off that computes them in `at`, in whatever way.

    A rounding of the exponent, of the logarithm of theta and of their product each moves a power by `log(power)` roundings.
    The variance is the bound's square: a frequency is off by the same at every position, so that nothing averages out.
    """
    inverse = frequencies(rope, "float64").inverse_J
    plain = frequencies(replace(rope, kind="default"), "float64").inverse_J
    power = -np.log(plain)
    relative = np.where(power > 0.0, 3.0 * power + 4.0, 0.0) * at.unit
    bound = inverse * (relative + (0.0 if rope.kind == "default" else 2.0 * at.unit))
    if rope.kind in ("llama3", "yarn"):
        bound = bound + np.where(blended(inverse, plain, rope.factor), blend_error(rope, plain, relative, at), 0.0)
    return Estimate(inverse, bound**2, bound)


def blended(inverse_J: Array, plain_J: Array, factor: float) -> Array:
    """Which frequencies are neither kept nor slowed by all of the factor."""
    return (inverse_J < plain_J * (1.0 - 1e-9)) & (inverse_J > plain_J / factor * (1.0 + 1e-9))


def blend_error(rope: Rope, plain_J: Array, relative_J: Array, at: Format) -> Array:
    """What the weight of a blend may be off by, times what it is the weight of; Llama's weight depends on the frequency."""
    weight = 16.0 * at.unit + np.zeros_like(plain_J)
    if rope.kind == "llama3":
        weight = weight + relative_J * rope.high_freq_factor / (rope.high_freq_factor - rope.low_freq_factor)
    return plain_J * weight


def angle_budget(rope: Rope, positions_M: Array, at: Format, to: Format) -> tuple[Estimate, Estimate]:
    """Cosine and sine [M, J]: frequencies and phases in `at`, what comes of them rounded to `to`."""
    phase = times(exact(positions_M[:, None]), frequency_budget(rope, at), at)
    factor = frequencies(rope, "float64").attention_factor
    step = 2.0 * at.unit * factor
    cos, sin = cosine_and_sine(phase, at)
    if factor != 1.0:
        scale = Estimate(np.full(1, factor), np.full(1, step**2), np.full(1, step))
        cos, sin = times(cos, scale, at), times(sin, scale, at)
    return (rounded(cos, to), rounded(sin, to)) if to.bits < at.bits else (cos, sin)


def run_angles(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    return tuple(be.angles(Rope(**settings), feed.activation(be, inputs["positions"])))


def estimate_angles(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    to = rounding.format("angles")
    both = angle_budget(Rope(**settings), inputs["positions"], to if to.bits > 24 else FORMATS["f32"], to)
    return tuple(rounded(x, rounding.format("output")) for x in both)


# -- rope: budget -----------------------------------------------------------------------------------------------------


def of_inputs(inputs: Arrays) -> Rope:
    return Rope(dim=2 * len(inputs["inv_freq"]), theta=float(inputs["theta"][0]))


def run_rope(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    angles = be.angles(of_inputs(inputs), feed.activation(be, inputs["positions"]))
    return (be.rope(feed.activation(be, inputs["x"]), angles, interleaved=settings.get("interleaved", False)),)


def estimate_rope(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    """Angles are float32 at best, since they are given so."""
    single, to = FORMATS["f32"], rounding.format("angles")
    budget = angle_budget(of_inputs(inputs), inputs["positions"], single, min(to, single, key=lambda each: each.bits))
    cos, sin = (each.map(lambda x: x[:, None]) for each in budget)
    at, x, J = rounding.format("accumulate"), exact(inputs["x"]), cos.value.shape[-1]
    first, second = pairs(J, settings.get("interleaved", False))
    a, b = x.map(lambda v: v[..., first]), x.map(lambda v: v[..., second])
    out = handed_on(inputs["x"], rounding.format("inputs"), rounding.format("output"))
    turned = plus(times(a, cos, at), times(b._replace(value=-b.value), sin, at), at)
    other = plus(times(b, cos, at), times(a, sin, at), at)
    for where, part in ((first, turned), (second, other)):
        for whole, new in zip(out, rounded(part, rounding.format("output")), strict=True):
            whole[..., where] = new
    return (out,)


OPERATIONS = (
    Operation(
        name="rope",
        about="pairs of a head's features turned by the angles of the token's position",
        inputs={
            "x": ("token", "head", "feature"),
            "cos": ("token", "pair"),
            "sin": ("token", "pair"),
            "positions": ("token",),
            "inv_freq": ("pair",),
            "theta": ("one",),
        },
        outputs={"y": ("token", "head", "feature")},
        run=run_rope,
        estimate=estimate_rope,
        cases=ROPE_CASES,
        mistakes=ROPE_MISTAKES,
        derived=frozenset({"cos", "sin", "positions", "inv_freq", "theta"}),
    ),
    Operation(
        name="angles",
        about="cosines and sines of the phases of positions, with the scaling of long contexts",
        inputs={"positions": ("token",)},
        outputs={"cos": ("token", "pair"), "sin": ("token", "pair")},
        run=run_angles,
        estimate=estimate_angles,
        cases=ANGLES_CASES,
        mistakes=PHASE_MISTAKES + SCALING_MISTAKES,
    ),
)
