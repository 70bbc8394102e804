"""Qwen2 (arXiv 2407.10671) and Qwen2.5 (arXiv 2412.15115), dense; truth: transformers 5.23.

| against Llama 3 | here                                                                                    |
|-----------------|-----------------------------------------------------------------------------------------|
| biases          | always on q, k and v, never on o                                                        |
| mask            | causal; with use_sliding_window, layers from max_window_layers on see a window          |
| RoPE            | half-split, theta 1e6; yarn when the config asks (2.5: factor 4 beyond 32768 positions) |
| output head     | tied to the embedding up to 3B                                                          |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npllm.arrays import Array
from npllm.backend import RMS, Backend, merge_heads
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
    "head_dim": None,
    "max_position_embeddings": 32768,
}

# In published files, always false; in text, where all its positions are equal, it would change nothing.
IGNORED = ("use_mrope",)


@dataclass(frozen=True)
class Config(DecoderConfig):
    """`masks` holds each layer's rule (from `layer_types`)."""

    masks: tuple[Mask, ...]

    @classmethod
    def read(cls, reader: Reader) -> Config:
        fields = read_decoder(reader, DEFAULTS)
        return cls(**fields, masks=read_window_masks(reader, fields["num_hidden_layers"]))


def weight_spec(c: Config) -> Spec:
    """Names and shapes of the checkpoint (Hugging Face's Qwen2ForCausalLM)."""
    return decoder_spec(c, [layer_spec(c)] * c.num_hidden_layers)


def layer_spec(c: Config) -> Spec:
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    return {
        **norm_spec("input_layernorm", c.hidden_size),
        **attention_spec(c.hidden_size, heads, kv_heads, c.head_dim, bias=True, o_bias=False),
        **norm_spec("post_attention_layernorm", c.hidden_size),
        **gated_ffn_spec("mlp", c.hidden_size, c.intermediate_size),
    }


def cache_spec(c: Config) -> list[LayerSpec]:
    return [LayerSpec(c.num_key_value_heads, c.head_dim, c.head_dim, mask) for mask in c.masks]


def block(be: Backend, c: Config, w: Any, x_MD: Array, angles: Angles, rows: Rows, memory: LayerCache, mask: Mask) -> Array:
    norm = RMS(w.input_layernorm, c.rms_norm_eps)
    q_MHK, k_MGK, v_MGK = be.project_heads(x_MD, w.self_attn.qkv, c.head_dim, norm=norm)
    q_MHK, keys = be.append_heads(q_MHK, k_MGK, v_MGK, memory, rows, angles=angles)
    o_MHV = be.mark("attention.heads", be.attention(q_MHK, keys, rows, mask=mask, scale=c.head_dim**-0.5))
    x_MD = be.mark("attention.output", be.linear(merge_heads(o_MHV), w.self_attn.o_proj, x_MD))
    norm = RMS(w.post_attention_layernorm, c.rms_norm_eps)
    return be.mark("output", be.gated_ffn(x_MD, w.mlp, c.hidden_act, norm=norm, residual_MD=x_MD))


def forward(be: Backend, c: Config, w: Any, tokens_M: Array, rows: Rows, cache: Cache) -> Array:
    """Token ids -> logits_WN of the rows' wanted tokens; keys and values go to `cache`."""
    angles = be.angles(c.rope, rows.positions_M)
    x_MD = be.mark("embedding", be.embed(tokens_M, w.embed_tokens))
    for i, (layer, memory, mask) in enumerate(zip(w.layers, cache.layers, c.masks, strict=True)):
        x_MD = block(be.layer(i), c, layer, x_MD, angles, rows, memory, mask)
    x_WD = be.mark("norm", be.rms_norm(rows.wanted(x_MD), w.norm, c.rms_norm_eps))
    return be.mark("logits", be.linear(x_WD, w.lm_head))
