"""Published models as data: the config.json of every size as published, and the numbers that are known of it.

The fields and values are those of the published files (transformers 4's spelling, as a rule); fields that only name the
vision or audio tower's shape are left out. `tests/test_numbers.py` checks that npllm gets the numbers from the fields.
"""

from . import deepseek, gemma, gpt2, llama, mistral, olmo2, qwen
from .model import Published

__all__ = ["MODELS", "Published"]

MODELS: dict[str, Published] = (
    gpt2.MODELS | llama.MODELS | olmo2.MODELS | qwen.MODELS | mistral.MODELS | gemma.MODELS | deepseek.MODELS
)
