"""Qwen3, dense (arXiv 2505.09388); truth: transformers 5.23.

| against Llama 3 | here                                                                                |
|-----------------|-------------------------------------------------------------------------------------|
| norms           | the same; besides, RMSNorm over each head of q and k, before RoPE (qk-norm)         |
| head_dim        | a field of its own (128): heads x head_dim need not be the hidden size              |
| RoPE            | half-split, theta 1e6; yarn when the config asks                                    |
| mask            | causal; with use_sliding_window, layers from max_window_layers on see a window      |
| output head     | tied to the embedding up to 4B                                                      |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npllm.arrays import Array
from npllm.backend import RMS, Backend, HeadNorms, merge_heads
from npllm.blocks import Angles, Mask
from npllm.cache import Cache, LayerCache, LayerSpec, Rows
from npllm.config import DecoderConfig, Reader, read_decoder, read_window_masks
from npllm.weights import Spec, attention_spec, decoder_spec, gated_ffn_spec, norm_spec

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
}


@dataclass(frozen=True)
class Config(DecoderConfig):
    """`attention_bias` puts biases on q, k, v and o; `masks` holds each layer's rule (from `layer_types`)."""

    attention_bias: bool
    masks: tuple[Mask, ...]

    @classmethod
    def read(cls, reader: Reader) -> Config:
        fields = read_decoder(reader, DEFAULTS)
        masks = read_window_masks(reader, fields["num_hidden_layers"])
        return cls(**fields, attention_bias=reader.flag("attention_bias", False), masks=masks)


def weight_spec(c: Config) -> Spec:
    """Names and shapes of the checkpoint (Hugging Face's Qwen3ForCausalLM)."""
    return decoder_spec(c, [layer_spec(c)] * c.num_hidden_layers)


def layer_spec(c: Config) -> Spec:
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    return {
        **norm_spec("input_layernorm", c.hidden_size),
        **attention_spec(c.hidden_size, heads, kv_heads, c.head_dim, bias=c.attention_bias),
        **norm_spec("self_attn.q_norm", c.head_dim, axes="K"),
        **norm_spec("self_attn.k_norm", c.head_dim, axes="K"),
        **norm_spec("post_attention_layernorm", c.hidden_size),
        **gated_ffn_spec("mlp", c.hidden_size, c.intermediate_size),
    }


def cache_spec(c: Config) -> list[LayerSpec]:
    return [LayerSpec(c.num_key_value_heads, c.head_dim, c.head_dim, mask) for mask in c.masks]


def block(be: Backend, c: Config, w: Any, x_MD: Array, angles: Angles, rows: Rows, memory: LayerCache, mask: Mask) -> Array:
    eps = c.rms_norm_eps
    q_MHK, k_MGK, v_MGK = be.project_heads(x_MD, w.self_attn.qkv, c.head_dim, norm=RMS(w.input_layernorm, eps))
    norms = HeadNorms(RMS(w.self_attn.q_norm, eps), RMS(w.self_attn.k_norm, eps))
    q_MHK, keys = be.append_heads(q_MHK, k_MGK, v_MGK, memory, rows, norms=norms, angles=angles)
    o_MHV = be.mark("attention.heads", be.attention(q_MHK, keys, rows, mask=mask, scale=c.head_dim**-0.5))
    x_MD = be.mark("attention.output", be.linear(merge_heads(o_MHV), w.self_attn.o_proj, x_MD))
    norm = RMS(w.post_attention_layernorm, eps)
    return be.mark("output", be.gated_ffn(x_MD, w.mlp, c.hidden_act, norm=norm, residual_MD=x_MD))


def forward(be: Backend, c: Config, w: Any, tokens_M: Array, rows: Rows, cache: Cache) -> Array:
    """Token ids -> logits_WN of the rows' wanted tokens; keys and values go to `cache`."""
    angles = be.angles(c.rope, rows.positions_M)
    x_MD = be.mark("embedding", be.embed(tokens_M, w.embed_tokens))
    for i, (layer, memory, mask) in enumerate(zip(w.layers, cache.layers, c.masks, strict=True)):
        x_MD = block(be.layer(i), c, layer, x_MD, angles, rows, memory, mask)
    x_WD = be.mark("norm", be.rms_norm(rows.wanted(x_MD), w.norm, c.rms_norm_eps))
    return be.mark("logits", be.linear(x_WD, w.lm_head))
