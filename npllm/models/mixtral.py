"""Mixtral 8x7B, 8x22B (arXiv 2401.04088); truth: transformers 5.23.

| against Llama 3 | here                                                                                     |
|-----------------|------------------------------------------------------------------------------------------|
| RoPE            | theta 1e6; half-split, interleaved (rope_interleave) in Mistral's own files              |
| mask            | causal; with a number in sliding_window (published: null), every layer sees a window     |
| FFN             | sparse in every layer: 2 of 8 SwiGLU experts as wide as a dense FFN                      |
| router          | softmax over all experts; the weights of the chosen are always divided by their sum      |
| names           | block_sparse_moe; w1, w3, w2 for gate, up, down                                          |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npllm.arrays import Array
from npllm.backend import RMS, Backend, merge_heads
from npllm.blocks import Angles, Mask, Router, sliding
from npllm.cache import Cache, LayerCache, LayerSpec, Rows
from npllm.config import DecoderConfig, Reader, read_decoder, read_experts
from npllm.weights import Spec, attention_spec, decoder_spec, experts_spec, norm_spec, router_spec

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}

# Training only.
IGNORED = ("router_aux_loss_coef", "router_jitter_noise", "output_router_logits")

# What transformers 5 calls it in memory, and in files saved in that form.
RENAMED = {".mlp.": ".block_sparse_moe."}


@dataclass(frozen=True)
class Config(DecoderConfig):
    """`intermediate_size` is the width of one expert, `mask` the rule of every layer; `rope_interleave` says that the rows
    of q and k pair up as (2j, 2j + 1)."""

    mask: Mask
    num_local_experts: int
    router: Router
    rope_interleave: bool

    @classmethod
    def read(cls, reader: Reader) -> Config:
        fields = read_decoder(reader, DEFAULTS)
        experts, chosen = read_experts(reader, default=8, per_token=2, least=1)
        return cls(
            **fields,
            mask=sliding(reader.optional_integer("sliding_window")),
            num_local_experts=experts,
            router=Router(chosen, normalise=True),
            rope_interleave=reader.flag("rope_interleave", False),
        )


def weight_spec(c: Config) -> Spec:
    """Names and shapes of the checkpoint (Hugging Face's MixtralForCausalLM)."""
    return decoder_spec(c, [layer_spec(c)] * c.num_hidden_layers)


def layer_spec(c: Config) -> Spec:
    experts, width, inner = c.num_local_experts, c.hidden_size, c.intermediate_size
    return {
        **norm_spec("input_layernorm", width),
        **attention_spec(width, c.num_attention_heads, c.num_key_value_heads, c.head_dim),
        **norm_spec("post_attention_layernorm", width),
        **router_spec("block_sparse_moe.gate", experts, width),
        **experts_spec("block_sparse_moe.experts", experts, width, inner, names=("w1", "w3", "w2")),
    }


def cache_spec(c: Config) -> list[LayerSpec]:
    return [LayerSpec(c.num_key_value_heads, c.head_dim, c.head_dim, c.mask)] * c.num_hidden_layers


def block(be: Backend, c: Config, w: Any, x_MD: Array, angles: Angles, rows: Rows, memory: LayerCache) -> Array:
    norm = RMS(w.input_layernorm, c.rms_norm_eps)
    q_MHK, k_MGK, v_MGK = be.project_heads(x_MD, w.self_attn.qkv, c.head_dim, norm=norm)
    q_MHK, keys = be.append_heads(q_MHK, k_MGK, v_MGK, memory, rows, angles=angles, interleaved=c.rope_interleave)
    o_MHV = be.mark("attention.heads", be.attention(q_MHK, keys, rows, mask=c.mask, scale=c.head_dim**-0.5))
    x_MD = be.mark("attention.output", be.linear(merge_heads(o_MHV), w.self_attn.o_proj, x_MD))
    h_MD = be.mark("moe.input", be.rms_norm(x_MD, w.post_attention_layernorm, c.rms_norm_eps))
    index_MC, weight_MC = be.route(h_MD, w.block_sparse_moe.router, c.router)
    x_MD = be.expert_ffn(h_MD, w.block_sparse_moe.experts, index_MC, weight_MC, c.hidden_act, residual_MD=x_MD)
    return be.mark("output", x_MD)


def forward(be: Backend, c: Config, w: Any, tokens_M: Array, rows: Rows, cache: Cache) -> Array:
    """Token ids -> logits_WN of the rows' wanted tokens; keys and values go to `cache`."""
    angles = be.angles(c.rope, rows.positions_M)
    x_MD = be.mark("embedding", be.embed(tokens_M, w.embed_tokens))
    for i, (layer, memory) in enumerate(zip(w.layers, cache.layers, strict=True)):
        x_MD = block(be.layer(i), c, layer, x_MD, angles, rows, memory)
    x_WD = be.mark("norm", be.rms_norm(rows.wanted(x_MD), w.norm, c.rms_norm_eps))
    return be.mark("logits", be.linear(x_WD, w.lm_head))
