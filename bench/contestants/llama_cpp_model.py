"""llama.cpp by its C interface: python -m bench.contestants.llama_cpp_model '{"file": ..., "threads": ..., "context": ...}'.

Tokens go through llama_decode in one batch, as llama-bench has it: nothing is sampled, and Python does next to nothing.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from importlib import metadata
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as lib

from bench.contestants.serving import prompt_ids, serve

# GGML_LOG_LEVEL_ERROR
ERROR = 4


@lib.llama_log_callback
def log(level: int, text: bytes, data: Any) -> None:
    """Errors go to stderr; nothing else is said while time is taken."""
    if level == ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


class LlamaCpp:
    def __init__(self, file: str, threads: int, context: int, batch: int) -> None:
        lib.llama_log_set(log, None)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"{file}: llama.cpp does not load it")
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, batch, batch
        settings.n_threads = settings.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(f"{file}: llama.cpp makes no context for it")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def about(self) -> dict[str, Any]:
        found = {"llama-cpp-python": metadata.version("llama-cpp-python")}
        return {"versions": found, "build": lib.llama_print_system_info().decode()}

    def prefill(self, tokens: int) -> float:
        """Seconds for a prompt of so many tokens, with the logits of the last."""
        self._clear()
        ids = prompt_ids(tokens, self.vocabulary)
        start = time.perf_counter()
        self._decode(ids)
        return time.perf_counter() - start

    def decode(self, tokens: int) -> float:
        """Seconds for so many tokens, one by one, after a prompt of one token."""
        self._clear()
        first, *ids = prompt_ids(tokens + 1, self.vocabulary)
        self._decode([first])
        start = time.perf_counter()
        for each in ids:
            self._decode([each])
        return time.perf_counter() - start

    def logits(self, tokens: int, path: str) -> None:
        """Write the logits of the last of so many tokens, float32 [N]."""
        self.prefill(tokens)
        np.save(path, self._last())

    def decoded(self, texts: str, path: str) -> None:
        """Write the logits that predict each token from a position on, one token per step, for all texts: float32 [T, N].

        `texts` is a file of JSON: [[token ids, position], ...].
        """
        found = []
        with open(texts) as file:
            asked = json.load(file)
        for ids, begin in asked:
            self._clear()
            for piece in [ids[:begin], *([each] for each in ids[begin:-1])]:
                self._decode(piece)
                found.append(self._last().copy())
        np.save(path, np.array(found))

    def _last(self) -> np.ndarray[Any, Any]:
        """The logits of the last token, float32 [N], until the next step."""
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, -1), (self.vocabulary,))

    def _clear(self) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)

    def _decode(self, ids: list[int]) -> None:
        array = (ctypes.c_int32 * len(ids))(*ids)  # the batch points into it
        status = lib.llama_decode(self.context, lib.llama_batch_get_one(array, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        lib.llama_synchronize(self.context)


if __name__ == "__main__":
    serve(lambda: LlamaCpp(**json.loads(sys.argv[1])))
