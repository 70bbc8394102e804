"""Qwen3-MoE: 30B-A3B, 235B-A22B (arXiv 2505.09388); truth: transformers 5.23.

| against Llama 3 | here                                                                                     |
|-----------------|------------------------------------------------------------------------------------------|
| norms           | the same; besides, RMSNorm over each head of q and k, before RoPE (qk-norm)              |
| head_dim        | a field of its own (128); hidden / heads where the config lacks it                       |
| RoPE            | half-split, theta 1e6; yarn when the config asks                                         |
| mask            | causal; with use_sliding_window, every layer sees a window                               |
| FFN             | sparse in every layer i where decoder_sparse_step divides i + 1, but not in              |
|                 | mlp_only_layers: 8 of 128 small SwiGLU experts, none shared                              |
| router          | softmax over all experts, then the best; with norm_topk_prob (class default: without)    |
|                 | the weights of the chosen are divided by their sum                                       |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npllm.arrays import Array
from npllm.backend import RMS, Backend, HeadNorms, merge_heads
from npllm.blocks import Angles, Mask, Router, sliding
from npllm.cache import Cache, LayerCache, LayerSpec, Rows
from npllm.config import DecoderConfig, Reader, read_decoder, read_experts, read_moe_layers
from npllm.weights import Spec, attention_spec, decoder_spec, experts_spec, gated_ffn_spec, norm_spec, router_spec

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": None,
    "max_position_embeddings": 32768,
}

# Training only; and the dense Qwen3's key for which layers see a window, which transformers does not read here.
IGNORED = ("router_aux_loss_coef", "output_router_logits", "max_window_layers")


@dataclass(frozen=True)
class Config(DecoderConfig):
    """`intermediate_size` is the width of a dense layer's FFN, `moe_intermediate_size` of one expert's.

    `moe_layers` says for each layer whether it is a mixture; `router` is the rule by which all of them choose.
    """

    attention_bias: bool
    mask: Mask
    num_experts: int
    moe_intermediate_size: int
    moe_layers: tuple[bool, ...]
    router: Router

    @classmethod
    def read(cls, reader: Reader) -> Config:
        fields = read_decoder(reader, DEFAULTS)
        experts, chosen = read_experts(reader, default=128, per_token=8)
        window = reader.optional_integer("sliding_window", 4096)
        return cls(
            **fields,
            attention_bias=reader.flag("attention_bias", False),
            mask=sliding(window if reader.flag("use_sliding_window", False) else None),
            num_experts=experts,
            moe_intermediate_size=reader.integer("moe_intermediate_size", 768),
            moe_layers=read_moe_layers(reader, fields["num_hidden_layers"], experts),
            router=Router(chosen, normalise=reader.flag("norm_topk_prob", False)),
        )


def weight_spec(c: Config) -> Spec:
    """Names and shapes of the checkpoint (Hugging Face's Qwen3MoeForCausalLM)."""
    return decoder_spec(c, [layer_spec(c, moe) for moe in c.moe_layers])


def layer_spec(c: Config, moe: bool) -> Spec:
    return {
        **norm_spec("input_layernorm", c.hidden_size),
        **attention_spec(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, bias=c.attention_bias),
        **norm_spec("self_attn.q_norm", c.head_dim, axes="K"),
        **norm_spec("self_attn.k_norm", c.head_dim, axes="K"),
        **norm_spec("post_attention_layernorm", c.hidden_size),
        **(moe_spec(c) if moe else gated_ffn_spec("mlp", c.hidden_size, c.intermediate_size)),
    }


def moe_spec(c: Config) -> Spec:
    return {
        **router_spec("mlp.gate", c.num_experts, c.hidden_size),
        **experts_spec("mlp.experts", c.num_experts, c.hidden_size, c.moe_intermediate_size),
    }


def cache_spec(c: Config) -> list[LayerSpec]:
    return [LayerSpec(c.num_key_value_heads, c.head_dim, c.head_dim, c.mask)] * c.num_hidden_layers


def block(be: Backend, c: Config, w: Any, x_MD: Array, angles: Angles, rows: Rows, memory: LayerCache, moe: bool) -> Array:
    eps = c.rms_norm_eps
    q_MHK, k_MGK, v_MGK = be.project_heads(x_MD, w.self_attn.qkv, c.head_dim, norm=RMS(w.input_layernorm, eps))
    norms = HeadNorms(RMS(w.self_attn.q_norm, eps), RMS(w.self_attn.k_norm, eps))
    q_MHK, keys = be.append_heads(q_MHK, k_MGK, v_MGK, memory, rows, norms=norms, angles=angles)
    o_MHV = be.mark("attention.heads", be.attention(q_MHK, keys, rows, mask=c.mask, scale=c.head_dim**-0.5))
    x_MD = be.mark("attention.output", be.linear(merge_heads(o_MHV), w.self_attn.o_proj, x_MD))
    norm = RMS(w.post_attention_layernorm, eps)
    if not moe:
        return be.mark("output", be.gated_ffn(x_MD, w.mlp, c.hidden_act, norm=norm, residual_MD=x_MD))
    h_MD = be.mark("moe.input", be.normed(x_MD, norm))
    index_MC, weight_MC = be.route(h_MD, w.mlp.router, c.router)
    return be.mark("output", be.expert_ffn(h_MD, w.mlp.experts, index_MC, weight_MC, c.hidden_act, residual_MD=x_MD))


def forward(be: Backend, c: Config, w: Any, tokens_M: Array, rows: Rows, cache: Cache) -> Array:
    """Token ids -> logits_WN of the rows' wanted tokens; keys and values go to `cache`."""
    angles = be.angles(c.rope, rows.positions_M)
    x_MD = be.mark("embedding", be.embed(tokens_M, w.embed_tokens))
    for i, (layer, memory, moe) in enumerate(zip(w.layers, cache.layers, c.moe_layers, strict=True)):
        x_MD = block(be.layer(i), c, layer, x_MD, angles, rows, memory, moe)
    x_WD = be.mark("norm", be.rms_norm(rows.wanted(x_MD), w.norm, c.rms_norm_eps))
    return be.mark("logits", be.linear(x_WD, w.lm_head))
