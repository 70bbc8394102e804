"""Every .cu file compiles for the GPUs that it is written for, and fits into the registers of its threads."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from npllm.backends.cupy_gpu.sources import kernels, source
from tests.gpu.compiled import ALL_ARCHITECTURES, ARCHITECTURES, Usage, compiled, compiler, variants

VARIANTS = variants()

# Bytes that a thread may spill: a few words around a loop cost nothing, a loop that works on spilled numbers does.
SPILLED = 64

needs_compiler = pytest.mark.skipif(
    not compiler(), reason="neither NVRTC (nvidia-cuda-nvrtc with CuPy) nor nvcc is installed"
)


def test_all_files_are_here() -> None:
    folder = files("npllm.backends.cupy_gpu") / "kernels"
    assert set(VARIANTS) == {file.name for file in folder.iterdir() if file.name.endswith(".cu")}


@pytest.mark.parametrize("file", VARIANTS)
def test_comments_keep_to_the_line(file: str) -> None:
    long = [line for line in source(file).splitlines() if line.lstrip().startswith("//") and len(line) > 125]
    assert not long


@pytest.mark.parametrize("file", VARIANTS)
def test_every_kernel_waits_for_its_inputs(file: str) -> None:
    """Before any way out: what comes after a grid counts on all that came before it."""
    bodies = re.split(r'^extern "C" __global__ void ', source(file), flags=re.MULTILINE)[1:]
    assert len(bodies) == len(kernels(file))
    for body in bodies:
        waits = re.search(r"wait_for_inputs\(\)|\bproducts<", body.partition("\n}\n")[0])
        assert waits, body[:80]
        assert not re.search(r"\breturn\b", body[: waits.start()]), body[:80]


def fits_registers(found: list[Usage]) -> None:
    """The compiler gives a thread no more registers than a block of so many can have: what has no room is spilled."""
    assert found
    assert not [usage for usage in found if usage.spilled > SPILLED]


@needs_compiler
@pytest.mark.parametrize("file", VARIANTS)
def test_a_file_compiles(file: str) -> None:
    """As Qwen3 in bf16 needs it, for one architecture: which one goes by the file, so that all have their turn."""
    number = list(VARIANTS).index(file)
    fits_registers(compiled(file, VARIANTS[file][0], ALL_ARCHITECTURES[number % len(ALL_ARCHITECTURES)]))


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", VARIANTS)
def test_every_variant(file: str, architecture: int) -> None:
    for macros in VARIANTS[file]:
        fits_registers(compiled(file, macros, architecture))
