"""Writing a model's folder: safetensors piece by piece, with an index where there are several; finished or not at all.
And text files, in the same way.

The `safetensors` package would need all tensors of a file in memory; here one piece of one tensor is enough.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.checkpoint import SafetensorsFile
from npllm.errors import ArgumentError, CheckpointError, NpllmError

SHARD_BYTES = 4_000_000_000

# Bytes that are copied at a time.
PIECE = 1 << 24

# What goes along with the weights: configuration, tokenizer, templates, licence; never code.
COMPANIONS = (".json", ".jinja", ".model", ".txt", ".md")


class Outgoing(NamedTuple):
    """A tensor to write: its type by the name of a safetensors header, its shape, bytes per element, and what gives its
    elements in order, as arrays that lie without gaps. Those that are `last` are asked for after all others, in their order.
    """

    dtype: str
    shape: tuple[int, ...]
    itemsize: int
    pieces: Callable[[], Iterable[Array]]
    last: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def write_tensors(folder: Path, tensors: Mapping[str, Outgoing], shard_bytes: int, owner: Path) -> Iterator[int]:
    """Write `model.safetensors`, or shards of at most `shard_bytes` and their index; yields the bytes of each piece.

    CheckpointError, in the name of `owner`, when the disk has not that much space.
    """
    total, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(folder).free
    if total > free:
        raise CheckpointError(f"{owner}: {total} bytes are needed and {free} are free; choose another disk")
    plan = _plan(tensors, shard_bytes)
    for file, names in plan.items():
        yield from _write_file(folder / file, {name: tensors[name] for name in names})
    if len(plan) > 1:
        weight_map = {name: file for file, names in plan.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _plan(tensors: Mapping[str, Outgoing], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names, in the checkpoint's order; a tensor larger than a shard gets one of its own."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": names for number, names in enumerate(groups, 1)}


def _write_file(path: Path, tensors: Mapping[str, Outgoing]) -> Iterator[int]:
    """Write one safetensors file; wide types first, so that every tensor is aligned to its own size."""
    order = sorted(tensors, key=lambda name: (1, 0, "") if tensors[name].last else (0, -tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": tensors[name].dtype, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for piece in tensors[name].pieces():
                file.write(piece.data)
                yield piece.nbytes
        file.flush()
        os.fsync(file.fileno())


def as_stored(file: SafetensorsFile, name: str) -> Outgoing:
    """A tensor whose bytes stay as they are, whatever their type."""
    dtype, shape, begin, end = file.entries[name]

    def pieces() -> Iterator[Array]:
        for start in range(begin, end, PIECE):
            assert file.mapping is not None
            yield np.frombuffer(file.mapping, np.uint8, min(PIECE, end - start), file.start + start)

    return Outgoing(dtype, shape, (end - begin) // max(1, math.prod(shape)), pieces)


def require_empty(out: Path) -> None:
    """CheckpointError unless `out` is an empty folder, or nothing yet."""
    try:
        usable = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    except OSError as bad:
        raise CheckpointError(f"{out}: cannot be written ({bad.strerror})") from None
    if not usable:
        raise CheckpointError(f"{out}: is not an empty folder; name another, or a new one")


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """A hidden folder inside `out` that vanishes at the end, as does `out` itself if it is new and stays empty."""
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".npllm-", dir=out.resolve()) as temporary:
            yield Path(temporary)
    except OSError as bad:
        if isinstance(bad, NpllmError):
            raise
        raise CheckpointError(f"{out}: cannot be written ({bad.strerror})") from bad
    finally:
        if new:
            with suppress(OSError):
                out.rmdir()


def copy_companions(folder: Path, temporary: Path) -> None:
    """Copy what goes along with the weights of `folder`."""
    for path in sorted(folder.iterdir()):
        wanted = path.suffix in COMPANIONS or path.name.startswith("LICENSE")
        if wanted and not path.name.endswith(".index.json") and path.is_file():
            shutil.copyfile(path, temporary / path.name)


def move_into_place(temporary: Path, out: Path) -> set[str]:
    """Rename the finished files, config.json last: only with it is a folder a model -> their names."""
    made = {path.name for path in temporary.iterdir()}
    for name in sorted(made, key=lambda name: (name == "config.json", not name.endswith(".safetensors"), name)):
        os.replace(temporary / name, out / name)
    return made


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write text files, all whole or none: each beside its place first, and renamed when the last is on the disk.

    What a file was before is replaced; what is no file (a pipe, a terminal) is written to as it is. ArgumentError where one
    is a folder or cannot be written, or where two are the same.
    """
    waiting: dict[Path, Path] = {}
    out = Path()
    try:
        for out, text in texts.items():
            if any(os.path.realpath(out) == os.path.realpath(other) for other in texts if other != out):
                raise ArgumentError(f"{out}: two files are to be written there; name another")
            if out.is_dir():
                raise ArgumentError(f"{out}: is a folder; name a file")
            if not out.exists() or out.is_file():
                waiting[out] = _written_beside(Path(os.path.realpath(out)), text)
        for out, text in texts.items():
            if out not in waiting:
                out.write_text(text, encoding="utf-8")
        for out in list(waiting):
            os.replace(waiting[out], os.path.realpath(out))
            del waiting[out]
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as bad:  # ValueError: a path with a zero byte
        if isinstance(bad, NpllmError):
            raise
        reason = bad.strerror if isinstance(bad, OSError) else bad
        raise ArgumentError(f"{out}: cannot be written ({reason})") from None
    finally:
        for temporary in waiting.values():
            temporary.unlink(missing_ok=True)


def _written_beside(out: Path, text: str) -> Path:
    """A new hidden file in the folder of `out` with this text."""
    temporary = out.parent / f".npllm-{secrets.token_hex(8)}"
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
