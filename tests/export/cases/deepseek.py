"""DeepSeek V2, DeepSeek V3 and Mistral Large 3: latent attention, routed and shared experts."""

from typing import Any

from .case import IDS, Case, rope

SHARED: dict[str, Any] = IDS | {
    "vocab_size": 89,
    "hidden_size": 28,
    "intermediate_size": 34,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 18,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "max_position_embeddings": 64,
}
"""Four groups of three experts, of which two are kept; no two of the widths of latent attention are the same."""

NO_GROUPS: dict[str, Any] = {"n_group": 1, "topk_group": 1}
NO_Q_LORA: dict[str, Any] = {"q_lora_rank": None}

YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.25}
"""With theta 100 and 8 rotated numbers, a ramp from pair 0 to pair 3."""

PUBLISHED: dict[str, Any] = {
    "old_rope_key": "type",
    "old_without": ("head_dim", "qk_head_dim", "rope_interleave", "output_router_logits"),
}
"""What transformers 5 writes and the published files have not."""

V3_FIELDS: dict[str, Any] = {"ep_size": 1, "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
BIAS = ("e_score_correction_bias",)

V3 = {
    "deepseek-v3": Case(
        "deepseek_v3",
        SHARED | rope(100.0, "yarn", **YARN, mscale=1.0, mscale_all_dim=1.0),
        "as V3: yarn with the squared factor on the scale, sigmoid router in groups with a correction bias, one dense layer",
        controls=(
            rope(100.0, "yarn", **YARN),
            rope(100.0, "yarn", **YARN, mscale=1.0, mscale_all_dim=1.0, attention_factor=1.1),
            rope(100.0),
            {"rope_interleave": False},
            {"norm_topk_prob": False},
            {"routed_scaling_factor": 1.0},
            {"topk_group": 4},
            {"n_group": 3},
            {"num_experts_per_tok": 2},
        ),
        zeroed=BIAS,
        old=V3_FIELDS | {"seq_aux": True, "aux_loss_alpha": 0.001},
        **PUBLISHED,
    ),
    "deepseek-v3-moonlight": Case(
        "deepseek_v3",
        SHARED | NO_Q_LORA | NO_GROUPS | {"routed_scaling_factor": 2.446, "num_experts_per_tok": 4} | rope(50.0),
        "as Moonlight: queries without a latent, no groups, RoPE without scaling",
        controls=({"rope_interleave": False}, {"n_group": 4}, rope(60.0)),
        zeroed=BIAS,
        old=V3_FIELDS,
        **PUBLISHED,
    ),
    "deepseek-v3-bias": Case(
        "deepseek_v3",
        SHARED
        | {"attention_bias": True, "norm_topk_prob": False, "n_group": 2, "topk_group": 1, "v_head_dim": 12}
        | {"tie_word_embeddings": True}
        | rope(100.0, "yarn", **YARN, mscale=0.707, mscale_all_dim=0.4),
        "biases on the attention, weights not normalised, yarn whose two mscales differ, values wider than keys, tied",
        controls=(
            {"norm_topk_prob": True},
            {"topk_group": 2},
            rope(100.0, "yarn", **YARN, mscale=0.4, mscale_all_dim=0.4),
            rope(100.0, "yarn", **YARN, mscale=0.707, mscale_all_dim=0.4, attention_factor=1.0),
        ),
        zeroed=(*BIAS, r"self_attn\.\w+\.bias"),
        old_rope_key="rope_type",
        old_without=PUBLISHED["old_without"],
    ),
    "deepseek-v3-halves-bf16": Case(
        "deepseek_v3",
        SHARED
        | {"rope_interleave": False, "first_k_dense_replace": 0, "num_hidden_layers": 2, "rms_norm_eps": 1e-3}
        | {"n_shared_experts": 1, "n_routed_experts": 20, "n_group": 5, "topk_group": 3}
        | rope(50.0, "linear", factor=2.0),
        "half-split RoPE, no dense layer, rms_norm_eps apart from the latent norms' 1e-6, bfloat16 storage",
        controls=({"rope_interleave": True}, rope(50.0), {"topk_group": 5}, {"rms_norm_eps": 0.1}),
        storage="bfloat16",
        zeroed=BIAS,
    ),
}

V2_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}

