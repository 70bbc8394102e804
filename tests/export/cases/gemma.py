"""Gemma 2 and Gemma 3."""

from typing import Any

from .case import IDS, LLAMA3, Case, rope

SIZES: dict[str, Any] = IDS | {
    "vocab_size": 97,
    "hidden_size": 30,
    "intermediate_size": 34,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "sliding_window": 7,
}

GEMMA2: dict[str, Any] = SIZES | {
    "query_pre_attn_scalar": 5,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 6.0,
    **rope(100.0),
}
"""The caps are low, so that scores and logits of this scale feel them."""


def ropes(full: dict[str, Any], local: dict[str, Any]) -> dict[str, Any]:
    """Config fields for one RoPE setting of global layers and one of sliding layers, as `rope` makes them."""
    return {"rope_parameters": {"full_attention": full["rope_parameters"], "sliding_attention": local["rope_parameters"]}}


GLOBAL, SLOWED, LOCAL = rope(800.0), rope(800.0, "linear", factor=4.0), rope(40.0)

GEMMA3: dict[str, Any] = SIZES | {
    "query_pre_attn_scalar": 16,
    "sliding_window_pattern": 3,
    **ropes(SLOWED, LOCAL),
}

FEW = {"hidden_size": 20, "num_attention_heads": 4, "head_dim": 8, "intermediate_size": 26}
"""Small layers, for a case that needs many."""

CASES = {
    "gemma2": Case(
        "gemma2",
        GEMMA2,
        "layers 0 and 2 see a window of 7, the token itself included; scale query_pre_attn_scalar^-0.5; both caps; tied",
        seed=4,
        controls=(
            {"sliding_window": 8},
            {"sliding_window": 6},
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            {"query_pre_attn_scalar": 10},
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            rope(80.0),
        ),
        old_rope_key="rope_type",
    ),
    "gemma2-uncapped": Case(
        "gemma2",
        GEMMA2
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True}
        | {"tie_word_embeddings": False, "num_hidden_layers": 3, "query_pre_attn_scalar": 12},
        "caps of null, biases on q, k, v and o, untied head",
        controls=({"attn_logit_softcapping": 2.0}, {"final_logit_softcapping": 6.0}, {"attention_bias": False}),
    ),
    "gemma2-layer-types": Case(
        "gemma2",
        GEMMA2
        | {"num_hidden_layers": 3, "num_key_value_heads": 3, "hidden_activation": "gelu"}
        | {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        "layer_types say otherwise than even and odd, and count; the exact GELU",
        seed=25,
        controls=({"layer_types": None}, {"hidden_activation": "silu"}),
    ),
    "gemma2-linear": Case(
        "gemma2",
        GEMMA2 | {"num_hidden_layers": 3} | rope(100.0, "linear", factor=3.0),
        "linear RoPE scaling, on all layers",
        seed=1,
        controls=(rope(100.0),),
        old_rope_key="type",
    ),
    "gemma2-bf16": Case("gemma2", GEMMA2 | {"num_hidden_layers": 3}, "bfloat16 storage", storage="bfloat16"),
    "gemma3": Case(
        "gemma3_text",
        GEMMA3,
        "layer 2 sees everything, layers 0, 1, 3 a window of 7; global RoPE slowed by 4, local RoPE with its own base; tied",
        seed=2,
        controls=(
            {"sliding_window": 8},
            {"sliding_window": 6},
            {"sliding_window_pattern": 2},
            {"query_pre_attn_scalar": 10},
            ropes(GLOBAL, LOCAL),
            ropes(SLOWED, rope(40.0, "linear", factor=4.0)),
            ropes(SLOWED, rope(800.0)),
        ),
        old_rope_key="rope_type",
        old={"sliding_window_pattern": 3},
        old_without=("_sliding_window_pattern",),
    ),
    "gemma3-default-pattern": Case(
        "gemma3_text",
        {key: value for key, value in GEMMA3.items() if key != "sliding_window_pattern"}
        | FEW
        | {"num_hidden_layers": 7}
        | ropes(GLOBAL, LOCAL),
        "no pattern: of seven layers, the sixth sees everything; nothing scaled, as in 270m and 1B",
        controls=({"sliding_window_pattern": 5}, {"sliding_window_pattern": 7}, ropes(LOCAL, LOCAL)),
        old_rope_key="rope_type",
        old_without=("_sliding_window_pattern",),
    ),
    "gemma3-layer-types": Case(
        "gemma3_text",
        GEMMA3
        | {"num_hidden_layers": 3, "attention_bias": True, "tie_word_embeddings": False, "final_logit_softcapping": 6.0}
        | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "layer_types say otherwise than the pattern, and count; biases, untied head, capped logits",
        controls=({"layer_types": None}, {"attention_bias": False}, {"final_logit_softcapping": None}),
    ),
    "gemma3-both-scaled": Case(
        "gemma3_text",
        GEMMA3
        | {"num_hidden_layers": 3, "num_key_value_heads": 3, "head_dim": 12, "sliding_window": 9}
        | ropes(rope(80.0, "llama3", **LLAMA3), rope(40.0, "linear", factor=2.0)),
        "llama3 scaling of the global layers, linear of the sliding ones, as only the new spelling can say",
        seed=22,
        controls=(ropes(rope(80.0), rope(40.0, "linear", factor=2.0)), ropes(rope(80.0, "llama3", **LLAMA3), rope(40.0))),
    ),
    "gemma3-bf16": Case("gemma3_text", GEMMA3 | {"num_hidden_layers": 3}, "bfloat16 storage", storage="bfloat16"),
}
