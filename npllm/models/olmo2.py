"""OLMo 2, 1B to 32B (arXiv 2501.00656); truth: transformers 5.23.

| against Llama 3 | here                                                                                    |
|-----------------|-----------------------------------------------------------------------------------------|
| norms           | none before attention and FFN, one after each, inside the residual: x + norm(branch(x)) |
| qk-norm         | RMSNorm of q and of k over the whole projection (one mean over all heads), before RoPE  |
| attention       | as many key/value heads as heads; grouped in the 32B                                    |
| RoPE            | half-split, theta 5e5, not scaled                                                       |
| output head     | own matrix                                                                              |
| class defaults  | rms_norm_eps 1e-5 (published: 1e-6)                                                     |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npllm.arrays import Array
from npllm.backend import RMS, Backend, HeadNorms, merge_heads
from npllm.blocks import CAUSAL, Angles
from npllm.cache import Cache, LayerCache, LayerSpec, Rows
from npllm.config import DecoderConfig, Reader, read_decoder
from npllm.weights import Spec, attention_spec, decoder_spec, gated_ffn_spec, norm_spec

DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


@dataclass(frozen=True)
class Config(DecoderConfig):
    """`attention_bias` puts biases on q, k, v and o."""

    attention_bias: bool

    @classmethod
    def read(cls, reader: Reader) -> Config:
        return cls(**read_decoder(reader, DEFAULTS), attention_bias=reader.flag("attention_bias", False))


def weight_spec(c: Config) -> Spec:
    """Names and shapes of the checkpoint (Hugging Face's Olmo2ForCausalLM)."""
    return decoder_spec(c, [layer_spec(c)] * c.num_hidden_layers)


def layer_spec(c: Config) -> Spec:
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    return {
        **attention_spec(c.hidden_size, heads, kv_heads, c.head_dim, bias=c.attention_bias),
        **norm_spec("self_attn.q_norm", heads * c.head_dim, axes="H"),
        **norm_spec("self_attn.k_norm", kv_heads * c.head_dim, axes="G"),
        **norm_spec("post_attention_layernorm", c.hidden_size),
        **gated_ffn_spec("mlp", c.hidden_size, c.intermediate_size),
        **norm_spec("post_feedforward_layernorm", c.hidden_size),
    }


def cache_spec(c: Config) -> list[LayerSpec]:
    return [LayerSpec(c.num_key_value_heads, c.head_dim, c.head_dim)] * c.num_hidden_layers


def block(be: Backend, c: Config, w: Any, x_MD: Array, angles: Angles, rows: Rows, memory: LayerCache) -> Array:
    eps = c.rms_norm_eps
    q_MHK, k_MGK, v_MGK = be.project_heads(x_MD, w.self_attn.qkv, c.head_dim)
    norms = HeadNorms(RMS(w.self_attn.q_norm, eps), RMS(w.self_attn.k_norm, eps), whole=True)
    q_MHK, keys = be.append_heads(q_MHK, k_MGK, v_MGK, memory, rows, norms=norms, angles=angles)
    o_MHV = be.mark("attention.heads", be.attention(q_MHK, keys, rows, mask=CAUSAL, scale=c.head_dim**-0.5))
    o_MD = be.linear(merge_heads(o_MHV), w.self_attn.o_proj)
    x_MD = be.mark("attention.output", be.add_normed(x_MD, o_MD, RMS(w.post_attention_layernorm, eps)))
    y_MD = be.gated_ffn(x_MD, w.mlp, c.hidden_act)
    return be.mark("output", be.add_normed(x_MD, y_MD, RMS(w.post_feedforward_layernorm, eps)))


def forward(be: Backend, c: Config, w: Any, tokens_M: Array, rows: Rows, cache: Cache) -> Array:
    """Token ids -> logits_WN of the rows' wanted tokens; keys and values go to `cache`."""
    angles = be.angles(c.rope, rows.positions_M)
    x_MD = be.mark("embedding", be.embed(tokens_M, w.embed_tokens))
    for i, (layer, memory) in enumerate(zip(w.layers, cache.layers, strict=True)):
        x_MD = block(be.layer(i), c, layer, x_MD, angles, rows, memory)
    x_WD = be.mark("norm", be.rms_norm(rows.wanted(x_MD), w.norm, c.rms_norm_eps))
    return be.mark("logits", be.linear(x_WD, w.lm_head))
