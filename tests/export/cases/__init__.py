"""The model cases: one entry per checkpoint folder under `tests/truth/models/`, one file per family.

An entry is the model's `model_type`, the fields of its config, and what the case is for. The shapes are chosen so that
no two axes can be confused: key/value heads are neither 1 nor the number of heads, heads x head_dim is not the hidden
size, and the sizes are not all powers of two.
"""

from . import deepseek, fp8, gemma, gemma3n, gpt2, llama, llama4, mistral, mixtral, olmo2, qwen, qwen_moe
from .case import Case, digest

__all__ = ["CASES", "Case", "digest"]

CASES = (
    deepseek.CASES
    | fp8.CASES
    | gemma.CASES
    | gemma3n.CASES
    | gpt2.CASES
    | llama.CASES
    | llama4.CASES
    | mistral.CASES
    | mixtral.CASES
    | olmo2.CASES
    | qwen.CASES
    | qwen_moe.CASES
)
