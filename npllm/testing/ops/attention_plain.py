"""Attention as one formula in four steps, and the mistakes that are made within it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.blocks.masks import Mask
from npllm.cache import Keys, Rows
from npllm.testing.rounding import FORMATS, Format, in_format
from npllm.weights import Linear

# Keys that a kernel takes at a time.
TILE = 16

# The significand of e4m3, over exponents that no probability leaves.
FOUR_BITS = Format("four bits", 4, -126, 127)


def tiles(size: int) -> list[slice]:
    return [slice(begin, begin + TILE) for begin in range(0, size, TILE)]


class Plain(Backend):
    """Softmax attention of NumPy arrays, row by row."""

    def attention(
        self, q_MHK: Array, keys: Keys, rows: Rows, /, *,
        mask: Mask, scale: float, softcap: float | None = None, sinks: Linear | None = None,
    ) -> Array:  # fmt: skip
        H, V = q_MHK.shape[1], keys.v_BSGV.shape[-1]
        out_MHV = np.zeros((len(q_MHK), H, V), q_MHK.dtype)
        for r, (_, start, begin, end) in enumerate(rows):
            k_SGK, v_SGV, first = keys.row(r)
            allowed_TS = mask.allowed(np, np.arange(start, start + end - begin), first + np.arange(len(k_SGK)))
            q_HTK = q_MHK[begin:end].transpose(1, 0, 2)
            k_HKS, v_HSV = (np.repeat(x.transpose(1, 0, 2), H // x.shape[1], axis=0) for x in (k_SGK, v_SGV))
            s_HTS = self.scores(q_HTK, k_HKS.transpose(0, 2, 1), scale, softcap)
            sink_H11 = np.full((H, 1, 1), -np.inf) if sinks is None else self.dense(sinks.weight)[:, None, None]
            hidden_HTS = self.hidden(s_HTS, allowed_TS, softcap)
            p_HTS = self.weights(hidden_HTS, s_HTS, sink_H11) if len(k_SGK) else hidden_HTS
            out_MHV[begin:end] = self.sums(p_HTS.astype(q_MHK.dtype), v_HSV).transpose(1, 0, 2)
        return out_MHV

    def scores(self, q_HTK: Array, k_HKS: Array, scale: float, cap: float | None) -> Array:
        s_HTS = scale * (q_HTK @ k_HKS)
        return s_HTS if cap is None else cap * np.tanh(s_HTS / cap)

    def hidden(self, s_HTS: Array, allowed_TS: Array, cap: float | None) -> Array:
        return np.where(allowed_TS, s_HTS, s_HTS.dtype.type(-math.inf))

    def weights(self, hidden_HTS: Array, s_HTS: Array, sink_H11: Array) -> Array:
        top = np.maximum(np.max(hidden_HTS, axis=-1, keepdims=True), sink_H11)
        top = np.where(np.isfinite(top), top, 0.0)
        p_HTS = np.exp(hidden_HTS - top)
        total = np.sum(p_HTS, axis=-1, keepdims=True) + np.exp(sink_H11 - top)
        return np.asarray(p_HTS / np.where(total == 0.0, 1.0, total))

    def sums(self, p_HTS: Array, v_HSV: Array) -> Array:
        return p_HTS @ v_HSV


class CapBeforeScale(Plain):
    """`scale softcap(q k)`."""

    def scores(self, q_HTK: Array, k_HKS: Array, scale: float, cap: float | None) -> Array:
        return scale * super().scores(q_HTK, k_HKS, 1.0, cap)


class CoarseScores(Plain):
    """Scores are rounded to bfloat16 after scale and soft cap."""

    to = FORMATS["bf16"]

    def scores(self, q_HTK: Array, k_HKS: Array, scale: float, cap: float | None) -> Array:
        return in_format(super().scores(q_HTK, k_HKS, scale, cap), self.to)


class HalfScores(CoarseScores):
    """Scores are rounded to float16."""

    to = FORMATS["f16"]


class CoarseDots(Plain):
    """The running sum of a score is rounded after every tile of the width."""

    def scores(self, q_HTK: Array, k_HKS: Array, scale: float, cap: float | None) -> Array:
        s_HTS = np.zeros((*q_HTK.shape[:2], k_HKS.shape[2]), q_HTK.dtype)
        for part in tiles(q_HTK.shape[2]):
            s_HTS = in_format(s_HTS + super().scores(q_HTK[..., part], k_HKS[:, part], scale, None), FORMATS["bf16"])
        return s_HTS if cap is None else cap * np.tanh(s_HTS / cap)


class CapAfterMask(Plain):
    """-inf becomes -cap."""

    def hidden(self, s_HTS: Array, allowed_TS: Array, cap: float | None) -> Array:
        return np.where(allowed_TS, s_HTS, s_HTS.dtype.type(-(cap or math.inf)))


class Sentinel(Plain):
    """Masked scores are a large number, not -inf."""

    def hidden(self, s_HTS: Array, allowed_TS: Array, cap: float | None) -> Array:
        return np.where(allowed_TS, s_HTS, s_HTS.dtype.type(-1e4))


class ZeroScores(Plain):
    """Masked scores are multiplied by 0."""

    def hidden(self, s_HTS: Array, allowed_TS: Array, cap: float | None) -> Array:
        return np.where(allowed_TS, s_HTS, s_HTS.dtype.type(0.0))


class WholeDenominator(Plain):
    """Masked keys are left out of the sum of values only."""

    def weights(self, hidden_HTS: Array, s_HTS: Array, sink_H11: Array) -> Array:
        return np.where(hidden_HTS == -math.inf, 0.0, super().weights(s_HTS, s_HTS, sink_H11))


class NoMaximum(Plain):
    """The exponential of the score itself, in float32."""

    def weights(self, hidden_HTS: Array, s_HTS: Array, sink_H11: Array) -> Array:
        with np.errstate(all="ignore"):
            p_HTS, sink = np.exp(hidden_HTS.astype(np.float32)), np.exp(sink_H11.astype(np.float32))
            total = np.sum(p_HTS, axis=-1, keepdims=True) + sink
            return np.asarray(p_HTS / np.where(total == 0.0, 1.0, total))


class NoRescaling(Plain):
    """Each tile's exponentials are relative to the maximum so far, and are added up as they are."""

    def weights(self, hidden_HTS: Array, s_HTS: Array, sink_H11: Array) -> Array:
        top = np.where(np.isfinite(sink_H11), sink_H11, np.full((*hidden_HTS.shape[:2], 1), -math.inf))
        parts = []
        for part in tiles(hidden_HTS.shape[-1]):
            top = np.maximum(top, np.max(hidden_HTS[..., part], axis=-1, keepdims=True))
            base = np.where(np.isfinite(top), top, 0.0)
            parts.append(np.exp(hidden_HTS[..., part] - base))
        p_HTS = np.concatenate(parts, axis=-1)
        total = np.sum(p_HTS, axis=-1, keepdims=True) + np.exp(sink_H11 - base)
        return np.asarray(p_HTS / np.where(total == 0.0, 1.0, total))


