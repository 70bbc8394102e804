"""Mistral 7B (arXiv 2310.06825), Nemo, Small 3 and 3.1 (text part); truth: transformers 5.23.

| against Llama 3 | here                                                                                   |
|-----------------|----------------------------------------------------------------------------------------|
| head_dim        | a field of its own from Nemo on: Small has 32 heads of 128 and a hidden size of 5120   |
| mask            | every layer sees a window of sliding_window keys; null (7B v0.2 and all later): causal |
| RoPE            | theta 1e4 in 7B v0.1, 1e6 from v0.2 on, 1e9 in Small 3.1; not scaled                   |
| RoPE pairs      | half-split; interleaved (rope_interleave) in Mistral's own files, rows not permuted    |
| output head     | own matrix; the wrapper of Small 3.1 says otherwise, the stored head counts            |
| class defaults  | sliding_window 4096 when the key is absent                                             |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npllm.arrays import Array
from npllm.backend import RMS, Backend, merge_heads
from npllm.blocks import Angles, Mask, sliding
from npllm.cache import Cache, LayerCache, LayerSpec, Rows
from npllm.config import DecoderConfig, Reader, read_decoder
from npllm.weights import Spec, attention_spec, decoder_spec, gated_ffn_spec, norm_spec

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 131072,
}


@dataclass(frozen=True)
class Config(DecoderConfig):
    """`mask` is every layer's rule; `rope_interleave` says that the rows of q and k pair up as (2j, 2j + 1)."""

    mask: Mask
    rope_interleave: bool

    @classmethod
    def read(cls, reader: Reader) -> Config:
        return cls(
            **read_decoder(reader, DEFAULTS),
            mask=sliding(reader.optional_integer("sliding_window", 4096)),
            rope_interleave=reader.flag("rope_interleave", False),
        )


def weight_spec(c: Config) -> Spec:
    """Names and shapes of the checkpoint (Hugging Face's MistralForCausalLM)."""
    return decoder_spec(c, [layer_spec(c)] * c.num_hidden_layers)


def layer_spec(c: Config) -> Spec:
    return {
        **norm_spec("input_layernorm", c.hidden_size),
        **attention_spec(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim),
        **norm_spec("post_attention_layernorm", c.hidden_size),
        **gated_ffn_spec("mlp", c.hidden_size, c.intermediate_size),
    }


def cache_spec(c: Config) -> list[LayerSpec]:
    return [LayerSpec(c.num_key_value_heads, c.head_dim, c.head_dim, c.mask)] * c.num_hidden_layers


def block(be: Backend, c: Config, w: Any, x_MD: Array, angles: Angles, rows: Rows, memory: LayerCache) -> Array:
    norm = RMS(w.input_layernorm, c.rms_norm_eps)
    q_MHK, k_MGK, v_MGK = be.project_heads(x_MD, w.self_attn.qkv, c.head_dim, norm=norm)
    q_MHK, keys = be.append_heads(q_MHK, k_MGK, v_MGK, memory, rows, angles=angles, interleaved=c.rope_interleave)
    o_MHV = be.mark("attention.heads", be.attention(q_MHK, keys, rows, mask=c.mask, scale=c.head_dim**-0.5))
    x_MD = be.mark("attention.output", be.linear(merge_heads(o_MHV), w.self_attn.o_proj, x_MD))
    norm = RMS(w.post_attention_layernorm, c.rms_norm_eps)
    return be.mark("output", be.gated_ffn(x_MD, w.mlp, c.hidden_act, norm=norm, residual_MD=x_MD))


def forward(be: Backend, c: Config, w: Any, tokens_M: Array, rows: Rows, cache: Cache) -> Array:
    """Token ids -> logits_WN of the rows' wanted tokens; keys and values go to `cache`."""
    angles = be.angles(c.rope, rows.positions_M)
    x_MD = be.mark("embedding", be.embed(tokens_M, w.embed_tokens))
    for i, (layer, memory) in enumerate(zip(w.layers, cache.layers, strict=True)):
        x_MD = block(be.layer(i), c, layer, x_MD, angles, rows, memory)
    x_WD = be.mark("norm", be.rms_norm(rows.wanted(x_MD), w.norm, c.rms_norm_eps))
    return be.mark("logits", be.linear(x_WD, w.lm_head))
