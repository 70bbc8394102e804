"""What this CPU can do, and how much of it is used: the path that every kernel is compiled for.

`NPLLM_CPU_FEATURES` names a narrower path, for tests and bug reports. One path holds per process.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from npllm.errors import BackendError

VARIABLE = "NPLLM_CPU_FEATURES"


class Path(NamedTuple):
    """A set of instructions and the register tile that suits it.

    lanes    float32 numbers of a vector register.
    tile     (rows, vectors): a register tile of so many rows times so many vectors of tokens, for panels of 64 tokens;
             where a panel is as narrow as one vector, twice the rows.
    bf16     there is a dot product of bf16 pairs (AVX-512 BF16).
    int8     the dot product of unsigned and signed bytes: "avx512vnni", "avxvnni" or "" (none).
    cpu      LLVM's name of a CPU with no more than this; "" compiles for the host.
    needs    LLVM's names of the features that the path uses.
    """

    name: str
    lanes: int
    tile: tuple[int, int]
    bf16: bool = False
    int8: str = ""
    cpu: str = ""
    needs: tuple[str, ...] = ()


# From the widest to the one that any CPU has.
PATHS = (
    Path("avx512bf16", 16, (6, 4), True, "avx512vnni", "", ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16")),
    Path("avx512vnni", 16, (6, 4), False, "avx512vnni", "cascadelake", ("avx512f", "avx512bw", "avx512vl", "avx512vnni")),
    Path("avx512", 16, (6, 4), False, "", "skylake-avx512", ("avx512f", "avx512bw", "avx512vl")),
    Path("avxvnni", 8, (6, 2), False, "avxvnni", "alderlake", ("avx2", "fma", "f16c", "avxvnni")),
    Path("avx2", 8, (6, 2), False, "", "haswell", ("avx2", "fma", "f16c")),
    Path("generic", 4, (6, 2), False, "", "generic", ()),
)


def runnable() -> list[Path]:
    """The paths that this machine can run, the widest first."""
    import llvmlite.binding as llvm

    has = llvm.get_host_cpu_features()
    return [path for path in PATHS if all(has.get(need, False) for need in path.needs)]


def choose() -> Path:
    """The widest path, or the one that the environment names; BackendError if this CPU cannot run that."""
    paths = {path.name: path for path in runnable()}
    asked = os.environ.get(VARIABLE, "")
    if not asked:
        return next(iter(paths.values()))
    if asked not in paths:
        raise BackendError(f"{VARIABLE}={asked}: this CPU runs {', '.join(paths)}")
    return paths[asked]
