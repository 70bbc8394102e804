"""Weight files: finding them, checking their bounds, mapping their bytes. Nothing is read before it is checked.

The safetensors format: 8 bytes of header length (little endian), a JSON header {name: {dtype, shape, data_offsets}},
then the tensors, without holes or overlaps. The `safetensors` package copies tensors out of the file and has no bfloat16
in NumPy; here each tensor is a view of the mapped file in its storage format.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from npllm import mistral_native
from npllm.config import printable, read_json, shown
from npllm.errors import CheckpointError
from npllm.grouped import PACKED, factors_name
from npllm.handles import FORMATS, REALS, SCALE_FORMATS, Weight
from npllm.quantised import (
    BLOCK,
    GROUPED,
    OF_ACTIVATIONS,
    WHAT_WORKS,
    Block,
    find_scales,
    refuse_foreign,
    scaled,
    with_factors,
)  # fmt: skip

log = logging.getLogger("npllm")

# Formats that the header may name but no model of this version reads; buffers of such types are skipped by name.
OTHER_FORMATS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip

# Factors of q8 and q4.
FACTORS = {"F16": REALS["F16"]}

# The limit of the reference implementation.
LONGEST_HEADER = 100_000_000

# NumPy's arrays have at most 64 axes, a file system's names at most 255 bytes.
MOST_AXES = 64
LONGEST_NAME = 200

# How the text begins that Git leaves in place of a file that its LFS extension has not fetched.
LFS_POINTER = b"version "

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")


class SafetensorsFile:
    """One mapped safetensors file. `entries`: name -> (dtype, shape, begin, end), offsets counted from the data's start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, self.start, size = read_header(path)
        self.mapping = _map(path, self.start + size) if size else None

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def format(self, name: str) -> str:
        return str(self.entries[name][0])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name][1]

    def weight(self, name: str, formats: Mapping[str, tuple[str, str]] = REALS) -> Weight:
        """The handle of tensor `name` as it stands here; a format not among `formats` is an error that names it."""
        dtype, shape, begin, end = self.entries[name]
        if dtype not in formats:
            hint = f"; {WHAT_WORKS}" if dtype in ("U8", "I8", "I32") or dtype.startswith("F8_") else ""
            raise CheckpointError(
                f"{self.path}: tensor {name} is stored as {dtype}, not supported (supported: {', '.join(formats)}){hint}"
            )
        format, numpy_dtype = formats[dtype]
        if begin == end or self.mapping is None:
            return Weight(name, shape, format, np.zeros(shape, numpy_dtype), str(self.path))
        data = np.frombuffer(self.mapping, numpy_dtype, math.prod(shape), self.start + begin).reshape(shape)
        return Weight(name, shape, format, data, str(self.path), self.mapping)


def _map(path: Path, size: int) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as bad:
        raise CheckpointError(f"{path}: cannot be mapped into memory ({bad})") from None


Entry = tuple[str, tuple[int, ...], int, int]


