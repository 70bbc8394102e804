"""Qwen2-MoE and Qwen3-MoE."""

from typing import Any

from .case import IDS, RAMP, YARN, Case, rope

QWEN3_MOE: dict[str, Any] = IDS | {
    "vocab_size": 83,
    "hidden_size": 30,
    "intermediate_size": 26,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    **rope(1000.0),
}
RAW = {"norm_topk_prob": False}

SPARSE_STEP = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
"""Layer 0 is dense by the step, layer 1 sparse, layer 2 dense by the step, layer 3 dense because it is named."""

QWEN2_MOE: dict[str, Any] = {key: value for key, value in QWEN3_MOE.items() if key not in ("head_dim", "norm_topk_prob")} | {
    "hidden_size": 32,
    "shared_expert_intermediate_size": 17,
}
SHARED = (r"shared_expert\.", r"shared_expert_gate")

OLD_EXPERTS: dict[str, Any] = {"old": {"num_experts": 6, "max_window_layers": 48}, "old_without": ("num_local_experts",)}
"""What the older spelling of Qwen3-MoE calls otherwise."""

CASES = {
    "qwen3-moe": Case(
        "qwen3_moe",
        QWEN3_MOE,
        "as published: every layer sparse, weights of the chosen experts normalised; untied head",
        controls=(RAW, {"num_experts_per_tok": 3}, rope(800.0)),
        old_rope_key="rope_type",
        **OLD_EXPERTS,
    ),
    "qwen3-moe-raw": Case(
        "qwen3_moe",
        {key: value for key, value in QWEN3_MOE.items() if key != "norm_topk_prob"} | {"num_experts_per_tok": 3},
        "norm_topk_prob left to the class default, which is false; 3 of 6 experts",
        controls=({"norm_topk_prob": True}, {"num_experts_per_tok": 2}),
        old_rope_key="type",
        old_without=("norm_topk_prob", "num_local_experts", "mlp_only_layers"),
        old={"num_experts": 6},
    ),
    "qwen3-moe-sparse-step": Case(
        "qwen3_moe",
        QWEN3_MOE | SPARSE_STEP | {"tie_word_embeddings": True},
        "decoder_sparse_step and mlp_only_layers: dense, sparse, dense, dense; tied head",
        seed=2,
        controls=(RAW,),
        old_rope_key="rope_type",
        **OLD_EXPERTS,
    ),
    "qwen3-moe-window": Case(
        "qwen3_moe",
        QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 7, "attention_bias": True},
        "every layer sees a window of 7, the token itself included; biases on q, k, v and o",
        seed=1,
        controls=({"sliding_window": 8}, {"sliding_window": 6}, {"use_sliding_window": False}, {"attention_bias": False}),
    ),
    "qwen3-moe-yarn": Case(
        "qwen3_moe",
        QWEN3_MOE | {"head_dim": 12} | rope(100.0, "yarn", **YARN, **RAMP),
        "yarn as Qwen documents it (factor 4)",
        controls=(rope(100.0), rope(100.0, "yarn", **YARN, **RAMP, attention_factor=1.0)),
        old_rope_key="rope_type",
        **OLD_EXPERTS,
    ),
    "qwen3-moe-fused": Case(
        "qwen3_moe", QWEN3_MOE | RAW, "a layer's experts in two tensors; bfloat16", storage="bfloat16", fused=True
    ),
    "qwen2-moe": Case(
        "qwen2_moe",
        QWEN2_MOE,
        "as published: a shared expert behind a gate of its own, raw weights, biases on q, k and v; no head_dim (here 8)",
        controls=({"norm_topk_prob": True}, {"num_experts_per_tok": 3}, {"qkv_bias": False}),
        zeroed=SHARED,
        old_rope_key="rope_type",
        old={"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 1},
        old_without=("qkv_bias",),
    ),
    "qwen2-moe-sparse-step": Case(
        "qwen2_moe",
        QWEN2_MOE | SPARSE_STEP | {"qkv_bias": False, "norm_topk_prob": True, "tie_word_embeddings": True},
        "dense, sparse, dense, dense; normalised weights, no biases, tied head",
        seed=1,
        controls=(RAW,),
        zeroed=SHARED,
        old_rope_key="rope_type",
    ),
    "qwen2-moe-window": Case(
        "qwen2_moe",
        QWEN2_MOE | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "head_dim": 10},
        "of the layers before max_window_layers every other one, from 0 on, sees a window: here layer 0",
        controls=(
            {"sliding_window": 8},
            {"sliding_window": 6},
            {"use_sliding_window": False, "layer_types": None},
            {"max_window_layers": 3, "layer_types": None},
        ),
        old_rope_key="rope_type",
    ),
    "qwen2-moe-layer-types": Case(
        "qwen2_moe",
        QWEN2_MOE
        | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "tie_word_embeddings": True}
        | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "layer_types say otherwise than max_window_layers, and count",
        controls=({"layer_types": None}, {"layer_types": ["full_attention"] * 3}),
    ),
    "qwen2-moe-fused": Case(
        "qwen2_moe", QWEN2_MOE, "a layer's experts in two tensors; bfloat16", storage="bfloat16", fused=True, zeroed=SHARED
    ),
}
