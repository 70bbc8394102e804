"""The canon cut into parts for threads: the backend "numpy".

A step over many tokens (a prompt) is bound by arithmetic. Its products are cut by output features and everything else
by tokens, one part per thread, with BLAS keeping to one thread in each: BLAS's own threads spin for a while after every
product and would take the cores from the work between products. A step over few tokens (decoding) is bound by memory;
there BLAS's threads serve best, and the canonical bodies are inherited as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npllm import blocks, parallel
from npllm.arrays import Array
from npllm.backend import Backend, Norm, split_heads, widened_parts
from npllm.blocks.masks import Mask
from npllm.blocks.rope import Angles
from npllm.cache import Keys, Rows
from npllm.handles import Stack, Weight
from npllm.machine import default_threads
from npllm.weights import QKV, Experts, GatedFFN, Linear

# Tokens from which a step is cut into parts.
SPLIT = 64

# Multiply-adds below which one thread is faster than waking a second.
SMALL_PRODUCT = 1 << 23
SMALL_STEP = 1 << 25

# Features of a product that one thread computes at a time: more parts than threads, so that a disturbed one holds up less.
WIDE = 1024

# Features that one thread takes through gate, up and activation at a time: with 512 tokens they stay in its cache.
FEATURES = 256


class NumpyBackend(Backend):
    """The canon on NumPy, in parts: the same sums, cut where no sum is cut."""

    @property
    def parts(self) -> int:
        return self.threads or default_threads()

    def mapped(self, bundle: Any) -> Any:
        """The handles; the arrays that they are widened to at each use take each other's memory."""
        parallel.keep_freed_memory()
        return super().mapped(bundle)

    def limited(self, tokens: int, parameters: int) -> contextlib.AbstractContextManager[None]:
        """BLAS keeps to `threads`, or to one in a step that is cut into parts, or that is too small to share."""
        if tokens >= SPLIT:
            parallel.keep_freed_memory()
        alone = tokens >= SPLIT or tokens * parameters < SMALL_STEP
        return parallel.blas_threads(1 if alone else self.threads)

    def _rowwise(self, block: Callable[..., Array], *arrays: Array) -> Array:
        if len(arrays[0]) < SPLIT:
            return block(*arrays)
        return parallel.rowwise(block, self.parts, *arrays)

    def rms_norm(self, x_D: Array, w: Linear | None, /, eps: float, offset: float = 0.0) -> Array:
        return self._rowwise(lambda x: blocks.rms_norm(np, x, w and self.dense(w.weight), eps, offset), x_D)

    def layer_norm(self, x_D: Array, w: Linear, /, eps: float) -> Array:
        return self._rowwise(lambda x: blocks.layer_norm(np, x, self.dense(w.weight), self.dense(w.bias), eps), x_D)

    def rope(self, x_MHK: Array, angles: Angles, /, interleaved: bool = False) -> Array:
        rotate = blocks.rotate_interleaved if interleaved else blocks.rotate_halves
        return self._rowwise(lambda x, cos, sin: rotate(np, x, Angles(cos, sin)), x_MHK, *angles)

    def linear(self, x_MD: Array, w: Linear, /, residual_MF: Array | None = None) -> Array:
        # The head of a prompt's step sees one row; BLAS is kept to one thread there, so it is cut like the rest.
        few = x_MD.size * len(w.weight) < SMALL_PRODUCT or (len(x_MD) < SPLIT and not parallel.blas_is_alone())
        if few and not isinstance(w.weight, Weight):
            return super().linear(x_MD, w, residual_MF)
        y_MF = np.empty((len(x_MD), len(w.weight)), x_MD.dtype)

        def features(part: slice) -> None:
            self._features(x_MD, w, part, y_MF[:, part])
            if residual_MF is not None:
                y_MF[:, part] += residual_MF[:, part]

        if isinstance(w.weight, Weight):
            self._spread(features, widened_parts(w.weight))
        else:
            self._spread(features, parallel.split(len(w.weight), max(self.parts, len(w.weight) // WIDE)))
        return y_MF

    def _spread(self, work: Callable[[Any], None], items: Sequence[Any]) -> None:
        """`work` on every item, over the threads, with BLAS keeping to one in each: `limited` may have left it more."""
        with contextlib.nullcontext() if parallel.blas_is_alone() else parallel.blas_threads(1):
            parallel.each(work, items, self.parts)

    def attention(
        self, q_MHK: Array, keys: Keys, rows: Rows, /, *,
        mask: Mask, scale: float, softcap: float | None = None, sinks: Linear | None = None,
    ) -> Array:  # fmt: skip
        if len(q_MHK) < SPLIT:
            return super().attention(q_MHK, keys, rows, mask=mask, scale=scale, softcap=softcap, sinks=sinks)
        out_MHV = np.empty((*q_MHK.shape[:2], keys.v_BSGV.shape[-1]), q_MHK.dtype)
        pieces = self.attention_pieces(q_MHK, keys, rows, out_MHV, mask, scale, softcap, sinks)
        parallel.each(lambda piece: piece(), pieces, self.parts)
        return out_MHV

    def project_heads(
        self, x_MD: Array, w: QKV, /, head_dim: int, *, norm: Norm | None = None
    ) -> tuple[Array, Array, Array]:
        if len(x_MD) < SPLIT or x_MD.size * len(w.k_proj.weight) < SMALL_PRODUCT:
            return super().project_heads(x_MD, w, head_dim, norm=norm)
        h_MD = self.normed(x_MD, norm)
        outputs = [np.empty((len(h_MD), len(module.weight)), h_MD.dtype) for module in w]
        # One round for the three products: the threads wait for each other once.
        parts = [
            (module, out, part)
            for module, out in zip(w, outputs, strict=True)
            for part in parallel.split(out.shape[1], max(self.parts, out.shape[1] // WIDE))
        ]
        parallel.each(lambda each: self._features(h_MD, each[0], each[2], each[1][:, each[2]]), parts, self.parts)
        q_MF, k_MF, v_MF = outputs
        return split_heads(q_MF, head_dim), split_heads(k_MF, head_dim), split_heads(v_MF, head_dim)

    def gated_ffn(
        self, x_MD: Array, w: GatedFFN, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None
    ) -> Array:
        inner = len(w.gate_proj.weight)
        if len(x_MD) < SPLIT or x_MD.size * inner < SMALL_PRODUCT:
            return super().gated_ffn(x_MD, w, act, norm=norm, residual_MD=residual_MD)
        h_MD = self.normed(x_MD, norm)
        hidden_MF = np.empty((len(x_MD), inner), x_MD.dtype)

        def features(part: slice) -> None:
            gate, up = np.empty((2, len(h_MD), part.stop - part.start), h_MD.dtype)
            self._features(h_MD, w.gate_proj, part, gate)
            self._features(h_MD, w.up_proj, part, up)
            np.multiply(blocks.ACTIVATIONS[act](np, gate), up, out=hidden_MF[:, part])

        parallel.each(features, parallel.split(inner, max(self.parts, inner // FEATURES)), self.parts)
        return self.linear(hidden_MF, w.down_proj, residual_MD)

    def moe(
        self, x_MD: Array, w: Experts, index_MC: Array, weight_MC: Array, /, act: str, *, weigh: str = "output"
    ) -> Array:
        if len(x_MD) < SPLIT and not isinstance(w.gate_proj.weight, Stack):
            return super().moe(x_MD, w, index_MC, weight_MC, act, weigh=weigh)
        out_MCD = np.empty((*index_MC.shape, x_MD.shape[1]), x_MD.dtype)
        pieces = self.moe_pieces(x_MD, w, index_MC, weight_MC, out_MCD, act, weigh)
        self._spread(lambda piece: piece(), pieces)
        y_MD = np.empty_like(x_MD)
        self._spread(lambda part: np.sum(out_MCD[part], axis=1, out=y_MD[part]), parallel.split(len(y_MD), self.parts))
        return y_MD

    def expert(self, x_TD: Array, gate_FD: Array, up_FD: Array, down_DF: Array, act: str) -> Array:
        # Few tokens against a whole matrix: BLAS is faster by a third where it need not transpose the matrix.
        x_DT = np.ascontiguousarray(x_TD.T)
        hidden_FT = blocks.ACTIVATIONS[act](np, gate_FD @ x_DT)
        hidden_FT *= up_FD @ x_DT
        return (down_DF @ hidden_FT).T

    def _features(self, x_MD: Array, w: Linear, part: slice, out: Array) -> None:
        """The features in `part` of `x W^T + b`, into `out`."""
        np.matmul(x_MD, self.dense(w.weight[part]).T, out=out)
        if w.bias is not None:
            out += self.dense(w.bias)[part]
