"""Mixtral."""

from typing import Any

from .case import IDS, RAMP, YARN, Case, rope

MIXTRAL: dict[str, Any] = IDS | {
    "vocab_size": 83,
    "hidden_size": 30,
    "intermediate_size": 14,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 5,
    "max_position_embeddings": 64,
    **rope(1000.0),
}

CASES = {
    "mixtral": Case(
        "mixtral",
        MIXTRAL,
        "2 of 5 experts, normalised weights; the published names (block_sparse_moe, w1, w2, w3); no window",
        controls=({"num_experts_per_tok": 1}, {"num_experts_per_tok": 3}, {"sliding_window": 7}, rope(800.0)),
        old_rope_key="rope_type",
    ),
    "mixtral-defaults": Case(
        "mixtral",
        {key: value for key, value in MIXTRAL.items() if key not in ("head_dim", "rope_parameters")}
        | {"hidden_size": 32, "num_experts_per_tok": 3, "tie_word_embeddings": True},
        "class defaults: theta 1e6, eps 1e-5, head_dim hidden / heads (here 8); tied head",
        controls=(rope(10000.0), {"rms_norm_eps": 1e-2}),
        old_rope_key="type",
        old_without=("rms_norm_eps", "head_dim", "sliding_window"),
    ),
    "mixtral-window": Case(
        "mixtral",
        MIXTRAL | {"sliding_window": 7, "num_hidden_layers": 2},
        "every layer sees a window of 7, the token itself included",
        controls=({"sliding_window": 8}, {"sliding_window": 6}, {"sliding_window": None}),
        old_rope_key="rope_type",
    ),
    "mixtral-yarn-gelu": Case(
        "mixtral",
        MIXTRAL | {"head_dim": 12, "hidden_act": "gelu_pytorch_tanh"} | rope(100.0, "yarn", **YARN, **RAMP),
        "yarn, and experts with another activation",
        controls=(rope(100.0), {"hidden_act": "silu"}),
    ),
    "mixtral-fused": Case(
        "mixtral", MIXTRAL, "what transformers 5 holds: mlp.gate, a layer's experts in two tensors", fused=True
    ),
    "mixtral-bf16": Case("mixtral", MIXTRAL | {"num_local_experts": 4}, "bfloat16 storage", storage="bfloat16"),
}
