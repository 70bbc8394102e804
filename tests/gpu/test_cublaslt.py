"""The binding of cuBLASLt: its numbers against the headers, its calls against a library that checks what it is given."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from npllm.backends.cupy_gpu import cublaslt
from npllm.backends.cupy_gpu.cublaslt import WORKSPACE, Algorithm, Heuristic, Plan, Products, Shape
from npllm.backends.cupy_gpu.device import Device
from npllm.errors import BackendError
from npllm.testing.conformance import conformity, trials
from tests.gpu.emulator import EmulatedBackend, Emulator
from tests.gpu.emulator.device import built

ROOT = Path(__file__).parents[2]

FAKE = Path(__file__).with_name("fake_cublaslt.cpp")

ENUMERATORS = sorted(name for name in vars(cublaslt) if name.startswith(("CUDA_R_", "CUBLAS")))


def headers() -> list[Path]:
    """Folders of CUDA's headers, cublasLt.h among them; none where CUDA is not installed."""
    folders = [*Path("/usr/local").glob("cuda*/include"), *Path(sysconfig.get_path("purelib")).glob("nvidia/*/include")]
    return folders if any((folder / "cublasLt.h").exists() for folder in folders) else []


def test_numbers_are_those_of_the_headers(tmp_path: Path) -> None:
    folders = headers()
    if not folders:
        pytest.skip("cublasLt.h is not installed (CUDA's toolkit, or the package nvidia-cublas)")
    shown = [
        *(f'printf("{name} %d\\n", (int){name});' for name in ENUMERATORS),
        'printf("Heuristic %zu\\n", sizeof(cublasLtMatmulHeuristicResult_t));',
        'printf("Algorithm %zu\\n", sizeof(cublasLtMatmulAlgo_t));',
        'printf("state %zu\\n", offsetof(cublasLtMatmulHeuristicResult_t, state));',
        'printf("workspace %zu\\n", offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));',
    ]
    text = "#include <cstdio>\n#include <cstddef>\n#include <cublasLt.h>\nint main() {" + "\n".join(shown) + "}\n"
    program = tmp_path / "shown"
    include = [f"-I{folder}" for folder in folders]
    subprocess.run(["g++", "-x", "c++", "-", *include, "-o", str(program)], input=text, text=True, check=True)
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split("\n")
    found = {name: int(value) for name, value in (line.split() for line in lines if line)}
    ours = {name: getattr(cublaslt, name) for name in ENUMERATORS} | {
        "Heuristic": ctypes.sizeof(Heuristic), "Algorithm": ctypes.sizeof(Algorithm),
        "state": Heuristic.state.offset, "workspace": Heuristic.workspace.offset,
    }  # fmt: skip
    assert found == ours
    assert len(ENUMERATORS) > 10


def test_the_library_takes_our_descriptions() -> None:
    """All but the last call needs no GPU; that one finds no handle."""
    library = cublaslt.find()
    if library is None:
        pytest.skip("libcublasLt is not installed")
    with pytest.raises(BackendError, match=r"cublasLtMatmulAlgoGetHeuristic failed: CUBLAS_STATUS_\w+"):
        Plan(library, ctypes.c_void_p(), Shape(512, 1024, 2048, "bf16", 2048, 1024, 256), WORKSPACE)


