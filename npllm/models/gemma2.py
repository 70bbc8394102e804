"""Gemma 2 (arXiv 2408.00118); truth: transformers 5.23.

| against Llama 3 | here                                                                                     |
|-----------------|------------------------------------------------------------------------------------------|
| embedding       | times sqrt(hidden_size), rounded to the dtype of the arithmetic                          |
| norms           | RMSNorm with gain 1 + w, before and after attention and FFN: x + norm(branch(norm(x)))   |
| attention       | scale query_pre_attn_scalar^-0.5; scores capped at 50: 50 tanh(s / 50), before the mask  |
| mask            | layers 0, 2, 4, ... see a window of 4096, layers 1, 3, 5, ... everything                 |
| head_dim        | a field of its own: heads x head_dim need not be the hidden size                         |
| RoPE            | half-split, theta 1e4                                                                    |
| FFN             | GeGLU (tanh form)                                                                        |
| output head     | tied to the embedding; logits capped at 30                                               |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from npllm.arrays import Array
from npllm.backend import RMS, Backend, merge_heads
from npllm.blocks import Angles, Mask, soft_cap
from npllm.cache import Cache, LayerCache, LayerSpec, Rows
from npllm.config import DecoderConfig, Reader, read_decoder, read_gemma_masks
from npllm.weights import Spec, attention_spec, decoder_spec, gated_ffn_spec, norm_spec

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}

# Published files say the activation twice, the window twice, and which cache transformers is to take.
IGNORED = ("hidden_act", "sliding_window_size", "cache_implementation")


@dataclass(frozen=True)
class Config(DecoderConfig):
    """`hidden_act` is the file's hidden_activation; `masks` holds each layer's rule; a cap of None caps nothing."""

    attention_bias: bool
    query_pre_attn_scalar: int
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    masks: tuple[Mask, ...]

    @classmethod
    def read(cls, reader: Reader) -> Config:
        fields = read_decoder(reader, DEFAULTS)
        reader.only("use_bidirectional_attention", False)
        return cls(
            **fields,
            attention_bias=reader.flag("attention_bias", False),
            query_pre_attn_scalar=reader.integer("query_pre_attn_scalar", 256),
            attn_logit_softcapping=reader.optional_real("attn_logit_softcapping", 50.0),
            final_logit_softcapping=reader.optional_real("final_logit_softcapping", 30.0),
            masks=read_gemma_masks(reader, fields["num_hidden_layers"], full_every=2, window=4096),
        )


def weight_spec(c: Config) -> Spec:
    """Names and shapes of the checkpoint (Hugging Face's Gemma2ForCausalLM)."""
    return decoder_spec(c, [layer_spec(c)] * c.num_hidden_layers)


def layer_spec(c: Config) -> Spec:
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    return {
        **norm_spec("input_layernorm", c.hidden_size),
        **attention_spec(c.hidden_size, heads, kv_heads, c.head_dim, bias=c.attention_bias),
        **norm_spec("post_attention_layernorm", c.hidden_size),
        **norm_spec("pre_feedforward_layernorm", c.hidden_size),
        **gated_ffn_spec("mlp", c.hidden_size, c.intermediate_size),
        **norm_spec("post_feedforward_layernorm", c.hidden_size),
    }


def cache_spec(c: Config) -> list[LayerSpec]:
    return [LayerSpec(c.num_key_value_heads, c.head_dim, c.head_dim, mask) for mask in c.masks]


def block(be: Backend, c: Config, w: Any, x_MD: Array, angles: Angles, rows: Rows, memory: LayerCache, mask: Mask) -> Array:
    eps, scale, cap = c.rms_norm_eps, c.query_pre_attn_scalar**-0.5, c.attn_logit_softcapping
    q_MHK, k_MGK, v_MGK = be.project_heads(x_MD, w.self_attn.qkv, c.head_dim, norm=RMS(w.input_layernorm, eps, 1.0))
    q_MHK, keys = be.append_heads(q_MHK, k_MGK, v_MGK, memory, rows, angles=angles)
    o_MHV = be.mark("attention.heads", be.attention(q_MHK, keys, rows, mask=mask, scale=scale, softcap=cap))
    o_MD = be.linear(merge_heads(o_MHV), w.self_attn.o_proj)
    x_MD = be.mark("attention.output", be.add_normed(x_MD, o_MD, RMS(w.post_attention_layernorm, eps, 1.0)))
    y_MD = be.gated_ffn(x_MD, w.mlp, c.hidden_act, norm=RMS(w.pre_feedforward_layernorm, eps, 1.0))
    return be.mark("output", be.add_normed(x_MD, y_MD, RMS(w.post_feedforward_layernorm, eps, 1.0)))


def forward(be: Backend, c: Config, w: Any, tokens_M: Array, rows: Rows, cache: Cache) -> Array:
    """Token ids -> logits_WN of the rows' wanted tokens; keys and values go to `cache`."""
    angles = be.angles(c.rope, rows.positions_M)
    x_MD = be.mark("embedding", be.embed(tokens_M, w.embed_tokens) * math.sqrt(c.hidden_size))
    for i, (layer, memory, mask) in enumerate(zip(w.layers, cache.layers, c.masks, strict=True)):
        x_MD = block(be.layer(i), c, layer, x_MD, angles, rows, memory, mask)
    x_WD = be.mark("norm", be.rms_norm(rows.wanted(x_MD), w.norm, c.rms_norm_eps, 1.0))
    logits_WN = be.linear(x_WD, w.lm_head)
    return be.mark("logits", soft_cap(be.xp, logits_WN, c.final_logit_softcapping))
