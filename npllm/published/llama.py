"""Llama 3 to 3.3 and Llama 4. Llama 3.3 70B has the fields of 3.1 70B."""

from typing import Any

from npllm.published.model import Published, sizes

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


LLAMA4: dict[str, Any] = {
    "_attn_implementation_autoset": True,
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "attn_scale": 0.1,
    "attn_temperature_tuning": 4,
    "bos_token_id": 200000,
    "cache_implementation": "hybrid",
    "eos_token_id": [200001, 200007, 200008],
    "floor_scale": 8192,
    "for_llm_compressor": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "intermediate_size_mlp": 16384,
    "model_type": "llama4_text",
    "no_rope_layers": [],
    "num_experts_per_tok": 1,
    "output_router_logits": False,
    "pad_token_id": 200018,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 202048,
    **sizes(5120, 48, 40, 8192, 8),
}
SCOUT_SCALING = SCALING | {"factor": 16.0, "high_freq_factor": 1.0}


def llama4(**text: Any) -> dict[str, Any]:
    """The published wrapper: text and vision in one config.json."""
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "boi_token_index": 200080,
        "eoi_token_index": 200081,
        "image_token_index": 200092,
        "model_type": "llama4",
        "text_config": LLAMA4 | text,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0.dev0",
        "vision_config": {"model_type": "llama4_vision_model"},
    }


SCOUT = {
    "interleave_moe_layer_step": 1,
    "max_position_embeddings": 10485760,
    "num_local_experts": 16,
    "rope_scaling": SCOUT_SCALING,
    "use_qk_norm": True,
}
MAVERICK = {
    "interleave_moe_layer_step": 2,
    "max_position_embeddings": 1048576,
    "num_local_experts": 128,
    "rope_scaling": None,
    "use_qk_norm": False,
}

# Scout's base model names its layers one by one.
NAMED_LAYERS = {"moe_layers": list(range(48)), "no_rope_layers": [1, 1, 1, 0] * 12, "max_position_embeddings": 262144}

MODELS = {
    "Llama 3 8B": Published(LLAMA3 | sizes(4096, 32, 32, 14336, 8), 8_030_261_248, 131_072),
    "Llama 3 70B": Published(LLAMA3 | sizes(8192, 80, 64, 28672, 8), 70_553_706_496, 327_680),
    "Llama 3.1 8B": Published(LLAMA31 | sizes(4096, 32, 32, 14336, 8), 8_030_261_248, 131_072),
    "Llama 3.1 70B": Published(LLAMA31 | sizes(8192, 80, 64, 28672, 8), 70_553_706_496, 327_680),
    "Llama 3.1 405B": Published(LLAMA31 | sizes(16384, 126, 128, 53248, 8), 405_853_388_800, 516_096),
    "Llama 3.2 1B": Published(LLAMA32 | sizes(2048, 16, 32, 8192, 8) | {"head_dim": 64}, 1_235_814_400, 32_768),
    "Llama 3.2 3B": Published(LLAMA32 | sizes(3072, 28, 24, 8192, 8) | {"head_dim": 128}, 3_212_749_824, 114_688),
    "Llama 4 Scout": Published(llama4(**SCOUT), 107_769_861_120, 196_608, "17.17", 49_152),
    "Llama 4 Scout base": Published(llama4(**(SCOUT | NAMED_LAYERS)), 107_769_861_120, 196_608, "17.17", 49_152),
    "Llama 4 Maverick": Published(llama4(**MAVERICK), 400_711_848_960, 196_608, "17.18", 49_152),
}
