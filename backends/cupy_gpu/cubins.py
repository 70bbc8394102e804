"""Kernels compiled by NVRTC, and kept."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npllm.backends.cupy_gpu.sources import source
from npllm.errors import BackendError
from npllm.machine import cache_root

DIGEST_BYTES = 16


def compile_cubin(text: str, name: str, architecture: int, defines: Sequence[tuple[str, int]]) -> bytes:
    """A source compiled by NVRTC for exactly this architecture; needs no GPU. BackendError with what the compiler says."""
    from cupy_backends.cuda.libs import nvrtc

    options = (f"-arch=sm_{architecture}", "-std=c++17", "-default-device", *(f"-D{key}={value}" for key, value in defines))
    program = nvrtc.createProgram(text, name, (), ())
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError:
        log = nvrtc.getProgramLog(program)
        raise BackendError(f"{name} does not compile for sm_{architecture}: {log.strip()}") from None
    finally:
        nvrtc.destroyProgram(program)


def cubin(file: str, architecture: int, defines: tuple[tuple[str, int], ...], compiler: str) -> bytes:
    """A compiled file, from the cache where it has been compiled before: for this text, architecture and compiler.

    A file of the cache begins with a digest of what follows: one that is damaged counts as missing.
    """
    path = cubin_path(file, architecture, defines, compiler)
    if (stored := read_cubin(path)) is not None:
        return stored
    made = compile_cubin(source(file), file, architecture, defines)
    if path is None:
        return made
    # A folder that cannot be written costs time, nothing else.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        partial.write_bytes(_digest(made) + made)
        partial.replace(path)
    return made


def cubin_folder() -> Path | None:
    """Where compiled files are kept."""
    root = cache_root()
    return None if root is None else root / "cuda"


def cubin_path(file: str, architecture: int, defines: tuple[tuple[str, int], ...], compiler: str) -> Path | None:
    folder = cubin_folder()
    key = _digest(f"{source(file)}\0{architecture}\0{defines}\0{compiler}".encode()).hex()
    return None if folder is None else folder / f"{file.removesuffix('.cu')}-{key}.cubin"


def read_cubin(path: Path | None) -> bytes | None:
    if path is not None:
        with contextlib.suppress(OSError):
            stored = path.read_bytes()
            if _digest(stored[DIGEST_BYTES:]) == stored[:DIGEST_BYTES]:
                return stored[DIGEST_BYTES:]
    return None


def kept_cubins() -> dict[str, Any]:
    """Folder, bytes and number of the files that are kept, whatever they were compiled for."""
    folder = cubin_folder()
    files = [] if folder is None else sorted(folder.glob("*.cubin"))
    return {
        "folder": None if folder is None else str(folder),
        "bytes": sum(file.stat().st_size for file in files),
        "compiled": len(files),
    }


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
