"""Gemma 2, Gemma 3 and Gemma 3n."""

from typing import Any

from npllm.published.model import Published, sizes

GEMMA: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}

GEMMA2: dict[str, Any] = GEMMA | {
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "transformers_version": "4.42.4",
    "vocab_size": 256000,
}
GEMMA2_9B = {"sliding_window_size": 4096}
GEMMA2_27B = {"head_dim": 128, "query_pre_attn_scalar": 144}

GEMMA3: dict[str, Any] = GEMMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "transformers_version": "4.50.0.dev0",
    "vocab_size": 262144,
}
GEMMA3_270M = {
    "_sliding_window_pattern": 6,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "use_bidirectional_attention": False,
    "transformers_version": "4.55.0.dev0",
}
GEMMA3_1B = {"cache_implementation": "hybrid", "sliding_window_pattern": 6}


def multimodal(layers: int, width: int, inner: int, **text: Any) -> dict[str, Any]:
    """The published wrapper: its text_config names what differs from the class defaults, and no more."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": width,
            "intermediate_size": inner,
            "model_type": "gemma3_text",
            "num_hidden_layers": layers,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            **text,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {"model_type": "siglip_vision_model"},
    }


HEADS_12B = {"num_attention_heads": 16, "num_key_value_heads": 8}
HEADS_27B = {"head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 16, "query_pre_attn_scalar": 168}


def gemma3n(layers: int, inner: int, shared: int) -> dict[str, Any]:
    pattern = ["sliding_attention"] * 4 + ["full_attention"]
    return {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "audio_config": {"model_type": "gemma3n_audio"},
        "audio_soft_tokens_per_image": 188,
        "audio_token_id": 262273,
        "boa_token_id": 256000,
        "boi_token_id": 255999,
        "eoa_token_id": 262272,
        "eoi_token_id": 262144,
        "eos_token_id": [1, 106],
        "image_token_id": 262145,
        "initializer_range": 0.02,
        "model_type": "gemma3n",
        "text_config": {
            "activation_sparsity_pattern": [0.95] * 10 + [0.0] * (layers - 10),
            "altup_active_idx": 0,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_lr_multiplier": 1.0,
            "altup_num_inputs": 4,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 2048,
            "hidden_size_per_layer_input": 256,
            "initializer_range": 0.02,
            "intermediate_size": [inner] * layers,
            "laurel_rank": 64,
            "layer_types": pattern * (layers // 5),
            "max_position_embeddings": 32768,
            "model_type": "gemma3n_text",
            "num_attention_heads": 8,
            "num_hidden_layers": layers,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": shared,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": 512,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": 262400,
            "vocab_size_per_layer_input": 262144,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.53.0.dev0",
        "vision_config": {"model_type": "gemma3n_vision"},
        "vision_soft_tokens_per_image": 256,
    }


# One part in two of Gemma 2's layers is global, one in six of Gemma 3's, one in five of Gemma 3n's.
MODELS = {
    "Gemma 2 2B": Published(GEMMA2 | sizes(2304, 26, 8, 9216, 4), 2_614_341_888, 106_496, growing=53_248),
    "Gemma 2 9B": Published(GEMMA2 | GEMMA2_9B | sizes(3584, 42, 16, 14336, 8), 9_241_705_984, 344_064, growing=172_032),
    "Gemma 2 27B": Published(GEMMA2 | GEMMA2_27B | sizes(4608, 46, 32, 36864, 16), 27_227_128_320, 376_832, growing=188_416),
    "Gemma 3 270m": Published(GEMMA3 | GEMMA3_270M | sizes(640, 18, 4, 2048, 1), 268_098_176, 18_432, growing=3_072),
    "Gemma 3 1B": Published(GEMMA3 | GEMMA3_1B | sizes(1152, 26, 4, 6912, 1), 999_885_952, 26_624, growing=4_096),
    "Gemma 3 4B": Published(multimodal(34, 2560, 10240), 3_880_263_168, 139_264, growing=20_480),
    "Gemma 3 12B": Published(multimodal(48, 3840, 15360, **HEADS_12B), 11_766_034_176, 393_216, growing=65_536),
    "Gemma 3 27B": Published(multimodal(62, 5376, 21504, **HEADS_27B), 27_009_346_304, 507_904, growing=81_920),
    "Gemma 3n E2B": Published(gemma3n(30, 8192, 10), 4_435_182_688, 40_960, growing=8_192),
    "Gemma 3n E4B": Published(gemma3n(35, 16384, 15), 6_835_235_568, 40_960, growing=8_192),
}
