"""The architectures, one file each, and the registry that finds them by `model_type`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from npllm import mistral_native
from npllm.arrays import Array
from npllm.backend import Backend
from npllm.cache import Cache, LayerSpec, Rows
from npllm.config import Reader, nearest, shown
from npllm.errors import ConfigError
from npllm.quantised import BLOCK, Block, read_block
from npllm.weights import Spec

log = logging.getLogger("npllm")

# model_type of config.json -> file in this folder.
REGISTRY = {
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3n_text": "gemma3n",
    "gpt2": "gpt2",
    "kimi_k2": "deepseek_v3",
    "llama": "llama3",
    "llama4_text": "llama4",
    "mistral": "mistral",
    "mistral4": "mistral4",
    "mixtral": "mixtral",
    "olmo2": "olmo2",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
}

# Multimodal wrappers keep the text model's configuration here; it may leave its own model_type to the wrapper's.
NESTED = "text_config"
WRAPPERS: dict[str, str] = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "llama4": "llama4_text",
    "mistral3": "mistral",
}

# What the text part takes from the wrapper where it says nothing itself.
INHERITED = ("tie_word_embeddings", "eos_token_id", "auto_map", "quantization_config")


class Architecture(Protocol):
    """What a model file offers. It may add BUFFERS (a regular expression of own names that carry no weights), RENAMED (parts
    of own names that some files spell otherwise, with this file's spelling) and IGNORED (config keys without effect)."""

    Config: Any

    def weight_spec(self, c: Any) -> Spec: ...
    def cache_spec(self, c: Any) -> list[LayerSpec]: ...
    def forward(self, be: Backend, c: Any, w: Any, tokens_M: Array, rows: Rows, cache: Cache) -> Array: ...


class Described(NamedTuple):
    """A configuration read: the module that computes it, its Config, the config.json it came from, and the rows and columns
    of a block of its FP8 weights."""

    architecture: Architecture
    config: Any
    values: dict[str, Any]
    block: Block = BLOCK


def read_config(folder: Path) -> Described:
    """Read `folder/config.json`, or `params.json` where the model is in Mistral's own files."""
    return interpret(*mistral_native.read_described(folder))


def text_part(values: dict[str, Any]) -> dict[str, Any]:
    """The text model's configuration out of a multimodal wrapper's, with what it takes from there."""
    text: dict[str, Any] = values[NESTED]
    inherited = {key: values[key] for key in INHERITED if key in values and text.get(key) is None}
    if (wrapper := values.get("model_type")) in WRAPPERS and text.get("model_type") is None:
        inherited["model_type"] = WRAPPERS[wrapper]
    # Either part may say that the head is tied. A head that is stored counts before both (npllm.matching.match).
    tied = {"tie_word_embeddings": True} if values.get("tie_word_embeddings") is True else {}
    return text | inherited | tied


def interpret(values: dict[str, Any], name: str = "config.json", warn: Callable[..., None] = log.warning) -> Described:
    """A parsed config.json -> its architecture and Config; ConfigError names the field that does not fit.

    `warn` as in npllm.config.Reader.
    """
    if isinstance(values.get(NESTED), dict):
        warn("%s: a multimodal model; only its text part runs", name)
        values, name = text_part(values), f"{name}: {NESTED}"
    if "auto_map" in values:
        warn("%s: its auto_map names code of the checkpoint's author; npllm never runs it", name)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in REGISTRY:
        problem = "has no model_type" if kind is None else f"model_type {shown(kind)} is not supported"
        if isinstance(kind, str) and kind in WRAPPERS:
            raise ConfigError(f"{name}: is a multimodal model's, but has no {NESTED}")
        raise ConfigError(f"{name}: {problem}; supported: {nearest(shown(kind, str), REGISTRY)}")
    block = read_block(values, name)
    architecture = import_module(f"npllm.models.{REGISTRY[kind]}")
    reader = Reader(values, name, warn)
    # False would make an encoder of any of them: every token would see those after it.
    reader.only("is_causal", True)
    config = architecture.Config.read(reader)
    reader.finish(getattr(architecture, "IGNORED", ()))
    return Described(architecture, config, values, block)
