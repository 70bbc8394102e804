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
    tile     (rows, vectors): a register tile of so many rows times so many vectors of tokens, for panels of 64 tokens;
             where a panel is as narrow as one vector, twice the rows.
    bf16     there is a dot product of bf16 pairs (AVX-512 BF16).
    int8     what multiplies unsigned by signed bytes: "avx512vnni", "avxvnni" (sums of four products), "maddubs" (sums of
             two, in 16 bits), or "" (nothing does).
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
    Path("avx512", 16, (6, 4), False, "maddubs", "skylake-avx512", ("avx512f", "avx512bw", "avx512vl")),
    Path("avxvnni", 8, (6, 2), False, "avxvnni", "alderlake", ("avx2", "fma", "f16c", "avxvnni")),
    Path("avx2", 8, (6, 2), False, "maddubs", "haswell", ("avx2", "fma", "f16c")),
    Path("generic", 4, (6, 2), False, "", "generic", ()),
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
    asked = os.environ.get(VARIABLE, "")
    if not asked:
        return next(iter(paths.values()))._replace(cpu="")
    if asked not in paths:
        raise BackendError(f"{VARIABLE}={asked}: this CPU runs {', '.join(paths)}")
    return paths[asked]
