"""Rotary embedding: the angles of positions, and turning heads by them.

The truth of both is the definition, `cos(position * frequency)` in float64, with frequencies that are rounded nowhere.
Kernels get cosines and sines that are rounded to float32 once, or make their own from positions and float32 frequencies:
what rounding a frequency and a phase to float32 costs, `position * frequency * 2^-24` and more, is in the budget, for either
way. It is far below the rounding of a 16-bit output up to some thousand positions, and above it at a hundred thousand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.blocks.rope import Angles, Frequencies, Rope, frequencies, yarn_mscale
from npllm.blocks.rope import angles as angles_of
from npllm.testing.case import Case, Draw
from npllm.testing.estimate import Estimate, cosine_and_sine, exact, handed_on, plus, rounded, times
from npllm.testing.mistakes import Mistake
from npllm.testing.operation import Arrays, Operation, Settings
from npllm.testing.ops import feed, norms
from npllm.testing.ops.norms import in_format
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


def pairs(J: int, interleaved: bool) -> tuple[slice, slice]:
    """Where the first and the second numbers of the pairs stand in a head."""
    return (slice(0, 2 * J, 2), slice(1, 2 * J, 2)) if interleaved else (slice(0, J), slice(J, 2 * J))


# -- inputs -----------------------------------------------------------------------------------------------------------

# Draws positions [M] of so many tokens.
Places = Callable[[np.random.Generator, int], Array]


def counting(start: int, step: int = 1) -> Places:
    return lambda dice, tokens: start + step * np.arange(tokens)


def anywhere(below: int, start: int = 0) -> Places:
    """Unsorted, with repetitions."""
    return lambda dice, tokens: dice.integers(start, below, size=tokens)


def two_rows(dice: np.random.Generator, tokens: int) -> Array:
    """Two sequences of a packed batch, the second in the middle of its text."""
    half = tokens // 2
    return np.concatenate([7 + np.arange(half), 1000 + np.arange(tokens - half)])


def turned(tokens: int, heads: int, width: int, dim: int, theta: float, places: Places) -> Draw:
    """Heads of normal numbers of about `scale`; the first `dim` features turn."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        positions, rope = places(dice, tokens).astype(np.int32), Rope(dim, theta)
        cos, sin = angles_of(np, rope, positions, "float64")
        return {
            "x": scale * dice.standard_normal((tokens, heads, width)),
            "cos": cos.astype(np.float32),
            "sin": sin.astype(np.float32),
            "positions": positions,
            "inv_freq": frequencies(rope, "float64").inverse_J.astype(np.float32),
            "theta": np.full(1, theta, np.float32),
        }

    return draw


def at_positions(tokens: int, places: Places) -> Draw:
    return lambda dice, scale: {"positions": places(dice, tokens).astype(np.int32)}


def rope_case(name: str, draw: Draw, tags: str, scales: tuple[float, ...] = (1.0,), **settings: Any) -> Case:
    return Case("rope", name, draw, settings, frozenset(tags.split()), scales)


def angles_case(name: str, tokens: int, places: Places, tags: str, **settings: Any) -> Case:
    return Case("angles", name, at_positions(tokens, places), settings, frozenset(tags.split()))


ROPE_CASES = (
    rope_case("halves-d128", turned(128, 4, 128, 128, 5e5, counting(0)), "halves prefill"),
    rope_case("interleaved-d128", turned(128, 4, 128, 128, 5e5, counting(3)), "interleaved prefill", interleaved=True),
    rope_case("halves-d64", turned(96, 6, 64, 64, 1e6, anywhere(2000)), "halves unsorted", (1e-2, 30.0)),
    rope_case("interleaved-d64", turned(96, 3, 64, 64, 1e4, two_rows), "interleaved ragged", interleaved=True),
    rope_case("partial", turned(64, 4, 96, 32, 1e6, counting(10)), "halves partial"),
    rope_case("partial-interleaved", turned(64, 4, 80, 40, 5e5, anywhere(900)), "interleaved partial", interleaved=True),
    rope_case("packed", turned(64, 8, 64, 64, 5e5, two_rows), "halves ragged"),
    rope_case("decode", turned(7, 16, 128, 128, 5e5, anywhere(4096, 300)), "halves decode unsorted"),
    rope_case("decode-one", turned(1, 32, 128, 128, 5e5, counting(2049)), "halves decode"),
    rope_case("position-zero", turned(1, 32, 128, 128, 5e5, counting(0)), "halves decode"),
    rope_case("far", turned(64, 4, 128, 128, 5e5, anywhere(131072, 65537)), "halves large unsorted"),
    rope_case("far-interleaved", turned(64, 4, 64, 64, 1e4, counting(131008)), "interleaved large", interleaved=True),
    rope_case("one-pair", turned(257, 3, 2, 2, 1e4, counting(0)), "halves odd"),
    rope_case("one-head-d96", turned(101, 1, 96, 96, 1e6, counting(11, 17)), "halves odd mqa"),
    rope_case("no-tokens", turned(0, 4, 64, 64, 1e4, counting(0)), "halves empty"),
)

