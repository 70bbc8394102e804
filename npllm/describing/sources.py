"""Where a description comes from: a config.json, a folder, a hub id (of which only the config is fetched), a short name."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from npllm import mistral_native, published
from npllm.config import printable, read_json
from npllm.errors import ArgumentError
from npllm.models import Described, interpret, read_config

log = logging.getLogger("npllm")


class Found(NamedTuple):
    """What a source led to: the model's name, its configuration, and what its publisher says of its size."""

    name: str
    described: Described
    claim: str = ""


def found(source: str | Path | Mapping[str, Any] | None, revision: str | None = None) -> Found:
    """ConfigError where a config does not fit, ArgumentError where there is none of that name, HubError from the hub."""
    if isinstance(source, Mapping):
        return Found(str(source.get("_name_or_path") or "config"), interpret(dict(source), "config"))
    if source is not None and not str(source):
        raise ArgumentError("the model's name is empty: give a config.json, a folder, a hub id or a short name")
    path = Path(__file__).parent.parent / "shipped" if source is None else Path(source)
    name = "npllm-shipped" if source is None else str(source)
    if path.is_dir():
        return Found(name, read_config(path))
    if path.is_file():
        return Found(name, _read_file(path))
    known = published.find(name)
    if known is not None:
        return Found(known, interpret(published.MODELS[known].config, known, warn=_silent), published.CLAIMS.get(known, ""))
    if path.suffix == ".json" or path.is_absolute() or name.startswith("."):
        raise ArgumentError(f"{printable(name)}: no such file or folder")
    if "/" not in name:
        raise _unknown(name)
    from npllm.hub import fetch

    return Found(name, read_config(fetch(name, revision=revision, config_only=True)))


def _silent(*_: Any) -> None:
    """Published files are known, keys without effect included."""


def _read_file(path: Path) -> Described:
    """A config.json, or Mistral's params.json, whatever the file's name."""
    values = read_json(path)
    if "model_type" not in values and "dim" in values and "n_layers" in values:
        return interpret(mistral_native.config_values(values, str(path)), f"{path}, as config.json would say it")
    return interpret(values, str(path))


def _unknown(name: str) -> ArgumentError:
    close = difflib.get_close_matches(name.lower(), published.NAMES, n=5, cutoff=0.4)
    known = f"nearest: {', '.join(close)}" if close else f"known: {', '.join(sorted(published.NAMES)[:5])}, ..."
    return ArgumentError(
        f"{printable(name)}: no such file or folder, and no published model of that name; {known}; or give a hub id "
        "(owner/name)"
    )
