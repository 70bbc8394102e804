"""OLMo 2."""

from typing import Any

from .case import DENSE, YARN, Case, rope

OLMO2: dict[str, Any] = DENSE | {
    "vocab_size": 93,
    "pad_token_id": None,
    "rms_norm_eps": 1e-6,
    **rope(500.0),
}

PUBLISHED = {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 4}
"""As in the sizes up to 13B: as many key/value heads as heads, and no head_dim (here 10)."""

CASES = {
    "olmo2": Case("olmo2", OLMO2, "grouped heads; norms of q, of k and of each branch", controls=(rope(400.0),)),
    "olmo2-mha": Case(
        "olmo2",
        {key: value for key, value in (OLMO2 | PUBLISHED).items() if key != "head_dim"},
        "as many key/value heads as heads, head_dim from the hidden size",
        controls=(rope(400.0),),
        old_rope_key="rope_type",
    ),
    "olmo2-eps": Case(
        "olmo2",
        OLMO2 | {"attention_bias": True, "rms_norm_eps": 0.5},
        "an eps that counts, in the norms of q and k too; biases on q, k, v and o",
        controls=({"rms_norm_eps": 0.4}, {"attention_bias": False}),
    ),
    "olmo2-yarn": Case(
        "olmo2",
        OLMO2 | {"head_dim": 12, "num_key_value_heads": 3, "intermediate_size": 30} | rope(100.0, "yarn", **YARN),
        "yarn, 3 key/value heads",
        controls=(rope(100.0), rope(100.0, "yarn", **YARN, attention_factor=1.0)),
        old_rope_key="type",
    ),
    "olmo2-bf16": Case("olmo2", OLMO2 | {"num_key_value_heads": 3}, "bfloat16 storage, untied", storage="bfloat16"),
}
