"""Multi-head latent attention (npllm.blocks.mla): `latent_project`, `latent_expand`, `latent_attention`.

Rows of few queries attend to the latents themselves: `absorb` takes the queries there by the rows of kv_b_proj as they are
stored, `unabsorb` brings back what comes out. For other rows the keys and values of all heads are made first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import RMS, Norm, accelerates, split_heads
from npllm.backends.cupy_gpu.attention import BF16, F32, Attention, aligned
from npllm.backends.cupy_gpu.base import THREADS, groups
from npllm.backends.cupy_gpu.cache import HEADS, NOT_TAKEN, DeviceLayerCache
from npllm.backends.cupy_gpu.device import Argument, InOut, Out
from npllm.backends.cupy_gpu.matrix import FORMATS, PER_VECTOR, Matrix
from npllm.backends.cupy_gpu.products import STAGED_BYTES, Products, unprepared
from npllm.blocks.masks import Mask
from npllm.blocks.rope import Angles
from npllm.cache import Keys, LayerCache, Rows
from npllm.weights import LatentKV, LatentQ, Linear

# Of latent_attention.cu: queries of a tile, keys of a step, and tiles that share the keys of a block.
QUERIES, KEYS, TILES = 16, 32, (1, 2, 4)

# Of absorb.cu: threads, and vectors of a row that a block takes.
PRODUCT_THREADS, ACROSS = 128, 8

# Numbers of a latent that TOKENS tokens can be staged with.
MOST_STAGED = STAGED_BYTES // 4

# Parts that keys are cut into at most; each costs those who merge a row of numbers per head.
MOST_SPLITS = 64


# Numbers of a latent at most: the sums of a query fit into the registers of four warps.
WIDEST = 640


def shared_bytes(width: int, tiles: int) -> int:
    """The size of struct Shared of latent_attention.cu."""
    queries = tiles * QUERIES
    return 4 * KEYS * (groups(width, 64) * 64 + 8) + queries * (16 * (KEYS + 4) + 2 * (KEYS + 8) + 12)


def not_latents(be: Products, keys: Keys, w: Linear) -> str | None:
    """Why kernels cannot attend to these."""
    x_BSGK = keys.k_BSGK
    if x_BSGK.shape[2] != 1 or w.bias is not None:
        return "latents of several heads, or a bias"
    if x_BSGK.shape[-1] > WIDEST:
        return f"latents {x_BSGK.shape[-1]} wide"
    if x_BSGK.dtype != np.dtype("float32" if keys.widen is None else "uint16"):
        return f"latents of {x_BSGK.dtype}"
    if x_BSGK.size and x_BSGK.strides[-1] != x_BSGK.itemsize:
        return "the numbers of a latent do not lie side by side"
    return unprepared(be, w)


def not_placed(be: Products, q: Linear | LatentQ, kv: LatentKV, memory: LayerCache) -> str | None:
    """Why kernels cannot bring these latents to the cache."""
    if be.dtype == "float64" or not isinstance(memory, DeviceLayerCache):
        return NOT_TAKEN
    matrices = (q.q_a_proj, q.q_b_proj) if isinstance(q, LatentQ) else (q,)
    return unprepared(be, kv.kv_a_proj_with_mqa, *matrices)


class Latents(Attention, Products):
    """Latent attention."""

    @accelerates(lambda self, h_MD, w, angles, eps, interleaved=True: unprepared(self, w.kv_a_proj_with_mqa))
    def latent_project(self, h_MD: Array, w: LatentKV, angles: Angles, /, eps: float, *, interleaved: bool = True) -> Array:
        down_MF = self.product(h_MD, w.kv_a_proj_with_mqa)
        latent_MGK = self.empty(len(down_MF), 1, down_MF.shape[1])
        self._place_latents(None, down_MF, w, None, angles, eps, interleaved, None, Out(latent_MGK), {"STORED": F32})
        return latent_MGK

    @accelerates(lambda self, x_MD, q, kv, memory, *args, **kwargs: not_placed(self, q, kv, memory))
    def append_latents(
        self, x_MD: Array, q: Linear | LatentQ, kv: LatentKV, memory: LayerCache, rows: Rows, angles: Angles, /,
        head_dim: int, eps: float, *, norm: Norm | None = None, interleaved: bool = True, scale_M: Array | None = None,
    ) -> tuple[Array, Keys]:  # fmt: skip
        assert isinstance(memory, DeviceLayerCache)
        if not memory.takes(rows):
            how: dict[str, Any] = {"norm": norm, "interleaved": interleaved, "scale_M": scale_M}
            return super().append_latents(x_MD, q, kv, memory, rows, angles, head_dim, eps, **how)
        first = q.q_a_proj if isinstance(q, LatentQ) else q
        q_MF, down_MF = self.products(x_MD, (first, kv.kv_a_proj_with_mqa), norm)
        if isinstance(q, LatentQ):
            q_MF = self.product(q_MF, q.q_b_proj, norm=RMS(q.q_a_layernorm, eps))
        q_MHK, keys = split_heads(q_MF, head_dim), memory.place(rows)
        assert keys is not None
        storage = InOut(memory.stored[0])
        plan = self.plan(keys, rows)
        self._place_latents(
            plan, down_MF, kv, q_MHK, angles, eps, interleaved, scale_M, storage, memory.defines, memory.size
        )
        return q_MHK, keys

    def _place_latents(
        self, plan: Array | None, down_MF: Array, kv: LatentKV, q_MHK: Array | None, angles: Angles, eps: float,
        interleaved: bool, scale_M: Array | None, storage: Out | InOut, defines: Mapping[str, int], size: int = 0,
    ) -> None:  # fmt: skip
        """`[norm(c) | rope(k)]` of each token to where it is kept; queries turn in their place."""
        (M, width), L = down_MF.shape, len(kv.kv_a_layernorm.weight)
        cos_MJ, sin_MJ = self.plain(angles.cos_MJ), self.plain(angles.sin_MJ)
        heads = (None, 0, 0) if q_MHK is None else (InOut(q_MHK), *q_MHK.shape[1:])
        args = (
            plan, 0 if plan is None else len(plan), down_MF, width, L, width - L, self.vector(kv.kv_a_layernorm, "weight"),
            float(eps), *heads, cos_MJ, sin_MJ, cos_MJ.shape[1], int(interleaved),
            None if scale_M is None else self.plain(scale_M), size, storage,
        )  # fmt: skip
        if M:
            grid = (M, 1 + groups(heads[1], HEADS), 1)
            self.launch("heads.cu", "place_latents", defines, grid, 32 * HEADS, args)

    @accelerates(lambda self, latent_SGF, w, nope, heads: unprepared(self, w))
    def latent_expand(self, latent_SGF: Array, w: Linear, /, nope: int, heads: int) -> tuple[Array, Array]:
        latent_SGF = self.plain(latent_SGF)
        (S, _, width), (rows, L) = latent_SGF.shape, w.weight.shape
        value, turning = rows // heads - nope, width - L
        up_SF = self.product(latent_SGF[:, 0, :L], w)
        k_SHK, v_SHV = self.empty(S, heads, nope + turning), self.empty(S, heads, value)
        count = S * heads * (nope + turning + value)
        if count:
            shared = latent_SGF[:, 0, L:]
            args = (up_SF, S, heads, nope, value, shared, width, turning, Out(k_SHK), Out(v_SHV))
            self.launch("latent.cu", "place_keys", {}, (groups(count, THREADS), 1, 1), THREADS, args)
        return k_SHK, v_SHV

    @accelerates(lambda self, q_MHF, keys, rows, w, nope, mask, scale: not_latents(self, keys, w))
    def latent_absorbed(self, q_MHF: Array, keys: Keys, rows: Rows, w: Linear, nope: int, mask: Mask, scale: float) -> Array:
        q_MHF, matrix = self.plain(q_MHF), w.weight
        (M, H, F), L = q_MHF.shape, matrix.shape[1]
        turning, value = F - nope, matrix.shape[0] // H - nope
        q_MHK, out_MHV = self.empty(M, H, L + turning), self.empty(M, H, value)
        if not out_MHV.size:
            return out_MHV
        tokens = self._tokens(M, matrix)
        defines = {"FORMAT": FORMATS[matrix.format], "TOKENS": tokens}
        grid = (H, groups(L, ACROSS * PER_VECTOR[matrix.format]), groups(M, tokens))
        args: tuple[Argument, ...] = (q_MHF, M, H, nope, turning, matrix.structure, Out(q_MHK))
        self.launch("absorb.cu", "absorb", defines, grid, PRODUCT_THREADS, args)
        if self.dtype == "float32":
            partial, splits = self.plain(self.attention(q_MHK, keys, rows, mask=mask, scale=scale)), 0
        else:
            partial, splits = self._attend_latents(q_MHK, keys, rows, L, mask, scale)
        wide = 4 * groups(value, 16) if H * groups(M, tokens) < self.device.multiprocessors else value
        args = (partial, splits, M, H, nope, wide, matrix.structure, Out(out_MHV))
        grid = (H, groups(value, wide), groups(M, tokens))
        self.launch("absorb.cu", "unabsorb", defines, grid, PRODUCT_THREADS, args, STAGED_BYTES)
        return out_MHV

    def _attend_latents(
        self, q_MHK: Array, keys: Keys, rows: Rows, latent: int, mask: Mask, scale: float
    ) -> tuple[Array, int]:
        """Attention on tensor cores -> what each part of the keys gives [M, H, parts, L + 2], and how many there are."""
        x_BSGK, (M, H, width) = keys.k_BSGK, q_MHK.shape
        lanes = max(rows.counts) * H
        fitting = [each for each in TILES if shared_bytes(width, each) <= self.device.shared_limit]
        tiles = next((each for each in fitting if each * QUERIES >= lanes), fitting[-1])
        blocks = groups(lanes, tiles * QUERIES)
        splits = min(MOST_SPLITS, self._splits(keys, len(rows.counts) * blocks))
        partial = self.empty(M, H, splits, latent + 2)
        stored = BF16 if x_BSGK.dtype == np.uint16 else F32
        defines = {"STORED": stored, "WIDTH": width, "LATENT": latent, "HEAD_TILES": tiles}
        steps = tuple(step // x_BSGK.itemsize for step in x_BSGK.strides[:3])
        whole, seen = int(aligned(self, x_BSGK)), (mask.window or 0, mask.chunk or 0)
        args = (
            self.plan(keys, rows), *self._pages(keys), q_MHK, H, x_BSGK, *steps,
            max(1, x_BSGK.shape[1]), whole, *seen, float(scale), Out(partial),
        )  # fmt: skip
        grid = (splits, blocks, len(rows.counts))
        self.launch("latent_attention.cu", "attend_latents", defines, grid, 128 * tiles, args, shared_bytes(width, tiles))
        return partial, splits

    def _tokens(self, tokens: int, matrix: Matrix) -> int:
        """How many tokens a block of absorb.cu takes: their sums, and their latents, have to fit."""
        per = PER_VECTOR[matrix.format]
        most = max(1, min(32 // per, MOST_STAGED // max(1, groups(matrix.shape[1], 32) * 32)))
        return 1 << (min(most, 4, tokens).bit_length() - 1)
