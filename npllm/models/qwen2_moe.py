"""Qwen2-MoE: Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B (arXiv 2407.10671); truth: transformers 5.23.

| against Llama 3 | here                                                                                     |
|-----------------|------------------------------------------------------------------------------------------|
| biases          | on q, k and v (unless qkv_bias is false), never on o                                     |
| RoPE            | half-split, theta 1e6; yarn when the config asks                                         |
| mask            | causal; with use_sliding_window, of the layers before max_window_layers every other one, |
|                 | from 0 on, sees a window: not the layers that the dense Qwen2 means                      |
| FFN             | sparse in every layer i where decoder_sparse_step divides i + 1, but not in              |
|                 | mlp_only_layers: 4 of 60 small SwiGLU experts, and a shared one that sees every token    |
| shared expert   | its output is multiplied by a sigmoid of its own, one number per token                   |
| router          | softmax over all experts, then the best; with norm_topk_prob (published: without) the    |
|                 | weights of the chosen are divided by their sum                                           |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npllm.arrays import Array
from npllm.backend import RMS, Backend, merge_heads
from npllm.blocks import CAUSAL, Angles, Mask, Router, sigmoid, sliding
from npllm.cache import Cache, LayerCache, LayerSpec, Rows
from npllm.config import DecoderConfig, Reader, read_decoder, read_experts, read_layer_types, read_moe_layers
from npllm.weights import (
    Spec,
    attention_spec,
    decoder_spec,
    experts_spec,
    gated_ffn_spec,
    linear_spec,
    norm_spec,
    router_spec,
)

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": None,
    "max_position_embeddings": 32768,
}

# Training only.
IGNORED = ("router_aux_loss_coef", "output_router_logits")


@dataclass(frozen=True)
class Config(DecoderConfig):
    """`intermediate_size` is the width of a dense layer's FFN, the other two those of an expert and of the shared one.

    `masks` and `moe_layers` say for each layer what it sees and whether it is a mixture; `router` is the rule of them all.
    """

    qkv_bias: bool
    masks: tuple[Mask, ...]
    num_experts: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    moe_layers: tuple[bool, ...]
    router: Router

    @classmethod
    def read(cls, reader: Reader) -> Config:
        fields = read_decoder(reader, DEFAULTS)
        experts, chosen = read_experts(reader, default=60, per_token=4)
        return cls(
            **fields,
            qkv_bias=reader.flag("qkv_bias", True),
            masks=read_masks(reader, fields["num_hidden_layers"]),
            num_experts=experts,
            moe_intermediate_size=reader.integer("moe_intermediate_size", 1408),
            shared_expert_intermediate_size=reader.integer("shared_expert_intermediate_size", 5632),
            moe_layers=read_moe_layers(reader, fields["num_hidden_layers"], experts),
            router=Router(chosen, normalise=reader.flag("norm_topk_prob", False)),
        )


def read_masks(reader: Reader, layers: int) -> tuple[Mask, ...]:
    """Each layer's rule. transformers writes a sliding_window of 0 where there is none."""
    uses_window = reader.flag("use_sliding_window", False)
    window = reader.optional_integer("sliding_window", 4096, least=0) or None
    windowed = range(0, reader.integer("max_window_layers", 28, least=0), 2)
    pattern = ["sliding_attention" if uses_window and i in windowed else "full_attention" for i in range(layers)]
    types = read_layer_types(reader, pattern, ("full_attention", "sliding_attention"))
    if "sliding_attention" in types and not (uses_window and window):
        raise reader.fail(
            "sliding_window", "with this use_sliding_window is no window, but some layers are sliding_attention"
        )
    return tuple(CAUSAL if kind == "full_attention" else sliding(window) for kind in types)


def weight_spec(c: Config) -> Spec:
    """Names and shapes of the checkpoint (Hugging Face's Qwen2MoeForCausalLM)."""
    return decoder_spec(c, [layer_spec(c, moe) for moe in c.moe_layers])


