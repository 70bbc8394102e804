"""DeepSeek V2, V2.5 and V2-Lite (arXiv 2405.04434); truth: transformers 5.23.

| against Llama 3 | here                                                                                               |
|-----------------|----------------------------------------------------------------------------------------------------|
| norms           | the same; besides, of both latent vectors (eps 1e-6, whatever rms_norm_eps is)                     |
| attention       | latent (MLA): keys and values of all heads come from one vector of kv_lora_rank numbers per token  |
| queries         | by way of a latent vector of q_lora_rank numbers; V2-Lite, where that is null, directly            |
| RoPE            | interleaved, on the last qk_rope_head_dim numbers of a query and on one key that all heads share   |
| RoPE scaling    | theta 1e4; yarn, 40 times 4096 positions                                                           |
| scale           | head_dim^-0.5; with yarn's mscale_all_dim times (0.1 mscale_all_dim ln(factor) + 1)^2              |
| cache           | the latent vector after its norm and the shared key: 576 numbers per token and layer               |
| FFN             | dense in the first layers; then num_experts_per_tok of n_routed_experts, plus shared experts       |
| router          | softmax; "group_limited_greedy" keeps the groups with the best single experts, "greedy" knows none |
| its weights     | the scores times routed_scaling_factor; they do not sum to 1                                       |

A layer has experts if its index is at least first_k_dense_replace and divisible by moe_layer_freq (1 in every published
file; transformers does not read it). norm_topk_prob, false in every published file, is without effect, as in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": None,
    "topk_group": None,
    "num_experts_per_tok": None,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 2048,
}

# Of training and its machines.
IGNORED = (*COMPUTED, "ep_size", "seq_aux", "aux_loss_alpha")


@dataclass(frozen=True)
class Config(LatentConfig):
    """`mlp_bias` puts biases on gate, up and down of the dense FFN and of the shared experts."""

    mlp_bias: bool

    @classmethod
    def read(cls, reader: Reader) -> Config:
        reader.only("scoring_func", "softmax")
        reader.only("rope_interleave", True)
        if reader.flag("norm_topk_prob", False):
            reader.warn("%s: norm_topk_prob has no effect in DeepSeek V2", reader.name)
        greedy = reader.choice("topk_method", "greedy", ("greedy", "group_limited_greedy")) == "greedy"
        groups = reader.seeing(n_group=1, topk_group=1) if greedy else reader
        return cls(
            **read_latent(reader, DEFAULTS),
            router=read_router(groups, DEFAULTS, scores="softmax", ranking="max", normalise=False),
            mlp_bias=reader.flag("mlp_bias", False),
        )


def weight_spec(c: Config) -> Spec:
    """Names and shapes of the checkpoint (Hugging Face's DeepseekV2ForCausalLM)."""
    return decoder_spec(c, [latent_layer_spec(c, moe, mlp_bias=c.mlp_bias) for moe in c.moe_layers])


def cache_spec(c: Config) -> list[LayerSpec]:
    return latent_cache_spec(c)


def block(be: Backend, c: Config, w: Any, x_MD: Array, angles: Angles, rows: Rows, memory: LayerCache, moe: bool) -> Array:
    q_MHK, keys = latent_heads(be, c, w, x_MD, angles, rows, memory)
    o_MHV = be.latent_attention(q_MHK, keys, rows, w.self_attn.kv_b_proj, mask=CAUSAL, scale=c.scale)
    o_MF = merge_heads(be.mark("attention.heads", o_MHV))
    x_MD = be.mark("attention.output", be.linear(o_MF, w.self_attn.o_proj, x_MD))
    return be.mark("output", latent_ffn(be, c, w, x_MD, moe))


def forward(be: Backend, c: Config, w: Any, tokens_M: Array, rows: Rows, cache: Cache) -> Array:
    """Token ids -> logits_WN of the rows' wanted tokens; latent vectors and shared keys go to `cache`."""
    angles = be.angles(c.rope, rows.positions_M)
    x_MD = be.mark("embedding", be.embed(tokens_M, w.embed_tokens))
    for i, (layer, memory, moe) in enumerate(zip(w.layers, cache.layers, c.moe_layers, strict=True)):
        x_MD = block(be.layer(i), c, layer, x_MD, angles, rows, memory, moe)
    x_WD = be.mark("norm", be.rms_norm(rows.wanted(x_MD), w.norm, c.rms_norm_eps))
    return be.mark("logits", be.linear(x_WD, w.lm_head))
