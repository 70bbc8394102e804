"""What kernels of projections and feed-forward layers get wrong: which activation, of what, and where it is rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from npllm import blocks
from npllm.arrays import Array
from npllm.backend import RMS, Backend, Norm, merge_heads, split_heads
from npllm.testing.mistakes import Mistake
from npllm.testing.ops.linear_mistakes import (
    NeighbourResidual,
    NoResidual,
    RoundedBeforeResidual,
    next_token,
    of_product,
    shortened,
    summed_in,
    transposed,
    truncated,
    without_last,
)
from npllm.testing.rounding import FORMATS
from npllm.weights import MLP, QKV, GatedFFN, Linear

BF16 = FORMATS["bf16"]

# (act, gate, up) -> hidden features; `up` is None in an MLP.
Hidden = Callable[[str, Array, Array | None], Array]


def product(x: Array, up: Array | None) -> Array:
    return x if up is None else x * up


# -- the activation ---------------------------------------------------------------------------------------------------


def of_name(name: str, others: Mapping[str, str]) -> Mistake:
    """Another activation: `others` maps the right name to the wrong one."""

    class Wrong(Backend):
        def gated_ffn(
            self, x_MD: Array, w: GatedFFN, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None
        ) -> Array:
            return super().gated_ffn(x_MD, w, others.get(act, act), norm=norm, residual_MD=residual_MD)

        def mlp(
            self, x_MD: Array, w: MLP, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None
        ) -> Array:
            return super().mlp(x_MD, w, others.get(act, act), norm=norm, residual_MD=residual_MD)

    return Mistake(name, Wrong)


def of_hidden(name: str, hidden: Hidden) -> Mistake:
    """Hidden features made in another way from what gate and up give."""

    class Wrong(Backend):
        def gated_ffn(
            self, x_MD: Array, w: GatedFFN, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None
        ) -> Array:
            h_MD = self.normed(x_MD, norm)
            made_MF = hidden(act, self.linear(h_MD, w.gate_proj), self.linear(h_MD, w.up_proj))
            return self.linear(made_MF, w.down_proj, residual_MD)

        def mlp(
            self, x_MD: Array, w: MLP, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None
        ) -> Array:
            made_MF = hidden(act, self.linear(self.normed(x_MD, norm), w.c_fc), None)
            return self.linear(made_MF, w.c_proj, residual_MD)

    return Mistake(name, Wrong)


def activation(act: str, x: Array) -> Array:
    return blocks.ACTIVATIONS[act](np, x)


def quick_gelu(act: str, gate: Array, up: Array | None) -> Array:
    """`x sigmoid(1.702 x)` for either form of GELU."""
    return product(gate * blocks.sigmoid(np, 1.702 * gate) if "gelu" in act else activation(act, gate), up)


def both_activated(act: str, gate: Array, up: Array | None) -> Array:
    return product(activation(act, gate), None if up is None else activation(act, up))


def squared(act: str, gate: Array, up: Array | None) -> Array:
    """ReLU squared for ReLU."""
    return product(activation(act, gate) ** (2 if act == "relu" else 1), up)


def clipped(act: str, gate: Array, up: Array | None) -> Array:
    """The limit of 7 that gpt-oss has."""
    return product(activation(act, np.minimum(gate, 7.0)), up)


def without_tail(act: str, gate: Array, up: Array | None) -> Array:
    """SiLU taken for 0 where it is below 0.003."""
    return product(np.where(gate < -8.0, 0.0, activation(act, gate)) if act == "silu" else activation(act, gate), up)


def separate(act: str, gate: Array, up: Array | None) -> Array:
    """As four kernels in bf16 compute it."""
    active = shortened(activation(act, shortened(gate, BF16)), BF16)
    return active if up is None else shortened(active * shortened(up, BF16), BF16)


def truncated_hidden(act: str, gate: Array, up: Array | None) -> Array:
    hidden = product(activation(act, gate), up)
    step = BF16.spacing(hidden)
    return (np.trunc(hidden / step) * step).astype(hidden.dtype)


def without_last_feature(act: str, gate: Array, up: Array | None) -> Array:
    hidden = product(activation(act, gate), up)
    hidden[:, -1:] = 0.0
    return hidden


def in_fp8(act: str, gate: Array, up: Array | None) -> Array:
    """Hidden features in 4 significant bits."""
    return shortened(product(activation(act, gate), up), BF16._replace(bits=4))


TANH = ("gelu_pytorch_tanh", "gelu_new")

ACTIVATION_MISTAKES = (
    of_name("exact GELU in place of the tanh form", dict.fromkeys(TANH, "gelu")),
    of_name("tanh form in place of the exact GELU", {"gelu": "gelu_new"}),
    of_name("SiLU in place of GELU", dict.fromkeys((*TANH, "gelu"), "silu")),
    of_name("GELU in place of SiLU", {"silu": "gelu"}),
    of_hidden("quick GELU, x sigmoid(1.702 x)", quick_gelu),
    of_hidden("ReLU squared", squared),
    of_hidden("hidden features truncated to bf16", truncated_hidden),
    of_hidden("hidden features in 4 bits", in_fp8),
    of_hidden("last hidden feature left out", without_last_feature),
    of_product("sums kept in half precision", summed_in("f16", 8)),
    of_product("sums truncated to bf16", truncated),
    of_product("last column left out", without_last),
    of_product("weight transposed where it is square", transposed),
)


# -- the norm ---------------------------------------------------------------------------------------------------------


def of_norm(name: str, other: Callable[[RMS], RMS | None]) -> Mistake:
    """Another norm in front."""

    class Wrong(Backend):
        def normed(self, x_MD: Array, norm: Norm | None, /) -> Array:
            return super().normed(x_MD, other(norm) if isinstance(norm, RMS) else norm)

    return Mistake(name, Wrong)


class TruncatedNorm(Backend):
    """Norm truncated to bf16."""

    def normed(self, x_MD: Array, norm: Norm | None, /) -> Array:
        h_MD = super().normed(x_MD, norm)
        step = BF16.spacing(h_MD)
        return h_MD if norm is None else (np.trunc(h_MD / step) * step).astype(h_MD.dtype)


NORM_MISTAKES = (
    of_norm("norm skipped", lambda norm: None),
    of_norm("gain of the norm left out", lambda norm: norm._replace(params=None)),
    of_norm("gain of the norm plus 1", lambda norm: norm._replace(offset=1.0)),
    of_norm("eps ten times too large", lambda norm: norm._replace(eps=10.0 * norm.eps)),
    of_norm("eps left out", lambda norm: norm._replace(eps=0.0)),
    Mistake("norm truncated to bf16", TruncatedNorm),
)


# -- gated FFN --------------------------------------------------------------------------------------------------------


class Exchanged(Backend):
    """Gate and up exchanged."""

    def gated_ffn(
        self, x_MD: Array, w: GatedFFN, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None
    ) -> Array:
        other = GatedFFN(w.up_proj, w.gate_proj, w.down_proj)
        return super().gated_ffn(x_MD, other, act, norm=norm, residual_MD=residual_MD)


class ResidualTwice(Backend):
    """Residual added twice."""

    def gated_ffn(
        self, x_MD: Array, w: GatedFFN, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None
    ) -> Array:
        doubled = None if residual_MD is None else 2.0 * residual_MD
        return super().gated_ffn(x_MD, w, act, norm=norm, residual_MD=doubled)


GATED_MISTAKES = (
    Mistake("gate and up exchanged", Exchanged),
    of_hidden("up activated as well", both_activated),
    of_hidden("gate clipped at 7", clipped),
    of_hidden("SiLU cut to zero below -8", without_tail),
    of_hidden("gate, up and activation each rounded to bf16", separate),
    Mistake("residual dropped", NoResidual),
    Mistake("residual added twice", ResidualTwice),
    Mistake("rounded to bf16 before the residual is added", RoundedBeforeResidual),
    Mistake("residual of the neighbouring token", NeighbourResidual),
    of_product("input row of the neighbouring token", next_token),
    *ACTIVATION_MISTAKES,
    *NORM_MISTAKES,
)


# -- MLP --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Biases:
    """Which biases a wrong MLP has: True as it should be."""

    up: bool = True
    down: bool = True


def of_biases(name: str, kept: Biases) -> Mistake:
    class Wrong(Backend):
        def mlp(
            self, x_MD: Array, w: MLP, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None
        ) -> Array:
            c_fc = w.c_fc if kept.up else w.c_fc._replace(bias=None)
            c_proj = w.c_proj if kept.down else w.c_proj._replace(bias=None)
            return super().mlp(x_MD, MLP(c_fc, c_proj), act, norm=norm, residual_MD=residual_MD)

    return Mistake(name, Wrong)


class LateBias(Backend):
    """The first bias is added behind the activation."""

    def mlp(self, x_MD: Array, w: MLP, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None) -> Array:
        up_MF = self.linear(self.normed(x_MD, norm), w.c_fc._replace(bias=None))
        return self.linear(activation(act, up_MF) + self.dense(w.c_fc.bias), w.c_proj, residual_MD)


def rounded_first(act: str, gate: Array, up: Array | None) -> Array:
    """The argument of the activation and its value in 7 bits, one less than bf16 has."""
    fewer = BF16._replace(bits=7)
    return product(shortened(activation(act, shortened(gate, fewer)), fewer), up)


MLP_MISTAKES = (
    of_biases("first bias dropped", Biases(up=False)),
    of_biases("second bias dropped", Biases(down=False)),
    Mistake("first bias added behind the activation", LateBias),
    of_hidden("features rounded to 7 bits around the activation", rounded_first),
    *ACTIVATION_MISTAKES,
)


# -- projections ------------------------------------------------------------------------------------------------------


def of_heads(name: str, change: Callable[[Array, Array, Array], tuple[Array, Array, Array]]) -> Mistake:
    """q, k and v changed after a correct projection."""

    class Wrong(Backend):
        def project_heads(
            self, x_MD: Array, w: QKV, /, head_dim: int, *, norm: Norm | None = None
        ) -> tuple[Array, Array, Array]:
            return change(*super().project_heads(x_MD, w, head_dim, norm=norm))

    return Mistake(name, Wrong)


def of_module(name: str, change: Callable[[QKV], QKV]) -> Mistake:
    """Other weights for the projections."""

    class Wrong(Backend):
        def project_heads(
            self, x_MD: Array, w: QKV, /, head_dim: int, *, norm: Norm | None = None
        ) -> tuple[Array, Array, Array]:
            return super().project_heads(x_MD, change(w), head_dim, norm=norm)

    return Mistake(name, Wrong)


def unbiased(w: Linear) -> Linear:
    return w._replace(bias=None)


def width_first(q: Array) -> Array:
    """Features read as [width, head]."""
    return np.swapaxes(merge_heads(q).reshape(len(q), q.shape[2], q.shape[1]), 1, 2)


def normed_heads(q: Array) -> Array:
    """Rows come out as unit vectors times the root of the width: a norm of q where there is none."""
    return q / np.sqrt(np.mean(q**2, axis=-1, keepdims=True) + 1e-6)


def tail_from_first(q: Array) -> Array:
    """The last head is the first once more."""
    flat = merge_heads(q).copy()
    flat[:, -q.shape[2] :] = flat[:, : q.shape[2]]
    return split_heads(flat, q.shape[2])


PROJECT_MISTAKES = (
    of_module("k and v exchanged", lambda w: QKV(w.q_proj, w.v_proj, w.k_proj)),
    of_module("k taken for v", lambda w: QKV(w.q_proj, w.k_proj, w.k_proj)),
    of_module("bias of q dropped", lambda w: w._replace(q_proj=unbiased(w.q_proj))),
    of_module("bias of k dropped", lambda w: w._replace(k_proj=unbiased(w.k_proj))),
    of_module("bias of v dropped", lambda w: w._replace(v_proj=unbiased(w.v_proj))),
    of_heads("heads split as width by head", lambda q, k, v: (width_first(q), k, v)),
    of_heads("queries scaled by 1 / sqrt(width)", lambda q, k, v: (q / q.shape[2] ** 0.5, k, v)),
    of_heads("queries normed", lambda q, k, v: (normed_heads(q), k, v)),
    of_heads("heads off by one", lambda q, k, v: (np.roll(q, 1, axis=1), k, v)),
    of_heads("last head repeats the first", lambda q, k, v: (q, k, tail_from_first(v))),
    of_product("input row of the neighbouring token", next_token),
    of_product("sums kept in half precision", summed_in("f16", 8)),
    of_product("sums truncated to bf16", truncated),
    of_product("last column left out", without_last),
    *NORM_MISTAKES,
)
