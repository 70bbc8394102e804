"""Published models: their config.json, as published, gives the published number of parameters and size of the cache."""

import logging
from typing import Any, NamedTuple

import numpy as np
import pytest

from npllm.cache import Cache
from npllm.models import interpret
from npllm.weights import count_parameters

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

LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
    "vocab_size": 128256,
}

SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
LLAMA31 = LLAMA3 | {"mlp_bias": False, "max_position_embeddings": 131072, "rope_scaling": {"factor": 8.0} | SCALING}
LLAMA32 = LLAMA31 | {"tie_word_embeddings": True, "rope_scaling": {"factor": 32.0} | SCALING}

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


class Published(NamedTuple):
    """A config.json, the parameters it stands for, and bytes per token of its bfloat16 cache."""

    config: dict[str, Any]
    parameters: int
    kv_bytes: int


def gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return GPT2 | {"n_embd": width, "n_layer": layers, "n_head": heads}


def llama(family: dict[str, Any], width: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inner}
    return family | sizes | more


def qwen3(width: int, layers: int, heads: int, inner: int, *, tied: bool) -> dict[str, Any]:
    return llama(QWEN3, width, layers, heads, inner, max_window_layers=layers, tie_word_embeddings=tied)


MODELS = {
    "gpt2": Published(gpt2(768, 12, 12), 124_439_808, 36_864),
    "gpt2-medium": Published(gpt2(1024, 24, 16), 354_823_168, 98_304),
    "gpt2-large": Published(gpt2(1280, 36, 20), 774_030_080, 184_320),
    "gpt2-xl": Published(gpt2(1600, 48, 25), 1_557_611_200, 307_200),
    "Llama 3 8B": Published(llama(LLAMA3, 4096, 32, 32, 14336), 8_030_261_248, 131_072),
    "Llama 3 70B": Published(llama(LLAMA3, 8192, 80, 64, 28672), 70_553_706_496, 327_680),
    "Llama 3.1 8B": Published(llama(LLAMA31, 4096, 32, 32, 14336), 8_030_261_248, 131_072),
    "Llama 3.1 70B": Published(llama(LLAMA31, 8192, 80, 64, 28672), 70_553_706_496, 327_680),
    "Llama 3.1 405B": Published(llama(LLAMA31, 16384, 126, 128, 53248), 405_853_388_800, 516_096),
    "Llama 3.2 1B": Published(llama(LLAMA32, 2048, 16, 32, 8192, head_dim=64), 1_235_814_400, 32_768),
    "Llama 3.2 3B": Published(llama(LLAMA32, 3072, 28, 24, 8192, head_dim=128), 3_212_749_824, 114_688),
    "Qwen3 0.6B": Published(qwen3(1024, 28, 16, 3072, tied=True), 596_049_920, 114_688),
    "Qwen3 1.7B": Published(qwen3(2048, 28, 16, 6144, tied=True), 1_720_574_976, 114_688),
    "Qwen3 4B": Published(qwen3(2560, 36, 32, 9728, tied=True), 4_022_468_096, 147_456),
    "Qwen3 8B": Published(qwen3(4096, 36, 32, 12288, tied=False), 8_190_735_360, 147_456),
    "Qwen3 14B": Published(qwen3(5120, 40, 40, 17408, tied=False), 14_768_307_200, 163_840),
    "Qwen3 32B": Published(qwen3(5120, 64, 64, 25600, tied=False), 32_762_123_264, 262_144),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_cache_of_a_published_model(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """No key of the file is unknown, and both numbers come out exactly."""
    model = MODELS[name]
    with caplog.at_level(logging.WARNING, "npllm"):
        described = interpret(model.config)
    assert not caplog.records
    architecture, config = described.architecture, described.config
    assert count_parameters(architecture.weight_spec(config)) == model.parameters
    cache = Cache(np, architecture.cache_spec(config), "float32", config.max_position_embeddings, "bfloat16")
    assert cache.bytes_per_token == model.kv_bytes
