"""Llama 3, 3.1, 3.2, 3.3 (arXiv 2407.21783), and the Llama checkpoints before them; truth: transformers 5.23.

The model that every other file is compared with.

| part         | here                                                                             |
|--------------|----------------------------------------------------------------------------------|
| norms        | RMSNorm before attention and before the FFN, and after the last block            |
| attention    | grouped heads, causal, scale head_dim^-0.5; biases only if attention_bias        |
| qk-norm      | none                                                                             |
| RoPE         | half-split; theta 5e5; from 3.1 on the llama3 scaling (linear and yarn if asked) |
| FFN          | SwiGLU; biases only if mlp_bias                                                  |
| output head  | own matrix; tied to the embedding in 3.2 1B and 3B                               |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npllm.arrays import Array
from npllm.backend import RMS, Backend, merge_heads
from npllm.blocks import CAUSAL, Angles
from npllm.cache import Cache, LayerCache, LayerSpec, Rows
from npllm.config import DecoderConfig, Reader, read_decoder
from npllm.weights import Spec, attention_spec, decoder_spec, gated_ffn_spec, norm_spec

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class Config(DecoderConfig):
    """`attention_bias` puts biases on q, k, v and o; `mlp_bias` on gate, up and down."""

    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def read(cls, reader: Reader) -> Config:
        return cls(
            **read_decoder(reader, DEFAULTS),
            attention_bias=reader.flag("attention_bias", False),
            mlp_bias=reader.flag("mlp_bias", False),
        )


def weight_spec(c: Config) -> Spec:
    """Names and shapes of the checkpoint (Hugging Face's LlamaForCausalLM)."""
    return decoder_spec(c, [layer_spec(c)] * c.num_hidden_layers)


def layer_spec(c: Config) -> Spec:
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    return {
        **norm_spec("input_layernorm", c.hidden_size),
        **attention_spec(c.hidden_size, heads, kv_heads, c.head_dim, bias=c.attention_bias),
        **norm_spec("post_attention_layernorm", c.hidden_size),
        **gated_ffn_spec("mlp", c.hidden_size, c.intermediate_size, bias=c.mlp_bias),
    }


def cache_spec(c: Config) -> list[LayerSpec]:
    return [LayerSpec(c.num_key_value_heads, c.head_dim, c.head_dim)] * c.num_hidden_layers


def block(be: Backend, c: Config, w: Any, x_MD: Array, angles: Angles, rows: Rows, memory: LayerCache) -> Array:
    norm = RMS(w.input_layernorm, c.rms_norm_eps)
    q_MHK, k_MGK, v_MGK = be.project_heads(x_MD, w.self_attn.qkv, c.head_dim, norm=norm)
    q_MHK, keys = be.append_heads(q_MHK, k_MGK, v_MGK, memory, rows, angles=angles)
    o_MHV = be.mark("attention.heads", be.attention(q_MHK, keys, rows, mask=CAUSAL, scale=c.head_dim**-0.5))
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
