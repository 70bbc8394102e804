"""FP8 storage: the published layouts, on architectures whose arithmetic other cases prove."""

from typing import Any

from .case import Case, rope
from .deepseek import SHARED, YARN
from .llama import LLAMA
from .qwen import QWEN3


def blocks(rows: int, columns: int) -> dict[str, Any]:
    """quantization_config as DeepSeek V3 and Qwen3 publish it."""
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [rows, columns]}


def compressed_tensors(strategy: str, **weights: Any) -> dict[str, Any]:
    """quantization_config as llm-compressor writes it."""
    told = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": told, "input_activations": None, "output_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


BEYOND_128: dict[str, Any] = {
    "hidden_size": 136,
    "intermediate_size": 150,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 36,
    "tie_word_embeddings": True,
}
"""Every matrix but k and v outruns a block of 128 x 128 both ways, by 8 to 22."""

V3: dict[str, Any] = SHARED | rope(100.0, "yarn", **YARN, mscale=1.0, mscale_all_dim=1.0)
"""22 rows of kv_a_proj_with_mqa; experts of 6 rows."""

CASES = {
    "llama3-fp8": Case(
        "llama",
        LLAMA | BEYOND_128,
        "FP8 in blocks of 128 x 128, with partial blocks at both edges",
        tokens=26,
        storage="bfloat16",
        quantisation=blocks(128, 128),
    ),
    "llama3-fp8-block": Case(
        "llama",
        LLAMA,
        "FP8 of compressed-tensors, in many small blocks that are partial at the edges",
        quantisation=compressed_tensors("block", block_structure=[16, 8]),
    ),
    "llama3-fp8-channel": Case(
        "llama", LLAMA, "FP8 of compressed-tensors, a scale per row", quantisation=compressed_tensors("channel")
    ),
    "qwen3-fp8": Case(
        "qwen3",
        QWEN3,
        "FP8 in many small blocks that are partial at the edges; scales in bfloat16",
        storage="bfloat16",
        quantisation=blocks(16, 8),
        scales="bfloat16",
    ),
    "qwen3-fp8-powers": Case(
        "qwen3",
        QWEN3,
        "FP8 with scales that are powers of two, stored as e8m0",
        quantisation=blocks(8, 16) | {"scale_fmt": "ue8m0"},
        scales="float8_e8m0fnu",
    ),
    "qwen3-fp8-tensor": Case(
        "qwen3", QWEN3, "FP8 of compressed-tensors, one scale per matrix", quantisation=compressed_tensors("tensor")
    ),
    "deepseek-v3-fp8": Case(
        "deepseek_v3",
        V3,
        "FP8 in small blocks: 22 rows of kv_a_proj_with_mqa are one block of 16 and a partial one",
        storage="bfloat16",
        quantisation=blocks(16, 8),
    ),
    "deepseek-v3-fp8-fused": Case(
        "deepseek_v3",
        V3 | {"num_hidden_layers": 2},
        "FP8 with fused experts: gate ends and up begins within a block",
        quantisation=blocks(8, 12),
        fused=True,
    ),
}
