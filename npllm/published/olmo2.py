"""OLMo 2."""

from typing import Any

from npllm.published.model import Published, sizes

OLMO2: dict[str, Any] = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.47.0",
    "use_cache": True,
    "vocab_size": 100352,
}

MODELS = {
    "OLMo 2 1B": Published(OLMO2 | sizes(2048, 16, 16, 8192, 16), 1_484_916_736, 131_072),
    "OLMo 2 7B": Published(OLMO2 | sizes(4096, 32, 32, 11008, 32), 7_298_617_344, 524_288),
    "OLMo 2 13B": Published(OLMO2 | sizes(5120, 40, 40, 13824, 40), 13_716_198_400, 819_200),
    "OLMo 2 32B": Published(OLMO2 | sizes(5120, 64, 40, 27648, 8), 32_234_279_936, 262_144),
}
