"""What stands between the backend and a GPU: memory, structures of the driver, kept code, models that do not fit."""

from __future__ import annotations

import ctypes
import logging
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from npllm import registry
from npllm.backend import Backend, log_once
from npllm.backends.cupy_gpu import cubins
from npllm.backends.cupy_gpu.cuda import MemoryErrors
from npllm.backends.cupy_gpu.device import CannotCaptureError
from npllm.backends.cupy_gpu.driver import Attribute, Configuration
from npllm.errors import MemoryLimitError
from tests.gpu.emulator import emulated
from tests.gpu.fake_cupy import ERRORS, DriverError, OutOfMemoryError, RefusedError


def test_memory_that_runs_out_is_an_error_of_ours_and_is_given_back() -> None:
    given_back: list[bool] = []
    device = SimpleNamespace(
        cupy=SimpleNamespace(cuda=SimpleNamespace(**ERRORS)),
        release=lambda: given_back.append(True),
        memory=lambda: SimpleNamespace(free=3 << 30),
    )
    guard: Any = MemoryErrors(device)  # type: ignore[arg-type]
    full: list[Exception] = [
        OutOfMemoryError(),
        RefusedError("cudaErrorMemoryAllocation: out of memory"),
        DriverError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    ]
    for error in full:
        with pytest.raises(MemoryLimitError, match=r"the GPU's memory is full \(3\.0 GiB is free\): lower max_con"), guard:
            raise error
    for other in (ZeroDivisionError(), RefusedError("cudaErrorIllegalAddress"), DriverError("CUDA_ERROR_NO_BINARY_FOR_GPU")):
        with pytest.raises(type(other)), guard:
            raise other
    assert given_back == [True] * len(full)


def test_structures_of_the_driver() -> None:
    """Sizes and places of cuda.h."""
    assert (ctypes.sizeof(Attribute), Attribute.value.offset) == (72, 8)
    assert (ctypes.sizeof(Configuration), Configuration.stream.offset) == (56, 32)


def test_code_is_kept_and_a_damaged_file_counts_as_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = []
    monkeypatch.setenv("NPLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(cubins, "compile_cubin", lambda text, name, *key: made.append(key) or b"machine code")
    for macros, compiler, count in (((), "13.0", 1), ((), "13.0", 1), ((("WIDE", 1),), "13.0", 2), ((), "13.1", 3)):
        assert cubins.cubin("norms.cu", 90, macros, compiler) == b"machine code"
        assert len(made) == count
    assert cubins.cubin("norms.cu", 80, (), "13.0") == b"machine code"
    for file in (tmp_path / "cuda").iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert cubins.cubin("norms.cu", 90, (), "13.0") == b"machine code"
    assert len(made) == 5


@emulated
def test_a_model_that_does_not_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import npllm
    from tests.gpu.emulator import EmulatedBackend, Emulator
    from tests.models import make_checkpoint

    make_checkpoint(tmp_path)
    folder = tmp_path
    monkeypatch.setattr(EmulatedBackend, "shared_device", Emulator(memory=1000))
    monkeypatch.setattr("npllm.loading.get_backend", lambda *args, **options: EmulatedBackend("float32"))
    for weights in ("auto", "memory"):
        with pytest.raises(MemoryLimitError, match=r"the weights need \d+ MiB, 0 MiB of memory is free .*quantize it"):
            npllm.load(folder, backend="cupy", weights=weights)
    with pytest.raises(MemoryLimitError, match="keeps weights in the GPU's memory"):
        npllm.load(folder, backend="cupy", weights="disk")


class OnDisk(Backend):
    """In the place of "numba"."""

    name = "numba"


@emulated
@pytest.mark.parametrize(
    ("memory", "weights", "taken", "why"),
    [
        (1 << 30, "disk", "numba", "the cupy backend keeps no weights on disk"),
        (1000, "auto", "numba", r"the weights need \d+ MiB, 0 MiB of memory is free where the cupy backend keeps them"),
        (1000, "memory", "numba", r"the weights need \d+ MiB, 0 MiB of memory is free where the cupy backend keeps them"),
        (1 << 30, "memory", "cupy", ""),
    ],
)
def test_auto_passes_over_a_gpu_that_cannot_have_the_weights(
    memory: int, weights: Any, taken: str, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:  # fmt: skip
    import npllm
    from tests.gpu.emulator import EmulatedBackend, Emulator
    from tests.models import make_checkpoint

    make_checkpoint(tmp_path)
    names = {"cupy": "tests.gpu.emulator:EmulatedBackend", "numba": f"{__name__}:OnDisk"}
    points = [EntryPoint(name, value, "npllm.backends") for name, value in names.items()]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    monkeypatch.setattr(registry, "PREFERENCE", tuple(map(registry.Candidate, names)))
    monkeypatch.setattr(EmulatedBackend, "shared_device", Emulator(memory=memory))
    log_once.cache_clear()
    for _ in range(2):
        llm = npllm.load(tmp_path, weights=weights)
        assert llm.backend.name == taken
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == bool(why)
    assert all(re.search(why, message) for message in said)


@emulated
def test_the_emulator_notices_what_a_gpu_would_not() -> None:
    """A NumPy array in a kernel's place, numbers that nobody wrote, a product in a capture that CuPy has cuBLAS make."""
    from npllm.backends.cupy_gpu.device import Out
    from tests.gpu.emulator import Emulator

    device = Emulator()
    kernel = device.kernel("elementwise.cu", "halve", {})
    with pytest.raises(TypeError, match="not an array of the device"):
        device.launch(kernel, (1, 1, 1), 32, (np.zeros(3), Out(device.empty((3,), "float32"))))
    with pytest.raises(ValueError, match="512 threads"):
        device.launch(kernel, (1, 1, 1), 512, (device.empty((3,), "float32"), 3, Out(device.empty((3,), "uint16"))))
    assert np.isnan(device.download(device.empty((3,), "float32"))).all()
    x = device.upload(np.arange(3.0))
    with pytest.raises(TypeError, match="upload it"):
        x + np.arange(3.0)
    with pytest.raises(TypeError, match="download it"):
        x.__array__()
    square = device.upload(np.eye(3))
    for product in (lambda: square @ square, lambda: device.xp.matmul(square, square), lambda: np.dot(square, square)):
        with pytest.raises(CannotCaptureError, match="cuBLAS"):
            device.capture(product)
        np.testing.assert_array_equal(device.download(product()), np.eye(3))


@emulated
def test_counters_that_a_graph_knows_stay_where_they_are() -> None:
    """More of them are asked for later, by a longer prompt: the graph still draws from the first ones."""
    from tests.gpu.emulator import EmulatedBackend

    be = EmulatedBackend("float32")
    first = be.tickets(1).array
    address = be.device.address(first)
    assert len(be.tickets(2 * len(first)).array) == 2 * len(first)
    assert any(be.device.address(each) == address for each in be._tickets)
