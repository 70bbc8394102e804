"""Llama 3 and the RoPE scalings."""

from typing import Any

from .case import DENSE, LLAMA3, RAMP, SCALED, YARN, Case, rope

LLAMA: dict[str, Any] = DENSE | {
    "vocab_size": 97,
    "rms_norm_eps": 1e-5,
    **rope(500.0),
}

CASES = {
    "llama3": Case("llama", LLAMA, "grouped heads, untied head, head_dim its own field", controls=(rope(400.0),)),
    "llama3-tied": Case(
        "llama", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 3}, "tied head, no lm_head stored"
    ),
    "llama3-scaling": Case(
        "llama",
        LLAMA | SCALED | rope(80.0, "llama3", **LLAMA3),
        "llama3 RoPE: frequency 0 kept, 1 and 2 blended, 3 to 5 divided; the rows outrun the original context",
        controls=(rope(80.0), rope(80.0, "linear", factor=8.0)),
        old_rope_key="rope_type",
    ),
    "llama3-yarn": Case(
        "llama",
        LLAMA | SCALED | rope(100.0, "yarn", **YARN),
        "yarn with default betas: frequency 0 kept, 1 blended, the others divided; default attention factor",
        controls=(rope(100.0), rope(100.0, "yarn", **YARN, attention_factor=1.0)),
        old_rope_key="type",
    ),
    "llama3-yarn-mscale": Case(
        "llama",
        LLAMA | SCALED | rope(100.0, "yarn", **YARN, **RAMP, mscale=1.3, mscale_all_dim=0.4),
        "yarn with its own betas (frequencies 1 to 3 blended) and attention factor from mscale and mscale_all_dim",
        controls=(rope(100.0, "yarn", **YARN, mscale=1.3, mscale_all_dim=0.4), rope(100.0, "yarn", **YARN, **RAMP)),
        old_rope_key="rope_type",
    ),
    "llama3-yarn-untruncated": Case(
        "llama",
        LLAMA | SCALED | rope(100.0, "yarn", **YARN, **RAMP, attention_factor=1.25, truncate=False),
        "yarn with an explicit attention factor and ends of the ramp that are not rounded",
        controls=(
            rope(100.0, "yarn", **YARN, **RAMP, attention_factor=1.25),
            rope(100.0, "yarn", **YARN, **RAMP, truncate=False),
        ),
    ),
    "llama3-linear": Case(
        "llama", LLAMA | SCALED | rope(500.0, "linear", factor=3.0), "linear RoPE scaling", controls=(rope(500.0),)
    ),
    "llama3-biases": Case(
        "llama",
        LLAMA | {"attention_bias": True, "mlp_bias": True},
        "biases on all seven projections",
        controls=({"attention_bias": False}, {"mlp_bias": False}),
    ),
    "llama3-bf16": Case("llama", LLAMA, "bfloat16 storage, untied", storage="bfloat16"),
    "llama3-f16": Case("llama", LLAMA | {"tie_word_embeddings": True}, "float16 storage, tied", storage="float16"),
    "llama3-sharded": Case("llama", LLAMA, "several files and an index", seed=1, shard_size="40KB"),
}