def read_header(path: Path) -> tuple[dict[str, Entry], int, int]:
    """Read and check a safetensors header -> (entries, offset of the data, bytes of data)."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if hasattr(os, "posix_fadvise"):
                # The header and no more: the system would read on, into weights that nobody may want.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: {size} bytes is too short for a safetensors file; download it again")
            length = int.from_bytes(prefix, "little")
            if prefix == LFS_POINTER:
                raise CheckpointError(f"{path}: is a pointer of Git LFS, not the weights; fetch them with: git lfs pull")
            if length > LONGEST_HEADER:
                raise CheckpointError(f"{path}: header of {length} bytes is beyond the limit: is this a safetensors file?")
            if 8 + length > size:
                raise CheckpointError(f"{path}: header of {length} bytes is longer than the file ({size} bytes)")
            text = file.read(length)
    except OSError as bad:
        raise CheckpointError(f"{path}: cannot be read ({bad.strerror})") from None
    return _check_header(path, text, size - 8 - length), 8 + length, size - 8 - length


def _check_header(path: Path, text: bytes, size: int) -> dict[str, Entry]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) < len(pairs):
            raise ValueError("a key stands twice")
        return names

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as bad:
        raise CheckpointError(f"{path}: header is not valid JSON ({bad})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _check_entry(path, name, entry, size) for name, entry in header.items()}
    _check_layout(path, entries, size)
    return entries


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _check_entry(path: Path, name: str, entry: Any, size: int) -> Entry:
    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {printable(name)}: {problem}")

    if not isinstance(entry, dict):
        raise fail("its header entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or (dtype not in FORMATS and dtype not in OTHER_FORMATS):
        raise fail(f"unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or len(shape) > MOST_AXES or not all(map(_is_size, shape)):
        raise fail(f"shape {shown(shape)} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise fail(f"data_offsets {shown(offsets)} is not a pair of positions")
    begin, end = offsets
    if not begin <= end <= size:
        raise fail(f"bytes {begin}..{end} lie outside the file's {size} bytes of data (truncated download?)")
    itemsize = np.dtype(FORMATS[dtype][1]).itemsize if dtype in FORMATS else OTHER_FORMATS[dtype]
    if math.prod(shape) * itemsize != end - begin:
        needed = shown(math.prod(shape) * itemsize)
        raise fail(f"shape {shown(shape)} of {dtype} needs {needed} bytes, its offsets hold {end - begin}")
    if math.prod(max(1, axis) for axis in shape) * itemsize >= 1 << 63:
        raise fail(f"shape {shown(shape)} is beyond what an array can have")
    return dtype, tuple(shape), begin, end


def _check_layout(path: Path, entries: dict[str, Entry], size: int) -> None:
    """Tensors must tile the data: an overlap or a hole means that the header or the file is damaged."""
    position = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != position:
            what = "overlaps the one before it" if begin < position else f"leaves a hole of {begin - position} bytes"
            raise CheckpointError(f"{path}: tensor {printable(name)} {what} (bytes {begin}..{end})")
        position = end
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor belong to nothing")


class Checkpoint:
    """All tensors of a model folder, from one file or from the shards that its index names.

    An FP8 tensor brings its scale along, in blocks of `block` rows and columns, a q8 or q4 tensor its factors; they are not
    tensors of their own here.
    `native`: these are Mistral's own files, with the names of npllm.mistral_native.
    """

    def __init__(self, folder: Path, block: Block = BLOCK) -> None:
        self.folder, self.block = folder, block
        names_there = _names(folder)
        self.native = mistral_native.is_native(names_there)
        if others := mistral_native.left_alone(names_there):
            log.info("%s: Hugging Face's files are used; Mistral's own (%s) are left alone", folder, others[0])
        self.files: dict[str, SafetensorsFile] = {}
        for path, names in find_weights(folder).items():
            file = SafetensorsFile(path)
            for name in file if names is None else names:
                if not name.isprintable():
                    raise CheckpointError(f"{path}: a tensor's name holds control characters: {printable(name)}")
                if name not in file.entries:
                    raise CheckpointError(f"{path}: the index places tensor {printable(name)} here, but the file lacks it")
                if name in self.files:
                    raise CheckpointError(f"{path}: tensor {name} also stands in {self.files[name].path.name}")
                self.files[name] = file
        refuse_foreign(self.files)
        self.files = {name: file for name, file in self.files.items() if not OF_ACTIVATIONS.fullmatch(name)}
        self.scales = {name: (scale, self.files[scale]) for name, scale in find_scales(self.files).items()}
        for scale, _ in self.scales.values():
            del self.files[scale]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    @property
    def shards(self) -> list[SafetensorsFile]:
        """The files, each once."""
        return list({file.path: file for file in self.files.values()}.values())

    def read_exactly(self) -> None:
        """Weights will be used where they lie: the system shall read what is used, and not what follows it in the file."""
        for file in self.shards:
            if file.mapping is not None and hasattr(file.mapping, "madvise"):
                file.mapping.madvise(mmap.MADV_RANDOM)

    def grouped(self, name: str) -> bool:
        """Whether a tensor is stored in q8 or q4 (npllm.grouped)."""
        return self.format(name) in GROUPED and self.scales.get(name, ("",))[0] == factors_name(name)

    def weight(self, name: str) -> Weight:
        if self.grouped(name):
            factors, file = self.scales[name]
            return with_factors(self.files[name].weight(name, GROUPED), file.weight(factors, FACTORS))
        if self.format(name) in GROUPED and any(map(self.grouped, self.scales)):
            lost = f"tensor {name} is stored without its factors {factors_name(name)}"
            raise CheckpointError(f"{self.files[name].path}: {lost}; quantise the model again")
        weight = self.files[name].weight(name, FORMATS)
        if weight.format != "f8_e4m3":
            return weight
        if name not in self.scales:
            raise CheckpointError(f"{weight.source}: tensor {name} is stored as F8_E4M3 without its scale; {WHAT_WORKS}")
        scale, file = self.scales[name]
        return scaled(weight, file.weight(scale, SCALE_FORMATS), self.block)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor's numbers, of which q4 stores two in a byte."""
        shape = self.files[name].shape(name)
        if not (self.grouped(name) and shape):
            return shape
        return (*shape[:-1], shape[-1] * PACKED[GROUPED[self.format(name)][0]])

    def format(self, name: str) -> str:
        return self.files[name].format(name)


