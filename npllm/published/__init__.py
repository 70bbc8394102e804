"""Published models as data: the config.json of every size as published, and the numbers that are known of it.

The fields and values are those of the published files (transformers 4's spelling, as a rule); fields that only name the
vision or audio tower's shape are left out. `npllm.describe` takes the short names; `tests/test_numbers.py` checks that
npllm gets the numbers from the fields.
"""

from __future__ import annotations

from npllm.published import deepseek, gemma, gpt2, llama, mistral, olmo2, qwen
from npllm.published.claims import CLAIMS
from npllm.published.model import Published

__all__ = ["CLAIMS", "MODELS", "NAMES", "Published", "find"]

MODELS: dict[str, Published] = (
    gpt2.MODELS | llama.MODELS | olmo2.MODELS | qwen.MODELS | mistral.MODELS | gemma.MODELS | deepseek.MODELS
)

# Names that say less than the published ones, and sizes whose fields are those of another release.
ALIASES = {
    "gpt2-small": "gpt2",
    "llama-3.3-70b": "Llama 3.1 70B",
    "mistral-7b": "Mistral 7B v0.1",
    "mistral-small-3.1-24b": "Mistral Small 3.1",
    "mistral-large-3-675b": "Mistral Large 3",
}

# Short name -> name in MODELS.
NAMES = {name.lower().replace(" ", "-"): name for name in MODELS} | ALIASES


def find(name: str) -> str | None:
    """The name in MODELS that a short name stands for, capitals and spaces aside."""
    return NAMES.get(name.strip().lower().replace(" ", "-").replace("_", "-"))
