"""Mistral Large 3 and other models of transformers' `mistral4`; truth: transformers 5.23.

| against Llama 3 | here                                                                                              |
|-----------------|---------------------------------------------------------------------------------------------------|
| norms           | the same; besides, of both latent vectors (eps 1e-6, whatever rms_norm_eps is)                    |
| attention       | latent (MLA): keys and values of all heads come from one vector of kv_lora_rank numbers per token |
| queries         | by way of a latent vector; after RoPE times 1 + beta ln(1 + floor(position / trained context))    |
| RoPE            | interleaved, on the last qk_rope_head_dim numbers of a query and on one key that all heads share  |
| scale           | head_dim^-0.5; times the square of yarn's temperature if the file has mscale_all_dim, as Mistral  |
|                 | Large 3's own has not: there attention_factor is 1 and no mscale stands                           |
| cache           | the latent vector after its norm and the shared key                                               |
| FFN             | dense in the first layers; then num_experts_per_tok of n_routed_experts, plus shared experts      |
| router          | softmax; the chosen weights divided by their sum; groups, if any, by the sum of their two best    |

Trained context: original_max_position_embeddings of RoPE's parameters; beta: llama_4_scaling_beta, without which queries
stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npllm import blocks
from npllm.arrays import Array
from npllm.backend import Backend, merge_heads
from npllm.blocks import CAUSAL, Angles
from npllm.cache import Cache, LayerCache, LayerSpec, Rows
from npllm.config import Reader
from npllm.latent import (
    COMPUTED,
    LatentConfig,
    latent_cache_spec,
    latent_ffn,
    latent_heads,
    latent_layer_spec,
    read_latent,
    read_router,
)
from npllm.weights import Spec, decoder_spec

DEFAULTS: dict[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 256,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 64,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 1048576,
}

# RoPE of a file that says nothing of it.
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

IGNORED = COMPUTED


@dataclass(frozen=True)
class Config(LatentConfig):
    """Queries grow by `llama_4_scaling_beta` with the logarithm of their position in `trained_context` tokens."""

    llama_4_scaling_beta: float
    trained_context: int

    @classmethod
    def read(cls, reader: Reader) -> Config:
        key = "rope_scaling" if reader.values.get("rope_scaling") else "rope_parameters"
        section = reader.section(key) or Reader(ROPE, reader.name, reader.warn)
        beta = section.real("llama_4_scaling_beta", 0.0, positive=False)
        fields = read_latent(seeing_plain_rope(reader, key, section), DEFAULTS)
        context = section.integer("original_max_position_embeddings", fields["max_position_embeddings"])
        normalise = reader.flag("norm_topk_prob", True)
        return cls(
            **fields,
            router=read_router(reader, DEFAULTS, scores="softmax", ranking="pair", normalise=normalise),
            llama_4_scaling_beta=beta,
            trained_context=fields["rope"].original or context,
        )


def seeing_plain_rope(reader: Reader, key: str, section: Reader) -> Reader:
    """A reader that finds at `key` the RoPE `section` without what only this architecture says there.

    partial_rotary_factor tells that RoPE turns qk_rope_head_dim numbers of a query, and must agree with that.
    """
    turned = reader.integer("qk_rope_head_dim", DEFAULTS["qk_rope_head_dim"])
    part = turned / (turned + reader.integer("qk_nope_head_dim", DEFAULTS["qk_nope_head_dim"]))
    for each in (reader, section):
        each.only("partial_rotary_factor", part)
    own = ("llama_4_scaling_beta", "partial_rotary_factor", "max_position_embeddings")
    plain = {name: value for name, value in section.values.items() if name not in own}
    return reader.seeing(**{key: plain, "partial_rotary_factor": None})


def weight_spec(c: Config) -> Spec:
    """Names and shapes of the checkpoint (Hugging Face's Mistral4ForCausalLM)."""
    return decoder_spec(c, [latent_layer_spec(c, moe) for moe in c.moe_layers])


def cache_spec(c: Config) -> list[LayerSpec]:
    return latent_cache_spec(c)


def block(
    be: Backend, c: Config, w: Any, x_MD: Array, angles: Angles, scale_M: Array, rows: Rows, memory: LayerCache, moe: bool
) -> Array:
    q_MHK, keys = latent_heads(be, c, w, x_MD, angles, rows, memory, scale_M)
    o_MHV = be.latent_attention(q_MHK, keys, rows, w.self_attn.kv_b_proj, mask=CAUSAL, scale=c.scale)
    o_MF = merge_heads(be.mark("attention.heads", o_MHV))
    x_MD = be.mark("attention.output", be.linear(o_MF, w.self_attn.o_proj, x_MD))
    return be.mark("output", latent_ffn(be, c, w, x_MD, moe))


def forward(be: Backend, c: Config, w: Any, tokens_M: Array, rows: Rows, cache: Cache) -> Array:
    """Token ids -> logits_WN of the rows' wanted tokens; latent vectors and shared keys go to `cache`."""
    angles = be.angles(c.rope, rows.positions_M)
    scale_M = blocks.temperature(be.xp, rows.positions_M, c.trained_context, c.llama_4_scaling_beta, be.array_dtype)
    x_MD = be.mark("embedding", be.embed(tokens_M, w.embed_tokens))
    for i, (layer, memory, moe) in enumerate(zip(w.layers, cache.layers, c.moe_layers, strict=True)):
        x_MD = block(be.layer(i), c, layer, x_MD, angles, scale_M, rows, memory, moe)
    x_WD = be.mark("norm", be.rms_norm(rows.wanted(x_MD), w.norm, c.rms_norm_eps))
    return be.mark("logits", be.linear(x_WD, w.lm_head))
