"""MatFormer (Devvrit et al. 2023, arXiv 2310.07707): smaller Gemma 3n models out of a bigger one's weights, untrained.

Gemma 3n is trained so that a prefix of each FFN's features is a feed-forward layer too, and so that it can do without some
of the layers that have no keys of their own. `npllm.load(folder, matformer=...)` takes the parts of a mapped checkpoint
that the smaller model needs, where they lie; `npllm slice` (`slice_folder`) writes them to a folder of their own.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from npllm.arrays import Array, DTypeLike
from npllm.blocks import CAUSAL
from npllm.checkpoint import Checkpoint
from npllm.config import nearest, read_json, shown
from npllm.errors import ArgumentError, CheckpointError, ConfigError
from npllm.grouped import PACKED
from npllm.handles import Handle, Weight
from npllm.matching import match, own_name
from npllm.models import NESTED, Described, interpret, read_config
from npllm.models.gemma3n import Config
from npllm.saving import (
    PIECE,
    SHARD_BYTES,
    Outgoing,
    as_stored,
    copy_companions,
    move_into_place,
    require_empty,
    workplace,
    write_tensors,
)  # fmt: skip
from npllm.weights import count_parameters

# Published sizes by name: which layers go, and the FFN's width.
PRESETS: dict[str, dict[str, Any]] = {"e2b": {"drop": [20, 21, 22, 23, 24], "ffn": 8192}}

# The narrowest FFN that the published models were trained with. A smaller model is taken to be trained from its half on.
NARROWEST = 8192

TABLE, PROJECTION = "embed_tokens_per_layer.weight", "per_layer_model_projection.weight"
LAYER = re.compile(r"layers\.(\d+)\.(.*)")
FFN = re.compile(r"mlp\.(gate|up|down)_proj\.weight")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Slice:
    """The layers of a bigger model that make up the smaller one, in their order, and the FFN's width in each."""

    layers: tuple[int, ...]
    ffn: tuple[int, ...]


Wanted: TypeAlias = str | Mapping[str, Any] | Slice


@dataclass(frozen=True, eq=False)
class Columns(Weight):
    """A handle on some columns of a matrix. `data` is the whole matrix as it lies in its file; `parts` are put side by side
    when rows are read."""

    parts: tuple[slice, ...] = ()

    @classmethod
    def of_matrix(cls, weight: Weight, parts: Sequence[slice]) -> Columns:
        shape = (len(weight), sum(part.stop - part.start for part in parts))
        whole = weight.name, shape, weight.format, weight.data, weight.source, weight.mapping
        return cls(*whole, axes=weight.axes, part=weight.part, parts=tuple(parts))

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.data.itemsize

    def array(self, dtype: DTypeLike) -> Array:
        return self[:].array(dtype)

    def __getitem__(self, index: int | slice) -> Weight:
        chosen = self.rows(np.atleast_1d(np.arange(len(self))[index]))
        return chosen if isinstance(index, slice) else chosen[0]

    def rows(self, index_M: Array) -> Weight:
        data = np.concatenate([self.data[index_M, part] for part in self.parts], axis=1)
        return Weight(self.name, data.shape, self.format, data, self.source, axes=self.axes, part=self.part)


# -- which slice ------------------------------------------------------------------------------------------------------


def choose(wanted: Wanted, described: Described, where: str) -> Slice:
    """What `wanted` asks of a model: a name of PRESETS, a Slice, or {"drop" or "layers": [int], "ffn": int or [int]}.

    "drop" are the layers to leave out, "layers" those to keep; "ffn" is the width of each layer that is kept, or of all.
    `where` heads the errors: ArgumentError for what cannot be, ConfigError for a model that is no MatFormer.
    """
    c = described.config
    if not isinstance(c, Config):
        raise ConfigError(f"{where}: is not a MatFormer model, so nothing can be cut out of it (Gemma 3n is one)")
    if isinstance(wanted, Slice):
        wanted = {"layers": wanted.layers, "ffn": wanted.ffn}
    if isinstance(wanted, str):
        if wanted not in PRESETS:
            raise ArgumentError(f"matformer = {shown(wanted)} is not a size by name: {nearest(wanted, PRESETS)}")
        wanted = PRESETS[wanted]
    if not isinstance(wanted, Mapping) or not wanted or set(wanted) - {"drop", "layers", "ffn"}:
        raise ArgumentError(f"matformer = {shown(wanted)} must be a name or have the keys drop or layers, and ffn")
    layers = _kept(wanted, len(c.layers), where)
    _check_keys(c, layers, where)
    return Slice(layers, _widths(wanted.get("ffn"), c, layers, where))


