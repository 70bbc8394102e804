"""The corpus of the three operations of latent attention, in DeepSeek's proportions but small."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.blocks.rope import Rope, angles, frequencies
from npllm.testing.case import Case, Draw


class Sizes(NamedTuple):
    """`nope`, `rope` and `value` are widths per head, `latent` the compressed vector's."""

    heads: int = 4
    nope: int = 32
    rope: int = 16
    value: int = 32
    latent: int = 64

    @property
    def scale(self) -> float:
        return float((self.nope + self.rope) ** -0.5)


SMALL = Sizes()
ODD = Sizes(heads=3, nope=13, rope=6, value=11, latent=37)
WIDE = Sizes(heads=2, latent=512)
MANY = Sizes(heads=16)
SINGLE = Sizes(heads=1)

# YaRN's temperature for a factor of 40, squared (DeepSeek V3): what scales the scores beside the square root of the width.
MSCALE_SQUARED = (0.1 * np.log(40.0) + 1.0) ** 2


def weights(dice: np.random.Generator, s: Sizes) -> Array:
    """kv_b, of which a latent of normal numbers makes keys and values of normal numbers."""
    return dice.standard_normal((s.heads * (s.nope + s.value), s.latent)) * s.latent**-0.5


class Kind(NamedTuple):
    """What a case's numbers are like.

    offset  added to all latents' compressed numbers: a part that all keys share, and all values.
    size    of the compressed numbers.
    halves  added to the compressed numbers of the first half of the keys, and taken from those of the second.
    up      of kv_b, times what makes keys and values as large as latents.
    rope    of the shared key, and `agree` added to it and to what queries have for it: scores with a large common part.
    """

    offset: float = 0.0
    size: float = 1.0
    rope: float = 1.0
    agree: float = 0.0
    halves: float = 0.0
    up: float = 1.0


PLAIN = Kind()

# Weights that float16 holds, but not in full: numbers of another format taken through it lose bits.
WIDE_RANGE = Kind(size=2.0**13, rope=0.125, up=2.0**-16)


def attending(s: Sizes, batch: int, queries: int, keys: int, kind: Kind = PLAIN) -> Draw:
    """`scale` is that of the queries: it says how sharp the softmax is."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        q = scale * dice.standard_normal((batch, queries, s.heads, s.nope + s.rope))
        q[..., s.nope :] += kind.agree
        return {"q": q, "latent": latents(dice, (batch, keys), s, kind), "kv_b": kind.up * weights(dice, s)}

    return draw


def latents(dice: np.random.Generator, shape: tuple[int, ...], s: Sizes, kind: Kind) -> Array:
    c = kind.size * dice.standard_normal((*shape, s.latent)) + kind.offset
    later = np.arange(shape[-1]) >= shape[-1] // 2
    c += np.where(later, -kind.halves, kind.halves)[:, None]
    k = kind.rope * dice.standard_normal((*shape, s.rope)) + kind.agree
    return np.concatenate([c, k], axis=-1)


def attention(
    name: str, tags: str, s: Sizes, batch: int, queries: int, keys: int, kind: Kind = PLAIN,
    scales: tuple[float, ...] = (1.0, 4.0), factor: float = 1.0, **settings: Any,
) -> Case:  # fmt: skip
    draw = attending(s, batch, queries, keys, kind)
    given = {"scale": float(s.scale * factor), "nope": s.nope, **settings}
    return Case("latent_attention", name, draw, given, frozenset(tags.split()), scales)


ATTENTION = (
    attention("decode", "decode basic", MANY, 8, 1, 37),
    attention("decode-yarn", "decode scale", MANY, 8, 1, 24, factor=MSCALE_SQUARED),
    attention("large-scores", "prefill large", SMALL, 1, 48, 48, Kind(agree=7.0)),
    attention("decode-one-key", "decode", MANY, 8, 1, 1),
    attention("decode-300", "decode long", SMALL, 4, 1, 300),
    attention("decode-64", "decode", SMALL, 8, 1, 64),
    attention("decode-window", "decode window", MANY, 4, 1, 65, window=16),
    attention("decode-large-rope", "decode large", MANY, 4, 1, 40, Kind(rope=6.0), (1.0,)),
    attention("mtp-2", "mtp", MANY, 4, 2, 41),
    attention("mtp-3-window", "mtp window", SMALL, 8, 3, 50, window=17),
    attention("prefill", "prefill basic", SMALL, 1, 70, 70),
    attention("prefill-yarn", "prefill scale", SMALL, 1, 48, 48, factor=MSCALE_SQUARED),
    attention("prefill-batch", "prefill", SMALL, 3, 17, 17),
    attention("prefill-single-head", "prefill", SINGLE, 3, 64, 64, scales=(1.0,)),
    attention("prefill-window", "prefill window", SMALL, 1, 65, 65, window=16),
    attention("prefill-window-one", "prefill window", SMALL, 1, 33, 33, scales=(1.0,), window=1),
    attention("chunk", "chunk", SMALL, 2, 23, 60),
    attention("wide", "decode wide", WIDE, 16, 2, 40),
    attention("wide-prefill", "prefill wide", WIDE, 1, 33, 33, scales=(1.0,)),
    attention("odd", "odd prefill", ODD, 3, 19, 29),
    attention("odd-decode", "odd decode", ODD, 2, 1, 7),
    attention("offset", "prefill offset", SMALL, 1, 48, 48, Kind(offset=4.0)),
    attention("offset-decode", "decode offset", MANY, 4, 1, 48, Kind(offset=4.0)),
    attention("large-latents", "prefill large", SMALL, 1, 48, 48, Kind(size=8.0), (0.25, 1.0)),
    attention("small-latents", "prefill small", SMALL, 1, 48, 48, Kind(size=0.05), (1.0,)),
    # Values cancel, but sums over either half of the keys are large; scores come from the shared key.
    attention("halves-cancel", "decode cancel", MANY, 8, 1, 64, Kind(rope=50.0, halves=8.0), (0.02,)),
    attention("halves-cancel-odd", "prefill cancel", SMALL, 8, 4, 67, Kind(rope=50.0, halves=8.0), (0.02,)),
    attention("wide-range", "prefill range", SMALL, 1, 48, 48, WIDE_RANGE, (8.0,)),
    attention("wide-range-decode", "decode range", MANY, 8, 1, 40, WIDE_RANGE, (8.0,)),
    attention("one", "odd", Sizes(1, 2, 2, 2, 4), 1, 1, 1),
    attention("no-queries", "empty", SMALL, 1, 0, 5, scales=(1.0,)),
)  # fmt: skip


def projecting(s: Sizes, tokens: int, width: int, size: float, first: int) -> Draw:
    """Tokens at positions from `first` on, in no order."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        positions = (first + dice.permutation(3 * tokens)[:tokens]).astype(np.int32)
        rope = Rope(s.rope)
        cos, sin = angles(np, rope, positions, "float64")
        return {
            "h": scale * size * dice.standard_normal((tokens, width)),
            "kv_a": dice.standard_normal((s.latent + s.rope, width)) * width**-0.5,
            "norm": 1.0 + 0.3 * dice.standard_normal(s.latent),
            "cos": cos.astype(np.float32),
            "sin": sin.astype(np.float32),
            "positions": positions,
            "inv_freq": frequencies(rope, "float64").inverse_J.astype(np.float32),
            "theta": np.full(1, rope.theta, np.float32),
        }

    return draw


