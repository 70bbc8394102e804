"""Weight files: finding them, checking their bounds, mapping their bytes. Nothing is read before it is checked.

The safetensors format: 8 bytes of header length (little endian), a JSON header {name: {dtype, shape, data_offsets}},
then the tensors, without holes or overlaps. The `safetensors` package copies tensors out of the file and has no bfloat16
in NumPy; here each tensor is a view of the mapped file in its storage format.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from npllm.config import printable, read_json, shown
from npllm.errors import CheckpointError
from npllm.handles import FORMATS, Weight

# Formats that the header may name but no model of this version reads; buffers of such types are skipped by name.
OTHER_FORMATS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip

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

    def weight(self, name: str) -> Weight:
        """The handle of tensor `name`; a format that npllm does not compute with is an error that names it."""
        dtype, shape, begin, end = self.entries[name]
        if dtype not in FORMATS:
            raise CheckpointError(
                f"{self.path}: tensor {name} is stored as {dtype}, which is not supported (supported: {', '.join(FORMATS)})"
            )
        format, numpy_dtype = FORMATS[dtype]
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
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: {size} bytes is too short for a safetensors file; download it again")
            length = int.from_bytes(prefix, "little")
            if prefix == LFS_POINTER:
                raise CheckpointError(f"{path}: is a pointer of Git LFS, not the weights; fetch them with: git lfs pull")
            if length > LONGEST_HEADER:
                raise CheckpointError(f"{path}: header of {length} bytes is beyond the limit of {LONGEST_HEADER}")
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
    """All tensors of a model folder, from one file or from the shards that its index names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def weight(self, name: str) -> Weight:
        return self.files[name].weight(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files[name].shape(name)

    def format(self, name: str) -> str:
        return self.files[name].format(name)


def find_weights(folder: Path) -> dict[Path, list[str] | None]:
    """The weight files of a folder, each with the tensors that the index places there (None: all it holds).

    `model.safetensors.index.json` outranks `model.safetensors`; other files are never mixed in, or a model that is
    published in two forms would be loaded twice.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _read_index(index)
    single = folder / "model.safetensors"
    if single.is_file():
        return {single: None}
    for path in (index, single):
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a link to {path.readlink()}, which is missing; download it again")
    pickles = [name for name in PICKLES if (folder / name).exists()] or _names(folder, *PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder}: only pickled weights ({pickles[0]}), which can run code when read; "
            f"turn them into safetensors with: npllm convert {folder} OUT"
        )
    others = _names(folder, ".safetensors")
    hint = f"; {others[0]} alone says nothing about which tensors belong to the model" if others else ""
    raise CheckpointError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there{hint}")


def _names(folder: Path, *suffixes: str) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.suffix in suffixes)
    except OSError as bad:
        raise CheckpointError(f"{folder}: cannot be listed ({bad.strerror})") from None


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