def find_weights(folder: Path) -> dict[Path, list[str] | None]:
    """The weight files of a folder, each with the tensors that the index places there (None: all it holds).

    `model.safetensors.index.json` outranks `model.safetensors`; Mistral's own files are used when they are all there is.
    Other files are never mixed in, or a model that is published in two forms would be loaded twice.
    """
    names = _names(folder)
    if mistral_native.is_native(names):
        return _read_files(folder, mistral_native.require_weights(names, str(folder)))
    theirs = [folder / name for name in mistral_native.HUGGING_FACE_WEIGHTS]
    if found := next((path for path in theirs if path.is_file()), None):
        return _read_files(folder, [found.name])
    if lost := next((path for path in theirs if path.is_symlink()), None):
        raise CheckpointError(f"{lost}: is a link to {lost.readlink()}, which is missing; download it again")
    if own := mistral_native.weight_files(names):
        raise CheckpointError(f"{folder}: {own[0]} is in Mistral's own form, which needs {mistral_native.PARAMS} beside it")
    pickles = [name for name in PICKLES if name in names] or [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(
            f"{folder}: only pickled weights ({pickles[0]}), which can run code when read; "
            f"turn them into safetensors with: npllm convert {folder} OUT"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    hint = f"; {others[0]} alone says nothing about which tensors belong to the model" if others else ""
    raise CheckpointError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there{hint}")


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as bad:
        raise CheckpointError(f"{folder}: cannot be listed ({bad.strerror})") from None


def _read_files(folder: Path, names: list[str]) -> dict[Path, list[str] | None]:
    if names[0].endswith(".json"):
        return _read_index(folder / names[0])
    return {folder / name: None for name in names}


def _read_index(index: Path) -> dict[Path, list[str] | None]:
    table = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(shard, str) for shard in table.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to shard file names")
    shards: dict[Path, list[str] | None] = {}
    for name, shard in table.items():
        path = _shard_path(index, shard)
        names = shards.setdefault(path, [])
        assert names is not None
        names.append(name)
    return shards


def _shard_path(index: Path, shard: str) -> Path:
    parts = PurePosixPath(shard)
    outside = parts.is_absolute() or ".." in parts.parts or "\\" in shard or ":" in shard
    if outside or len(shard) > LONGEST_NAME or not shard.isprintable() or not shard.endswith(".safetensors"):
        shown = printable(shard)
        raise CheckpointError(f"{index}: {shown!r} is not the name of a safetensors file inside the folder")
    path = index.parent / shard
    if not path.is_file():
        raise CheckpointError(f"{index}: names the shard {shard}, which is missing; download it again")
    return path
