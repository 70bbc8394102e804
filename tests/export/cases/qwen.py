"""Qwen2 and Qwen3, dense."""

from typing import Any

from .case import DENSE, SCALED, SMALL, YARN, Case, rope

QWEN3: dict[str, Any] = DENSE | {
    "vocab_size": 101,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    **rope(1000.0),
}

QWEN2: dict[str, Any] = QWEN3 | {"num_key_value_heads": 2, "tie_word_embeddings": False}

CASES = {
    "qwen2": Case("qwen2", QWEN2, "biases on q, k and v, none on o; untied head", controls=(rope(800.0),)),
    "qwen2-window-off": Case(
        "qwen2",
        {key: value for key, value in QWEN2.items() if key != "head_dim"} | {"hidden_size": 40, "num_attention_heads": 4},
        "no head_dim (here 10); the older spelling names a window and says that it is not used",
        controls=({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "layer_types": None},),
        old_rope_key="rope_type",
        old={"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2-window": Case(
        "qwen2",
        QWEN2
        | SMALL
        | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "tie_word_embeddings": True},
        "layers 0 and 1 attend to everything, layers 2 and 3 to a window of 7, the token itself included",
        controls=({"sliding_window": 8}, {"sliding_window": 6}, {"max_window_layers": 1, "layer_types": None}),
        old_rope_key="rope_type",
    ),
    "qwen2-layer-types": Case(
        "qwen2",
        QWEN2
        | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "tie_word_embeddings": True}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        "layer_types say otherwise than max_window_layers, and count",
        controls=({"layer_types": None}, {"layer_types": ["full_attention"] * 3}),
    ),
    "qwen2-yarn": Case(
        "qwen2",
        QWEN2 | SCALED | rope(100.0, "yarn", **YARN),
        "yarn as Qwen2.5 documents it (factor 4), tied head",
        controls=(rope(100.0), rope(100.0, "yarn", **YARN, attention_factor=1.0)),
        old_rope_key="type",
    ),
    "qwen2-bf16": Case("qwen2", QWEN2 | {"tie_word_embeddings": True}, "bfloat16 storage, tied", storage="bfloat16"),
    "qwen3": Case("qwen3", QWEN3, "per-head norms of q and k, tied head, head_dim its own field", controls=(rope(800.0),)),
    "qwen3-untied-bias": Case(
        "qwen3",
        QWEN3 | {"tie_word_embeddings": False, "attention_bias": True},
        "untied head, biases on the attention's projections",
        controls=({"attention_bias": False},),
    ),
    "qwen3-yarn": Case(
        "qwen3",
        QWEN3 | SCALED | rope(100.0, "yarn", **YARN),
        "yarn as Qwen documents it (factor 4)",
        controls=(rope(100.0), rope(100.0, "yarn", **YARN, attention_factor=1.0)),
        old_rope_key="rope_type",
    ),
    "qwen3-window": Case(
        "qwen3",
        QWEN3 | SMALL | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        "layer 0 attends to everything, layers 1 to 3 to a window of 7, the token itself included",
        controls=({"sliding_window": 8}, {"sliding_window": 6}, {"max_window_layers": 2, "layer_types": None}),
        old_rope_key="rope_type",
    ),
    "qwen3-bf16": Case("qwen3", QWEN3 | {"num_key_value_heads": 2}, "bfloat16 storage, tied", storage="bfloat16"),
}