def _kept(wanted: Mapping[str, Any], count: int, where: str) -> tuple[int, ...]:
    if "drop" in wanted and "layers" in wanted:
        raise ArgumentError("matformer: give the layers to drop or the layers to keep, not both")
    key = "drop" if "drop" in wanted else "layers"
    named = wanted.get(key, range(count))
    if isinstance(named, str) or not isinstance(named, Sequence) or not all(map(_is_whole, named)):
        raise ArgumentError(f"matformer: {key} = {shown(named)} must be a list of layer numbers")
    verb, strange = "drop" if key == "drop" else "keep", [i for i in named if not 0 <= i < count]
    if strange:
        raise ArgumentError(f"{where}: has layers 0 to {count - 1}, there is no layer {shown(strange[0])} to {verb}")
    if len(set(named)) < len(named) or (key == "layers" and list(named) != sorted(named)):
        raise ArgumentError(f"matformer: {key} = {shown(list(named))} must name each layer once, in order")
    kept = tuple(i for i in range(count) if (i in named) == (key == "layers"))
    if not kept:
        raise ArgumentError(f"{where}: a model needs a layer; matformer drops all {count}")
    return kept


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_keys(c: Config, layers: tuple[int, ...], where: str) -> None:
    for i in layers:
        source = c.layers[i].keys_of
        if source not in layers:
            raise ArgumentError(f"{where}: layer {source} cannot be dropped, layer {i} shares its keys and values")


