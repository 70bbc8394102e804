"""Known mistakes of RoPE and its angles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.blocks.rope import Angles, Frequencies, Rope, frequencies, yarn_mscale
from npllm.testing.mistakes import Mistake
from npllm.testing.ops import norms_mistakes as norms
from npllm.testing.rounding import FORMATS, in_format

# -- angles: budget ---------------------------------------------------------------------------------------------------


def pairs(J: int, interleaved: bool) -> tuple[slice, slice]:
    """Where the first and the second numbers of the pairs stand in a head."""
    return (slice(0, 2 * J, 2), slice(1, 2 * J, 2)) if interleaved else (slice(0, J), slice(J, 2 * J))


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
    angles_with("positions in bf16", lambda make, rope, p: make(rope, in_format(1.0 * p, FORMATS["bf16"]))),
    angles_with("positions in f16", lambda make, rope, p: make(rope, in_format(1.0 * p, FORMATS["f16"]))),
    angles_with("cosine and sine exchanged", lambda make, rope, p: Angles(*make(rope, p)[::-1])),
    angles_with("sign of the sine", lambda make, rope, p: opposite(make(rope, p))),
    angles_with("theta 10000 whatever the model says", lambda make, rope, p: make(replace(rope, theta=1e4), p)),
    frequencies_with(
        "frequencies in bf16", lambda rope, right: right._replace(inverse_J=in_format(right.inverse_J, FORMATS["bf16"]))
    ),
    frequencies_with(
        "frequencies in f16", lambda rope, right: right._replace(inverse_J=in_format(right.inverse_J, FORMATS["f16"]))
    ),
    frequencies_with("exponents of the next pair", powers(lambda dim, j: 2.0 * (j + 1) / dim)),
    frequencies_with("exponents over dim - 2", powers(lambda dim, j: 2.0 * j / max(dim - 2, 1))),
    frequencies_with("exponents over twice the width that turns", powers(lambda dim, j: 1.0 * j / dim)),
)


def opposite(angles: Angles) -> Angles:
    return angles._replace(sin_MJ=-angles.sin_MJ)


def in_bf16(angles: Angles) -> Angles:
    return Angles(*(in_format(x, FORMATS["bf16"]) for x in angles))


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
