"""What DeepSeek V2, DeepSeek V3 and Mistral Large 3 share: latent attention and a mixture of routed and shared experts.

Their config fields, their tensors, and two steps of their blocks. Latent attention itself is in npllm.blocks.mla, the
choice of experts in npllm.blocks.moe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npllm.arrays import Array
from npllm.backend import RMS, Backend
from npllm.blocks import Angles, Router
from npllm.blocks.rope import yarn_mscale
from npllm.cache import Keys, LayerCache, LayerSpec, Rows
from npllm.config import MOST_EXPERTS, DecoderConfig, Reader, divide, read_decoder
from npllm.errors import ConfigError
from npllm.weights import (
    Bundle,
    LatentKV,
    LatentQ,
    Linear,
    Spec,
    Tensor,
    experts_spec,
    gated_ffn_spec,
    linear_spec,
    norm_spec,
    router_spec,
)

# The eps of the norms of both latent vectors, whatever rms_norm_eps is.
LATENT_EPS = 1e-6

# Keys of files that transformers 5 writes: it computes them anew (head_dim is RoPE's width or a query's, by model).
COMPUTED = ("head_dim", "qk_head_dim", "output_router_logits")


@dataclass(frozen=True)
class LatentConfig(DecoderConfig):
    """Fields as in config.json, but for `head_dim`, a query's width (qk_nope_head_dim + qk_rope_head_dim), `moe_layers`,
    which says for each layer whether it has experts, and `router`."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool
    rope_interleave: bool
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    moe_layers: tuple[bool, ...]
    router: Router

    @property
    def scale(self) -> float:
        """Of the scores: head_dim^-0.5, times YaRN's temperature squared where mscale_all_dim asks for it."""
        if self.rope.kind == "default" or not self.rope.mscale_all_dim:
            return self.head_dim**-0.5
        return self.head_dim**-0.5 * yarn_mscale(self.rope.factor, self.rope.mscale_all_dim) ** 2