@pytest.mark.parametrize("status", [0, 1])
def test_a_library_that_does_not_work_here_is_none(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUBLAS_STATUS_NOT_INITIALIZED, as where the driver is too old for it: products go through kernels of our own."""
    destroyed: list[object] = []
    library = SimpleNamespace(cublasLtCreate=lambda handle: status, cublasLtDestroy=destroyed.append)
    monkeypatch.setattr(cublaslt, "find", lambda: library)
    assert cublaslt.load() is (None if status else library)
    assert len(destroyed) == 1 - status


# Where the wheel of a package puts its libraries.
PLACES = {"nvidia-cublas": ("nvidia/cu13/lib", "13"), "nvidia-cublas-cu12": ("nvidia/cublas/lib", "12")}

FOUND = """
import site, sys
site.getsitepackages = lambda: [sys.argv[1]]
from cuda.pathfinder import load_nvidia_dynamic_lib
from npllm.backends.cupy_gpu import cublaslt

pytestmark = emulated
print(load_nvidia_dynamic_lib("cublas").abs_path, load_nvidia_dynamic_lib("cublasLt").abs_path, cublaslt.find()._name)
"""


@pytest.mark.parametrize(("extra", "package"), [("cuda13", "nvidia-cublas"), ("cuda12", "nvidia-cublas-cu12")])
def test_the_documented_install_brings_the_library(extra: str, package: str, tmp_path: Path) -> None:
    """Ours, and that of CuPy's own products, which CuPy asks cuda.pathfinder for."""
    pytest.importorskip("cuda.pathfinder")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert package in {re.split("[<>=]", each)[0] for each in extras[extra]}
    place, version = PLACES[package]
    folder = tmp_path / place
    folder.mkdir(parents=True)
    libraries = [folder / f"{name}.so.{version}" for name in ("libcublas", "libcublasLt")]
    for library in libraries:
        shutil.copy(built("cublaslt", FAKE.read_text()), library)
    command = [sys.executable, "-c", FOUND, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [*map(str, libraries), str(libraries[1])]


@functools.cache
def fake() -> ctypes.CDLL:
    return ctypes.CDLL(str(built("cublaslt", FAKE.read_text())))


@pytest.fixture
def products() -> Iterator[Products]:
    room = np.zeros(1, np.uint8)
    return Products(fake(), room.ctypes.data, WORKSPACE, lambda: 0)


def bf16(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_a_product(products: Products, kind: str, add: bool) -> None:
    dice = np.random.default_rng(2)
    x, w, y = (dice.integers(-8, 8, shape).astype(np.float32) for shape in ((5, 24), (7, 32), (5, 9)))
    before, (given_x, given_w) = y.copy(), (x, w) if kind == "f32" else (bf16(x), bf16(w))
    shape = Shape(5, 7, 24, kind, 32, 9, 16)
    assert products.multiply(shape, given_x.ctypes.data, given_w.ctypes.data, y.ctypes.data, add=add)
    np.testing.assert_array_equal(y[:, :7], x @ w[:, :24].T + (before[:, :7] if add else 0))
    np.testing.assert_array_equal(y[:, 7:], before[:, 7:])


def test_without_a_kernel_nothing_is_done(products: Products) -> None:
    y = np.full((5, 7), 3.0, np.float32)
    assert not products.multiply(Shape(5, 7, 23, "bf16", 23, 7, 16), 0, 0, y.ctypes.data)
    assert (y == 3.0).all()


def test_plans_are_kept_and_given_up(products: Products, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt, "MOST_PLANS", 3)
    before = fake().fake_live()
    shapes = [Shape(m, 4, 8, "f32", 8, 4, 256) for m in range(1, 8)]
    first = products.plan(shapes[0])
    assert products.plan(shapes[0]) is first
    for shape in shapes:
        products.plan(shape)
    assert fake().fake_live() - before == 3 * 5


def test_an_error_says_which_call(products: Products) -> None:
    with pytest.raises(BackendError, match="cublasLtMatrixLayoutCreate failed: CUBLAS_STATUS_INVALID_VALUE"):
        products.plan(Shape(2, 3, 8, "f32", 4, 3, 256))


@pytest.mark.parametrize(("addresses", "expected"), [((256, 512), 256), ((4096 + 8, 1024), 8), ((0, 96), 32), ((0,), 256)])
def test_alignment(addresses: tuple[int, ...], expected: int) -> None:
    assert cublaslt.alignment(*addresses) == expected


class WithLibrary(Emulator):
    """A GPU for which there is a cuBLASLt."""

    def __init__(self) -> None:
        super().__init__()
        self._room = np.zeros(1, np.uint8)
        self._products = Products(fake(), self._room.ctypes.data, WORKSPACE, lambda: 0)

    def blas(self) -> Products:
        return self._products


class LibraryBackend(EmulatedBackend):
    @classmethod
    @functools.cache
    def open_device(cls) -> Device:
        return WithLibrary()


@pytest.mark.parametrize(("dtype", "storage"), [("float32", "f32"), ("stored", "bf16")])
def test_prompts_go_through_the_library(dtype: str, storage: str) -> None:
    """Every second of the kit's cases: those of more than a few tokens, in every format of weights that it takes."""
    before = fake().fake_calls()
    for trial in trials(LibraryBackend, ["linear"], storages=[storage], dtypes=[dtype])[::2]:
        conformity(LibraryBackend, trial).raise_on_failure()
    assert fake().fake_calls() - before >= 5
