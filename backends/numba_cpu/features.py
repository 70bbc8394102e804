"""What this CPU can do, and how much of it is used: the path that every kernel is compiled for.

`NPLLM_CPU_FEATURES` names a narrower path, for tests and bug reports. One path holds per process.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from npllm.errors import BackendError

VARIABLE = "NPLLM_CPU_FEATURES"

# The first Numba whose LLVM takes the instructions that the kernels name, and whose pointers have no types.
LEAST_NUMBA = (0, 62)
INSTALL = "pip install 'npllm[numba]'"


class Path(NamedTuple):
    """A set of instructions and the register tile that suits it.

    lanes    float32 numbers of a vector register.
    tile     (rows, vectors): a register tile of so many rows times so many vectors of tokens; where a panel is as narrow
             as one vector, twice the rows.
    steps    numbers, or pairs, of a row that a tile is summed over at a time: so many of all its tokens stay in a cache.
    bf16     there is a dot product of bf16 pairs (AVX-512 BF16).
    int8     what multiplies unsigned by signed bytes: "avx512vnni", "avxvnni" (sums of four products), "maddubs" (sums of
             two, in 16 bits), or "" (nothing does).
    cpu      LLVM's name of a CPU with no more than this; "" compiles for the host.
    needs    LLVM's names of the features that the path uses.
    twin     other instructions stand in for those of bf16: the widest path's logic, for tests on a CPU without them.
    """

    name: str
    lanes: int
    tile: tuple[int, int]
    steps: int
    bf16: bool = False
    int8: str = ""
    cpu: str = ""
    needs: tuple[str, ...] = ()
    twin: bool = False


# From the widest to the one that any CPU has; the last is only taken by name.
_AVX512, _AVX2 = ("avx512f", "avx512bw", "avx512vl"), ("avx2", "fma", "f16c")
PATHS = (
    Path("avx512bf16", 16, (6, 4), 1024, True, "avx512vnni", "", (*_AVX512, "avx512vnni", "avx512bf16")),
    Path("avx512vnni", 16, (6, 4), 1024, False, "avx512vnni", "cascadelake", (*_AVX512, "avx512vnni")),
    Path("avx512", 16, (6, 4), 1024, False, "maddubs", "skylake-avx512", _AVX512),
    Path("avxvnni", 8, (6, 2), 512, False, "avxvnni", "alderlake", (*_AVX2, "avxvnni")),
    Path("avx2", 8, (6, 2), 512, False, "maddubs", "haswell", _AVX2),
    Path("generic", 4, (6, 2), 512, False, "", "generic"),
    Path("twin", 16, (6, 4), 1024, True, twin=True),
)


def check_numba() -> None:
    """BackendError if Numba is missing, too old, broken or switched off."""
    try:
        import numba
    except ModuleNotFoundError as error:
        missing = error.name or "numba"
        raise BackendError(f"{missing} is not installed: {INSTALL}") from None
    except Exception as error:
        raise BackendError(f"numba cannot be imported ({error}): {INSTALL} --force-reinstall") from error
    if numba.version_info.short < LEAST_NUMBA:
        least = ".".join(map(str, LEAST_NUMBA))
        raise BackendError(f"numba {numba.__version__} is too old, {least} is the least: {INSTALL} --upgrade")
    if numba.config.DISABLE_JIT:
        raise BackendError("NUMBA_DISABLE_JIT is set, and there is nothing without compiling: unset it")


def runnable() -> list[Path]:
    """The paths that this machine can run, the widest first."""
    import llvmlite.binding as llvm

    try:
        has = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know this system well enough
        has = {}
    return [path for path in PATHS if all(has.get(need, False) for need in path.needs)]


def choose() -> Path:
    """The widest path, compiled for the host, or the one that the environment names for a CPU that has no more.

    BackendError if this CPU cannot run that.
    """
    paths = {path.name: path for path in runnable()}
    asked, widest = os.environ.get(VARIABLE, ""), next(iter(paths.values()))
    if asked in ("", widest.name):
        return widest._replace(cpu="")
    if asked not in paths:
        raise BackendError(f"{VARIABLE}={asked}: this CPU runs {', '.join(paths)}")
    return paths[asked]
