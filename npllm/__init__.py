"""npllm: every modern open LLM architecture, defined once in plain NumPy, and run from there.

    import npllm
    llm = npllm.load()                      # the small model that ships with npllm; or a folder, or a hub id
    print(llm.chat([{"role": "user", "content": "What is grouped-query attention?"}]).text)

Importing npllm imports NumPy and the standard library, nothing else.
"""

from npllm.backend import Backend, get_backend
from npllm.errors import NpllmError
from npllm.generation import Output, Piece, Stream
from npllm.llm import LLM, Score
from npllm.loading import load
from npllm.sampling import Sampling

__all__ = ["LLM", "Backend", "NpllmError", "Output", "Piece", "Sampling", "Score", "Stream", "get_backend", "load"]
__version__ = "0.1.0"
