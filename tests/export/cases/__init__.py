"""The model cases: one entry per checkpoint folder under `tests/truth/models/`, one file per family.

An entry is the model's `model_type`, the fields of its config, and what the case is for. The shapes are chosen so that
no two axes can be confused: key/value heads are neither 1 nor the number of heads, heads x head_dim is not the hidden
size, and the sizes are not all powers of two.
"""

from . import gpt2, llama, qwen
from .case import Case, digest

__all__ = ["CASES", "Case", "digest"]

CASES = gpt2.CASES | llama.CASES | qwen.CASES