def _widths(given: Any, c: Config, layers: tuple[int, ...], where: str) -> tuple[int, ...]:
    """The FFN's width in each of `layers`: as it is, or the first so many of its features."""
    own = [c.layers[i].inner for i in layers]
    widths = own if given is None else [given] * len(own) if _is_whole(given) else given
    if isinstance(widths, str) or not isinstance(widths, Sequence) or not all(map(_is_whole, widths)):
        raise ArgumentError(f"matformer: ffn = {shown(given)} must be a width, or a list with one for each layer")
    if len(widths) != len(own):
        raise ArgumentError(f"matformer: ffn names {len(widths)} widths, but {len(own)} layers are kept")
    for i, width, most in zip(layers, widths, own, strict=True):
        least = NARROWEST if most >= NARROWEST else -(-most // 2)
        if not least <= width <= most:
            raise ArgumentError(f"{where}: layer {i} was trained with FFNs {least} to {most} wide, not {width}")
    return tuple(widths)


# -- the smaller model ------------------------------------------------------------------------------------------------


def sliced_values(values: Mapping[str, Any], c: Config, chosen: Slice) -> dict[str, Any]:
    """config.json of the smaller model; `values` is that of the bigger one, `c` what was read from it."""
    if isinstance(values.get(NESTED), dict):
        return dict(values) | {NESTED: sliced_values(values[NESTED], c, chosen)}
    kept = [c.layers[i] for i in chosen.layers]
    return dict(values) | {
        "num_hidden_layers": len(kept),
        "intermediate_size": list(chosen.ffn),
        "layer_types": ["full_attention" if layer.mask == CAUSAL else "sliding_attention" for layer in kept],
        "activation_sparsity_pattern": [layer.sparsity for layer in kept],
        "num_kv_shared_layers": sum(layer.keys_of != i for i, layer in zip(chosen.layers, kept, strict=True)),
    }


def sliced_model(
    described: Described, handles: Mapping[str, Handle], wanted: Wanted, where: str
) -> tuple[Described, dict[str, Handle]]:
    """The smaller model's configuration and handles, out of those of the bigger one; next to nothing is read."""
    chosen = choose(wanted, described, where)
    _refuse_scales(handles, where)
    values = sliced_values(described.values, described.config, chosen)
    smaller = interpret(values, where, warn=lambda *_: None)
    width = smaller.config.hidden_size_per_layer_input
    renamed = ((_new_name(name, chosen), handle) for name, handle in handles.items())
    return smaller, {new: _cut(new, handle, chosen, width) for new, handle in renamed if new is not None}


def _refuse_scales(handles: Mapping[str, Handle], where: str) -> None:
    scaled = next((name for name, handle in handles.items() if isinstance(handle, Weight) and handle.scale), None)
    if scaled is not None:
        stored = handles[scaled].format if handles[scaled].format in PACKED else "FP8"
        problem = f"tensor {scaled} is stored in {stored}, which cannot be cut: take a bfloat16 checkpoint"
        raise CheckpointError(f"{where}: {problem}")


def _new_name(own: str, chosen: Slice) -> str | None:
    """The name in the smaller model; None for a tensor of a layer that goes."""
    if (found := LAYER.fullmatch(own)) is None:
        return own
    number = int(found[1])
    return f"layers.{chosen.layers.index(number)}.{found[2]}" if number in chosen.layers else None


def _cut(new: str, weight: Handle, chosen: Slice, width: int) -> Weight:
    """The part of a tensor that the smaller model has under the name `new`; `width` is that of a per-layer input."""
    assert isinstance(weight, Weight)
    runs = _runs(chosen.layers, width)
    if new == TABLE and runs != [slice(0, weight.shape[1])]:
        return Columns.of_matrix(weight, runs)
    if new == PROJECTION:
        if len(runs) == 1:
            return weight[runs[0]]
        data = np.concatenate([weight.data[run] for run in runs])
        return replace(weight, shape=data.shape, data=data, mapping=None)
    found = LAYER.fullmatch(new)
    if found and (matrix := FFN.fullmatch(found[2])):
        features = chosen.ffn[int(found[1])]
        return weight[:features] if matrix[1] != "down" else weight.transposed()[:features].transposed()
    return weight


def _runs(layers: Sequence[int], width: int) -> list[slice]:
    """The per-layer inputs of `layers`, each `width` wide, as few slices."""
    runs: list[slice] = []
    for layer in layers:
        begin, end = layer * width, (layer + 1) * width
        if runs and runs[-1].stop == begin:
            runs[-1] = slice(runs[-1].start, end)
        else:
            runs.append(slice(begin, end))
    return runs


# -- a folder of its own ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sliced:
    """What `slice_folder` wrote: where, which layers with which FFN widths, and how much."""

    folder: Path
    layers: tuple[int, ...]
    ffn: tuple[int, ...]
    parameters: int
    nbytes: int


def slice_folder(
    source: Path, out: Path, wanted: Wanted, *, shard_bytes: int | None = None, progress: Progress | None = None
) -> Sliced:
    """Write the smaller model to the folder `out`, new or empty, as a checkpoint of its own; `wanted` as in `choose`.

    Towers of a multimodal model, the tokenizer and the like come along. The files hold at most `shard_bytes`, by default
    as much as those of `source`. `progress(done, total)` counts bytes written. Only pieces of tensors are in memory.
    ArgumentError, ConfigError, CheckpointError; nothing half-written is left behind.
    """
    described = read_config(source)
    chosen = choose(wanted, described, str(source))
    require_empty(out)
    checkpoint = Checkpoint(source, described.block)
    handles = match(described, checkpoint)
    _refuse_scales(handles, str(source))
    tensors = _outgoing(checkpoint, handles, chosen, described.config.hidden_size_per_layer_input)
    values = sliced_values(read_json(source / "config.json"), described.config, chosen)
    smaller = interpret(values, str(out), warn=lambda *_: None)
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    with workplace(out) as temporary:
        for size in write_tensors(temporary, tensors, shard_bytes or _shard_bytes(checkpoint), out):
            done += size
            if progress is not None:
                progress(done, total)
        copy_companions(source, temporary)
        (temporary / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        move_into_place(temporary, out)
    parameters = count_parameters(smaller.architecture.weight_spec(smaller.config))
    return Sliced(out, chosen.layers, chosen.ffn, parameters, total)


def _shard_bytes(checkpoint: Checkpoint) -> int:
    """What the largest of several files holds."""
    largest = max(max(end for _, _, _, end in file.entries.values()) for file in checkpoint.shards)
    return largest if len(checkpoint.shards) > 1 else SHARD_BYTES


def _outgoing(checkpoint: Checkpoint, handles: Mapping[str, Handle], chosen: Slice, width: int) -> dict[str, Outgoing]:
    """What to write, by the names that the files of the bigger model use."""
    tensors = {}
    for stored in checkpoint:
        own = own_name(stored)
        new = own and _new_name(own, chosen)
        if own is not None and new is None:
            continue
        name = stored if own is None else stored.removesuffix(own) + str(new)
        whole = handles.get(own or "")
        part = whole if whole is None else _cut(str(new), whole, chosen, width)
        if part is None or part is whole:
            tensors[name] = as_stored(checkpoint.files[stored], stored)
        else:
            pieces = functools.partial(_pieces, part)
            tensors[name] = Outgoing(checkpoint.format(stored), part.shape, part.data.itemsize, pieces)
    return tensors


def _pieces(weight: Weight) -> Iterable[Array]:
    """The elements in their stored type, some rows at a time."""
    rows = max(1, PIECE * len(weight) // max(1, weight.nbytes))
    for begin in range(0, len(weight), rows):
        yield np.ascontiguousarray(weight[begin : begin + rows].data)
