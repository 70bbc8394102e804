"""Gemma 3n, E2B and E4B, the text part (published 2025-06 without a paper); truth: transformers 5.23.

| against Llama 3 | here                                                                                                 |
|-----------------|------------------------------------------------------------------------------------------------------|
| residual stream | four (AltUp, arXiv 2301.13310): a layer predicts all, computes on one, corrects all                  |
| per-layer input | a vector per token and layer from a table of its own, gated by the active stream, to streams 1, 2, 3 |
| norms           | with gain w, before and after attention and FFN; of each head of q and k; of v, without a gain       |
| LAuReL          | a low-rank branch beside attention (arXiv 2411.07501); the sum of both is divided by sqrt(2)         |
| attention       | scale 1; four layers see a window of 512, the fifth everything; another RoPE base for each kind      |
| KV sharing      | the last layers have no keys and values: they read those of the last layer of their kind that has    |
| FFN             | GeGLU; in the first ten layers a cut lets 5 % of the gates through (Spark, arXiv 2506.06644)         |
| MatFormer       | a width for each layer: a prefix of the features is a model too (arXiv 2310.07707, npllm.matformer)  |
| embedding, head | embedding times sqrt(D); tied head, logits capped at 30                                              |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from npllm import blocks
from npllm.arrays import Array
from npllm.backend import RMS, Backend, HeadNorms, merge_heads, split_heads
from npllm.blocks import CAUSAL, Angles, Mask, Rope
from npllm.cache import Cache, Keys, LayerCache, LayerSpec, Rows
from npllm.config import MOST_LAYERS, DecoderConfig, Reader, read_decoder, read_gemma_masks, read_per_layer
from npllm.weights import GatedFFN, Spec, Tensor, attention_spec, decoder_spec, gated_ffn_spec, linear_spec, norm_spec

DEFAULTS: dict[str, Any] = {
    "vocab_size": 262400, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 35, "head_dim": 256,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e6, "rope_local_base_freq": 1e4, "laurel_rank": 64,
    "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256,
}  # fmt: skip

# Of a layer, D wide.
NORMS = """input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm
    altup.router_norm laurel.post_laurel_norm post_per_layer_input_norm""".split()

# Where a layer's keys come from: its own cache, or what another layer's `append` returned.
Memory = LayerCache | Keys

# Limits of training, and a scale that these models do not use.
IGNORED = ("altup_coef_clip", "altup_lr_multiplier", "query_pre_attn_scalar")


class Layer(NamedTuple):
    """What differs from layer to layer: `inner` is the FFN's width, `keys_of` whose keys are read, perhaps its own."""

    mask: Mask
    rope: Rope
    inner: int
    sparsity: float
    keys_of: int


@dataclass(frozen=True)
class Config(DecoderConfig):
    """Fields as in config.json, but for those that may differ from layer to layer: `intermediate_size` is the widest."""

    local_rope: Rope
    layers: tuple[Layer, ...]
    attention_bias: bool
    vocab_size_per_layer_input: int
    hidden_size_per_layer_input: int
    altup_num_inputs: int
    altup_active_idx: int
    altup_correct_scale: bool
    laurel_rank: int
    final_logit_softcapping: float | None

    @property
    def owners(self) -> int:
        """Layers with keys and values of their own: the first ones."""
        return sum(layer.keys_of == i for i, layer in enumerate(self.layers))

    @property
    def skipped(self) -> dict[str, str]:
        """Published files hold projections that layers without keys of their own do not use."""
        shared = "|".join(map(str, range(self.owners, len(self.layers))))
        return {rf"layers\.({shared})\.self_attn\.[kv]_(proj|norm)\..*": "keys and values of layers that share another's"}

    @classmethod
    def read(cls, reader: Reader) -> Config:
        count = reader.integer("num_hidden_layers", 35, most=MOST_LAYERS)
        inner = read_per_layer(reader, "intermediate_size", count, lambda r, key: r.integer(key, 16384))
        fields = read_decoder(reader.seeing(intermediate_size=max(inner)), DEFAULTS)
        streams = reader.integer("altup_num_inputs", 4, least=2, most=64)
        sizes = ("vocab_size_per_layer_input", "hidden_size_per_layer_input", "laurel_rank")
        return cls(
            **fields | {key: reader.integer(key, DEFAULTS[key]) for key in sizes},
            layers=read_layers(reader, fields, inner),
            attention_bias=reader.flag("attention_bias", False),
            altup_num_inputs=streams,
            altup_active_idx=reader.integer("altup_active_idx", 0, least=0, most=streams - 1),
            altup_correct_scale=reader.flag("altup_correct_scale", True),
            final_logit_softcapping=reader.optional_real("final_logit_softcapping", 30.0),
        )