def read_latent(reader: Reader, defaults: dict[str, Any]) -> dict[str, Any]:
    """The fields of `LatentConfig` but the router, with a model's class `defaults`."""
    heads = reader.integer("num_attention_heads", defaults["num_attention_heads"])
    reader.only("num_key_value_heads", heads)
    widths = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size")
    sizes = {key: reader.integer(key, defaults[key]) for key in widths}
    if sizes["qk_rope_head_dim"] % 2:
        raise reader.fail("qk_rope_head_dim", "must be even, RoPE turns pairs")
    # What the file calls head_dim is computed; the part of a head that turns is to RoPE a head of its own.
    turned = reader.seeing(head_dim=sizes["qk_rope_head_dim"], num_key_value_heads=heads)
    fields = read_decoder(turned, defaults) | {"head_dim": sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"]}
    first = reader.integer("first_k_dense_replace", defaults["first_k_dense_replace"], least=0)
    every = reader.integer("moe_layer_freq", 1)
    return {
        **fields,
        **sizes,
        "q_lora_rank": reader.optional_integer("q_lora_rank", defaults["q_lora_rank"]),
        "attention_bias": reader.flag("attention_bias", False),
        "rope_interleave": reader.flag("rope_interleave", True),
        "n_routed_experts": reader.integer("n_routed_experts", defaults["n_routed_experts"], most=MOST_EXPERTS),
        "n_shared_experts": reader.integer("n_shared_experts", defaults["n_shared_experts"], least=0),
        "moe_layers": tuple(i >= first and i % every == 0 for i in range(fields["num_hidden_layers"])),
    }


def read_router(reader: Reader, defaults: dict[str, Any], *, scores: str, ranking: str, normalise: bool) -> Router:
    """The rule by which experts are chosen; n_group of null is one group, topk_group of null keeps all of them."""
    experts = reader.integer("n_routed_experts", defaults["n_routed_experts"], most=MOST_EXPERTS)
    chosen = reader.optional_integer("num_experts_per_tok", defaults["num_experts_per_tok"])
    if chosen is None:
        raise ConfigError(f"{reader.name}: num_experts_per_tok is missing")
    groups = reader.optional_integer("n_group", defaults["n_group"]) or 1
    kept = reader.optional_integer("topk_group", defaults["topk_group"]) or groups
    if kept > groups:
        raise ConfigError(f"{reader.name}: topk_group = {kept} is more than n_group = {groups}")
    eligible = kept * divide(reader, "n_routed_experts", experts, "n_group", groups)
    if chosen > eligible:
        raise ConfigError(f"{reader.name}: num_experts_per_tok = {chosen}, but only {eligible} experts can be chosen")
    scale = reader.real("routed_scaling_factor", defaults["routed_scaling_factor"])
    return Router(
        chosen, scores, groups=groups, kept_groups=kept, ranking=ranking, normalise=normalise, floor=1e-20, scale=scale
    )


def latent_layer_spec(c: LatentConfig, moe: bool, *, correction: bool = False, mlp_bias: bool = False) -> Spec:
    """One layer: norms, latent attention, and an FFN, or with `moe` experts (`correction`: the router has such a bias)."""
    ffn = _experts_spec(c, correction, mlp_bias) if moe else _dense_spec(c, mlp_bias)
    return {
        **norm_spec("input_layernorm", c.hidden_size),
        **_attention_spec(c),
        **norm_spec("post_attention_layernorm", c.hidden_size),
        **ffn,
    }


def _attention_spec(c: LatentConfig) -> Spec:
    D, H, L, part = c.hidden_size, c.num_attention_heads, c.kv_lora_rank, "attention"
    bias, kv_a = c.attention_bias, ("self_attn.kv_a", LatentKV)
    return {
        **_queries_spec(c),
        **linear_spec("self_attn.kv_a_proj_with_mqa", L + c.qk_rope_head_dim, D, "LD", part, bias=bias, bundle=kv_a),
        "self_attn.kv_a_layernorm.weight": Tensor((L,), "L", "norm", Bundle(*kv_a, "kv_a_layernorm")),
        **linear_spec("self_attn.kv_b_proj", H * (c.qk_nope_head_dim + c.v_head_dim), L, "HL", part),
        **linear_spec("self_attn.o_proj", D, H * c.v_head_dim, "DH", part, bias=bias),
    }


def _queries_spec(c: LatentConfig) -> Spec:
    D, HK, rank, part = c.hidden_size, c.num_attention_heads * c.head_dim, c.q_lora_rank, "attention"
    if rank is None:
        return linear_spec("self_attn.q_proj", HK, D, "HD", part)
    return {
        **linear_spec("self_attn.q_a_proj", rank, D, "LD", part, bias=c.attention_bias),
        **norm_spec("self_attn.q_a_layernorm", rank, axes="L"),
        **linear_spec("self_attn.q_b_proj", HK, rank, "HL", part),
    }


def _dense_spec(c: LatentConfig, bias: bool) -> Spec:
    return gated_ffn_spec("mlp", c.hidden_size, c.intermediate_size, bias=bias)


def _experts_spec(c: LatentConfig, correction: bool, bias: bool) -> Spec:
    E, D, F = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
    return {
        **router_spec("mlp.gate", E, D, correction=correction),
        **experts_spec("mlp.experts", E, D, F),
        **gated_ffn_spec("mlp.shared_experts", D, c.n_shared_experts * F, bias=bias),
    }


def latent_cache_spec(c: LatentConfig) -> list[LayerSpec]:
    """Per token one latent vector and one rotated key, whatever the number of heads."""
    return [LayerSpec(1, c.kv_lora_rank + c.qk_rope_head_dim, 0, latent=c.kv_lora_rank)] * c.num_hidden_layers


def latent_heads(
    be: Backend, c: LatentConfig, w: Any, x_MD: Array, angles: Angles, rows: Rows, memory: LayerCache,
    scale_M: Array | None = None,
) -> tuple[Array, Keys]:  # fmt: skip
    """The layer's norm, then queries, and latents into the cache -> q_MHK, and the keys that they attend to."""
    norm, attention = RMS(w.input_layernorm, c.rms_norm_eps), w.self_attn
    return be.append_latents(
        x_MD, query_weights(c, attention), attention.kv_a, memory, rows, angles, c.head_dim, LATENT_EPS,
        norm=norm, interleaved=c.rope_interleave, scale_M=scale_M,
    )  # fmt: skip


def query_weights(c: LatentConfig, w: Any) -> Linear | LatentQ:
    """What makes the queries: one matrix where there is no q_lora_rank, else the way through a latent vector."""
    return w.q_proj if c.q_lora_rank is None else LatentQ(w.q_a_proj, w.q_a_layernorm, w.q_b_proj)


def latent_ffn(be: Backend, c: LatentConfig, w: Any, x_MD: Array, moe: bool) -> Array:
    """Norm, then an FFN, or with `moe` the chosen experts and those that every token shares; plus `x_MD` -> x_MD."""
    norm = RMS(w.post_attention_layernorm, c.rms_norm_eps)
    if not moe:
        return be.gated_ffn(x_MD, w.mlp, c.hidden_act, norm=norm, residual_MD=x_MD)
    h_MD = be.mark("moe.input", be.normed(x_MD, norm))
    index_MC, weight_MC = be.route(h_MD, w.mlp.router, c.router)
    shared = w.mlp.shared_experts
    return be.expert_ffn(h_MD, w.mlp.experts, index_MC, weight_MC, c.hidden_act, residual_MD=x_MD, shared=shared)
