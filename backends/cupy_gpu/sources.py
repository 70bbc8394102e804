"""CUDA sources as they are compiled: a .cu file with what it includes of its own folder in the place of its includes."""

from __future__ import annotations

import functools
import re
from importlib.resources import files

INCLUDE = re.compile(r'^#include "(\w+\.cuh)"\n', re.MULTILINE)
KERNEL = re.compile(r'^extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(', re.MULTILINE)


FOLDER = files(__package__) / "kernels"


def text(file: str) -> str:
    """The text of kernels/`file` as it is."""
    return (FOLDER / file).read_text(encoding="utf-8")


@functools.cache
def source(file: str) -> str:
    """The text of kernels/`file`, what it includes included."""
    included: set[str] = set()

    def inline(found: re.Match[str]) -> str:
        name = found.group(1)
        if name in included:
            return ""
        included.add(name)
        return expand(name)

    def expand(name: str) -> str:
        return INCLUDE.sub(inline, text(name))

    return expand(file)


def kernels(file: str) -> list[str]:
    """The names of the kernels in a file."""
    return KERNEL.findall(source(file))
