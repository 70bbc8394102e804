"""Mistral, with and without its window."""

from typing import Any

from .case import DENSE, SMALL, YARN, Case, rope

MISTRAL: dict[str, Any] = DENSE | {
    "vocab_size": 97,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    **rope(10000.0),
}

CASES = {
    "mistral": Case(
        "mistral",
        MISTRAL,
        "no window, head_dim its own field",
        controls=({"sliding_window": 20}, rope(1000.0)),
        old_rope_key="rope_type",
    ),
    "mistral-window": Case(
        "mistral",
        MISTRAL | SMALL | {"sliding_window": 7, "tie_word_embeddings": True},
        "every layer sees a window of 7, the token itself included",
        controls=({"sliding_window": 8}, {"sliding_window": 6}, {"sliding_window": None}),
    ),
    "mistral-7b": Case(
        "mistral",
        {key: value for key, value in MISTRAL.items() if key != "head_dim"}
        | {"hidden_size": 48, "intermediate_size": 28, "sliding_window": 12},
        "the older spelling: no head_dim (here 8), a window",
        controls=({"sliding_window": 11}, {"sliding_window": 13}),
        old_rope_key="rope_type",
        old_without=("head_dim",),
    ),
    "mistral-yarn": Case(
        "mistral",
        MISTRAL | {"head_dim": 12, "num_key_value_heads": 3, "intermediate_size": 30} | rope(100.0, "yarn", **YARN),
        "yarn, and no window",
        controls=(rope(100.0), rope(100.0, "yarn", **YARN, attention_factor=1.0)),
        old_rope_key="type",
    ),
    "mistral-bf16": Case(
        "mistral",
        MISTRAL | {"sliding_window": 9, "num_key_value_heads": 3},
        "bfloat16 storage, a window of 9",
        storage="bfloat16",
        controls=({"sliding_window": 10},),
    ),
}
