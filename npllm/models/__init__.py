"""The architectures, one file each, and the registry that finds them by `model_type`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.cache import Cache, LayerSpec, Rows
from npllm.config import Reader, nearest, read_json, shown
from npllm.errors import ConfigError
from npllm.weights import Spec

log = logging.getLogger("npllm")

# model_type of config.json -> file in this folder.
REGISTRY = {"gpt2": "gpt2", "llama": "llama3", "qwen3": "qwen3"}

# Multimodal wrappers keep the text model's configuration here; it may leave its own model_type to the wrapper's.
NESTED = "text_config"
WRAPPERS: dict[str, str] = {}

# What the text part takes from the wrapper where it says nothing itself.
INHERITED = ("tie_word_embeddings", "eos_token_id", "auto_map")


class Architecture(Protocol):
    """What a model file offers. It may add BUFFERS (a regular expression of own names that carry no weights) and IGNORED
    (config keys without effect)."""

    Config: Any

    def weight_spec(self, c: Any) -> Spec: ...
    def cache_spec(self, c: Any) -> list[LayerSpec]: ...
    def forward(self, be: Backend, c: Any, w: Any, tokens_M: Array, rows: Rows, cache: Cache) -> Array: ...


class Described(NamedTuple):
    """A configuration read: the module that computes it, its Config, and the config.json it came from."""

    architecture: Architecture
    config: Any
    values: dict[str, Any]


def read_config(folder: Path) -> Described:
    """Read `folder/config.json`."""
    path = folder / "config.json"
    return interpret(read_json(path, missing="; a model folder needs one"), str(path))


def interpret(values: dict[str, Any], name: str = "config.json", warn: Callable[..., None] = log.warning) -> Described:
    """A parsed config.json -> its architecture and Config; ConfigError names the field that does not fit.

    `warn` as in npllm.config.Reader.
    """
    text = values.get(NESTED)
    if isinstance(text, dict):
        warn("%s: a multimodal model; only its text part runs", name)
        refuse_quantised(values, name)
        inherited = {key: values[key] for key in INHERITED if key in values and key not in text}
        if (wrapper := values.get("model_type")) in WRAPPERS and "model_type" not in text:
            inherited["model_type"] = WRAPPERS[wrapper]
        values, name = inherited | text, f"{name}: {NESTED}"
    if "auto_map" in values:
        warn("%s: its auto_map names code of the checkpoint's author; npllm never runs it", name)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in REGISTRY:
        problem = "has no model_type" if kind is None else f"model_type {shown(kind)} is not supported"
        raise ConfigError(f"{name}: {problem}; supported: {nearest(shown(kind, str), REGISTRY)}")
    refuse_quantised(values, name)
    architecture = import_module(f"npllm.models.{REGISTRY[kind]}")
    reader = Reader(values, name, warn)
    config = architecture.Config.read(reader)
    reader.finish(getattr(architecture, "IGNORED", ()))
    return Described(architecture, config, values)


def refuse_quantised(values: dict[str, Any], name: str) -> None:
    quantisation = values.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise ConfigError(f"{name}: quantised checkpoints are not supported (quantization_config: {shown(method, str)})")