def read_layers(reader: Reader, fields: dict[str, Any], inner: tuple[int, ...]) -> tuple[Layer, ...]:
    """ConfigError where layers would share keys that no layer of their kind has."""
    count, key = len(inner), "activation_sparsity_pattern"
    masks = read_gemma_masks(reader, count, full_every=5, window=512)
    owners = count - reader.integer("num_kv_shared_layers", 15, least=0)
    if owners < 1 or set(masks[:owners]) != set(masks):
        raise reader.fail("num_kv_shared_layers", "leaves a layer without one of its type whose keys it could share")
    sources = [i if i < owners else max(j for j in range(owners) if masks[j] == masks[i]) for i in range(count)]
    ropes = [fields["rope"] if mask == CAUSAL else fields["local_rope"] for mask in masks]
    by_default = [0.95 if i < 10 < count else 0.0 for i in range(count)]
    sparsity = read_per_layer(reader, key, count, lambda r, key: r.real(key, 0.0, positive=False), by_default)
    # In float32, since 0.99999999 is 1 there, and 1 has no quantile.
    if not all(0 <= share < 1 and np.float32(share) < 1 for share in sparsity):
        raise reader.fail(key, "must lie from 0 up to, but not at, 1")
    return tuple(map(Layer, masks, ropes, inner, sparsity, sources))


def weight_spec(c: Config) -> Spec:
    """Names and shapes of the checkpoint (Hugging Face's Gemma3nForCausalLM)."""
    D, P = c.hidden_size, c.hidden_size_per_layer_input
    spec = decoder_spec(c, [layer_spec(c, layer, layer.keys_of == i) for i, layer in enumerate(c.layers)])
    columns = len(c.layers) * P
    spec["embed_tokens_per_layer.weight"] = Tensor((c.vocab_size_per_layer_input, columns), "NP", "lookup")
    spec |= linear_spec("per_layer_model_projection", columns, D, "PD", "per-layer")
    spec |= norm_spec("per_layer_projection_norm", P, axes="P")
    for n in range(c.altup_num_inputs - 1):
        spec |= linear_spec(f"altup_projections.{n}", D, D, "FD", "altup")
        spec |= linear_spec(f"altup_unembed_projections.{n}", D, D, "FD", "altup")
    return spec


def layer_spec(c: Config, layer: Layer, owner: bool) -> Spec:
    D, A, P, K, R = c.hidden_size, c.altup_num_inputs, c.hidden_size_per_layer_input, c.head_dim, c.laurel_rank
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads if owner else 0
    return {
        **{name: tensor for norm in NORMS for name, tensor in norm_spec(norm, D).items()},
        **attention_spec(D, heads, kv_heads, K, bias=c.attention_bias),
        **norm_spec("self_attn.q_norm", K, axes="K"),
        **(norm_spec("self_attn.k_norm", K, axes="K") if owner else {}),
        **gated_ffn_spec("mlp", D, layer.inner),
        **linear_spec("altup.modality_router", A, D, "AD", "altup"),
        **linear_spec("altup.prediction_coefs", A * A, A, "FA", "altup"),
        **linear_spec("altup.correction_coefs", A, A, "FA", "altup"),
        "altup.correct_output_scale": Tensor((D,), "D", "altup"),
        **linear_spec("laurel.linear_left", R, D, "FD", "laurel"),
        **linear_spec("laurel.linear_right", D, R, "DF", "laurel"),
        **linear_spec("per_layer_input_gate", P, D, "PD", "per-layer"),
        **linear_spec("per_layer_projection", D, P, "DP", "per-layer"),
    }


