"""What kernels of latent attention are known to get wrong.

Nearly all of it is a right kernel given the wrong operands: rows of kv_b in another order, another scale, a mask of other
positions. So a mistake is a function of the operands, and the backend that makes it calls its own method with the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from npllm.arrays import Array, Namespace
from npllm.backend import Backend
from npllm.blocks.masks import Mask
from npllm.blocks.norms import layer_norm
from npllm.blocks.rope import Angles, rotate_halves, rotate_interleaved
from npllm.cache import Keys, Rows
from npllm.testing.mistakes import Mistake
from npllm.testing.rounding import FORMATS, Format, in_format
from npllm.weights import LatentKV, Linear

# An 8-bit number as in FP8 caches, without a scale.
E4M3 = Format("e4m3", 4, -6, 8)

# Keys that a kernel takes at a time, in mistakes that need to say so.
BLOCK = 16


# -- latent_attention -------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """The operands of Backend.latent_attention; kv_b as an array."""

    xp: Namespace
    q: Array
    keys: Keys
    rows: Rows
    kv_b: Array
    mask: Mask
    scale: float

    @property
    def width(self) -> int:
        """L, the compressed vector's."""
        return int(self.kv_b.shape[1])

    @property
    def rope(self) -> int:
        return int(self.keys.k_BSGK.shape[-1]) - self.width

    @property
    def nope(self) -> int:
        return int(self.q.shape[-1]) - self.rope

    @property
    def up(self) -> Array:
        """kv_b by heads, [H, F, L]."""
        heads = self.q.shape[1]
        return self.kv_b.reshape(heads, len(self.kv_b) // heads, self.width)

    def with_up(self, *parts: Array) -> Call:
        """With other matrices for each head: parts of rows [H, F, L] in their order."""
        return self._replace(kv_b=self.xp.concatenate(parts, axis=1).reshape(self.kv_b.shape))

    def with_q(self, nope: Array | None = None, rope: Array | None = None) -> Call:
        """With other queries: either part may be replaced."""
        parts = self.q[..., : self.nope] if nope is None else nope, self.q[..., self.nope :] if rope is None else rope
        return self._replace(q=self.xp.concatenate(parts, axis=-1))

    def with_latent(self, compressed: Callable[[Array], Array]) -> Call:
        """With `compressed(c)` in place of the cached latents' compressed part c."""
        k = self.keys.k_BSGK
        latent = self.xp.concatenate([compressed(k[..., : self.width]), k[..., self.width :]], axis=-1)
        return self._replace(keys=self.keys._replace(k_BSGK=latent, v_BSGV=latent[..., : self.width]))

    def later(self, by: int) -> Call:
        """With queries that take themselves to stand `by` positions further."""
        return self._replace(rows=replace(self.rows, starts=tuple(start + by for start in self.rows.starts)))


def attending(name: str, change: Callable[[Call], Call]) -> Mistake:
    class Changed(Backend):
        def latent_attention(self, q_MHF: Array, keys: Keys, rows: Rows, w: Linear, /, *, mask: Mask, scale: float) -> Array:
            call = change(Call(self.xp, q_MHF, keys, rows, self.dense(w.weight), mask, scale))
            kv_b = Linear(self.asarray(call.kv_b))
            return super().latent_attention(call.q, call.keys, call.rows, kv_b, mask=call.mask, scale=call.scale)

    return Mistake(name, Changed)


def value_rows_first(x: Call) -> Call:
    V = len(x.up[0]) - x.nope
    return x.with_up(x.up[:, V:], x.up[:, :V])


def keys_of_all_heads_first(x: Call) -> Call:
    H, cut = len(x.up), len(x.up) * x.nope
    return x.with_up(x.kv_b[:cut].reshape(H, -1, x.width), x.kv_b[cut:].reshape(H, -1, x.width))


def heads_interleaved(x: Call) -> Call:
    return x.with_up(x.kv_b.reshape(-1, len(x.up), x.width).transpose(1, 0, 2))


def values_of_the_next_head(x: Call) -> Call:
    """One head has none; it takes its own values backwards."""
    values = x.up[:, x.nope :]
    wrong = x.xp.roll(values, -1, axis=0) if len(values) > 1 else values[:, ::-1]
    return x.with_up(x.up[:, : x.nope], wrong)


def latents_as_values(x: Call) -> Call:
    H, F, L = x.up.shape
    plain = x.xp.broadcast_to(x.xp.eye(F - x.nope, L, dtype=x.kv_b.dtype), (H, F - x.nope, L))
    return x.with_up(x.up[:, : x.nope], plain)


def own_part_of_the_rope_key(x: Call) -> Call:
    """Head h of H takes the h-th part of the shared key for all of its own."""
    heads = x.q.shape[1]
    of_column = x.xp.arange(x.rope) * heads // max(x.rope, 1)
    own = of_column[None] == x.xp.arange(heads)[:, None]
    return x.with_q(rope=x.q[..., x.nope :] * own)


def other_pair_order(x: Call) -> Call:
    rope = x.q[..., x.nope :]
    return x.with_q(rope=x.xp.concatenate([rope[..., 0::2], rope[..., 1::2]], axis=-1))


def without_last_column(c: Array) -> Array:
    out = c.copy()
    out[..., -1] = 0.0
    return out


def first_row_for_all(x: Call) -> Call:
    return x._replace(keys=x.keys._replace(slots=x.keys.slots[:1] * len(x.keys.slots)))


def only_whole_blocks(x: Call) -> Call:
    """Keys behind the last whole block are not read; where there is none, all are."""
    counts = tuple(count // BLOCK * BLOCK or count for count in x.keys.counts)
    return x._replace(keys=x.keys._replace(counts=counts))


class Open(Mask):
    """Every key is seen."""

    def allowed(self, xp: Namespace, query_T: Array, key_S: Array) -> Array:
        return xp.ones((len(query_T), len(key_S)), dtype=bool)

    def reach(self, first: int, last: int) -> tuple[int, int]:
        return 0, 1 << 62


class Plain(Backend):
    """Attention without blocks, with places where a kernel may err."""

    def attention(
        self, q_MHK: Array, keys: Keys, rows: Rows, /, *, mask: Mask, scale: float,
        softcap: float | None = None, sinks: Linear | None = None,
    ) -> Array:  # fmt: skip
        xp = self.xp
        out_MHV = xp.empty((*q_MHK.shape[:2], keys.v_BSGV.shape[-1]), dtype=q_MHK.dtype)
        for r, (_, start, begin, end) in enumerate(rows):
            k_SGK, v_SGV, first = keys.row(r)
            repeats = q_MHK.shape[1] // k_SGK.shape[1]
            k_HSK, v_HSV = (xp.repeat(x.transpose(1, 0, 2), repeats, axis=0) for x in (k_SGK, v_SGV))
            scores_HTS = scale * (q_MHK[begin:end].transpose(1, 0, 2) @ k_HSK.transpose(0, 2, 1))
            seen_TS = mask.allowed(xp, xp.arange(start, start + end - begin), xp.arange(first, first + len(k_SGK)))
            p_HTS = self.softmax(xp.where(seen_TS, self.scores(scores_HTS), scores_HTS.dtype.type(-math.inf)))
            out_MHV[begin:end] = self.sums(p_HTS, v_HSV).transpose(1, 0, 2)
        return out_MHV

    def sums(self, p_HTS: Array, v_HSV: Array) -> Array:
        return p_HTS @ v_HSV

    def scores(self, scores_HTS: Array) -> Array:
        return scores_HTS

    def softmax(self, scores_HTS: Array) -> Array:
        return self.normalised(self.xp.exp(scores_HTS - self.xp.max(scores_HTS, axis=-1, keepdims=True)))

    def normalised(self, e_HTS: Array) -> Array:
        return e_HTS / self.xp.sum(e_HTS, axis=-1, keepdims=True)


class ScoresInBf16(Plain):
    """Scores are rounded to bf16 before the softmax."""

    def scores(self, scores_HTS: Array) -> Array:
        return in_format(scores_HTS, FORMATS["bf16"])


class WeightsInFp8(Plain):
    """Softmax weights are rounded to e4m3 before they multiply the values."""

    def softmax(self, scores_HTS: Array) -> Array:
        return in_format(super().softmax(scores_HTS), E4M3)


class HalvesInBf16(Plain):
    """Either half of the keys is summed up for itself, and put away in bf16 before the two are added."""

    def sums(self, p_HTS: Array, v_HSV: Array) -> Array:
        half = v_HSV.shape[1] // 2
        first, second = (
            in_format(super(HalvesInBf16, self).sums(p_HTS[..., part], v_HSV[:, part]), FORMATS["bf16"])
            for part in (slice(half), slice(half, None))
        )
        return first + second


class OwnMaximum(Plain):
    """Each block of keys subtracts its own maximum, and what came before is not scaled to the new one."""

    def softmax(self, scores_HTS: Array) -> Array:
        blocks = [scores_HTS[..., at : at + BLOCK] for at in range(0, scores_HTS.shape[-1], BLOCK)]
        tops = [self.xp.max(block, axis=-1, keepdims=True) for block in blocks]
        moved = [self.xp.exp(x - self.xp.where(top == -math.inf, 0.0, top)) for x, top in zip(blocks, tops, strict=True)]
        return self.normalised(self.xp.concatenate(moved, axis=-1))


def windowed(x: Call, by: int | None) -> Call:
    """With a window so much wider; None: without one. Where there is none, none."""
    wide = x.mask.window
    return x if wide is None else x._replace(mask=Mask(None if by is None else wide + by))


ATTENTION = (
    attending("scale by the width without RoPE", lambda x: x._replace(scale=x.scale * math.sqrt(1.0 + x.rope / x.nope))),
    attending("scale by the latent's width", lambda x: x._replace(scale=x.keys.k_BSGK.shape[-1] ** -0.5)),
    attending("scale by the width only, its factor forgotten", lambda x: x._replace(scale=x.q.shape[-1] ** -0.5)),
    attending("rope part dropped", lambda x: x.with_q(rope=0.0 * x.q[..., x.nope :])),
    attending("rope part scaled twice", lambda x: x.with_q(rope=x.scale * x.q[..., x.nope :])),
    attending("rope part not scaled", lambda x: x.with_q(rope=x.q[..., x.nope :] / x.scale)),
    attending("compressed part dropped from the scores", lambda x: x.with_q(nope=0.0 * x.q[..., : x.nope])),
    attending("rope key divided among the heads", own_part_of_the_rope_key),
    attending("rope part of queries in the other pair order", other_pair_order),
    attending("kv_b: value rows before key rows", value_rows_first),
    attending("kv_b: keys of all heads before all values", keys_of_all_heads_first),
    attending("kv_b: heads interleaved", heads_interleaved),
    attending("kv_b: one row off", lambda x: x._replace(kv_b=x.xp.roll(x.kv_b, -1, axis=0))),
    attending("values of the next head", values_of_the_next_head),
    attending("latents as values, without W_v", latents_as_values),
    attending("last latent number skipped", lambda x: x.with_latent(without_last_column)),
    attending("last number of the rope key skipped", lambda x: x.with_q(rope=without_last_column(x.q[..., x.nope :]))),
    attending("latents cached in 8 bits", lambda x: x.with_latent(lambda c: in_format(c, E4M3))),
    attending("kv_b in 8 bits", lambda x: x._replace(kv_b=in_format(x.kv_b, E4M3))),
    attending("queries in 8 bits", lambda x: x._replace(q=in_format(x.q, E4M3))),
    attending("every row reads the first row's latents", first_row_for_all),
    attending("keys behind the last whole block skipped", only_whole_blocks),
    attending("causal from the top left", lambda x: x._replace(rows=replace(x.rows, starts=(0,) * len(x.rows.starts)))),
    attending("not causal", lambda x: x._replace(mask=Open())),
    attending("next position seen", lambda x: x.later(1)),
    attending("own position not seen", lambda x: x.later(-1) if min(x.rows.starts, default=0) > 0 else x),
    attending("window one key too wide", lambda x: windowed(x, 1)),
    attending("window one key too narrow", lambda x: windowed(x, -1)),
    attending("window ignored", lambda x: windowed(x, None)),
    Mistake("scores rounded to bf16", ScoresInBf16),
    Mistake("softmax weights in 8 bits", WeightsInFp8),
    Mistake("sums over parts of the keys kept in bf16", HalvesInBf16),
    Mistake("running maximum not carried between blocks", OwnMaximum),
)


# -- latent_project ---------------------------------------------------------------------------------------------------


class Projection(NamedTuple):
    """The operands of Backend.latent_project; the two weights as arrays."""

    xp: Namespace
    h: Array
    kv_a: Array
    norm: Array
    angles: Angles
    eps: float
    interleaved: bool


def projecting(name: str, change: Callable[[Projection], Projection]) -> Mistake:
    class Changed(Backend):
        def latent_project(
            self, h_MD: Array, w: LatentKV, angles: Angles, /, eps: float, *, interleaved: bool = True
        ) -> Array:
            weights = self.dense(w.kv_a_proj_with_mqa.weight), self.dense(w.kv_a_layernorm.weight)
            call = change(Projection(self.xp, h_MD, *weights, angles, eps, interleaved))
            bundle = LatentKV(Linear(self.asarray(call.kv_a)), Linear(self.asarray(call.norm)))
            return super().latent_project(call.h, bundle, call.angles, call.eps, interleaved=call.interleaved)

    return Mistake(name, Changed)


def turning(name: str, change: Callable[[Array, Array], tuple[Array, Array]]) -> Mistake:
    """A mistake about cosines and sines."""
    return projecting(name, lambda x: x._replace(angles=Angles(*change(*x.angles))))


def finishing(name: str, finish: Callable[[Any, Array, Array, Angles, float, Callable[..., Array]], Array]) -> Mistake:
    """A mistake in what is made of the projection: `finish(xp, down_M1F, norm_L, angles, eps, rotate)`."""

    class Finished(Backend):
        def latent_project(
            self, h_MD: Array, w: LatentKV, angles: Angles, /, eps: float, *, interleaved: bool = True
        ) -> Array:
            down_M1F = self.linear(h_MD, w.kv_a_proj_with_mqa)[:, None]
            rotate = rotate_interleaved if interleaved else rotate_halves
            return finish(self, down_M1F, self.dense(w.kv_a_layernorm.weight), angles, eps, rotate)

    return Mistake(name, Finished)


def norm_of_all(be: Backend, down: Array, gain: Array, angles: Angles, eps: float, rotate: Callable[..., Array]) -> Array:
    L = len(gain)
    normed = be.rms_norm(down, None, eps)
    return be.xp.concatenate([normed[..., :L] * gain, rotate(be.xp, normed[..., L:], angles)], axis=-1)


def mean_of_all(be: Backend, down: Array, gain: Array, angles: Angles, eps: float, rotate: Callable[..., Array]) -> Array:
    L = len(gain)
    normed = be.rms_norm(down, None, eps)
    return be.xp.concatenate([normed[..., :L] * gain, rotate(be.xp, down[..., L:], angles)], axis=-1)


def rope_normed(be: Backend, down: Array, gain: Array, angles: Angles, eps: float, rotate: Callable[..., Array]) -> Array:
    L = len(gain)
    key = rotate(be.xp, be.rms_norm(down[..., L:], None, eps), angles)
    return be.xp.concatenate([be.rms_norm(down[..., :L], Linear(gain), eps), key], axis=-1)


def not_normed(be: Backend, down: Array, gain: Array, angles: Angles, eps: float, rotate: Callable[..., Array]) -> Array:
    L = len(gain)
    return be.xp.concatenate([down[..., :L] * gain, rotate(be.xp, down[..., L:], angles)], axis=-1)


def less_mean(be: Backend, down: Array, gain: Array, angles: Angles, eps: float, rotate: Callable[..., Array]) -> Array:
    L = len(gain)
    normed = layer_norm(be.xp, down[..., :L], gain, be.xp.zeros_like(gain), eps)
    return be.xp.concatenate([normed, rotate(be.xp, down[..., L:], angles)], axis=-1)


def compressed_turned(
    be: Backend, down: Array, gain: Array, angles: Angles, eps: float, rotate: Callable[..., Array]
) -> Array:
    L = len(gain)
    c, k = be.rms_norm(down[..., :L], Linear(gain), eps), down[..., L:]
    return be.xp.concatenate([rotate(be.xp, c, angles), rotate(be.xp, k, angles)], axis=-1)


PROJECT = (
    finishing("norm over the whole projection, the rope part with it", norm_of_all),
    finishing("norm's mean over the whole projection", mean_of_all),
    finishing("rope part normed too", rope_normed),
    finishing("latent not normed", not_normed),
    finishing("LayerNorm in place of RMSNorm", less_mean),
    finishing("compressed part rotated too", compressed_turned),
    projecting("eps ten times too large", lambda x: x._replace(eps=10.0 * x.eps)),
    projecting("eps forgotten", lambda x: x._replace(eps=0.0)),
    projecting("norm's gain missing", lambda x: x._replace(norm=x.xp.ones_like(x.norm))),
    projecting("norm's gain taken as 1 + w", lambda x: x._replace(norm=1.0 + x.norm)),
    projecting("rope part first", lambda x: x._replace(kv_a=x.xp.roll(x.kv_a, len(x.norm) - len(x.kv_a), axis=0))),
    projecting("rope part in the other pair order", lambda x: x._replace(interleaved=not x.interleaved)),
    turning("angles of another token", lambda cos, sin: (cos[::-1], sin[::-1])),
    turning("no rotation", lambda cos, sin: (cos * 0.0 + 1.0, sin * 0.0)),
    turning("rotation the other way", lambda cos, sin: (cos, -sin)),
    turning("frequencies in reverse", lambda cos, sin: (cos[:, ::-1], sin[:, ::-1])),
)


# -- latent_expand ----------------------------------------------------------------------------------------------------


class Expansion(NamedTuple):
    """The operands of Backend.latent_expand; kv_b as an array."""

    xp: Namespace
    latent: Array
    kv_b: Array
    nope: int
    heads: int

    @property
    def width(self) -> int:
        """L, the compressed vector's."""
        return int(self.kv_b.shape[1])

    @property
    def up(self) -> Array:
        """kv_b by heads, [H, F, L]."""
        return self.kv_b.reshape(self.heads, len(self.kv_b) // self.heads, self.width)

    def with_rows(self, rows_HFL: Array) -> Expansion:
        return self._replace(kv_b=rows_HFL.reshape(self.kv_b.shape))


def expanding(
    name: str,
    before: Callable[[Expansion], Expansion] = lambda x: x,
    after: Callable[[Expansion, Array, Array], tuple[Array, Array]] = lambda x, k, v: (k, v),
) -> Mistake:
    class Changed(Backend):
        def latent_expand(self, latent_SGF: Array, w: Linear, /, nope: int, heads: int) -> tuple[Array, Array]:
            given = Expansion(self.xp, latent_SGF, self.dense(w.weight), nope, heads)
            call = before(given)
            k_SHK, v_SHV = super().latent_expand(call.latent, Linear(self.asarray(call.kv_b)), nope, heads)
            return after(given, k_SHK, v_SHV)

    return Mistake(name, Changed)


def split_over_all_heads(x: Expansion) -> Expansion:
    cut = x.heads * x.nope
    parts = (part.reshape(x.heads, -1, x.width) for part in (x.kv_b[:cut], x.kv_b[cut:]))
    return x.with_rows(x.xp.concatenate([*parts], axis=1))


def values_first(x: Expansion) -> Expansion:
    return x.with_rows(x.xp.roll(x.up, x.nope, axis=1))


def rope_first(x: Expansion) -> Expansion:
    return x._replace(latent=x.xp.roll(x.latent, x.width - x.latent.shape[-1], axis=-1))


def own_rope(x: Expansion, k: Array, v: Array) -> tuple[Array, Array]:
    """Only the first head has the shared key."""
    out = k.copy()
    out[:, 1:, x.nope :] = 0.0
    return out, v


def no_rope(x: Expansion, k: Array, v: Array) -> tuple[Array, Array]:
    return x.xp.concatenate([k[..., : x.nope], 0.0 * k[..., x.nope :]], axis=-1), v


def neighbours_rope(x: Expansion, k: Array, v: Array) -> tuple[Array, Array]:
    return x.xp.concatenate([k[..., : x.nope], x.xp.roll(k[..., x.nope :], -1, axis=0)], axis=-1), v


EXPAND = (
    expanding("kv_b: keys of all heads before all values", split_over_all_heads),
    expanding("kv_b: value rows before key rows", values_first),
    expanding("kv_b: heads interleaved", lambda x: x.with_rows(x.kv_b.reshape(-1, x.heads, x.width).transpose(1, 0, 2))),
    expanding("kv_b: one row off", lambda x: x._replace(kv_b=x.xp.roll(x.kv_b, -1, axis=0))),
    expanding("latent taken as [rope | compressed]", rope_first),
    expanding("last latent number skipped", lambda x: x._replace(kv_b=without_last_column(x.kv_b))),
    expanding("kv_b in 8 bits", lambda x: x._replace(kv_b=in_format(x.kv_b, E4M3))),
    expanding("rope key missing", after=no_rope),
    expanding("rope key given to the first head only", after=own_rope),
    expanding("rope key before the head's own", after=lambda x, k, v: (x.xp.roll(k, k.shape[-1] - x.nope, axis=-1), v)),
    expanding("rope key of the next token", after=neighbours_rope),
    expanding("heads in reverse", after=lambda x, k, v: (k[:, ::-1], v[:, ::-1])),
)
