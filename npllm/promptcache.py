"""A key/value cache that knows its tokens: what a prompt shares with it need not be computed again."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from npllm.cache import Cache
from npllm.checkpoint import SafetensorsFile
from npllm.errors import CheckpointError

FORMAT = "npllm-prompt-cache-1"


class PromptCache:
    """One row of a `Cache`, and the tokens it holds. Made by `LLM.prompt_cache()`; serves one call at a time.

    model    the name of the model it belongs to; a saved cache is refused by another model.
    """

    def __init__(self, cache: Cache, model: str) -> None:
        self.cache, self.model = cache, model
        self.slot = cache.add()
        self.tokens: list[int] = []

    def rewind(self, prompt: Sequence[int]) -> int:
        """Cut back to what `prompt` shares, but for its last token, whose logits are wanted -> tokens kept."""
        shared = 0
        for mine, wanted in zip(self.tokens, prompt[:-1], strict=False):
            if mine != wanted:
                break
            shared += 1
        self.cache.truncate(self.slot, shared)
        self.tokens = self.tokens[:shared]
        return shared

    def settle(self, tokens: Sequence[int]) -> None:
        """After a run over `tokens`: keep those that reached the cache."""
        self.tokens = list(tokens[: self.cache.lengths[self.slot]])

    def _about(self) -> dict[str, str]:
        shapes = [list(spec) for spec in self.cache.specs]
        return {"format": FORMAT, "model": self.model, "kv_dtype": self.cache.kv_dtype, "layers": json.dumps(shapes)}

    def save(self, path: str | Path) -> None:
        """Write tokens, keys and values as safetensors; the file appears whole or not at all."""
        from safetensors.numpy import save

        path = Path(path)
        tensors = {name: np.ascontiguousarray(array) for name, array in self.cache.contents(self.slot).items()}
        tensors["tokens"] = np.array(self.tokens, dtype=np.int64)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(save(tensors, metadata=self._about()))
                file.close()
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    def load(self, path: str | Path) -> None:
        """Take the place of what was saved; CheckpointError if it is not a cache of this model and kv_dtype."""
        from safetensors import safe_open

        path = Path(path)
        SafetensorsFile(path)  # bounds-checked, with npllm's errors
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            if about != self._about():
                differs = [key for key, value in self._about().items() if about.get(key) != value]
                raise CheckpointError(f"{path}: not a prompt cache of this model: {', '.join(differs)} differ")
            contents = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        tokens = [int(token) for token in contents.pop("tokens")]
        self.cache.truncate(self.slot, 0)
        self.cache.restore(self.slot, contents, len(tokens))
        self.tokens = tokens