def project(
    name: str, tags: str, s: Sizes, tokens: int, width: int, size: float = 1.0, first: int = 0,
    scales: tuple[float, ...] = (1.0,), eps: float = 1e-6, **settings: Any,
) -> Case:  # fmt: skip
    draw = projecting(s, tokens, width, size, first)
    return Case("latent_project", name, draw, {"eps": eps, **settings}, frozenset(tags.split()), scales)


PROJECT = (
    project("prefill", "prefill basic", SMALL, 65, 128, interleaved=True),
    project("prefill-halves", "prefill halves", SMALL, 65, 128),
    project("decode", "decode", SMALL, 1, 96, interleaved=True),
    project("wide", "wide", WIDE, 24, 256, interleaved=True),
    project("tiny-rows", "small", SMALL, 64, 64, 1e-3, interleaved=True, scales=(1.0, 10.0)),
    project("tiny-rows-halves", "small halves", SMALL, 64, 64, 1e-3, eps=1e-5),
    project("large-rows", "large", SMALL, 64, 64, 30.0, interleaved=True),
    project("far", "far", SMALL, 64, 64, first=5000, interleaved=True),
    project("odd", "odd", ODD, 103, 61),
    project("odd-interleaved", "odd", ODD, 7, 29, interleaved=True),
    project("no-tokens", "empty", SMALL, 0, 32, interleaved=True),
)  # fmt: skip


def expanding(s: Sizes, keys: int, kind: Kind) -> Draw:
    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        return {"latent": scale * latents(dice, (keys,), s, kind), "kv_b": kind.up * weights(dice, s)}

    return draw


def expand(name: str, tags: str, s: Sizes, keys: int, kind: Kind = PLAIN, scales: tuple[float, ...] = (1.0,)) -> Case:
    settings = {"nope": s.nope, "heads": s.heads}
    return Case("latent_expand", name, expanding(s, keys, kind), settings, frozenset(tags.split()), scales)


EXPAND = (
    expand("basic", "basic", SMALL, 65),
    expand("many-heads", "heads", MANY, 17),
    expand("one-head", "heads", SINGLE, 130),
    expand("one-key", "odd", SMALL, 1),
    expand("wide", "wide", WIDE, 40),
    expand("value-wider", "widths", Sizes(4, 16, 8, 48, 40), 33),
    expand("key-wider", "widths", Sizes(4, 48, 8, 16, 40), 33),
    expand("odd", "odd", ODD, 29),
    expand("offset", "offset", SMALL, 40, Kind(offset=4.0)),
    expand("scales", "large small", SMALL, 40, Kind(rope=5.0), (0.01, 30.0)),
    expand("wide-range", "range", SMALL, 40, WIDE_RANGE),
    expand("no-keys", "empty", SMALL, 0),
)  # fmt: skip
