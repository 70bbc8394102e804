"""A backend as another package would bring it, in its own way throughout, and the same with mistakes in it."""

from itertools import pairwise
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend, accelerates
from npllm.blocks.masks import Mask
from npllm.blocks.moe import Router, eligible
from npllm.cache import Keys, Rows
from npllm.sampling import Drawn
from npllm.weights import Experts, Gate, Linear


def has_sinks(
    self: Backend, q_MHK: Array, keys: Keys, rows: Rows, /, *,
    mask: Mask, scale: float, softcap: float | None = None, sinks: Linear | None = None,
) -> str | None:  # fmt: skip
    return None if sinks is None else "attention sinks"


def weighs_input(
    self: Backend, x_MD: Array, w: Experts, index_MC: Array, weight_MC: Array, /, act: str, *, weigh: str = "output"
) -> str | None:
    return "weights on the experts' input" if weigh == "input" else None


class Mine(Backend):
    """Attention head by head with keys in tiles, products in tiles of features, experts token by token."""

    name = "mine"
    tile = 24

    def rms_norm(self, x_D: Array, w: Linear | None, /, eps: float, offset: float = 0.0) -> Array:
        squares = np.einsum("...d,...d->...", x_D, x_D)[..., None]
        y_D = x_D * (squares / x_D.shape[-1] + x_D.dtype.type(eps)) ** x_D.dtype.type(-0.5)
        return y_D if w is None else y_D * (self.dense(w.weight) + x_D.dtype.type(offset))

    def linear(self, x_MD: Array, w: Linear, /, residual_MF: Array | None = None) -> Array:
        weight_FD = self.dense(w.weight)
        tiles = pairwise([*range(0, len(weight_FD), self.tile), len(weight_FD)])
        y_MF = np.concatenate([x_MD @ weight_FD[begin:end].T for begin, end in tiles], axis=1)
        for more in (w.bias, residual_MF):
            y_MF += 0 if more is None else self.dense(more)
        return y_MF

    @accelerates(has_sinks)
    def attention(
        self, q_MHK: Array, keys: Keys, rows: Rows, /, *,
        mask: Mask, scale: float, softcap: float | None = None, sinks: Linear | None = None,
    ) -> Array:  # fmt: skip
        out_MHV = np.zeros((*q_MHK.shape[:2], keys.v_BSGV.shape[-1]), q_MHK.dtype)
        for r, (_, start, begin, end) in enumerate(rows):
            k_SGK, v_SGV, first = keys.row(r)
            seen_TS = mask.allowed(np, np.arange(start, start + end - begin), first + np.arange(len(k_SGK)))
            each = q_MHK.shape[1] // k_SGK.shape[1]
            for h in range(q_MHK.shape[1]):
                head = (q_MHK[begin:end, h] * scale, k_SGK[:, h // each], v_SGV[:, h // each])
                out_MHV[begin:end, h] = self.head(*head, seen_TS, softcap)
        return out_MHV

    def head(self, q_TK: Array, k_SK: Array, v_SV: Array, seen_TS: Array, softcap: float | None) -> Array:
        """One head with an online softmax over tiles of keys; -> [T, V], 0 where a query sees no key."""
        top_T1: Any = np.full((len(q_TK), 1), -np.inf, q_TK.dtype)
        sums_TV: Any = np.zeros((len(q_TK), v_SV.shape[1] + 1), q_TK.dtype)
        for begin in range(0, len(k_SK), self.tile):
            seen = seen_TS[:, begin : begin + self.tile]
            if not seen.any():
                continue
            used = seen.any(axis=0)
            k, v = k_SK[begin : begin + self.tile][used], v_SV[begin : begin + self.tile][used]
            scores = q_TK @ k.T
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            scores = np.where(seen[:, used], scores, -np.inf)
            new_T1 = np.maximum(top_T1, scores.max(axis=1, keepdims=True))
            base_T1 = np.where(new_T1 == -np.inf, 0, new_T1)
            p = np.exp(scores - base_T1)
            sums_TV = sums_TV * np.exp(top_T1 - base_T1) + p @ np.concatenate([v, np.ones_like(v[:, :1])], axis=1)
            top_T1 = new_T1
        return sums_TV[:, :-1] / np.where(sums_TV[:, -1:] == 0, 1, sums_TV[:, -1:])

    def route(self, h_MD: Array, w: Gate, /, router: Router) -> tuple[Array, Array]:
        logits_ME = self.linear(h_MD, w.gate)
        if router.scores == "sigmoid":
            small_ME = np.exp(-np.abs(logits_ME))
            scores_ME = np.where(logits_ME < 0, small_ME, 1) / (1 + small_ME)
        else:
            scores_ME = np.exp(logits_ME - np.max(logits_ME, axis=1, keepdims=True))
            scores_ME /= scores_ME.sum(axis=1, keepdims=True)
        ranks_ME = (logits_ME if router.by == "logits" else scores_ME).copy()
        if w.correction is not None:
            ranks_ME += self.dense(w.correction.weight)
        index_MC = self.best(eligible(np, ranks_ME, router), router.experts_per_token)
        weight_MC = np.take_along_axis(scores_ME, index_MC, axis=1)
        if router.normalise:
            weight_MC /= weight_MC.sum(axis=1, keepdims=True) + router.floor
        return index_MC, weight_MC * router.scale

    def best(self, ranks_ME: Array, k: int) -> Array:
        """One after the other: the largest, the lowest index of equal ones."""
        left_ME, found = ranks_ME.copy(), []
        for _ in range(k):
            found.append(np.argmax(left_ME, axis=1))
            np.put_along_axis(left_ME, found[-1][:, None], -np.inf, axis=1)
        return np.stack(found, axis=1)

    @accelerates(weighs_input)
    def moe(
        self, x_MD: Array, w: Experts, index_MC: Array, weight_MC: Array, /, act: str, *, weigh: str = "output"
    ) -> Array:
        y_MD = np.zeros_like(x_MD)
        for m, (chosen, weights) in enumerate(zip(index_MC.tolist(), weight_MC, strict=True)):
            for e, weight in zip(chosen, weights, strict=True):
                parts = (self.dense(part.weight[e]) for part in w)
                y_MD[m] += weight * self.expert(x_MD[m : m + 1], *parts, act)[0]
        return y_MD


# -- the same with a mistake --------------------------------------------------------------------------------------------


class Capless(Mine):
    """Forgets the soft cap."""

    name = "capless"

    def head(self, q_TK: Array, k_SK: Array, v_SV: Array, seen_TS: Array, softcap: float | None) -> Array:
        return super().head(q_TK, k_SK, v_SV, seen_TS, None)


class WideWindow(Mine):
    """Lets a query see one key too many."""

    name = "widewindow"

    def attention(self, q_MHK: Array, keys: Keys, rows: Rows, /, *, mask: Mask, **how: Any) -> Array:  # type: ignore[override]
        wide = mask._replace(window=mask.window and mask.window + 1)
        return super().attention(q_MHK, keys, rows, mask=wide, **how)


class Unscaled(Mine):
    """Drops the router's scale."""

    name = "unscaled"

    def route(self, h_MD: Array, w: Gate, /, router: Router) -> tuple[Array, Array]:
        return super().route(h_MD, w, router._replace(scale=1.0))


class LastOfTies(Mine):
    """Answers greedily with the last of the best tokens."""

    name = "lastofties"

    def step(self, model: Any, state: Any, /) -> Drawn:
        logits_WN = super().step(model, state).logits_WN
        assert logits_WN is not None
        return Drawn(logits_WN.shape[1] - 1 - np.argmax(logits_WN[:, ::-1], axis=1), logits_WN)
