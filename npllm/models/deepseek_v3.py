"""DeepSeek V3, V3-0324 and R1 (arXiv 2412.19437), Kimi K2, Moonlight; truth: transformers 5.23.

| against Llama 3 | here                                                                                              |
|-----------------|---------------------------------------------------------------------------------------------------|
| norms           | the same; besides, of both latent vectors (eps 1e-6, whatever rms_norm_eps is)                    |
| attention       | latent (MLA): keys and values of all heads come from one vector of kv_lora_rank numbers per token |
| queries         | by way of a latent vector of q_lora_rank numbers; where that is null, directly                    |
| RoPE            | interleaved, on the last qk_rope_head_dim numbers of a query and on one key that all heads share  |
| RoPE scaling    | theta 1e4; yarn, 40 times 4096 positions; Kimi K2: 5e4, 32 times                                  |
| scale           | head_dim^-0.5; with yarn's mscale_all_dim times (0.1 mscale_all_dim ln(factor) + 1)^2             |
| cache           | the latent vector after its norm and the shared key: 576 numbers per token and layer              |
| FFN             | dense in the first layers; then num_experts_per_tok of n_routed_experts, plus shared experts      |
| router          | sigmoid; a bias decides on the choice and not on the weights; groups by the sum of their two best |
| its weights     | the chosen scores divided by their sum (norm_topk_prob), times routed_scaling_factor (V3: 2.5)    |
| left out        | the layers that predict further tokens (MTP), stored after the last layer                         |

A layer has experts if its index is at least first_k_dense_replace and divisible by moe_layer_freq (1 in every published
file; transformers does not read it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npllm.arrays import Array
from npllm.backend import Backend, merge_heads
from npllm.blocks import CAUSAL, Angles
from npllm.cache import Cache, LayerCache, LayerSpec, Rows
from npllm.config import MOST_LAYERS, Reader
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
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": None,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 4096,
}

# Of training and its machines; `num_mtp_layers` is transformers' other name for num_nextn_predict_layers.
IGNORED = (*COMPUTED, "ep_size", "seq_aux", "aux_loss_alpha", "num_mtp_layers")


@dataclass(frozen=True)
class Config(LatentConfig):
    """`num_nextn_predict_layers` counts the layers, stored after the others, that predict further tokens."""

    num_nextn_predict_layers: int

    @property
    def skipped(self) -> dict[str, str]:
        """Tensors of these layers, by a pattern of their names, and what they are."""
        extra = range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)
        return {rf"layers\.{i}\..*": "layers that predict further tokens" for i in extra}

    @classmethod
    def read(cls, reader: Reader) -> Config:
        reader.only("topk_method", "noaux_tc")
        reader.only("scoring_func", "sigmoid")
        normalise = reader.flag("norm_topk_prob", True)
        return cls(
            **read_latent(reader, DEFAULTS),
            router=read_router(reader, DEFAULTS, scores="sigmoid", ranking="pair", normalise=normalise),
            num_nextn_predict_layers=reader.integer("num_nextn_predict_layers", 1, least=0, most=MOST_LAYERS),
        )


def weight_spec(c: Config) -> Spec:
    """Names and shapes of the checkpoint (Hugging Face's DeepseekV3ForCausalLM)."""
    return decoder_spec(c, [latent_layer_spec(c, moe, correction=True) for moe in c.moe_layers])


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
