"""Machine code of kernels, kept in files for the next process.

A folder holds the code of one version of the sources for one CPU, a file per kernel: a digest, then what it is the digest
of. A file that is damaged or half written has another digest and counts as missing. Files appear whole, by renaming, so
that any number of processes may compile and write at once. Code is read from a folder that cannot be written, too.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from npllm.machine import CACHE_VARIABLE, cache_root

VARIABLE, root = CACHE_VARIABLE, cache_root

# Folders of other versions and CPUs that are left alone, the newest first.
KEPT = 8

DIGEST_BYTES = 32
ENDING = ".code"


class Code(NamedTuple):
    """What a compiled function is loaded from again: names of its library and of its symbol, object code."""

    library: str
    symbol: str
    object: bytes


class Store:
    """The code of what `version` describes: the compiler, the CPU, how it is used. The sources are added to it."""

    def __init__(self, version: str) -> None:
        self.version = version

    @functools.cached_property
    def folder(self) -> Path | None:
        """Where the code lies, or would lie."""
        digest = hashlib.blake2b(f"{self.version} {sys.version_info[:2]}".encode(), digest_size=8)
        for source in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(source.name.encode() + source.read_bytes())
        above = root()
        return above and above / "kernels" / digest.hexdigest()

    def read(self, name: str) -> Code | None:
        """The code of a kernel, if it is there and as it was written."""
        with contextlib.suppress(OSError):
            content = self._file(name).read_bytes()
            if hashlib.blake2b(content[DIGEST_BYTES:], digest_size=DIGEST_BYTES).digest() == content[:DIGEST_BYTES]:
                return Code(*pickle.loads(content[DIGEST_BYTES:]))
        return None

    def write(self, name: str, code: Code) -> None:
        """Keep a kernel's code; OSError if that cannot be."""
        self.make()
        content = pickle.dumps(tuple(code))
        file = self._file(name)
        handle, partial = tempfile.mkstemp(dir=file.parent, suffix=".part")
        try:
            with open(handle, "wb") as stream:
                stream.write(hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest() + content)
            os.chmod(partial, 0o644)  # one user may have compiled for all of an image
            os.replace(partial, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise

    def make(self) -> None:
        """Make the folder, and take the oldest others away; OSError if nothing can be written there."""
        folder = self._place()
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            for old in sorted(folder.parent.iterdir(), key=_age)[KEPT + 1 :]:
                shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryFile(dir=folder):
            pass

    def names(self) -> set[str]:
        """The kernels whose code is there."""
        return {file.name.removesuffix(ENDING) for file in self._files() if file.name.endswith(ENDING)}

    def nbytes(self) -> int:
        """Bytes of all code in the folder."""
        sizes = []
        for file in self._files():
            with contextlib.suppress(OSError):
                sizes.append(file.stat().st_size)
        return sum(sizes)

    def _file(self, name: str) -> Path:
        return self._place() / f"{name}{ENDING}"

    def _place(self) -> Path:
        if self.folder is None:
            raise FileNotFoundError("there is no home directory")
        return self.folder

    def _files(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            yield from self.folder.iterdir() if self.folder else ()


def _age(folder: Path) -> float:
    """For sorting, the newest first; a folder that another process takes away meanwhile comes last."""
    try:
        return -folder.stat().st_mtime
    except OSError:
        return 0.0


def reason(error: Any) -> str:
    """An OSError in the system's words, without the path."""
    return error.strerror or str(error)
