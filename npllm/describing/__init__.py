"""`npllm.describe`: an architecture with all its numbers, from config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from npllm.describing.description import Description
from npllm.describing.recorder import record
from npllm.describing.sources import found
from npllm.describing.steps import steps_of
from npllm.describing.structure import embedding_of, head_of, kinds_of, layers_of, pattern_of
from npllm.describing.weights import FORMATS, parameters_of, stored_format, weight_bytes
from npllm.models import REGISTRY, Described

__all__ = ["Description", "describe", "description_of"]


def describe(source: str | Path | Mapping[str, Any] | None = None, revision: str | None = None) -> Description:
    """Everything that config.json says of a model, with what follows from it; no weights are read.

    source     a config.json (or params.json), a folder, a hub id (only its config is fetched), the short name of a
               published model such as "deepseek-v3" (npllm.published), a parsed config.json, or None: the shipped model.
    revision   branch, tag or commit on the hub.

    ConfigError for a config that is malformed or unsupported, ArgumentError (with the nearest names) for an unknown name,
    HubError from the hub.
    """
    name, described, claim = found(source, revision)
    return description_of(described, name, claim)


def description_of(described: Described, name: str, claim: str = "") -> Description:
    """The description of a configuration that has been read."""
    architecture, config = described.architecture, described.config
    spec = architecture.weight_spec(config)
    events = record(architecture, config, spec)
    layers = layers_of(events)
    kinds = kinds_of(layers)
    embedding = embedding_of(events)
    sizes = weight_bytes(spec, described.block)
    return Description(
        name=name,
        model_type=described.values["model_type"],
        file=REGISTRY[described.values["model_type"]],
        hidden_size=embedding.width,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        embedding=embedding,
        layers=layers,
        kinds=kinds,
        pattern=pattern_of([next(k for k, kind in enumerate(kinds) if kind.layer == layer) for layer in layers]),
        head=head_of(events, spec),
        parameters=parameters_of(spec, events),
        weight_bytes=tuple((format, sum(size[format] for size in sizes.values())) for format in FORMATS),
        cache=tuple(architecture.cache_spec(config)),
        steps=steps_of(events, sizes),
        stored=stored_format(described.values),
        claim=claim,
    )
