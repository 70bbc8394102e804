"""A model's folder in q8 or q4: `npllm quantize`.

The result has the tensors of the model's weight spec, under its own names, and no others: each expert's matrix for itself,
towers of a multimodal model left out. Matrices that npllm.grouped.marked names are `X` as I8 [F, D] or U8 [F, D/2], with
`X_factors`, F16 [F, D/32]; they always lie [out, in], whichever way the source had them. Everything else stays as it was
stored (experts in FP8 with rows of no whole groups become F32). config.json says so (npllm.quantised).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npllm import mistral_native
from npllm.arrays import Array
from npllm.backend import Backend
from npllm.checkpoint import Checkpoint
from npllm.errors import CheckpointError
from npllm.grouped import GROUP, PACKED, factors_name, marked
from npllm.handles import FORMATS, Handle, Stack, Weight
from npllm.matching import match
from npllm.models import NESTED, Described, read_config
from npllm.quantised import GROUPED, own_config
from npllm.registry import get_backend
from npllm.saving import (
    SHARD_BYTES,
    Outgoing,
    as_stored,
    copy_companions,
    move_into_place,
    require_empty,
    workplace,
    write_tensors,
)  # fmt: skip
from npllm.weights import Spec, count_parameters

# A format's name in a safetensors header.
NAMES = {format: name for name, (format, _) in (FORMATS | GROUPED).items()}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Quantised:
    """What `quantise_folder` wrote: where, how many matrices are quantised, and all bytes."""

    folder: Path
    matrices: int
    nbytes: int


def quantise_folder(
    source: Path, out: Path, format: str, *, shard_bytes: int = SHARD_BYTES, progress: Progress | None = None
) -> Quantised:
    """Write the model `source` in `format` ("q8", "q4") to the folder `out`, new or empty.

    The backend "auto" quantises: Numba's if it is installed and the model not small, else NumPy: the same bits.
    `progress(done, total)` counts bytes written. One matrix is in memory. CheckpointError, ConfigError; nothing half-written
    is left behind.
    """
    described = read_config(source)
    require_empty(out)
    checkpoint = Checkpoint(source, described.block)
    spec = described.architecture.weight_spec(described.config)
    handles = match(described, checkpoint)
    if stored := {handle.format for handle in handles.values()} & PACKED.keys():
        raise CheckpointError(f"{source}: is quantised already (to {stored.pop()}); take the original")
    quantisable, be = marked(spec, handles, format), get_backend(parameters=count_parameters(spec))
    tensors = _outgoing(quantisable, spec, checkpoint, be, format)
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    with workplace(out) as temporary:
        for size in write_tensors(temporary, tensors, shard_bytes, out):
            done += size
            if progress is not None:
                progress(done, total)
        copy_companions(source, temporary)
        values = _config(source, described, format)
        (temporary / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        move_into_place(temporary, out)
    return Quantised(out, sum(name.endswith(factors_name("")) for name in tensors), total)


def _config(source: Path, described: Described, format: str) -> dict[str, Any]:
    """config.json of the result, also of a model in Mistral's own files."""
    values, _ = mistral_native.read_described(source, warn=lambda *_: None)
    if isinstance(values.get(NESTED), dict):
        nested = {key: value for key, value in values[NESTED].items() if key != "quantization_config"}
        values = values | {NESTED: nested}
    return values | {"quantization_config": own_config(format, described.block)}


# -- tensors ----------------------------------------------------------------------------------------------------------


class Pair:
    """The factors and the codes of a matrix, made together when the factors are asked for."""

    def __init__(self, weight: Weight, be: Backend, format: str) -> None:
        self.weight, self.be, self.format = weight, be, format
        self.made: Weight | None = None

    def factors(self) -> Iterator[Array]:
        self.made = self.be.quantised(self.weight, self.format)
        assert self.made.scale is not None
        yield self.made.scale.weight.data

    def codes(self) -> Iterator[Array]:
        made, self.made = self.made, None
        assert made is not None
        yield made.data


def _outgoing(
    handles: Mapping[str, Handle], spec: Spec, checkpoint: Checkpoint, be: Backend, format: str
) -> dict[str, Outgoing]:
    tensors: dict[str, Outgoing] = {}
    for name, handle in handles.items():
        if isinstance(handle, Stack):
            for e, weight in enumerate(handle.weights):
                each = spec[name].forms[0].name.format(e)
                tensors |= _quantised(each, weight, be, format) if weight.quantisable else {each: _copied(weight)}
        elif handle.quantisable:
            outer = handle.transposed() if spec[name].stored == "io" else handle
            tensors |= _quantised(name, outer, be, format)
        else:
            tensors |= _as_stored(name, handle.name, checkpoint)
    return tensors


def _quantised(name: str, weight: Weight, be: Backend, format: str) -> dict[str, Outgoing]:
    pair, (rows, width) = Pair(weight, be, format), weight.shape
    return {
        factors_name(name): Outgoing("F16", (rows, width // GROUP), 2, pair.factors, last=True),
        name: Outgoing(NAMES[format], (rows, width // PACKED[format]), 1, pair.codes, last=True),
    }


def _as_stored(name: str, stored: str, checkpoint: Checkpoint) -> dict[str, Outgoing]:
    """A tensor of the file as it is, with the scale of FP8."""
    tensors = {name: as_stored(checkpoint.files[stored], stored)}
    if stored in checkpoint.scales:
        scale, file = checkpoint.scales[stored]
        tensors[f"{name}_scale_inv"] = as_stored(file, scale)
    return tensors


def _copied(weight: Weight) -> Outgoing:
    """A matrix out of a fused tensor."""
    format = "f32" if weight.scale else weight.format

    def pieces() -> Iterator[Array]:
        yield np.ascontiguousarray(weight.widened().data if weight.scale else weight.data)

    return Outgoing(NAMES[format], weight.shape, np.dtype(FORMATS[NAMES[format]][1]).itemsize, pieces)
