"""Mistral 7B, Mixtral, Mistral Small 3.1, Mistral Large 3."""

from typing import Any

from npllm.published.model import Published, sizes

MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
V03 = {"attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}

MIXTRAL: dict[str, Any] = MISTRAL | {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "transformers_version": "4.36.0.dev0",
}

SMALL31: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "text_config": {
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "use_cache": True,
        "vocab_size": 131072,
        **sizes(5120, 40, 32, 32768, 8),
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {"model_type": "pixtral"},
    "vision_feature_layer": -1,
}

# params.json, Mistral's own form.
LARGE3_PARAMS: dict[str, Any] = {
    "dim": 7168,
    "head_dim": 192,
    "hidden_dim": 16384,
    "kv_lora_rank": 512,
    "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8192},
    "max_position_embeddings": 294912,
    "moe": {
        "expert_hidden_dim": 4096,
        "expert_model_parallel": 1,
        "expert_parallel": 1,
        "first_k_dense_replace": 3,
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "num_shared_experts": 1,
        "route_every_n": 1,
        "routed_scale": 1.0,
    },
    "n_heads": 128,
    "n_kv_heads": 128,
    "n_layers": 61,
    "norm_eps": 1e-06,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_theta": 10000.0,
    "tied_embeddings": False,
    "v_head_dim": 128,
    "vocab_size": 131072,
    "yarn": {"alpha": 1, "apply_scale": False, "beta": 32, "factor": 36, "original_max_position_embeddings": 8192},
}

# The same in the spelling of transformers' mistral4.
LARGE3: dict[str, Any] = {
    "architectures": ["Mistral4ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 294912,
    "model_type": "mistral4",
    "moe_intermediate_size": 4096,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 4,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_interleave": True,
    "rope_parameters": {
        "attention_factor": 1.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 36.0,
        "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 8192,
        "rope_theta": 10000.0,
        "rope_type": "yarn",
        "type": "yarn",
    },
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "v_head_dim": 128,
    "vocab_size": 131072,
    **sizes(7168, 61, 128, 16384, 128),
}

MODELS = {
    "Mistral 7B v0.1": Published(MISTRAL | sizes(4096, 32, 32, 14336, 8), 7_241_732_096, 131_072, growing=0),
    "Mistral 7B v0.3": Published(MISTRAL | sizes(4096, 32, 32, 14336, 8) | V03, 7_248_023_552, 131_072),
    "Mixtral 8x7B": Published(MIXTRAL | sizes(4096, 32, 32, 14336, 8), 46_702_792_704, 131_072, "12.88"),
    "Mixtral 8x22B": Published(
        MIXTRAL | sizes(6144, 56, 48, 16384, 8) | {"max_position_embeddings": 65536}, 140_620_634_112, 229_376, "39.15"
    ),
    "Mistral Small 3.1": Published(SMALL31, 23_572_403_200, 163_840),
    "Mistral Large 3": Published(LARGE3, 673_421_089_792, 70_272, "39.95"),
}