def layer_spec(c: Config, moe: bool) -> Spec:
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    return {
        **norm_spec("input_layernorm", c.hidden_size),
        **attention_spec(c.hidden_size, heads, kv_heads, c.head_dim, bias=c.qkv_bias, o_bias=False),
        **norm_spec("post_attention_layernorm", c.hidden_size),
        **(moe_spec(c) if moe else gated_ffn_spec("mlp", c.hidden_size, c.intermediate_size)),
    }


def moe_spec(c: Config) -> Spec:
    return {
        **router_spec("mlp.gate", c.num_experts, c.hidden_size),
        **experts_spec("mlp.experts", c.num_experts, c.hidden_size, c.moe_intermediate_size),
        **gated_ffn_spec("mlp.shared_expert", c.hidden_size, c.shared_expert_intermediate_size),
        **linear_spec("mlp.shared_expert_gate", 1, c.hidden_size, "FD", "ffn"),
    }


def cache_spec(c: Config) -> list[LayerSpec]:
    return [LayerSpec(c.num_key_value_heads, c.head_dim, c.head_dim, mask) for mask in c.masks]


def block(
    be: Backend, c: Config, w: Any, x_MD: Array, angles: Angles, rows: Rows, memory: LayerCache, mask: Mask, moe: bool
) -> Array:
    norm = RMS(w.input_layernorm, c.rms_norm_eps)
    q_MHK, k_MGK, v_MGK = be.project_heads(x_MD, w.self_attn.qkv, c.head_dim, norm=norm)
    q_MHK, keys = be.append_heads(q_MHK, k_MGK, v_MGK, memory, rows, angles=angles)
    o_MHV = be.mark("attention.heads", be.attention(q_MHK, keys, rows, mask=mask, scale=c.head_dim**-0.5))
    x_MD = be.mark("attention.output", be.linear(merge_heads(o_MHV), w.self_attn.o_proj, x_MD))
    norm = RMS(w.post_attention_layernorm, c.rms_norm_eps)
    if not moe:
        return be.mark("output", be.gated_ffn(x_MD, w.mlp, c.hidden_act, norm=norm, residual_MD=x_MD))
    h_MD = be.mark("moe.input", be.normed(x_MD, norm))
    return be.mark("output", moe_ffn(be, c, w.mlp, h_MD, x_MD))


def moe_ffn(be: Backend, c: Config, w: Any, h_MD: Array, x_MD: Array) -> Array:
    """`x` plus the chosen experts' sum, and the shared expert weighed by its own gate -> y_MD."""
    index_MC, weight_MC = be.route(h_MD, w.router, c.router)
    x_MD = be.expert_ffn(h_MD, w.experts, index_MC, weight_MC, c.hidden_act, residual_MD=x_MD)
    weight_M1 = sigmoid(be.xp, be.linear(h_MD, w.shared_expert_gate))
    shared_MD = be.gated_ffn(h_MD, w.shared_expert, c.hidden_act)
    return x_MD + be.mark("moe.shared", weight_M1 * shared_MD)


def forward(be: Backend, c: Config, w: Any, tokens_M: Array, rows: Rows, cache: Cache) -> Array:
    """Token ids -> logits_WN of the rows' wanted tokens; keys and values go to `cache`."""
    angles = be.angles(c.rope, rows.positions_M)
    x_MD = be.mark("embedding", be.embed(tokens_M, w.embed_tokens))
    for i, (layer, memory, mask, moe) in enumerate(zip(w.layers, cache.layers, c.masks, c.moe_layers, strict=True)):
        x_MD = block(be.layer(i), c, layer, x_MD, angles, rows, memory, mask, moe)
    x_WD = be.mark("norm", be.rms_norm(rows.wanted(x_MD), w.norm, c.rms_norm_eps))
    return be.mark("logits", be.linear(x_WD, w.lm_head))
