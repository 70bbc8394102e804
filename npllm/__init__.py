"""npllm: every modern open LLM architecture, defined once in plain NumPy, and run from there.

    import npllm
    llm = npllm.load()                      # the small model that ships with npllm; or a folder, or a hub id
    print(llm.chat([{"role": "user", "content": "What is grouped-query attention?"}]).text)

Importing npllm imports nothing else; the first use of a name below imports NumPy and the standard library. So the command
line is up, and answers Ctrl-C in its own way, before NumPy is.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npllm.backend import Backend
    from npllm.describing import Description, describe
    from npllm.errors import NpllmError
    from npllm.generation import Output, Piece, Stream
    from npllm.llm import LLM, Score
    from npllm.loading import load
    from npllm.registry import get_backend
    from npllm.sampling import Sampling

__all__ = [
    "LLM", "Backend", "Description", "NpllmError", "Output", "Piece", "Sampling", "Score", "Stream", "describe",
    "get_backend", "load",
]  # fmt: skip
__version__ = "0.1.0"

PLACES = {
    "LLM": "llm", "Backend": "backend", "Description": "describing", "NpllmError": "errors", "Output": "generation",
    "Piece": "generation", "Sampling": "sampling", "Score": "llm", "Stream": "generation", "describe": "describing",
    "get_backend": "registry", "load": "loading",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'npllm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"npllm.{PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