def cache_spec(c: Config) -> list[LayerSpec]:
    """One entry per layer that has keys and values of its own."""
    return [LayerSpec(c.num_key_value_heads, c.head_dim, c.head_dim, layer.mask) for layer in c.layers[: c.owners]]


def per_layer_inputs(be: Backend, c: Config, w: Any, tokens_M: Array, x_MD: Array) -> Array:
    """inputs_MYP: a row of the table (row 0 for tokens beyond its end) and a projection of the embedding, in equal parts."""
    P = c.hidden_size_per_layer_input
    rows_M = be.xp.where(tokens_M < c.vocab_size_per_layer_input, tokens_M, 0)
    looked_up_MYP = split_heads(be.embed(rows_M, w.embed_tokens_per_layer), P) * P**0.5
    projected_MYP = split_heads(be.linear(x_MD, w.per_layer_model_projection) * c.hidden_size**-0.5, P)
    projected_MYP = be.rms_norm(projected_MYP, w.per_layer_projection_norm, c.rms_norm_eps)
    return (projected_MYP + looked_up_MYP) * 2**-0.5


def altup_router(be: Backend, c: Config, w: Any, x_MD: Array) -> Array:
    """r_MA, from -1 to 1: what the coefficients of AltUp are computed from."""
    h_MD = be.rms_norm(x_MD, w.router_norm, c.rms_norm_eps) * c.hidden_size**-1
    return be.xp.tanh(be.linear(h_MD, w.modality_router))


def ffn(be: Backend, c: Config, w: GatedFFN, x_MD: Array, norm: RMS, sparsity: float) -> Array:
    """The gated FFN; with sparsity, of the gate values only those pass that are large among the token's."""
    if not sparsity:
        return be.gated_ffn(x_MD, w, c.hidden_act, norm=norm)
    h_MD = be.mark("ffn.input", be.normed(x_MD, norm))
    gate_MF = be.mark("ffn.gate", blocks.gaussian_topk(be.xp, be.linear(h_MD, w.gate_proj), sparsity))
    up_MF = be.mark("ffn.up", be.linear(h_MD, w.up_proj))
    hidden_MF = be.mark("ffn.hidden", blocks.ACTIVATIONS[c.hidden_act](be.xp, gate_MF) * up_MF)
    return be.linear(hidden_MF, w.down_proj)


def attend(
    be: Backend, c: Config, layer: Layer, w: Any, x_MD: Array, angles: Angles, rows: Rows, memory: Memory
) -> tuple[Array, Keys]:
    """The active stream after attention and LAuReL, and the keys that were attended to."""
    eps, attention = c.rms_norm_eps, w.self_attn
    h_MD = be.rms_norm(x_MD, w.input_layernorm, eps)
    laurel_MD = be.linear(be.linear(h_MD, w.laurel.linear_left), w.laurel.linear_right)
    laurel_MD = be.mark("laurel.branch", be.add_normed(h_MD, laurel_MD, RMS(w.laurel.post_laurel_norm, eps)))
    if isinstance(memory, Keys):
        q_MHK, keys = split_heads(be.linear(be.mark("attention.input", h_MD), attention.q_proj), c.head_dim), memory
        q_MHK = be.mark("attention.q", be.rope(be.rms_norm(q_MHK, attention.q_norm, eps), angles))
    else:
        q_MHK, k_MGK, v_MGK = be.project_heads(h_MD, attention.qkv, c.head_dim)
        norms = HeadNorms(RMS(attention.q_norm, eps), RMS(attention.k_norm, eps), RMS(None, eps))
        q_MHK, keys = be.append_heads(q_MHK, k_MGK, v_MGK, memory, rows, norms=norms, angles=angles)
    o_MHV = be.mark("attention.heads", be.attention(q_MHK, keys, rows, mask=layer.mask, scale=1.0))
    o_MD = be.rms_norm(be.linear(merge_heads(o_MHV), attention.o_proj), w.post_attention_layernorm, eps)
    return be.mark("attention.output", (x_MD + o_MD + laurel_MD) * 2**-0.5), keys


