"""GPT-2 (2019)."""

from typing import Any

from npllm.published.model import Published

GPT2: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


def gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return GPT2 | {"n_embd": width, "n_layer": layers, "n_head": heads}


MODELS = {
    "gpt2": Published(gpt2(768, 12, 12), 124_439_808, 36_864),
    "gpt2-medium": Published(gpt2(1024, 24, 16), 354_823_168, 98_304),
    "gpt2-large": Published(gpt2(1280, 36, 20), 774_030_080, 184_320),
    "gpt2-xl": Published(gpt2(1600, 48, 25), 1_557_611_200, 307_200),
}
