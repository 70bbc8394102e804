"""The model cases: one entry per checkpoint folder under `tests/truth/models/`. Needs neither torch nor transformers.

An entry is the model's `model_type`, the fields of its config, and what the case is for. The shapes are chosen so that
no two axes can be confused: key/value heads are neither 1 nor the number of heads, heads x head_dim is not the hidden
size, and the sizes are not all powers of two.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One checkpoint and its truth.

    model: `model_type` of config.json. config: fields given to the config class, JSON values only.
    notes: what the case is for. seed: draws weights and tokens. tokens: length of each of the two rows.
    storage: dtype of the stored weights; the truth is computed in float32 from the weights as stored.
    controls: config fields that switch the case's feature off. Each must change the logits of the same weights by at
    least one per cent, so a case cannot pass without its feature.
    old_rope_key: if given, `config.old.json` says the same in the spelling of before transformers 5, with this name for
    the key of the RoPE type ("rope_type" or the still older "type").
    shard_size: if given, the weights are split into files of at most this size, with an index.
    """

    model: str
    config: dict[str, Any]
    notes: str
    seed: int = 0
    tokens: int = 37
    storage: str = "float32"
    controls: tuple[dict[str, Any], ...] = ()
    old_rope_key: str | None = None
    shard_size: str | None = None


def digest(case: Case) -> str:
    """Identifies a declaration; its notes do not count."""
    fields = asdict(case) | {"notes": None}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def rope(theta: float, rope_type: str = "default", **scaling: Any) -> dict[str, Any]:
    """Config fields for one RoPE setting, in the spelling of transformers 5."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **scaling}}


IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}

GPT2: dict[str, Any] = IDS | {"vocab_size": 97, "n_positions": 48, "n_embd": 30, "n_layer": 3, "n_head": 5}

LLAMA: dict[str, Any] = IDS | {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    **rope(500.0),
}

QWEN3: dict[str, Any] = IDS | {
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    **rope(1000.0),
}

SCALED = {"head_dim": 12, "tie_word_embeddings": True}
"""Six frequencies instead of five, so that each band of a scaling rule holds some; tied, to stay small."""

SMALL = {"num_hidden_layers": 4, "num_key_value_heads": 2, "intermediate_size": 30}
"""Four layers within the size of a folder."""

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 28}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
RAMP = {"beta_fast": 2.0, "beta_slow": 0.25}
"""With 16 original positions, a ramp whose ends are 0.3 and 3.0 for theta 100 and head_dim 12."""

CASES = {
    "gpt2": Case("gpt2", GPT2, "the published shape: n_inner absent (4 x n_embd), tied head", seed=2),
    "gpt2-inner": Case(
        "gpt2",
        GPT2 | {"n_inner": 52, "n_embd": 36, "n_head": 4},
        "n_inner apart from 4 x n_embd; an odd head_dim, 9",
        seed=2,
    ),
    "gpt2-inverse-layer-scale": Case(
        "gpt2",
        GPT2 | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 68},
        "attention scores divided by the layer's number, counted from 1",
        seed=1,
        controls=({"scale_attn_by_inverse_layer_idx": False},),
    ),
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
