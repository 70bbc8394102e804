"""GPT-2."""

from typing import Any

from .case import IDS, Case

GPT2: dict[str, Any] = IDS | {"vocab_size": 97, "n_positions": 48, "n_embd": 30, "n_layer": 3, "n_head": 5}

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
}