V2 = {
    "deepseek-v2": Case(
        "deepseek_v2",
        SHARED | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0} | rope(100.0, "yarn", **V2_YARN),
        "as V2: softmax router, groups by their best expert, weights times 16, yarn with mscale 0.707",
        controls=(
            {"topk_method": "greedy"},
            {"topk_group": 3},
            {"routed_scaling_factor": 1.0},
            rope(100.0, "yarn", **(V2_YARN | {"mscale_all_dim": 0.0})),
            rope(100.0),
        ),
        old={"scoring_func": "softmax", "moe_layer_freq": 1, "ep_size": 1, "seq_aux": True, "aux_loss_alpha": 0.001},
        **PUBLISHED,
    ),
    "deepseek-v2-lite": Case(
        "deepseek_v2",
        SHARED | NO_Q_LORA | NO_GROUPS | {"num_experts_per_tok": 4} | rope(100.0, "yarn", **V2_YARN),
        "as V2-Lite: greedy over all experts, queries without a latent, weights as they are",
        controls=({"num_experts_per_tok": 3}, {"routed_scaling_factor": 2.0}),
        old={"scoring_func": "softmax", "moe_layer_freq": 1, "norm_topk_prob": False},
        **PUBLISHED,
    ),
    "deepseek-v2-bias": Case(
        "deepseek_v2",
        SHARED
        | {"attention_bias": True, "mlp_bias": True, "n_group": None, "topk_group": None, "first_k_dense_replace": 2}
        | {"n_shared_experts": 1, "routed_scaling_factor": 3.0}
        | rope(100.0, "yarn", **YARN, attention_factor=1.3),
        "biases on attention and FFN (the shared expert's too), no groups given, an attention factor and no mscale",
        controls=({"routed_scaling_factor": 1.0}, rope(100.0, "yarn", **YARN)),
        zeroed=(r"mlp\.\w+\.bias", r"shared_experts\.\w+\.bias", r"self_attn\.\w+\.bias"),
    ),
    "deepseek-v2-moe-only-bf16": Case(
        "deepseek_v2",
        SHARED
        | {"first_k_dense_replace": 0, "num_hidden_layers": 2, "n_group": 3, "topk_group": 1, "tie_word_embeddings": True}
        | {"topk_method": "group_limited_greedy", "norm_topk_prob": True}
        | rope(60.0),
        "no dense layer, one group of three kept, norm_topk_prob without effect, tied, bfloat16 storage",
        controls=({"topk_group": 2}, {"n_group": 2}, rope(80.0)),
        storage="bfloat16",
    ),
}

TEMPERATURE = {"original_max_position_embeddings": 9, "llama_4_scaling_beta": 0.6}
"""A query temperature that rises at positions 9, 18, 27 and 36."""

M4_YARN = YARN | TEMPERATURE

MISTRAL4 = {
    "mistral4": Case(
        "mistral4",
        SHARED
        | NO_GROUPS
        | {"first_k_dense_replace": 0, "num_hidden_layers": 2, "n_routed_experts": 16}
        | rope(100.0, "yarn", **M4_YARN, mscale=1.0, mscale_all_dim=1.0),
        "as the class defaults: all layers MoE, softmax router, query temperature, the squared factor; fused experts",
        controls=(
            rope(100.0, "yarn", **(M4_YARN | {"llama_4_scaling_beta": 0.0}), mscale=1.0, mscale_all_dim=1.0),
            rope(100.0, "yarn", **(M4_YARN | {"original_max_position_embeddings": 8}), mscale=1.0, mscale_all_dim=1.0),
            rope(100.0, "yarn", **M4_YARN, mscale=1.0, mscale_all_dim=0.0, attention_factor=1.0),
            {"norm_topk_prob": False},
            {"rope_interleave": False},
        ),
        old_rope_key="type",
        old_without=("qk_head_dim", "output_router_logits"),
    ),
    "mistral4-large": Case(
        "mistral4",
        SHARED | NO_GROUPS | {"n_shared_experts": 1} | rope(100.0, "yarn", **M4_YARN, attention_factor=1.0),
        "as Mistral Large 3: a dense layer first, no factor on the scale and none on cosine and sine",
        seed=3,
        controls=(rope(100.0, "yarn", **M4_YARN, mscale=1.0, mscale_all_dim=1.0), {"num_experts_per_tok": 2}),
    ),
    "mistral4-groups": Case(
        "mistral4",
        SHARED
        | NO_Q_LORA
        | {"norm_topk_prob": False, "routed_scaling_factor": 3.0, "rope_interleave": False, "attention_bias": True}
        | rope(100.0, "yarn", **M4_YARN, mscale=0.707, mscale_all_dim=0.5),
        "groups by their two best experts, half-split RoPE, biases, weights as they are times 3, queries without a latent",
        controls=({"topk_group": 3}, {"norm_topk_prob": True}, {"rope_interleave": True}, {"routed_scaling_factor": 1.0}),
        zeroed=(r"self_attn\.\w+\.bias",),
    ),
    "mistral4-linear-bf16": Case(
        "mistral4",
        SHARED
        | {"n_group": 2, "topk_group": 1, "tie_word_embeddings": True, "num_hidden_layers": 2}
        | rope(100.0, "linear", factor=2.0, **TEMPERATURE),
        "RoPE scaled linearly with a query temperature, one of two groups kept, tied, bfloat16 storage",
        controls=({"topk_group": 2}, rope(100.0, "linear", factor=2.0, **(TEMPERATURE | {"llama_4_scaling_beta": 0.0}))),
        storage="bfloat16",
    ),
}

CASES = V3 | V2 | MISTRAL4
