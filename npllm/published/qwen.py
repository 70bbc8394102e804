"""Qwen2.5, Qwen1.5-MoE and Qwen2-MoE, Qwen3, Qwen3-MoE."""

from typing import Any

from npllm.published.model import Published, sizes

QWEN: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN25: dict[str, Any] = QWEN | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "transformers_version": "4.40.1",
    "use_mrope": False,
}
SMALL = {"max_position_embeddings": 32768, "sliding_window": 32768, "tie_word_embeddings": True}
LARGE = {"max_position_embeddings": 131072, "sliding_window": 131072, "vocab_size": 152064}

QWEN2_MOE: dict[str, Any] = QWEN | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "model_type": "qwen2_moe",
    "norm_topk_prob": False,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
A2_7B = {
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "transformers_version": "4.39.0.dev0",
}
A14B = {
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "moe_intermediate_size": 2560,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "shared_expert_intermediate_size": 20480,
    "sliding_window": 131072,
    "transformers_version": "4.40.1",
}

QWEN3: dict[str, Any] = QWEN | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "rope_scaling": None,
    "sliding_window": None,
    "transformers_version": "4.51.0",
}
QWEN3_MOE: dict[str, Any] = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def windowed(family: dict[str, Any], shape: dict[str, int], **more: Any) -> dict[str, Any]:
    """`max_window_layers`, which has no effect without a window, is the number of layers."""
    return family | shape | {"max_window_layers": shape["num_hidden_layers"]} | more


def moe(width: int, layers: int, heads: int, inner: int, expert: int) -> dict[str, Any]:
    return windowed(QWEN3_MOE, sizes(width, layers, heads, inner, 4), moe_intermediate_size=expert)


MODELS = {
    "Qwen2.5 0.5B": Published(windowed(QWEN25 | SMALL, sizes(896, 24, 14, 4864, 2)), 494_032_768, 12_288),
    "Qwen2.5 1.5B": Published(windowed(QWEN25 | SMALL, sizes(1536, 28, 12, 8960, 2)), 1_543_714_304, 28_672),
    "Qwen2.5 3B": Published(windowed(QWEN25 | SMALL, sizes(2048, 36, 16, 11008, 2)), 3_085_938_688, 36_864),
    "Qwen2.5 7B": Published(windowed(QWEN25 | LARGE, sizes(3584, 28, 28, 18944, 4)), 7_615_616_512, 57_344),
    "Qwen2.5 14B": Published(windowed(QWEN25 | LARGE, sizes(5120, 48, 40, 13824, 8)), 14_770_033_664, 196_608),
    "Qwen2.5 32B": Published(windowed(QWEN25 | LARGE, sizes(5120, 64, 40, 27648, 8)), 32_763_876_352, 262_144),
    "Qwen2.5 72B": Published(windowed(QWEN25 | LARGE, sizes(8192, 80, 64, 29568, 8)), 72_706_203_648, 327_680),
    "Qwen1.5-MoE A2.7B": Published(QWEN2_MOE | sizes(2048, 24, 16, 5632, 16) | A2_7B, 14_315_784_192, 196_608, "2.69"),
    "Qwen2 57B-A14B": Published(QWEN2_MOE | sizes(3584, 28, 28, 18944, 4) | A14B, 57_408_658_944, 57_344, "14.25"),
    "Qwen3 0.6B": Published(windowed(QWEN3, sizes(1024, 28, 16, 3072, 8), tie_word_embeddings=True), 596_049_920, 114_688),
    "Qwen3 1.7B": Published(windowed(QWEN3, sizes(2048, 28, 16, 6144, 8), tie_word_embeddings=True), 1_720_574_976, 114_688),
    "Qwen3 4B": Published(windowed(QWEN3, sizes(2560, 36, 32, 9728, 8), tie_word_embeddings=True), 4_022_468_096, 147_456),
    "Qwen3 8B": Published(windowed(QWEN3, sizes(4096, 36, 32, 12288, 8)), 8_190_735_360, 147_456),
    "Qwen3 14B": Published(windowed(QWEN3, sizes(5120, 40, 40, 17408, 8)), 14_768_307_200, 163_840),
    "Qwen3 32B": Published(windowed(QWEN3, sizes(5120, 64, 64, 25600, 8)), 32_762_123_264, 262_144),
    "Qwen3 30B-A3B": Published(moe(2048, 48, 32, 6144, 768), 30_532_122_624, 98_304, "3.353"),
    "Qwen3 235B-A22B": Published(moe(4096, 94, 64, 12288, 1536), 235_093_634_560, 192_512, "22.19"),
}
