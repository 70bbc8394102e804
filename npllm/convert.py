"""Pickled checkpoints to safetensors, in a process of its own that runs no code from them.

`torch_files` reads the pickles as data. Should it have a flaw all the same, the process that it runs in is isolated from
the caller: it gets no environment (no tokens), no standard input, limits on memory, processes and core dumps, and one
folder to write to. What it wrote is checked by `checkpoint` before it is moved into place.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.checkpoint import find_weights, read_header
from npllm.config import read_json
from npllm.errors import ArgumentError, CheckpointError, NpllmError
from npllm.saving import SHARD_BYTES, Outgoing, copy_companions, move_into_place, workplace, write_tensors
from npllm.torch_files import NUMPY, StoredTensor, one_line, read_torch_file

log = logging.getLogger("npllm")

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FLOATS = ("F64", "F32", "F16", "BF16")

# Elements that are cast at a time.
CHUNK = 1 << 22

# Safetensors has no sharing, so tensors that share a storage are written once each. Beyond this factor it is an attack.
MOST_SHARING = 4
SHARING_SLACK = 1 << 26

Progress = Callable[[int, int], None]

# The isolated interpreter (-I) has neither the caller's path nor its environment; the path is handed over.
BOOTSTRAP = (
    "import json, sys; request = json.loads(sys.argv[1]); sys.path[:] = request['path']; "
    "from npllm.convert import work; sys.exit(work(request))"
)
ENVIRONMENT = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "TEMP", "TMP")


def convert(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Turn pickled weights into a folder `out` with safetensors, configuration and tokenizer, and return it.

    `source` is a folder with pytorch_model.bin, its sharded form or a single *.bin, *.pt or *.pth, or such a file. `dtype`
    (float32, float16, bfloat16) casts floating-point tensors; otherwise each keeps its type. Files larger than
    `shard_bytes` are split. Tensors that share memory (tied embeddings) are written under every name they have.
    `progress(done, total)` counts bytes written. `out` may be `source`; existing results are replaced only with
    `overwrite`. Needs memory for about one tensor. Raises CheckpointError; nothing half-written is left behind.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    source, out = Path(source), Path(out)
    pickles = find_pickles(source)
    folder = pickles[0].parent
    _check_target(out, folder, overwrite)
    with workplace(out) as temporary:
        request = {"pickles": [str(path.absolute()) for path in pickles], "out": str(temporary)}
        _run({**request, "dtype": dtype, "shard_bytes": shard_bytes}, progress)
        for weights in find_weights(temporary):
            read_header(weights)
        if out.resolve() != folder.resolve():
            copy_companions(folder, temporary)
        made = move_into_place(temporary, out)
        for stale in _results(out):
            if stale.name not in made:
                stale.unlink()
    return out


def find_pickles(source: Path) -> list[Path]:
    """The pickle files that `source`, a folder or a file, stands for."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such file or folder")
    index, single = source / "pytorch_model.bin.index.json", source / "pytorch_model.bin"
    if index.is_file():
        return _shards(index)
    if single.is_file():
        return [single]
    found = sorted(path for path in source.iterdir() if path.suffix in (".bin", ".pt", ".pth") and path.is_file())
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(f"{source}: name one of its files: {', '.join(path.name for path in found[:8])}")
    if any(source.glob("*.safetensors")):
        raise CheckpointError(f"{source}: its weights are safetensors already; there is nothing to convert")
    raise CheckpointError(f"{source}: neither pytorch_model.bin nor another *.bin, *.pt or *.pth is there")


def _shards(index: Path) -> list[Path]:
    table = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: weight_map must map tensor names to shard file names")
    shards = list(dict.fromkeys(map(str, table.values())))
    for shard in shards:
        if PurePath(shard).name != shard or "\\" in shard or ":" in shard:
            raise CheckpointError(f"{index}: {shard[:200]!r} is not the name of a file in its folder")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index}: names the shard {shard}, which is missing; download it again")
    return [index.parent / shard for shard in shards]


