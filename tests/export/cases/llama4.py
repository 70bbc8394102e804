"""Llama 4, the text part."""

from typing import Any

from .case import IDS, Case, rope

SCALING = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 28}
"""As Scout's, low == high: with theta 80 and head_dim 10, frequencies 0 and 1 are kept and the others divided."""

LLAMA4: dict[str, Any] = IDS | {
    "vocab_size": 97,
    "hidden_size": 28,
    "intermediate_size": 12,
    "intermediate_size_mlp": 22,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "num_local_experts": 4,
    "attention_chunk_size": 8,
    "floor_scale": 6,
    "attn_scale": 0.8,
    **rope(500.0),
}
"""A chunk of 8 (rows reach into the fifth), a temperature that rises every 6 positions, an eps that shows in qk-norm."""

PUBLISHED: dict[str, Any] = {"old_rope_key": "rope_type", "old_without": ("moe_layers",)}
"""The published files have no list of MoE layers, and no or an empty list of NoPE layers."""

CASES = {
    "llama4": Case(
        "llama4_text",
        LLAMA4 | rope(80.0, "llama3", **SCALING),
        "as Scout: all layers MoE, qk-norm on the RoPE layers, llama3 RoPE with low == high, layer 3 NoPE",
        controls=(
            {"use_qk_norm": False},
            {"attn_temperature_tuning": False},
            {"floor_scale": 7},
            {"attention_chunk_size": 9},
            {"attention_chunk_size": 64},
            {"num_experts_per_tok": 2},
            rope(80.0),
        ),
        old={"no_rope_layers": []},
        **PUBLISHED,
    ),
    "llama4-interleaved": Case(
        "llama4_text",
        LLAMA4 | {"interleave_moe_layer_step": 2, "use_qk_norm": False, "num_local_experts": 5},
        "as Maverick: dense layers 0 and 2, MoE layers 1 and 3, no qk-norm, layer 3 NoPE",
        controls=({"use_qk_norm": True}, {"attn_scale": 1.0}, {"attention_chunk_size": 7}),
        old={"no_rope_layers": None, "no_rope_layer_interval": 4},
        **PUBLISHED,
    ),
    "llama4-top2": Case(
        "llama4_text",
        LLAMA4
        | {"num_hidden_layers": 3, "num_attention_heads": 4, "num_experts_per_tok": 2, "num_local_experts": 5}
        | {"moe_layers": [0, 2], "no_rope_layers": [0, 1, 0], "attention_bias": True, "attn_temperature_tuning": False},
        "two experts per token, lists of MoE and NoPE layers, biases in the attention, no temperature",
        controls=({"num_experts_per_tok": 1}, {"attention_bias": False}, {"attn_temperature_tuning": True}),
        old_rope_key="rope_type",
    ),
    "llama4-layer-types": Case(
        "llama4_text",
        LLAMA4
        | {"num_hidden_layers": 3, "no_rope_layer_interval": 2, "num_key_value_heads": 3, "tie_word_embeddings": True}
        | {"layer_types": ["full_attention", "chunked_attention", "chunked_attention"], "hidden_act": "gelu_pytorch_tanh"},
        "masks apart from RoPE: RoPE with all keys, NoPE within chunks; tied, another activation",
        controls=({"layer_types": None}, {"attn_temperature_tuning": False}, {"hidden_act": "silu"}),
    ),
    "llama4-bf16": Case(
        "llama4_text",
        LLAMA4 | {"interleave_moe_layer_step": 3, "num_hidden_layers": 3, "no_rope_layer_interval": 3},
        "bfloat16 storage of fused experts; layer 2 is MoE and NoPE",
        storage="bfloat16",
    ),
}