LLAMA3 = {
    "dim": 128, "theta": 5e5, "kind": "llama3", "factor": 8.0, "original": 8192, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip
DEEPSEEK = {"dim": 64, "theta": 1e4, "kind": "yarn", "factor": 40.0, "original": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
UNCUT = {"dim": 64, "theta": 150000.0, "kind": "yarn", "factor": 32.0, "original": 4096, "truncate": False}

ANGLES_CASES = (
    angles_case("default-d128", 256, counting(0), "default", dim=128, theta=5e5),
    angles_case("default-d64", 256, anywhere(4096), "default unsorted", dim=64, theta=1e4),
    angles_case("default-d96", 128, counting(1, 31), "default odd", dim=96, theta=1e6),
    angles_case("default-far", 256, anywhere(131072, 65537), "default large unsorted", dim=128, theta=5e5),
    angles_case("default-last", 64, counting(131008), "default large", dim=64, theta=1e6),
    angles_case("packed", 128, two_rows, "default ragged", dim=128, theta=1e6),
    angles_case("decode", 1, counting(4097), "default decode", dim=128, theta=5e5),
    angles_case("one-pair", 300, counting(0), "default odd", dim=2, theta=1e4),
    angles_case("no-tokens", 0, counting(0), "default empty", dim=64, theta=1e4),
    angles_case("linear", 256, anywhere(8192), "linear", dim=128, theta=1e6, kind="linear", factor=8.0),
    angles_case("linear-far", 128, anywhere(131072, 65537), "linear large", dim=64, theta=1e4, kind="linear", factor=4.0),
    angles_case("llama3", 256, anywhere(8192), "llama3", **LLAMA3),
    angles_case("llama3-far", 256, anywhere(131072, 65537), "llama3 large", **LLAMA3),
    angles_case("llama3-32", 128, anywhere(4096), "llama3", **{**LLAMA3, "dim": 64, "factor": 32.0}),
    angles_case("yarn", 256, anywhere(4096), "yarn", **DEEPSEEK),
    angles_case("yarn-far", 256, anywhere(131072, 65537), "yarn large", **DEEPSEEK),
    angles_case("yarn-equal-mscales", 128, anywhere(4096), "yarn mscale", mscale=1.0, mscale_all_dim=1.0, **DEEPSEEK),
    angles_case("yarn-two-mscales", 128, anywhere(4096), "yarn mscale", mscale=1.0, mscale_all_dim=0.707, **DEEPSEEK),
    angles_case("yarn-given-factor", 128, anywhere(4096), "yarn", attention_factor=1.25, **DEEPSEEK),
    angles_case("yarn-uncut", 256, anywhere(8192), "yarn", **UNCUT),
)


# -- mistakes ---------------------------------------------------------------------------------------------------------

Made = Callable[[Rope, Array], Angles]


def angles_with(name: str, change: Callable[[Made, Rope, Array], Angles]) -> Mistake:
    """`change(angles, rope, positions)` -> what is returned; `angles` is the backend's own."""

    class Changed(Backend):
        def angles(self, rope: Rope, positions_M: Array, /) -> Angles:
            return change(super().angles, rope, positions_M)

    return Mistake(name, Changed)


def frequencies_with(name: str, change: Callable[[Rope, Frequencies], tuple[Array, float]]) -> Mistake:
    """`change(rope, frequencies)` -> the frequencies [J] and the attention factor that are used."""

    class Changed(Backend):
        def angles(self, rope: Rope, positions_M: Array, /) -> Angles:
            inverse_J, factor = change(rope, frequencies(rope, self.array_dtype))
            phase_MJ = np.asarray(self.to_numpy(positions_M), dtype=self.array_dtype)[:, None] * inverse_J
            cos_MJ, sin_MJ = np.cos(phase_MJ) * factor, np.sin(phase_MJ) * factor
            return Angles(self.asarray(cos_MJ, self.array_dtype), self.asarray(sin_MJ, self.array_dtype))

    return Mistake(name, Changed)


def rope_with(name: str, change: Callable[[Callable[..., Array], Array, Angles, bool], Array]) -> Mistake:
    """`change(rope, x, angles, interleaved)` -> what is returned; `rope` is the backend's own."""

    class Changed(Backend):
        def rope(self, x_MHK: Array, angles: Angles, /, interleaved: bool = False) -> Array:
            return change(super().rope, x_MHK, angles, interleaved)

    return Mistake(name, Changed)


def powers(exponent: Callable[[int, Array], Array]) -> Callable[[Rope, Frequencies], tuple[Array, float]]:
    """Frequencies `theta^-exponent(dim, j)`, without scaling."""
    return lambda rope, right: (rope.theta ** -exponent(rope.dim, np.arange(rope.dim // 2)), right.attention_factor)


PHASE_MISTAKES = (
    angles_with("positions one too large", lambda make, rope, p: make(rope, p + 1)),
    angles_with("positions counted from the batch's first", lambda make, rope, p: make(rope, p - p[:1])),
    angles_with("positions in order of the tokens", lambda make, rope, p: make(rope, 0 * p + np.arange(len(p)))),
    angles_with("positions in bf16", lambda make, rope, p: make(rope, in_format(1.0 * p, "bf16"))),
    angles_with("positions in f16", lambda make, rope, p: make(rope, in_format(1.0 * p, "f16"))),
    angles_with("cosine and sine exchanged", lambda make, rope, p: Angles(*make(rope, p)[::-1])),
    angles_with("sign of the sine", lambda make, rope, p: opposite(make(rope, p))),
    angles_with("theta 10000 whatever the model says", lambda make, rope, p: make(replace(rope, theta=1e4), p)),
    frequencies_with(
        "frequencies in bf16", lambda rope, right: right._replace(inverse_J=in_format(right.inverse_J, "bf16"))
    ),
    frequencies_with("frequencies in f16", lambda rope, right: right._replace(inverse_J=in_format(right.inverse_J, "f16"))),
    frequencies_with("exponents of the next pair", powers(lambda dim, j: 2.0 * (j + 1) / dim)),
    frequencies_with("exponents over dim - 2", powers(lambda dim, j: 2.0 * j / max(dim - 2, 1))),
    frequencies_with("exponents over twice the width that turns", powers(lambda dim, j: 1.0 * j / dim)),
)


def opposite(angles: Angles) -> Angles:
    return angles._replace(sin_MJ=-angles.sin_MJ)


def in_bf16(angles: Angles) -> Angles:
    return Angles(*(in_format(x, "bf16") for x in angles))


def across_the_head(rope: Callable[..., Array], x: Array, angles: Angles, interleaved: bool) -> Array:
    """Half-split pairs (j, j + K/2) where only part of a head turns."""
    J, half = angles.cos_MJ.shape[-1], x.shape[-1] // 2
    if interleaved or x.shape[-1] == 2 * J:
        return rope(x, angles, interleaved=interleaved)
    order = np.r_[0:J, half : half + J, J:half, half + J : 2 * half]
    return rope(x[..., order], angles)[..., np.argsort(order)]


def last_features(rope: Callable[..., Array], x: Array, angles: Angles, interleaved: bool) -> Array:
    rest = x.shape[-1] - 2 * angles.cos_MJ.shape[-1]
    return np.roll(rope(np.roll(x, -rest, axis=-1), angles, interleaved=interleaved), rest, axis=-1)


def rest_zero(rope: Callable[..., Array], x: Array, angles: Angles, interleaved: bool) -> Array:
    return rope(x, angles, interleaved=interleaved) * (np.arange(x.shape[-1]) < 2 * angles.cos_MJ.shape[-1])


def in_place(rope: Callable[..., Array], x: Array, angles: Angles, interleaved: bool) -> Array:
    """The second number of a pair is turned with a first one that is already turned."""
    out = rope(x, angles, interleaved=interleaved)
    first, second = pairs(angles.cos_MJ.shape[-1], interleaved)
    out[..., second] = x[..., second] * angles.cos_MJ[:, None] + out[..., first] * angles.sin_MJ[:, None]
    return out


def last_pair_left(rope: Callable[..., Array], x: Array, angles: Angles, interleaved: bool) -> Array:
    out = rope(x, angles, interleaved=interleaved)
    last = [where.stop - 1 for where in pairs(angles.cos_MJ.shape[-1], False)] if not interleaved else [-2, -1]
    out[..., last] = x[..., last]
    return out


def first_head_only(rope: Callable[..., Array], x: Array, angles: Angles, interleaved: bool) -> Array:
    out = rope(x, angles, interleaved=interleaved)
    out[:, 1:] = x[:, 1:]
    return out


def twice(rope: Callable[..., Array], x: Array, angles: Angles, interleaved: bool) -> Array:
    return rope(rope(x, angles, interleaved=interleaved), angles, interleaved=interleaved)


def truncated(rope: Callable[..., Array], x: Array, angles: Angles, interleaved: bool) -> Array:
    return norms.truncated(rope(x, angles, interleaved=interleaved), "bf16")


ROPE_MISTAKES = (
    *PHASE_MISTAKES,
    rope_with("pairs in the other order", lambda rope, x, angles, other: rope(x, angles, interleaved=not other)),
    rope_with("turned twice", twice),
    rope_with("not turned", lambda rope, x, angles, other: x),
    rope_with("cosine and sine in bf16", lambda rope, x, angles, other: rope(x, in_bf16(angles), interleaved=other)),
    rope_with("second numbers from first ones already turned", in_place),
    rope_with("last pair not turned", last_pair_left),
    rope_with("only the first head turned", first_head_only),
    rope_with("pairs across the whole head where part of it turns", across_the_head),
    rope_with("the last features turned where part of the head turns", last_features),
    rope_with("zero where the head does not turn", rest_zero),
    rope_with("output truncated to bf16", truncated),
)


def changed(kinds: str, **fields: Callable[[Rope], Any]) -> Callable[[Made, Rope, Array], Angles]:
    """The angles of another Rope, where the kind is among those named."""

    def change(make: Made, rope: Rope, positions: Array) -> Angles:
        other = {name: value(rope) for name, value in fields.items()} if rope.kind in kinds.split() else {}
        return make(replace(rope, **other), positions)

    return change


def twice_high(rope: Rope) -> float:
    return 2.0 * rope.high_freq_factor


def half_low(rope: Rope) -> float:
    return rope.low_freq_factor / 2.0


def own_yarn_factor(rope: Rope) -> float:
    return yarn_mscale(rope.factor, 1.0)


def factor_squared(rope: Rope, right: Frequencies) -> tuple[Array, float]:
    return right.inverse_J, right.attention_factor**2


def ramp_reversed(rope: Rope, right: Frequencies) -> tuple[Array, float]:
    """Short waves slowed and long ones kept."""
    if rope.kind not in ("yarn", "llama3"):
        return right
    plain = frequencies(replace(rope, kind="default"), right.inverse_J.dtype).inverse_J
    return plain + plain / rope.factor - right.inverse_J, right.attention_factor


SCALING_MISTAKES = (
    angles_with("scaling left out", changed("linear llama3 yarn", kind=lambda rope: "default")),
    angles_with("all frequencies divided by the factor", changed("llama3 yarn", kind=lambda rope: "linear")),
    angles_with("frequencies times the factor", changed("linear", factor=lambda rope: 1.0 / rope.factor)),
    angles_with("llama3: band ends at twice the frequency", changed("llama3", high_freq_factor=twice_high)),
    angles_with("llama3: band begins at half the frequency", changed("llama3", low_freq_factor=half_low)),
    angles_with("original context twice as long", changed("llama3 yarn", original=lambda rope: 2 * rope.original)),
    angles_with("yarn: ramp not cut to whole pairs, or cut", changed("yarn", truncate=lambda rope: not rope.truncate)),
    angles_with("yarn: ramp from half as many turns", changed("yarn", beta_fast=lambda rope: rope.beta_fast / 2)),
    angles_with("yarn: attention factor left out", changed("yarn", attention_factor=lambda rope: 1.0)),
    frequencies_with("yarn: attention factor twice", factor_squared),
    angles_with("yarn: mscales of the config ignored", changed("yarn", mscale=lambda rope: None)),
    angles_with("yarn: factor of the config ignored", changed("yarn", attention_factor=own_yarn_factor)),
    frequencies_with("ramp the wrong way round", ramp_reversed),
)

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