def add_input(be: Backend, c: Config, w: Any, x_MAD: Array, input_MP: Array) -> Array:
    """x_MAD with the layer's own input, gated by the active stream, added to every stream but the first."""
    x_MD = x_MAD[:, c.altup_active_idx]
    if c.altup_correct_scale:
        x_MD = x_MD * be.dense(w.altup.correct_output_scale.weight)
    gate_MP = blocks.ACTIVATIONS[c.hidden_act](be.xp, be.linear(x_MD, w.per_layer_input_gate))
    added_MD = be.linear(gate_MP * input_MP, w.per_layer_projection)
    added_MD = be.rms_norm(added_MD, w.post_per_layer_input_norm, c.rms_norm_eps)
    return be.xp.concatenate([x_MAD[:, :1], x_MAD[:, 1:] + added_MD[:, None]], axis=1)


def block(
    be: Backend, c: Config, layer: Layer, w: Any, x_MAD: Array, input_MP: Array, angles: Angles, rows: Rows, memory: Memory
) -> tuple[Array, Keys]:
    """All streams after the layer, and the keys that it attended to: later layers may share them."""
    active, eps = c.altup_active_idx, c.rms_norm_eps
    mixing_MF = be.linear(altup_router(be, c, w.altup, x_MAD[:, active]), w.altup.prediction_coefs)
    mixing_MAA = split_heads(mixing_MF, c.altup_num_inputs)
    p_MAD = be.mark("altup.predicted", be.altup_predict(x_MAD, mixing_MAA))
    x_MD, keys = attend(be, c, layer, w, p_MAD[:, active], angles, rows, memory)
    f_MD = ffn(be, c, w.mlp, x_MD, RMS(w.pre_feedforward_layernorm, eps), layer.sparsity)
    x_MD = be.mark("ffn.output", be.add_normed(x_MD, f_MD, RMS(w.post_feedforward_layernorm, eps)))
    gain_MA = be.linear(altup_router(be, c, w.altup, x_MD), w.altup.correction_coefs)
    x_MAD = be.mark("altup.corrected", blocks.altup_correct(be.xp, p_MAD, x_MD, active, gain_MA))
    return be.mark("output", add_input(be, c, w, x_MAD, input_MP)), keys


def forward(be: Backend, c: Config, w: Any, tokens_M: Array, rows: Rows, cache: Cache) -> Array:
    """Token ids -> logits_WN of the rows' wanted tokens; keys and values go to `cache`."""
    angles = {rope: be.angles(rope, rows.positions_M) for rope in {layer.rope for layer in c.layers}}
    x_MD = be.embed(tokens_M, w.embed_tokens) * c.hidden_size**0.5
    inputs_MYP = be.mark("per_layer_inputs", per_layer_inputs(be, c, w, tokens_M, x_MD))
    streams = [blocks.match_rms(be.xp, be.linear(x_MD, projection), x_MD) for projection in w.altup_projections]
    x_MAD = be.mark("embedding", be.xp.stack([x_MD, *streams], axis=1))
    keys: list[Keys] = []
    for i, (layer, weights) in enumerate(zip(c.layers, w.layers, strict=True)):
        memory = cache.layers[i] if layer.keys_of == i else keys[layer.keys_of]
        x_MAD, seen = block(be.layer(i), c, layer, weights, x_MAD, inputs_MYP[:, i], angles[layer.rope], rows, memory)
        keys.append(seen)
    x_WAD = split_heads(rows.wanted(merge_heads(x_MAD)), c.hidden_size)
    unembed = enumerate(w.altup_unembed_projections, 1)
    streams = [blocks.match_rms(be.xp, be.linear(x_WAD[:, n], each), x_WAD[:, 0]) for n, each in unembed]
    x_WD = be.xp.mean(be.xp.stack([x_WAD[:, 0], *streams], axis=1), axis=1)
    x_WD = be.mark("norm", be.rms_norm(x_WD, w.norm, c.rms_norm_eps))
    return be.mark("logits", blocks.soft_cap(be.xp, be.linear(x_WD, w.lm_head), c.final_logit_softcapping))
