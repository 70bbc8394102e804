"""Gemma 3, 270m to 27B, the text part (arXiv 2503.19786); truth: transformers 5.23.

| against Llama 3 | here                                                                                      |
|-----------------|-------------------------------------------------------------------------------------------|
| embedding       | times sqrt(hidden_size), rounded to the dtype of the arithmetic                           |
| norms           | RMSNorm with gain 1 + w, before and after attention and FFN: x + norm(branch(norm(x)))    |
| qk-norm         | RMSNorm with gain 1 + w over each head of q and k, before RoPE                            |
| attention       | scale query_pre_attn_scalar^-0.5                                                          |
| mask            | five layers see a window (512; 1024 from 4B on), the sixth everything                     |
| head_dim        | a field of its own: heads x head_dim need not be the hidden size                          |
| RoPE            | half-split; sliding layers theta 1e4; global ones 1e6, from 4B on slowed by 8 (linear)    |
| FFN             | GeGLU (tanh form)                                                                         |
| output head     | tied to the embedding; logits capped if final_logit_softcapping says so (published: null) |
| class defaults  | count: the published 4B names six fields only                                             |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from npllm.arrays import Array
from npllm.backend import RMS, Backend, HeadNorms, merge_heads
from npllm.blocks import CAUSAL, Angles, Mask, Rope, soft_cap
from npllm.cache import Cache, LayerCache, LayerSpec, Rows
from npllm.config import DecoderConfig, Reader, read_decoder, read_gemma_masks
from npllm.weights import Spec, attention_spec, decoder_spec, gated_ffn_spec, norm_spec

DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "tie_word_embeddings": True,
}

# hidden_activation counts; the other says which cache transformers is to take.
IGNORED = ("hidden_act", "cache_implementation")


@dataclass(frozen=True)
class Config(DecoderConfig):
    """`hidden_act` is the file's hidden_activation; `masks` holds each layer's rule; `rope` is that of the layers without a
    window, `local_rope` that of those with one; a cap of None caps nothing."""

    local_rope: Rope
    attention_bias: bool
    query_pre_attn_scalar: int
    final_logit_softcapping: float | None
    masks: tuple[Mask, ...]

    @classmethod
    def read(cls, reader: Reader) -> Config:
        fields = read_decoder(reader, DEFAULTS)
        reader.only("use_bidirectional_attention", False)
        if reader.raw("attn_logit_softcapping") is not None:
            reader.warn("%s: attn_logit_softcapping has no effect on Gemma 3, here as in transformers", reader.name)
        # transformers also writes _sliding_window_pattern, beside the layer_types that follow from it, and never reads it.
        full_every = reader.integer("sliding_window_pattern", 6)
        return cls(
            **fields,
            attention_bias=reader.flag("attention_bias", False),
            query_pre_attn_scalar=reader.integer("query_pre_attn_scalar", 256),
            final_logit_softcapping=reader.optional_real("final_logit_softcapping"),
            masks=read_gemma_masks(reader, fields["num_hidden_layers"], full_every=full_every, window=4096),
        )


def weight_spec(c: Config) -> Spec:
    """Names and shapes of the checkpoint (Hugging Face's Gemma3ForCausalLM)."""
    return decoder_spec(c, [layer_spec(c)] * c.num_hidden_layers)


def layer_spec(c: Config) -> Spec:
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    return {
        **norm_spec("input_layernorm", c.hidden_size),
        **attention_spec(c.hidden_size, heads, kv_heads, c.head_dim, bias=c.attention_bias),
        **norm_spec("self_attn.q_norm", c.head_dim, axes="K"),
        **norm_spec("self_attn.k_norm", c.head_dim, axes="K"),
        **norm_spec("post_attention_layernorm", c.hidden_size),
        **norm_spec("pre_feedforward_layernorm", c.hidden_size),
        **gated_ffn_spec("mlp", c.hidden_size, c.intermediate_size),
        **norm_spec("post_feedforward_layernorm", c.hidden_size),
    }


def cache_spec(c: Config) -> list[LayerSpec]:
    return [LayerSpec(c.num_key_value_heads, c.head_dim, c.head_dim, mask) for mask in c.masks]


def block(be: Backend, c: Config, w: Any, x_MD: Array, angles: Angles, rows: Rows, memory: LayerCache, mask: Mask) -> Array:
    eps, scale = c.rms_norm_eps, c.query_pre_attn_scalar**-0.5
    q_MHK, k_MGK, v_MGK = be.project_heads(x_MD, w.self_attn.qkv, c.head_dim, norm=RMS(w.input_layernorm, eps, 1.0))
    norms = HeadNorms(RMS(w.self_attn.q_norm, eps, 1.0), RMS(w.self_attn.k_norm, eps, 1.0))
    q_MHK, keys = be.append_heads(q_MHK, k_MGK, v_MGK, memory, rows, norms=norms, angles=angles)
    o_MHV = be.mark("attention.heads", be.attention(q_MHK, keys, rows, mask=mask, scale=scale))
    o_MD = be.linear(merge_heads(o_MHV), w.self_attn.o_proj)
    x_MD = be.mark("attention.output", be.add_normed(x_MD, o_MD, RMS(w.post_attention_layernorm, eps, 1.0)))
    y_MD = be.gated_ffn(x_MD, w.mlp, c.hidden_act, norm=RMS(w.pre_feedforward_layernorm, eps, 1.0))
    return be.mark("output", be.add_normed(x_MD, y_MD, RMS(w.post_feedforward_layernorm, eps, 1.0)))


def forward(be: Backend, c: Config, w: Any, tokens_M: Array, rows: Rows, cache: Cache) -> Array:
    """Token ids -> logits_WN of the rows' wanted tokens; keys and values go to `cache`."""
    global_angles, local_angles = (be.angles(rope, rows.positions_M) for rope in (c.rope, c.local_rope))
    x_MD = be.mark("embedding", be.embed(tokens_M, w.embed_tokens) * math.sqrt(c.hidden_size))
    for i, (layer, memory, mask) in enumerate(zip(w.layers, cache.layers, c.masks, strict=True)):
        angles = global_angles if mask == CAUSAL else local_angles
        x_MD = block(be.layer(i), c, layer, x_MD, angles, rows, memory, mask)
    x_WD = be.mark("norm", be.rms_norm(rows.wanted(x_MD), w.norm, c.rms_norm_eps, 1.0))
    logits_WN = be.linear(x_WD, w.lm_head)
    return be.mark("logits", soft_cap(be.xp, logits_WN, c.final_logit_softcapping))
