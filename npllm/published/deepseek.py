"""DeepSeek V2, V2-Lite, V3 and R1, and Kimi K2, which is of V3's class."""

from typing import Any

from npllm.published.model import Published, sizes

MLA: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
}


def auto_map(version: str) -> dict[str, str]:
    """The author's own code, which the published files name and npllm does not run."""
    return {
        "AutoConfig": f"configuration_deepseek.Deepseek{version}Config",
        "AutoModel": f"modeling_deepseek.Deepseek{version}Model",
        "AutoModelForCausalLM": f"modeling_deepseek.Deepseek{version}ForCausalLM",
    }


def yarn(mscale: float) -> dict[str, Any]:
    return {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    }


DEEPSEEK_V2: dict[str, Any] = MLA | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "auto_map": auto_map("V2"),
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "model_type": "deepseek_v2",
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "pretraining_tp": 1,
    "rope_scaling": yarn(0.707),
    "scoring_func": "softmax",
    "seq_aux": True,
    "transformers_version": "4.39.3",
    "vocab_size": 102400,
}
V2 = {
    "ep_size": 1,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
V2_LITE = {
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
    "transformers_version": "4.33.1",
}

DEEPSEEK_V3: dict[str, Any] = MLA | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": auto_map("V3"),
    "bos_token_id": 0,
    "ep_size": 1,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rope_scaling": yarn(1.0),
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "transformers_version": "4.33.1",
    "vocab_size": 129280,
}

KIMI_K2 = {
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "rope_scaling": yarn(1.0) | {"beta_fast": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "seq_aux": True,
    "topk_group": 1,
    "transformers_version": "4.48.3",
    "vocab_size": 163840,
}
V3_SIZES = sizes(7168, 61, 128, 18432, 128)
R1 = {"transformers_version": "4.46.3"}

MODELS = {
    "DeepSeek V2": Published(DEEPSEEK_V2 | V2 | sizes(5120, 60, 128, 12288, 128), 235_741_434_880, 69_120, "21.38"),
    "DeepSeek V2-Lite": Published(DEEPSEEK_V2 | V2_LITE | sizes(2048, 27, 16, 10944, 16), 15_706_484_224, 31_104, "2.66"),
    "DeepSeek V3": Published(DEEPSEEK_V3 | V3_SIZES, 671_026_404_352, 70_272, "37.55"),
    "DeepSeek R1": Published(DEEPSEEK_V3 | V3_SIZES | R1, 671_026_404_352, 70_272, "37.55"),
    "Kimi K2": Published(DEEPSEEK_V3 | sizes(7168, 61, 64, 18432, 64) | KIMI_K2, 1_026_408_209_408, 70_272, "32.86"),
}
