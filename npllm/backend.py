"""class Backend: the hot operations and their canonical bodies.

`Backend` itself is the canon, on NumPy. A faster backend subclasses it, overrides what it can do faster and inherits the
rest; the first is `npllm.numpy_backend`, the canon cut into parts for threads. There are two grains: fine operations
(`linear`, `attention`, ...) and coarse ones that a fast backend wants whole (`project_heads`, `gated_ffn`, `step`), whose
canonical bodies call the fine ones; overriding either works.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from npllm import blocks, grouped, parallel
from npllm.arrays import Array, DTypeLike, Namespace
from npllm.blocks.masks import Mask
from npllm.blocks.moe import Router
from npllm.blocks.rope import Angles, Rope
from npllm.cache import Cache, Keys, LayerCache, LayerSpec, Rows
from npllm.errors import BackendError
from npllm.handles import Handle, Stack, Weight
from npllm.machine import available_memory
from npllm.sampling import Drawn, whole
from npllm.weights import MLP, QKV, Experts, Gate, GatedFFN, LatentKV, LatentQ, Linear, Tensor

if TYPE_CHECKING:
    from npllm.generation import State
    from npllm.model import Model

log = logging.getLogger("npllm")

# Numbers of a matrix on disk that are widened at a time: 1 MiB as float32 stays in a core's cache.
WIDENED = 1 << 18


class RMS(NamedTuple):
    """An RMS norm in front of a coarse operation: its prepared gain (None: 1), eps, and what is added to the gain."""

    params: Linear | None
    eps: float
    offset: float = 0.0


class LN(NamedTuple):
    """A LayerNorm in front of a coarse operation: its prepared gain and bias, and eps."""

    params: Linear
    eps: float


Norm = RMS | LN


class HeadNorms(NamedTuple):
    """RMS norms of new queries and keys (qk-norm), and of values, each over a head; None leaves them as they are.

    whole   the norm of queries and that of keys run over all heads side by side (OLMo 2).
    turned  queries and keys are normed after RoPE (Llama 4), not before it.
    """

    q: RMS | None = None
    k: RMS | None = None
    v: RMS | None = None
    whole: bool = False
    turned: bool = False


UNNORMED = HeadNorms()


def split_heads(x_MF: Array, head_dim: int) -> Array:
    """x_MF -> x_MHK of heads `head_dim` wide; M = 0 is legal."""
    return x_MF.reshape(len(x_MF), x_MF.shape[1] // head_dim, head_dim)


def merge_heads(o_MHV: Array) -> Array:
    """o_MHV -> o_MF, the heads side by side; M = 0 is legal."""
    return o_MHV.reshape(len(o_MHV), o_MHV.shape[1] * o_MHV.shape[2])


def widened_parts(weight: Any, numbers: int = WIDENED) -> list[slice]:
    """A weight in parts of rows that are widened at a time, about so many numbers each."""
    rows = max(1, numbers // max(1, math.prod(weight.shape[1:])))
    return [slice(begin, begin + rows) for begin in range(0, len(weight), rows)]


class Backend:
    """The canon, and the base of all backends.

    dtype     arithmetic: "float32" (None means this) or "float64"; weights are widened to it when they are prepared.
    strict    an override that declines an operation raises BackendError instead of falling back to the canon.
    threads   threads of the backend's own kernels and of BLAS; None leaves the environment's choice (OMP_NUM_THREADS).
    quantize  a name of `quantizations`: weights are turned into fewer bits when they are prepared.
    """

    name: ClassVar[str] = "numpy"
    xp: ClassVar[Namespace] = np
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float64")
    quantizations: ClassVar[tuple[str, ...]] = ()

    # Prompt tokens of a step, where npllm.generation's own number does not suit.
    prompt_tokens: ClassVar[int | None] = None

    # Whether it can compute with weights that stay on disk.
    on_disk: ClassVar[bool] = True

    # Why npllm.registry took it.
    why: str = "asked for"

    def __init__(
        self,
        dtype: str | None = None,
        *,
        strict: bool = False,
        threads: int | None = None,
        quantize: str | None = None,
    ) -> None:
        self.dtype = dtype or self.dtypes[0]
        if self.dtype not in self.dtypes:
            raise BackendError(f"the {self.name} backend computes in {' or '.join(self.dtypes)}, not in {self.dtype}")
        if quantize is not None and quantize not in self.quantizations:
            instead = f"it knows {' and '.join(self.quantizations)}" if self.quantizations else "the numba backend does"
            raise BackendError(
                f"the {self.name} backend does not quantise weights to {quantize!r}; {instead}, or leave quantize None"
            )
        self.threads = None if threads is None else whole("threads", threads, 1)
        self.strict, self.quantize = strict, quantize

    @classmethod
    def check(cls) -> None:
        """BackendError where it cannot run on this machine: why, and what to do."""

    @property
    def array_dtype(self) -> str:
        """The dtype of activations and caches: float64 when the arithmetic is, else float32."""
        return "float64" if self.dtype == "float64" else "float32"

    def rounding(self, operation: str, storage: str) -> Mapping[str, str]:
        """Where an operation's results are coarser than arithmetic in `array_dtype`, for `npllm verify`: rounding points of
        npllm.testing.Rounding by name.

        `storage` is the weights' format (f32, f16, bf16, f8_e4m3, q8, q4); "step" as operation is a whole model.
        """
        return {}

    def facts(self) -> dict[str, Any]:
        """What a bug report should know of this backend, for `npllm doctor`: JSON values by name."""
        return {}

    def warm_up(self, progress: Callable[[int, int], None], model: Model | None = None) -> int:
        """Compile ahead what would be compiled at its first use, for `model` or for any -> how many functions that were.

        `progress` is called with how many are done and how many there are.
        """
        return 0

    # -- arrays and weights -------------------------------------------------------------------------------------------

    def asarray(self, x: Any, dtype: DTypeLike | None = None) -> Array:
        """`x` as an array of this backend."""
        return self.xp.asarray(x, dtype=dtype)

    def to_numpy(self, x: Array) -> Array:
        """An array of this backend as a NumPy array."""
        return np.asarray(x)

    def prepare(self, bundle: Any) -> Any:
        """A tuple of handles (nested: `Linear`, `QKV`, ...) -> the same tuple of what the operations take.

        Called once per bundle. The canon widens each handle to `dtype`, or maps the file where its type is the same. A
        backend may put anything in the place of a handle that its `dense` turns into an array; the tuple's fields stay,
        since under a trace the canonical bodies read them.
        """
        if bundle is None:
            return None
        if isinstance(bundle, Weight):
            if bundle.part == "lookup":
                bundle.will_look_up()
                return bundle
            values = bundle.array(self.array_dtype)
            if values.base is None:
                bundle.release()
            return values
        if isinstance(bundle, Stack):
            return [self.prepare(weight) for weight in bundle.weights]
        return type(bundle)(*map(self.prepare, bundle))

    def quantised(self, weight: Weight, format: str) -> Weight:
        """A matrix in q8 or q4, in memory; CheckpointError if a number cannot be stored."""
        return grouped.quantised(weight, format)

    def mapped(self, bundle: Any) -> Any:
        """What stands for `prepare(bundle)` when weights stay on disk: the handles, widened part by part at each use."""
        return bundle

    def dense(self, weight: Any) -> Array:
        """A prepared or mapped weight as an array that the canonical bodies can compute with."""
        if not isinstance(weight, Weight):
            return weight
        weight.will_need()
        return weight.array(self.array_dtype)

    def is_finite(self, weight: Any) -> bool:
        """Whether a prepared or mapped weight holds nothing but finite numbers; it needs little memory."""
        return all(self.xp.isfinite(self.dense(weight[part])).all() for part in widened_parts(weight))

    def bytes_needed(self, tensors: Iterable[Tensor | Handle]) -> int:
        """Memory that these weights take when they are prepared."""
        numbers = sum(math.prod(tensor.shape) for tensor in tensors if tensor.part != "lookup")
        return numbers * np.dtype(self.array_dtype).itemsize

    def pinned_bytes(self, tensors: Iterable[Tensor | Handle]) -> int:
        """Memory of the host that these weights take besides, where a backend keeps its weights elsewhere."""
        return 0

    def available_memory(self) -> int:
        """Bytes that weights and caches can still take, where this backend keeps them."""
        return available_memory()

    def new_cache(self, specs: Sequence[LayerSpec], max_context: int, kv_dtype: str | None = None) -> Cache:
        """An empty key/value cache with one layer per spec (npllm.cache)."""
        return Cache(self.xp, specs, self.array_dtype, max_context, kv_dtype, self.available_memory)

    def limited(self, tokens: int, parameters: int) -> contextlib.AbstractContextManager[None]:
        """The context that a forward pass over so many tokens runs in: here, BLAS keeps to `threads`."""
        return parallel.blas_threads(self.threads)

    # -- naming intermediates (npllm.trace) ---------------------------------------------------------------------------

    def mark(self, name: str, x: Array) -> Array:
        """Give an intermediate its name; -> `x`, or what a trace puts in its place."""
        return x

    def layer(self, index: int) -> Backend:
        """The backend for layer `index`: itself, unless a trace wants to know whose intermediates it sees."""
        return self

    # -- fine operations ----------------------------------------------------------------------------------------------

    def embed(self, tokens_M: Array, w: Linear, /) -> Array:
        """Rows of the embedding [N, D] -> x_MD; of a table on disk, only these are read."""
        if isinstance(w.weight, Weight):
            return self.asarray(w.weight.rows(self.to_numpy(tokens_M)).array(self.array_dtype))
        return self.dense(w.weight)[tokens_M]

    def rms_norm(self, x_D: Array, w: Linear | None, /, eps: float, offset: float = 0.0) -> Array:
        """blocks.rms_norm over the last axis (any leading axes: q and k have M, H)."""
        return blocks.rms_norm(self.xp, x_D, w and self.dense(w.weight), eps, offset)

    def layer_norm(self, x_D: Array, w: Linear, /, eps: float) -> Array:
        """blocks.layer_norm over the last axis (any leading axes)."""
        return blocks.layer_norm(self.xp, x_D, self.dense(w.weight), self.dense(w.bias), eps)

    def linear(self, x_MD: Array, w: Linear, /, residual_MF: Array | None = None) -> Array:
        """`residual + x W^T + b` with W [F, D] -> y_MF; residual and bias may be absent."""
        y_MF = self._product(x_MD, w.weight)
        if w.bias is not None:
            y_MF += self.dense(w.bias)
        if residual_MF is not None:
            y_MF += residual_MF
        return y_MF

    def _product(self, x_MD: Array, weight: Any) -> Array:
        """`x W^T`; of a weight on disk, a part of the rows is widened at a time."""
        if not isinstance(weight, Weight):
            return x_MD @ self.dense(weight).T
        y_MF = self.xp.empty((len(x_MD), len(weight)), dtype=x_MD.dtype)
        for part in widened_parts(weight):
            y_MF[:, part] = x_MD @ self.asarray(self.dense(weight[part])).T
        return y_MF

    def angles(self, rope: Rope, positions_M: Array, /) -> Angles:
        """Cosines and sines of a step's positions, in the backend's dtype."""
        return blocks.angles(self.xp, rope, positions_M, self.array_dtype)

    def rope(self, x_MHK: Array, angles: Angles, /, interleaved: bool = False) -> Array:
        """blocks.rotate_halves, or blocks.rotate_interleaved."""
        rotate = blocks.rotate_interleaved if interleaved else blocks.rotate_halves
        return rotate(self.xp, x_MHK, angles)

    def attention(
        self, q_MHK: Array, keys: Keys, rows: Rows, /, *,
        mask: Mask, scale: float, softcap: float | None = None, sinks: Linear | None = None,
    ) -> Array:  # fmt: skip
        """blocks.softmax_attention of each row's queries over that row's keys -> o_MHV, packed as `q_MHK`.

        `sinks` holds a score per query head [H].
        """
        out_MHV = self.xp.empty((*q_MHK.shape[:2], keys.v_BSGV.shape[-1]), dtype=q_MHK.dtype)
        for piece in self.attention_pieces(q_MHK, keys, rows, out_MHV, mask, scale, softcap, sinks):
            piece()
        return out_MHV

    def attention_pieces(
        self, q_MHK: Array, keys: Keys, rows: Rows, out_MHV: Array, mask: Mask, scale: float, softcap: float | None,
        sinks: Linear | None,
    ) -> list[Callable[[], None]]:  # fmt: skip
        """The attention of a step, cut into pieces that each write their part of `out_MHV`, in any order."""
        pieces, sinks_H = [], sinks and self.dense(sinks.weight)
        for r, (_, start, begin, end) in enumerate(rows):
            k_SGK, v_SGV, first = keys.row(r)
            pieces += blocks.attention_pieces(
                self.xp, q_MHK[begin:end], k_SGK, v_SGV, out_MHV[begin:end],
                first_query=start, first_key=first, mask=mask, scale=scale, softcap=softcap, sinks_H=sinks_H,
            )  # fmt: skip
        return pieces

    def latent_expand(self, latent_SGF: Array, w: Linear, /, nope: int, heads: int) -> tuple[Array, Array]:
        """Keys and values of all heads from MLA's latents -> k_SHK, v_SHV; `w` is kv_b_proj, `nope` a key's width in it."""
        L = w.weight.shape[1]
        up_SF = self.linear(latent_SGF[:, 0, :L], w)
        return blocks.expand(self.xp, split_heads(up_SF, up_SF.shape[1] // heads), latent_SGF[:, :, L:], nope)

    def moe(
        self, x_MD: Array, w: Experts, index_MC: Array, weight_MC: Array, /, act: str, *, weigh: str = "output"
    ) -> Array:
        """The chosen experts' weighted sum -> y_MD; `weigh` says whether their "input" or "output" takes the weight."""
        out_MCD = self.xp.empty((*index_MC.shape, x_MD.shape[1]), dtype=x_MD.dtype)
        for piece in self.moe_pieces(x_MD, w, index_MC, weight_MC, out_MCD, act, weigh):
            piece()
        return self.xp.sum(out_MCD, axis=1)

    def moe_pieces(
        self, x_MD: Array, w: Experts, index_MC: Array, weight_MC: Array, out_MCD: Array, act: str, weigh: str
    ) -> list[Callable[[], None]]:
        """The work of a mixture, an expert a piece; each writes its tokens' places of `out_MCD`, in any order."""

        def expert(e: int, x_TD: Array) -> Array:
            gate_FD, up_FD, down_DF = (self.dense(part.weight[e]) for part in w)
            return self.expert(x_TD, gate_FD, up_FD, down_DF, act)

        return blocks.moe_pieces(self.xp, x_MD, expert, index_MC, weight_MC, out_MCD, weigh)

    def expert(self, x_TD: Array, gate_FD: Array, up_FD: Array, down_DF: Array, act: str) -> Array:
        """`down(act(gate x) * up x)` of one expert for the tokens that chose it -> y_TD."""
        hidden_TF = blocks.ACTIVATIONS[act](self.xp, x_TD @ gate_FD.T)
        hidden_TF *= x_TD @ up_FD.T
        return hidden_TF @ down_DF.T

    def altup_predict(self, x_MAD: Array, mixing_MAA: Array, /) -> Array:
        """blocks.altup_predict: each token's streams, predicted from all of them."""
        return blocks.altup_predict(self.xp, x_MAD, mixing_MAA)

    # -- coarse operations --------------------------------------------------------------------------------------------

    def normed(self, x_MD: Array, norm: Norm | None, /) -> Array:
        """`norm` applied to `x_MD`; None passes it through."""
        if isinstance(norm, LN):
            return self.layer_norm(x_MD, norm.params, norm.eps)
        return self._rms(x_MD, norm)

    def project_heads(
        self, x_MD: Array, w: QKV, /, head_dim: int, *, norm: Norm | None = None
    ) -> tuple[Array, Array, Array]:
        """Norm, then the three projections, split into heads -> q_MHK, k_MGK, v_MGK."""
        h_MD = self.mark("attention.input", self.normed(x_MD, norm))
        q_MF, k_MF, v_MF = (self.linear(h_MD, part) for part in w)
        return split_heads(q_MF, head_dim), split_heads(k_MF, head_dim), split_heads(v_MF, head_dim)

    def append_heads(
        self, q_MHK: Array, k_MGK: Array, v_MGV: Array, memory: LayerCache, rows: Rows, /, *,
        norms: HeadNorms = UNNORMED, angles: Angles | None = None, interleaved: bool = False, scale_M: Array | None = None,
    ) -> tuple[Array, Keys]:  # fmt: skip
        """Norms and RoPE of new queries and keys; keys and values go to `memory` -> q_MHK, and the keys that they attend to.

        Without `angles` nothing turns. Queries are multiplied with `scale_M` in the end.
        """
        how = (norms.whole, norms.turned, angles, interleaved)
        q_MHK, k_MGK = self._positioned(q_MHK, norms.q, *how), self._positioned(k_MGK, norms.k, *how)
        if scale_M is not None:
            q_MHK = q_MHK * scale_M[:, None, None]
        q_MHK, k_MGK = self.mark("attention.q", q_MHK), self.mark("attention.k", k_MGK)
        return q_MHK, memory.append(k_MGK, self.mark("attention.v", self._rms(v_MGV, norms.v)), rows)

    def _positioned(
        self, x_MHK: Array, norm: RMS | None, whole: bool, turned: bool, angles: Angles | None, interleaved: bool
    ) -> Array:
        """Heads normed and turned."""
        if angles is not None and turned:
            x_MHK = self.rope(x_MHK, angles, interleaved)
        x_MHK = split_heads(self._rms(merge_heads(x_MHK), norm), x_MHK.shape[2]) if whole else self._rms(x_MHK, norm)
        return x_MHK if angles is None or turned else self.rope(x_MHK, angles, interleaved)

    def _rms(self, x_D: Array, norm: RMS | None) -> Array:
        return x_D if norm is None else self.rms_norm(x_D, norm.params, norm.eps, norm.offset)

    def add_normed(self, x_MD: Array, y_MD: Array, norm: Norm, /) -> Array:
        """`x + norm(y)`: a branch whose norm stands after it."""
        return x_MD + self.normed(y_MD, norm)

    def gated_ffn(
        self, x_MD: Array, w: GatedFFN, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None
    ) -> Array:
        """`residual + down(act(gate h) * up h)` with `h = norm(x)` (SwiGLU, GeGLU: Shazeer 2020, arXiv 2002.05202).

        `act` is a name of blocks.ACTIVATIONS.
        """
        h_MD = self.mark("ffn.input", self.normed(x_MD, norm))
        hidden_MF = blocks.ACTIVATIONS[act](self.xp, self.mark("ffn.gate", self.linear(h_MD, w.gate_proj)))
        hidden_MF *= self.mark("ffn.up", self.linear(h_MD, w.up_proj))
        return self.linear(self.mark("ffn.hidden", hidden_MF), w.down_proj, residual_MD)

    def mlp(self, x_MD: Array, w: MLP, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None) -> Array:
        """`residual + c_proj(act(c_fc h))` with `h = norm(x)`."""
        h_MD = self.mark("ffn.input", self.normed(x_MD, norm))
        hidden_MF = blocks.ACTIVATIONS[act](self.xp, self.mark("ffn.up", self.linear(h_MD, w.c_fc)))
        return self.linear(self.mark("ffn.hidden", hidden_MF), w.c_proj, residual_MD)

    def route(self, h_MD: Array, w: Gate, /, router: Router) -> tuple[Array, Array]:
        """The experts of each token and their weights, by `router` -> index_MC, weight_MC."""
        logits_ME = self.mark("moe.logits", self.linear(h_MD, w.gate))
        correction_E = None if w.correction is None else self.dense(w.correction.weight)
        index_MC, weight_MC = blocks.route(self.xp, logits_ME, router, correction_E)
        return self.mark("moe.topk_index", index_MC), self.mark("moe.topk_weight", weight_MC)

    def expert_ffn(
        self, h_MD: Array, w: Experts, index_MC: Array, weight_MC: Array, /, act: str, *,
        residual_MD: Array, weigh: str = "output", shared: GatedFFN | None = None,
    ) -> Array:  # fmt: skip
        """`residual + moe(h)`, and what an expert that all tokens share says of h."""
        routed_MD = self.mark("moe.routed", self.moe(h_MD, w, index_MC, weight_MC, act, weigh=weigh))
        y_MD = residual_MD + routed_MD
        return y_MD if shared is None else y_MD + self.mark("moe.shared", self.gated_ffn(h_MD, shared, act))

    def append_latents(
        self, x_MD: Array, q: Linear | LatentQ, kv: LatentKV, memory: LayerCache, rows: Rows, angles: Angles, /,
        head_dim: int, eps: float, *, norm: Norm | None = None, interleaved: bool = True, scale_M: Array | None = None,
    ) -> tuple[Array, Keys]:  # fmt: skip
        """Norm, then MLA's queries `[nope | rope]`, the second part turned; latents go to `memory` -> q_MHK, and the keys.

        `eps` is that of the norms of latent vectors. Queries are multiplied with `scale_M` in the end.
        """
        h_MD = self.mark("attention.input", self.normed(x_MD, norm))
        if isinstance(q, LatentQ):
            q_MF = self.linear(self.rms_norm(self.linear(h_MD, q.q_a_proj), q.q_a_layernorm, eps), q.q_b_proj)
        else:
            q_MF = self.linear(h_MD, q)
        q_MHK, nope = split_heads(q_MF, head_dim), head_dim - 2 * angles.cos_MJ.shape[1]
        turned_MHJ = self.rope(q_MHK[..., nope:], angles, interleaved)
        q_MHK = self.xp.concatenate([q_MHK[..., :nope], turned_MHJ], axis=-1)
        if scale_M is not None:
            q_MHK = q_MHK * scale_M[:, None, None]
        latent_MGK = self.latent_project(h_MD, kv, angles, eps, interleaved=interleaved)
        q_MHK, latent_MGK = self.mark("attention.q", q_MHK), self.mark("attention.latent", latent_MGK)
        return q_MHK, memory.append(latent_MGK, None, rows)

    def latent_project(self, h_MD: Array, w: LatentKV, angles: Angles, /, eps: float, *, interleaved: bool = True) -> Array:
        """What MLA caches of each token, `[norm(c) | rope(k)]` -> latent_MGK with G = 1."""
        down_MF = self.linear(h_MD, w.kv_a_proj_with_mqa)
        return blocks.latent(self.xp, down_MF, self.dense(w.kv_a_layernorm.weight), angles, eps, interleaved)

    def latent_attention(self, q_MHF: Array, keys: Keys, rows: Rows, w: Linear, /, *, mask: Mask, scale: float) -> Array:
        """`softmax(mask(scale * (q_nope W_k c + q_rope k_rope))) W_v c` per head -> values [M, H, V]; `w` is kv_b_proj.

        Queries are `[nope | rope]`, F wide; c and k_rope are cached.

        Rows of few queries take the absorbed form, others the expanded one (npllm.blocks.mla): the same but for rounding.
        A backend overrides the forms; which one a row takes is decided here.
        """
        (out, L), (_, H, F) = w.weight.shape, q_MHF.shape
        nope = F - (keys.k_BSGK.shape[-1] - L)
        few = [blocks.absorbed_is_cheaper(count, L, out // H) for count in rows.counts]
        if all(few):
            return self.latent_absorbed(q_MHF, keys, rows, w, nope, mask, scale)
        forms = [self.latent_absorbed if is_few else self.latent_expanded for is_few in few]
        parts = [
            form(q_MHF[begin:end], keys.only(r), rows.only(r), w, nope, mask, scale)
            for r, (form, (_, _, begin, end)) in enumerate(zip(forms, rows, strict=True))
        ]
        return self.xp.concatenate(parts)

    def latent_absorbed(self, q_MHF: Array, keys: Keys, rows: Rows, w: Linear, nope: int, mask: Mask, scale: float) -> Array:
        """Queries go to the latent space, and what attention gives comes back -> o_MHV."""
        up_HFL = self.dense(w.weight).reshape(q_MHF.shape[1], -1, w.weight.shape[1])
        q_MHK = blocks.absorb(self.xp, q_MHF, up_HFL, nope)
        return blocks.unabsorb(self.attention(q_MHK, keys, rows, mask=mask, scale=scale), up_HFL, nope)

    def latent_expanded(self, q_MHF: Array, keys: Keys, rows: Rows, w: Linear, nope: int, mask: Mask, scale: float) -> Array:
        """Keys and values of all heads are made of the latents of a single row -> o_MHV."""
        latent_SGK, _, first = keys.row(0)
        k_SHK, v_SHV = self.latent_expand(latent_SGK, w, nope, q_MHF.shape[1])
        return self.attention(q_MHF, Keys.of(self.xp, k_SHK, v_SHV, first), rows, mask=mask, scale=scale)

    def step(self, model: Model, state: State, /) -> Drawn:
        """One step of generation: a forward pass, then a token drawn for each row that wants one."""
        logits_WN = self.to_numpy(model.run(self, self.asarray(state.tokens_M), state.rows, state.cache))
        tokens = [sampler.draw(logits_N) for sampler, logits_N in zip(state.samplers, logits_WN, strict=True)]
        return Drawn(np.array(tokens, dtype=np.int64), logits_WN)


# What a trace leaves to the backend it traces, and what it computes by the canonical bodies.
SERVICES = ("limited", "asarray", "to_numpy", "prepare", "dense", "new_cache")
FINE = (
    "embed", "rms_norm", "layer_norm", "linear", "angles", "rope", "attention", "latent_expand", "moe", "altup_predict",
)  # fmt: skip
COARSE = (
    "normed", "project_heads", "append_heads", "add_normed", "gated_ffn", "mlp", "route", "expert_ffn", "append_latents",
    "latent_project", "latent_attention", "step",
)  # fmt: skip
OPERATIONS = FINE + COARSE

B = TypeVar("B", bound=Callable[..., Any])


def accelerates(declines: Callable[..., str | None]) -> Callable[[B], B]:
    """Decorate an override: `declines(self, *args, **kwargs)` gives None, or the reason why it cannot take this call.

    A declined call goes to the inherited method; the reason is logged once, or raised under `strict=True`. The override's
    signature must be the canon's, else TypeError at class creation. A checker that raises is a bug and is not caught.
    """

    def wrap(override: B) -> B:
        operation = override.__name__
        canon = getattr(Backend, operation)
        if _shape(override) != _shape(canon):
            raise TypeError(f"{operation}{inspect.signature(override)} must have the canon's {inspect.signature(canon)}")

        @functools.wraps(override)
        def method(self: Backend, *args: Any, **kwargs: Any) -> Any:
            why = declines(self, *args, **kwargs)
            if why is None:
                return override(self, *args, **kwargs)
            if self.strict:
                raise BackendError(f"{self.name}.{operation} declines: {why}")
            log_once(f"{self.name}.{operation} falls back: {why}")
            # `unwrap`, because a test may have wrapped the method once more.
            definitions = ((each, each.__dict__.get(operation, type)) for each in type(self).__mro__)
            owner = next(each for each, definition in definitions if inspect.unwrap(definition) is override)
            return getattr(super(owner, self), operation)(*args, **kwargs)

        return method  # type: ignore[return-value]

    return wrap


def _shape(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


@functools.cache
def log_once(message: str, level: int = logging.INFO) -> None:
    log.log(level, message)
