"""Llama 4, the text part of Scout and Maverick (Meta, April 2025); truth: transformers 5.23.

| against Llama 3 | here                                                                                             |
|-----------------|--------------------------------------------------------------------------------------------------|
| RoPE            | interleaved pairs, as the checkpoint stores them; every fourth layer has none (NoPE)             |
| RoPE scaling    | theta 5e5; Scout's file asks for the llama3 scaling, Maverick's for none                         |
| mask            | with RoPE: aligned chunks of 8192 positions; NoPE layers see everything                          |
| qk-norm         | Scout: unit RMS (no gain) over each head of q and k, after RoPE, on RoPE layers only             |
| temperature     | NoPE layers: q times 1 + 0.1 ln(1 + floor((position + 1) / 8192))                                |
| FFN             | Scout: all layers MoE; Maverick: odd ones, the even ones dense and wider (intermediate_size_mlp) |
| router          | the top 1 of the raw logits; its sigmoid scales the expert's input, not the output               |
| experts         | stored as two stacks, [E, in, out] with gate before up; besides them one shared expert           |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from npllm import blocks
from npllm.arrays import Array
from npllm.backend import RMS, Backend, HeadNorms, merge_heads
from npllm.blocks import CAUSAL, Angles, Mask, Router, chunked
from npllm.cache import Cache, LayerCache, LayerSpec, Rows
from npllm.config import DecoderConfig, Reader, read_decoder, read_experts, read_layer_types
from npllm.errors import ConfigError
from npllm.weights import Spec, attention_spec, decoder_spec, experts_spec, gated_ffn_spec, norm_spec, router_spec

DEFAULTS: dict[str, Any] = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}

# Training, and how other programs keep their cache.
IGNORED = (
    "cache_implementation",
    "for_llm_compressor",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
)


class Layer(NamedTuple):
    """What one layer does: it turns q and k (`rope`), has experts (`moe`), sees keys by `mask`."""

    rope: bool
    moe: bool
    mask: Mask


@dataclass(frozen=True)
class Config(DecoderConfig):
    """`intermediate_size` is the width of an expert, `intermediate_size_mlp` that of a dense layer; `attention_bias` puts
    biases on q, k, v and o."""

    layers: tuple[Layer, ...]
    intermediate_size_mlp: int
    num_local_experts: int
    router: Router
    use_qk_norm: bool
    attention_bias: bool
    attn_temperature_tuning: bool
    floor_scale: int
    attn_scale: float

    @classmethod
    def read(cls, reader: Reader) -> Config:
        # Absent, head_dim is 128; null, it is hidden_size / num_attention_heads.
        fields = read_decoder(reader, DEFAULTS | {"head_dim": reader.optional_integer("head_dim", DEFAULTS["head_dim"])})
        experts, chosen = read_experts(reader, default=16, per_token=1, least=1)
        return cls(
            **fields,
            layers=read_layers(reader, fields["num_hidden_layers"]),
            intermediate_size_mlp=reader.integer("intermediate_size_mlp", 16384),
            num_local_experts=experts,
            router=Router(chosen, scores="sigmoid", by="logits"),
            use_qk_norm=reader.flag("use_qk_norm", True),
            attention_bias=reader.flag("attention_bias", False),
            attn_temperature_tuning=read_tuning(reader),
            floor_scale=reader.integer("floor_scale", 8192),
            attn_scale=reader.real("attn_scale", 0.1, positive=False),
        )


def read_layers(reader: Reader, layers: int) -> tuple[Layer, ...]:
    """`no_rope_layers` has a 1 for each layer with RoPE; absent, null or empty it means a NoPE layer in every four.

    `moe_layers` are indices; null means one layer in `interleave_moe_layer_step`.
    """
    interval, step = reader.integer("no_rope_layer_interval", 4), reader.integer("interleave_moe_layer_step", 1)
    ropes = reader.integers("no_rope_layers") or [(i + 1) % interval for i in range(layers)]
    if len(ropes) != layers:
        raise ConfigError(f"{reader.name}: no_rope_layers names {len(ropes)} layers, num_hidden_layers is {layers}")
    named = reader.integers("moe_layers")
    moe = range(step - 1, layers, step) if named is None else named
    pattern = ["chunked_attention" if rope else "full_attention" for rope in ropes]
    types = read_layer_types(reader, pattern, ("full_attention", "chunked_attention"))
    chunk = reader.optional_integer("attention_chunk_size", 8192)
    if chunk is None and "chunked_attention" in types:
        raise reader.fail("attention_chunk_size", "must be an integer: some layers are chunked_attention")
    masks = [CAUSAL if chunk is None or kind == "full_attention" else chunked(chunk) for kind in types]
    return tuple(Layer(bool(rope), i in moe, mask) for i, (rope, mask) in enumerate(zip(ropes, masks, strict=True)))


def read_tuning(reader: Reader) -> bool:
    """`attn_temperature_tuning`: true or false, or a number as in the first published files (4), which means true."""
    value = reader.raw("attn_temperature_tuning")
    if value is not None and not isinstance(value, int):
        raise reader.fail("attn_temperature_tuning", "must be true, false or an integer")
    return value is None or bool(value)


def weight_spec(c: Config) -> Spec:
    """Names and shapes of the checkpoint (Hugging Face's Llama4ForCausalLM)."""
    return decoder_spec(c, [layer_spec(c, layer) for layer in c.layers])


def layer_spec(c: Config, layer: Layer) -> Spec:
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    return {
        **norm_spec("input_layernorm", c.hidden_size),
        **attention_spec(c.hidden_size, heads, kv_heads, c.head_dim, bias=c.attention_bias),
        **norm_spec("post_attention_layernorm", c.hidden_size),
        **(moe_spec(c) if layer.moe else gated_ffn_spec("feed_forward", c.hidden_size, c.intermediate_size_mlp)),
    }


def moe_spec(c: Config) -> Spec:
    experts, width, inner = c.num_local_experts, c.hidden_size, c.intermediate_size
    return {
        **router_spec("feed_forward.router", experts, width),
        **experts_spec("feed_forward.experts", experts, width, inner, transposed=True),
        **gated_ffn_spec("feed_forward.shared_expert", width, inner),
    }


def cache_spec(c: Config) -> list[LayerSpec]:
    return [LayerSpec(c.num_key_value_heads, c.head_dim, c.head_dim, layer.mask) for layer in c.layers]


def block(
    be: Backend, c: Config, layer: Layer, w: Any, x_MD: Array, angles: Angles, scale_M: Array, rows: Rows, memory: LayerCache
) -> Array:
    eps = c.rms_norm_eps
    q_MHK, k_MGK, v_MGK = be.project_heads(x_MD, w.self_attn.qkv, c.head_dim, norm=RMS(w.input_layernorm, eps))
    unit = RMS(None, eps) if layer.rope and c.use_qk_norm else None
    q_MHK, keys = be.append_heads(
        q_MHK, k_MGK, v_MGK, memory, rows, norms=HeadNorms(unit, unit, turned=True),
        angles=angles if layer.rope else None, interleaved=True,
        scale_M=scale_M if not layer.rope and c.attn_temperature_tuning else None,
    )  # fmt: skip
    o_MHV = be.mark("attention.heads", be.attention(q_MHK, keys, rows, mask=layer.mask, scale=c.head_dim**-0.5))
    x_MD = be.mark("attention.output", be.linear(merge_heads(o_MHV), w.self_attn.o_proj, x_MD))
    return be.mark("output", feed_forward(be, c, layer, w, x_MD))


def feed_forward(be: Backend, c: Config, layer: Layer, w: Any, x_MD: Array) -> Array:
    norm, ffn = RMS(w.post_attention_layernorm, c.rms_norm_eps), w.feed_forward
    if not layer.moe:
        return be.gated_ffn(x_MD, ffn, c.hidden_act, norm=norm, residual_MD=x_MD)
    h_MD = be.mark("moe.input", be.normed(x_MD, norm))
    index_MC, weight_MC = be.route(h_MD, ffn.router, c.router)
    return be.expert_ffn(
        h_MD, ffn.experts, index_MC, weight_MC, c.hidden_act, residual_MD=x_MD, weigh="input", shared=ffn.shared_expert
    )


def forward(be: Backend, c: Config, w: Any, tokens_M: Array, rows: Rows, cache: Cache) -> Array:
    """Token ids -> logits_WN of the rows' wanted tokens; keys and values go to `cache`."""
    angles = be.angles(c.rope, rows.positions_M)
    # The first chunk ends at position floor_scale - 1, not after it: the position counts from 1 here.
    scale_M = blocks.temperature(be.xp, rows.positions_M + 1, c.floor_scale, c.attn_scale, be.array_dtype)
    x_MD = be.mark("embedding", be.embed(tokens_M, w.embed_tokens))
    for i, (layer, weights, memory) in enumerate(zip(c.layers, w.layers, cache.layers, strict=True)):
        x_MD = block(be.layer(i), c, layer, weights, x_MD, angles, scale_M, rows, memory)
    x_WD = be.mark("norm", be.rms_norm(rows.wanted(x_MD), w.norm, c.rms_norm_eps))
    return be.mark("logits", be.linear(x_WD, w.lm_head))
