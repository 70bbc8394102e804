"""Gemma 3n, its text part. Between layers it has several streams, so a folder holds few tokens and thin layers."""

from typing import Any

from .case import IDS, Case, rope
from .gemma import ropes

SLIDING, FULL = "sliding_attention", "full_attention"

GEMMA3N: dict[str, Any] = IDS | {
    "vocab_size": 61,
    "vocab_size_per_layer_input": 53,
    "hidden_size": 20,
    "hidden_size_per_layer_input": 5,
    "intermediate_size": 26,
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 3,
    "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING],
    "activation_sparsity_pattern": [0.7, 0.0, 0.8, 0.0, 0.0],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "laurel_rank": 3,
    "max_position_embeddings": 64,
    "sliding_window": 7,
    "final_logit_softcapping": 8.0,
    **ropes(rope(800.0), rope(40.0)),
}

DENSE = {"activation_sparsity_pattern": [0.0] * 5}
PUBLISHED = {"query_pre_attn_scalar": 256, "altup_coef_clip": 120.0}

CASES = {
    "gemma3n": Case(
        "gemma3n_text",
        GEMMA3N,
        "two layers with keys of their own, one of each type, and three that share them; sparse gates in layers 0 and 2; "
        "ids beyond the per-layer table; the cap is low enough to be felt",
        seed=2,
        tokens=29,
        controls=(
            {"sliding_window": 8},
            {"sliding_window": 6},
            {"layer_types": [FULL, SLIDING] * 2 + [FULL]},
            {"activation_sparsity_pattern": [0.7, 0.0, 0.0, 0.0, 0.0]},
            {"altup_correct_scale": False},
            {"altup_active_idx": 1},
            {"final_logit_softcapping": 30.0},
            ropes(rope(400.0), rope(40.0)),
            ropes(rope(800.0), rope(80.0)),
        ),
        zeroed=("embed_tokens_per_layer", "per_layer_model_projection", "linear_left", "prediction_coefs", "correction"),
        old_rope_key="rope_type",
        old=PUBLISHED | {"layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING]},
    ),
    "gemma3n-active": Case(
        "gemma3n_text",
        GEMMA3N
        | {
            "altup_num_inputs": 3,
            "altup_active_idx": 2,
            "altup_correct_scale": False,
            "intermediate_size": [26, 18, 22, 30, 18],
            "attention_bias": True,
            "num_kv_shared_layers": 2,
            "layer_types": [FULL, SLIDING, SLIDING, SLIDING, FULL],
        },
        "three streams, the layers compute on the last of them; the correction's scale unused; a width for each FFN; biases",
        tokens=29,
        controls=({"altup_active_idx": 0}, {"altup_correct_scale": True}, {"attention_bias": False}),
    ),
    "gemma3n-bf16": Case(
        "gemma3n_text",
        GEMMA3N | DENSE | {"num_kv_shared_layers": 0, "altup_num_inputs": 2, "hidden_activation": "gelu", "head_dim": 8},
        "bfloat16 storage, two streams, every layer with keys of its own, no sparsity, the exact GELU",
        tokens=29,
        storage="bfloat16",
        controls=({"hidden_activation": "gelu_pytorch_tanh", "altup_active_idx": 1}, ropes(rope(800.0), rope(800.0))),
    ),
    "gemma3n-defaults": Case(
        "gemma3n_text",
        {key: value for key, value in GEMMA3N.items() if key not in ("layer_types", "activation_sparsity_pattern")}
        | {
            "hidden_size": 16,
            "num_hidden_layers": 11,
            "num_kv_shared_layers": 5,
            "intermediate_size": 40,
            "hidden_size_per_layer_input": 3,
            "final_logit_softcapping": 30.0,
        }
        | ropes(rope(800.0, "linear", factor=4.0), rope(40.0)),
        "class defaults: every fifth layer global, the first ten sparse; old files say neither; a scaled RoPE on global "
        "layers; bfloat16 storage",
        seed=3,
        tokens=23,
        storage="bfloat16",
        controls=(
            {"activation_sparsity_pattern": [0.95] * 9 + [0.0] * 2},
            {"layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, SLIDING, SLIDING, SLIDING, SLIDING, FULL, SLIDING]},
            ropes(rope(800.0), rope(40.0)),
        ),
        old_rope_key="rope_type",
        old=PUBLISHED | {"intermediate_size": 40},
        old_without=("activation_sparsity_pattern",),
    ),
    "gemma3n-sliced": Case(
        "gemma3n_text",
        GEMMA3N
        | {
            "num_hidden_layers": 3,
            "num_kv_shared_layers": 1,
            "intermediate_size": [18, 26, 17],
            "layer_types": [SLIDING, FULL, SLIDING],
            "activation_sparsity_pattern": [0.7, 0.0, 0.0],
        },
        "what MatFormer makes of the case gemma3n: without layers 2 and 3, narrower FFNs in the first and the last layer",
        tokens=29,
        sliced_from="gemma3n",
        kept_layers=(0, 1, 4),
    ),
}