class SinkPerTile(Plain):
    """Each tile of keys brings the sink along."""

    def weights(self, hidden_HTS: Array, s_HTS: Array, sink_H11: Array) -> Array:
        return super().weights(hidden_HTS, s_HTS, sink_H11 + math.log(len(tiles(hidden_HTS.shape[-1]))))


class MaskedMean(Plain):
    """A query that sees nothing attends to all keys alike."""

    def weights(self, hidden_HTS: Array, s_HTS: Array, sink_H11: Array) -> Array:
        nothing = (hidden_HTS == -math.inf).all(axis=-1, keepdims=True)
        return np.where(nothing, 1.0 / hidden_HTS.shape[-1], super().weights(hidden_HTS, s_HTS, sink_H11))


class MaskedNaN(Plain):
    """0 / 0 where a query sees nothing."""

    def weights(self, hidden_HTS: Array, s_HTS: Array, sink_H11: Array) -> Array:
        nothing = (hidden_HTS == -math.inf).all(axis=-1, keepdims=True)
        return np.where(nothing, np.nan, super().weights(hidden_HTS, s_HTS, sink_H11))


class CoarseProbs(Plain):
    """Probabilities are rounded to four significant bits."""

    def sums(self, p_HTS: Array, v_HSV: Array) -> Array:
        return super().sums(in_format(p_HTS, FOUR_BITS), v_HSV)


class CoarseSums(Plain):
    """The running sum of values is rounded after every tile of keys."""

    def sums(self, p_HTS: Array, v_HSV: Array) -> Array:
        out_HTV: Any = np.zeros((*p_HTS.shape[:2], v_HSV.shape[-1]), v_HSV.dtype)
        for part in tiles(p_HTS.shape[-1]):
            out_HTV = in_format(out_HTV + super().sums(p_HTS[..., part], v_HSV[:, part]), FORMATS["bf16"])
        return np.asarray(out_HTV)
