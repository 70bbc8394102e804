"""npllm: python -m bench.contestants.npllm_model '{"folder": ..., "backend": ..., "dtype": ..., ...}' (see npllm.load)."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import npllm
from bench import counting
from bench.contestants.serving import prompt_ids, serve
from npllm.bench import generation_seconds, prompt_seconds

# Peak resident memory begins anew when this is written.
RESET_PEAK = ("/proc/self/clear_refs", "5")


class Npllm:
    def __init__(self, folder: str, **options: Any) -> None:
        npllm.get_backend(options["backend"])  # imports the backend's libraries
        self.before = resident()
        start = time.perf_counter()
        self.llm = npllm.load(folder, **options)
        self.load_seconds = time.perf_counter() - start
        self.contexts: dict[int, Any] = {}

    def about(self) -> dict[str, Any]:
        """Versions, arithmetic, and the bytes of weights that a token reads."""
        versions = {"npllm": npllm.__version__, "numpy": np.__version__, "python": platform.python_version()}
        if self.llm.backend.name == "numba":
            versions |= compiler()
        return {
            "versions": versions,
            "dtype": self.llm.backend.dtype,
            "weight_bytes": counting.weight_bytes(self.llm.model.weights),
            "load_seconds": self.load_seconds,
        }

    def prefill(self, tokens: int) -> float:
        """Seconds for a prompt of so many tokens, to the first token of the answer."""
        return prompt_seconds(self.llm, self.ids(tokens))

    def decode(self, tokens: int, context: int = 0) -> float:
        """Seconds for so many tokens, after a prompt of `context` tokens (at least one), which is computed once."""
        if not context:
            return generation_seconds(self.llm, self.ids(1), tokens)
        if context not in self.contexts:
            self.contexts.clear()
            self.contexts[context] = self.llm.prompt_cache()
        return generation_seconds(self.llm, self.ids(context), tokens, self.contexts[context])

    def context_bytes(self, length: int) -> int:
        """Bytes of keys and values that one token reads in a context of so many."""
        cache = self.llm.new_cache()
        return sum(each.spec.kept(length) * each.spec.bytes_per_token(each.kv_dtype) for each in cache.layers)

    def logits(self, tokens: int, path: str) -> None:
        """Write the logits of the last of so many tokens, float32 [N]."""
        np.save(path, self.llm.forward([self.ids(tokens)], "last")[0])

    def peak(self, tokens: int) -> dict[str, int]:
        """Bytes that a prompt of so many tokens takes at most beyond what was resident, and those of its cache."""
        before, (path, code) = resident()["VmRSS"], RESET_PEAK
        Path(path).write_text(code)
        self.prefill(tokens)
        return {"grown": resident()["VmHWM"] - before, "cache": self.context_bytes(tokens)}

    def memory(self) -> dict[str, int]:
        """Resident bytes: now, of which anonymous, at most so far, and with the libraries alone; and the bytes of the
        weights as they are kept."""
        now = resident()
        kept = sum(counting.stored(leaf) for leaf in counting.distinct(self.llm.model.weights))
        return {
            "now": now["VmRSS"],
            "anonymous": now["RssAnon"],
            "most": now["VmHWM"],
            "before": self.before["VmRSS"],
            "weights": kept,
        }

    def ids(self, tokens: int) -> list[int]:
        return prompt_ids(tokens, self.llm.config.vocab_size)


def compiler() -> dict[str, str]:
    """The version of Numba, and the instruction set that it compiles for."""
    from npllm.backends.numba_cpu.features import choose

    return {"numba": f"{metadata.version('numba')} ({choose().name})"}


def resident() -> dict[str, int]:
    """What /proc/self/status says of resident memory, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line[0].startswith(("VmRSS", "VmHWM", "Rss"))}


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    serve(lambda: Npllm(**json.loads(sys.argv[1])))