def _check_target(out: Path, folder: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is a file; name a folder for the converted model")
    if overwrite or not out.is_dir():
        return
    in_place = out.resolve() == folder.resolve()
    if _results(out) or (not in_place and any(out.iterdir())):
        what = _results(out)[0].name if _results(out) else "files"
        raise CheckpointError(f"{out}: already holds {what}; name another folder, or overwrite it with --overwrite")


def _results(folder: Path) -> list[Path]:
    """The weights that a loader would find in `folder`, whatever made them."""
    patterns = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


# ---------------------------------------------------------------------------------------------------------------------
# The caller's side of the process


def _run(request: dict[str, Any], progress: Progress | None) -> None:
    package = str(Path(__file__).resolve().parents[1])
    path = [entry for entry in sys.path if os.path.isabs(entry)]
    request["path"] = path if package in path else [package, *path]
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-I", "-X", "utf8", "-c", BOOTSTRAP, json.dumps(request)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    with process:
        try:
            last = _listen(process, progress)
        finally:
            process.kill()
    if last != "done":
        raise CheckpointError(f"{request['pickles'][0]}: the conversion stopped ({last or _ending(process)})")


def _listen(process: subprocess.Popen[bytes], progress: Progress | None) -> str:
    """Act on the messages, one JSON object per line; "done", or the last line of something else."""
    assert process.stdout is not None
    last = ""
    while line := process.stdout.readline(100_000):
        kind, value = _message(line)
        if kind == "error":
            raise CheckpointError(one_line(str(value)))
        if kind == "note":
            log.warning("%s", one_line(str(value)))
        elif kind == "progress" and progress is not None:
            progress(int(value[0]), int(value[1]))
        elif kind in ("done", "text"):
            last = one_line(str(value))
    return last


def _message(line: bytes) -> tuple[str, Any]:
    try:
        [(kind, value)] = json.loads(line).items()
    except (ValueError, AttributeError):
        return "text", line.decode("utf-8", "replace").strip()[:300]
    return kind, value


def _ending(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"killed by signal {-code}, perhaps for want of memory" if code and code < 0 else f"exit status {code}"


# ---------------------------------------------------------------------------------------------------------------------
# The process


def work(request: dict[str, Any]) -> int:
    """Entry point of the process: convert, and tell the caller in lines of JSON."""
    pickles = [Path(path) for path in request["pickles"]]
    try:
        _limit_resources(max(path.stat().st_size for path in pickles))
        _convert(pickles, Path(request["out"]), request["dtype"], request["shard_bytes"])
    except NpllmError as bad:
        _tell("error", str(bad))
    except OSError as bad:
        _tell("error", f"{request['out']}: cannot be written ({bad.strerror})")
    except MemoryError:
        _tell("error", f"{pickles[0]}: needs more memory than its size can account for; it may be malicious")
    else:
        _tell("done", "done")
        return 0
    return 1


def _tell(kind: str, value: Any) -> None:
    print(json.dumps({kind: value}), flush=True)


def _limit_resources(largest: int) -> None:
    """No new processes, no core dumps, memory for one file and the interpreter; as far as the system knows limits."""
    try:
        import resource
    except ImportError:
        return
    for name, limit in (("RLIMIT_CORE", 0), ("RLIMIT_NPROC", 0), ("RLIMIT_DATA", largest + (2 << 30))):
        with suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (limit, limit))


def _convert(pickles: list[Path], out: Path, dtype: str | None, shard_bytes: int) -> None:
    tensors: dict[str, StoredTensor] = {}
    for path in pickles:
        found, left_out = read_torch_file(path)
        for name in found.keys() & tensors.keys():
            raise CheckpointError(f"{path}: tensor {name} also stands in {tensors[name].path.name}")
        tensors.update(found)
        if left_out:
            more = " ..." if len(left_out) > 8 else ""
            _tell("note", f"{path.name}: left out what is not a tensor of the model: {', '.join(left_out[:8])}{more}")
    _check_sharing(tensors, pickles)
    total, done = sum(_nbytes(tensor, dtype) for tensor in tensors.values()), 0
    outgoing = {name: _outgoing(name, tensor, dtype) for name, tensor in tensors.items()}
    for size in write_tensors(out, outgoing, shard_bytes, out.parent):
        done += size
        _tell("progress", [done, total])


def _check_sharing(tensors: dict[str, StoredTensor], pickles: list[Path]) -> None:
    """Refuse a small file whose tensors all view the same storage, which would fill the disk."""
    size = sum(path.stat().st_size for path in pickles)
    written = sum(_nbytes(tensor, None) for tensor in tensors.values())
    if written > MOST_SHARING * size + SHARING_SLACK:
        raise CheckpointError(f"{pickles[0]}: its tensors share storage so that {size} bytes become {written}; refused")


def _stored_as(tensor: StoredTensor, dtype: str | None) -> str:
    return DTYPES[dtype] if dtype is not None and tensor.dtype in FLOATS else tensor.dtype


def _nbytes(tensor: StoredTensor, dtype: str | None) -> int:
    return tensor.elements * np.dtype(NUMPY[_stored_as(tensor, dtype)]).itemsize


def _outgoing(name: str, tensor: StoredTensor, dtype: str | None) -> Outgoing:
    target = _stored_as(tensor, dtype)
    pieces = functools.partial(_parts, tensor, name, target)
    return Outgoing(target, tensor.shape, np.dtype(NUMPY[target]).itemsize, pieces)


def _parts(tensor: StoredTensor, name: str, target: str) -> Iterable[Array]:
    """The elements in the type `target`, as flat arrays that can be written."""
    flat = tensor.array().reshape(-1)
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK]
        yield part if target == tensor.dtype else _cast(part, tensor, name, target)


def _cast(part: Array, tensor: StoredTensor, name: str, target: str) -> Array:
    import ml_dtypes

    types = {key: ml_dtypes.bfloat16 if key == "BF16" else np.dtype(NUMPY[key]) for key in FLOATS}
    values = part.view(types[tensor.dtype])
    with np.errstate(all="ignore"):
        cast = values.astype(types[target])
    if np.any(np.isinf(cast) & np.isfinite(values)):
        raise CheckpointError(f"{tensor.path}: tensor {name}: a value is too large for {target}; convert without --dtype")
    return cast.view(NUMPY[target])
