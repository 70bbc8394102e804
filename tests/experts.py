"""Checkpoints of tiny models with experts, one by one or fused, written to a folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from npllm.arrays import Array
from tests.models import save_tensors

# A module that holds experts, and what gate, up and down are called within one.
MLP = ("mlp", "gate_proj", "up_proj", "down_proj")


def save_model(folder: Path, config: dict[str, Any], tensors: dict[str, Array]) -> Path:
    """config.json and model.safetensors; the folder may be new."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_tensors(folder, tensors)
    return folder


def fused(tensors: dict[str, Array], place: tuple[str, str, str, str] = MLP) -> dict[str, Array]:
    """Per-expert tensors as transformers 5 holds them in memory: in `mlp`, gate above up, [E, 2F, D], and down, [E, D, F].

    `place` is the module that holds them in `tensors`, and their names there.
    """
    module, *names = place
    kept = {name.replace(f".{module}.", ".mlp."): x for name, x in tensors.items() if ".experts." not in name}
    for layer in {name.partition(f".{module}.experts.")[0] for name in tensors if ".experts." in name}:
        at, to = f"{layer}.{module}.experts.", f"{layer}.mlp.experts."
        count = sum(name.startswith(at) and name.endswith(f".{names[0]}.weight") for name in tensors)
        gate, up, down = (np.stack([tensors[f"{at}{e}.{name}.weight"] for e in range(count)]) for name in names)
        kept |= {f"{to}gate_up_proj": np.concatenate([gate, up], axis=1), f"{to}down_proj": down}
    return kept
