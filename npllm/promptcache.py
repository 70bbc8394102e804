"""A key/value cache that knows its tokens: what a prompt shares with it need not be computed again."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from npllm.cache import Cache
from npllm.checkpoint import SafetensorsFile
from npllm.config import printable
from npllm.errors import ArgumentError, CheckpointError

FORMAT = "npllm-prompt-cache-1"

# How a kv_dtype is spelled in the file; bfloat16 lies there as bits.
STORED = {"float32": "F32", "float64": "F64", "bfloat16": "U16"}


class PromptCache:
    """One row of a `Cache`, and the tokens it holds. Made by `LLM.prompt_cache()`; serves one call at a time.

    model    the fingerprint or name of the model it belongs to; a saved cache is refused by another model.
    """

    def __init__(self, cache: Cache, model: str) -> None:
        self.cache, self.model = cache, model
        self.slot = cache.add()
        self.tokens: list[int] = []
        self.runs = 0

    def rewind(self, prompt: Sequence[int]) -> int:
        """Cut back to what `prompt` shares, but for its last token, whose logits are wanted -> tokens kept.

        A run begins here; one before it that has not ended may no longer touch the cache (see `guard`).
        """
        self.runs += 1
        shared = 0
        for mine, wanted in zip(self.tokens, prompt[:-1], strict=False):
            if mine != wanted:
                break
            shared += 1
        shared = self.cache.truncate(self.slot, shared)
        self.tokens = self.tokens[:shared]
        return shared

    def guard(self, run: int) -> None:
        """ArgumentError if another run has begun since `run` did."""
        if run != self.runs:
            raise ArgumentError("this stream cannot go on: its cache was given to a later call")

    def settle(self, run: int, tokens: Sequence[int]) -> None:
        """After a run over `tokens`: keep those that reached the cache; nothing if a later run has begun."""
        if run == self.runs:
            self.tokens = list(tokens[: self.cache.lengths[self.slot]])

    def _about(self) -> dict[str, str]:
        return _describe(self.cache, self.model)

    def differences(self, cache: Cache, model: str) -> list[str]:
        """What keeps this from being a prompt cache of `model` around `cache`: "model", "dtype", "kv_dtype", "layers"."""
        wanted = _describe(cache, model)
        return [name for name, value in self._about().items() if wanted[name] != value]

    def save(self, path: str | Path) -> None:
        """Write tokens, keys and values as safetensors; the file appears whole or not at all."""
        from safetensors.numpy import save

        length = len(self.tokens)
        tensors, lost = self.cache.contents(self.slot, length), self.cache.lost(self.slot, length)
        tensors["tokens"] = np.array(self.tokens, dtype=np.int64)
        try:
            _write_whole(Path(path), save(tensors, metadata=self._about() | {"lost": json.dumps(lost)}))
        except OSError as bad:
            raise CheckpointError(f"{path}: cannot be written ({bad.strerror})") from None

    def load(self, path: str | Path) -> None:
        """Take the place of what was saved; CheckpointError if it is not a cache of this model and kv_dtype."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        file = SafetensorsFile(path)  # bounds-checked, with npllm's errors
        try:
            with safe_open(path, framework="numpy") as opened:
                about = opened.metadata() or {}
                self._check(path, about, file)
                lost = _read_lost(path, about.get("lost", ""), len(self.cache.layers))
                contents = {name: opened.get_tensor(name) for name in file}
        except SafetensorError as bad:
            raise CheckpointError(f"{path}: not a prompt cache ({printable(str(bad))})") from None
        tokens = contents.pop("tokens").tolist()
        self.runs += 1
        self.tokens = []
        self.cache.truncate(self.slot, 0)
        self.cache.restore(self.slot, contents, len(tokens), lost)
        self.tokens = tokens

    def _check(self, path: Path, about: dict[str, str], file: SafetensorsFile) -> None:
        differs = [key for key, value in self._about().items() if about.get(key) != value]
        if differs:
            raise CheckpointError(f"{path}: not a prompt cache of this model: {', '.join(differs)} differ")
        length = math.prod(file.shape("tokens")) if "tokens" in file.entries else 0
        if length > self.cache.max_context:
            raise CheckpointError(f"{path}: holds {length} tokens, the context is {self.cache.max_context}")
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {"tokens": ("I64", (length,))}
        for i, spec in enumerate(self.cache.specs):
            for name, width in spec.widths.items():
                wanted[f"layers.{i}.{name}"] = STORED[self.cache.kv_dtype], (spec.heads, spec.kept(length), width)
        found = {name: (file.format(name), file.shape(name)) for name in file}
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if wrong:
            raise CheckpointError(f"{path}: damaged prompt cache: {printable(wrong[0])} is missing, unexpected or misshaped")


def _describe(cache: Cache, model: str) -> dict[str, str]:
    return {
        "format": FORMAT,
        "model": model,
        "dtype": cache.compute_dtype,
        "kv_dtype": cache.kv_dtype,
        "layers": json.dumps([list(spec) for spec in cache.specs]),
    }


def _read_lost(path: Path, text: str, layers: int) -> list[int]:
    try:
        lost = json.loads(text)
    except (ValueError, RecursionError):
        lost = None
    if not isinstance(lost, list) or len(lost) != layers or not all(type(count) is int and count >= 0 for count in lost):
        raise CheckpointError(f"{path}: damaged prompt cache: it does not say how many keys each layer has lost")
    return lost


def _write_whole(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
