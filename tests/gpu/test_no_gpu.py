"""What is said where no GPU can be used, and what `auto` makes of it."""

from __future__ import annotations

import builtins
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from npllm import registry
from npllm.backend import log_once
from npllm.backends.cupy_gpu import cuda, driver
from npllm.backends.cupy_gpu.driver import check_gpu, cupy_module
from npllm.errors import BackendError
from npllm.registry import get_backend
from tests.gpu.fake_cupy import RefusedError, pretended

WRONG = {
    "no driver": ("cudaErrorInsufficientDriver", None, r"no NVIDIA driver is installed .*: install it"),
    "old driver": (
        "cudaErrorInsufficientDriver",
        "12.4",
        r"the NVIDIA driver knows CUDA 12.4, CuPy is made for CUDA 13.0: update",
    ),
    "no GPU": ("cudaErrorNoDevice: no CUDA-capable device", "13.0", r"no NVIDIA GPU is visible \(nvidia-smi lists them"),
    "another": ("cudaErrorSystemNotReady", "13.0", r"the NVIDIA GPU cannot be used: cudaErrorSystemNotReady"),
}


@pytest.mark.parametrize("why", WRONG)
def test_what_is_wrong_with_gpu_or_driver(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, newest, message = WRONG[why]
    monkeypatch.setattr(driver, "driver_version", lambda: newest)
    with pytest.raises(BackendError, match=message) as raised:
        check_gpu(pretended(error))
    assert "\n" not in str(raised.value)


def test_a_gpu_that_is_too_old_or_hidden() -> None:
    with pytest.raises(BackendError, match=r"compute capability 7\.5; kernels need 8\.0"):
        check_gpu(pretended(capability="75"))
    with pytest.raises(BackendError, match="no NVIDIA GPU is visible"):
        check_gpu(pretended(count=0))
    check_gpu(pretended())


# As cupy/__init__.py has it.
FRAMED = f"""
{"=" * 64}
Failed to import CuPy.

If you installed CuPy via wheels (cupy-cudaXXX), make sure that the package matches with the version of CUDA installed.

Check the Installation Guide for details:
  https://docs.cupy.dev/en/latest/install.html

Original error:
  ImportError: libcudart.so.12: cannot open shared object file
{"=" * 64}
"""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'cupy'", name="cupy"), r"CuPy is not installed: pip install 'npllm"),
        (
            ImportError("CuPy failed to load\nlibnvrtc.so.12: no such file"),
            r"not for this machine's CUDA \(libnvrtc",
        ),
        (ImportError(FRAMED), r"CUDA \(ImportError: libcudart\.so\.12: cannot open .*\): pip install "),
        (AttributeError("no attribute 'x'"), r"but cannot be imported \(no attribute 'x'\): pip install"),
        (ImportError(), r"not for this machine's CUDA \(ImportError\): pip install 'npllm"),
    ],
)
def test_cupy_that_is_missing_or_for_another_cuda(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importing(name: str, *args: Any, **options: Any) -> Any:
        if name == "cupy":
            raise error
        return real(name, *args, **options)

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(BackendError, match=message):
        cupy_module()


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise BackendError("no NVIDIA GPU is visible")

    cuda.gpu.cache_clear()
    monkeypatch.setattr(cuda, "gpu", none)
    log_once.cache_clear()


@pytest.mark.usefixtures("without_gpu")
def test_named_it_is_an_error_and_auto_moves_on_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "PREFERENCE", (registry.Candidate("cupy"), *registry.PREFERENCE[1:]))
    with pytest.raises(BackendError, match=r"^backend 'cupy' cannot run here: no NVIDIA GPU is visible$"):
        get_backend("cupy")
    assert "no NVIDIA GPU" in registry.available_backends()["cupy"]
    for _ in range(2):
        assert get_backend("auto").name != "cupy"
    assert [record.levelname for record in caplog.records if "cupy" in record.message] == ["WARNING"]


NO_NVRTC = RuntimeError("CuPy failed to load libnvrtc.so.12: OSError: libnvrtc.so.12: cannot open shared object file")
BROKEN = {
    "compiler": (NO_NVRTC, r"CuPy is for a CUDA whose NVRTC is not installed \(CuPy failed .*\): pip install 'npllm"),
    "properties": (RefusedError("cudaErrorUnknown"), r"the NVIDIA GPU cannot be used \(cudaErrorUnknown\): see what"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_auto_moves_on_from_a_gpu_that_fails_when_it_is_opened(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error, message = BROKEN[what]

    def fails(*args: Any) -> Any:
        raise error

    cupy = pretended()
    cupy.cuda.Device().id = 0
    named = {"name": b"a GPU", "multiProcessorCount": 4, "sharedMemPerBlockOptin": 1 << 17}
    cupy.cuda.runtime.getDeviceProperties = fails if what == "properties" else lambda number: named
    libraries = SimpleNamespace(nvrtc=SimpleNamespace(getVersion=fails if what == "compiler" else lambda: (13, 0)))
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", libraries)
    monkeypatch.setattr(driver, "cupy_module", lambda: cupy)
    monkeypatch.setattr(registry, "PREFERENCE", (registry.Candidate("cupy"), *registry.PREFERENCE[1:]))
    cuda.gpu.cache_clear()
    log_once.cache_clear()
    with pytest.raises(BackendError, match=f"^backend 'cupy' cannot run here: {message}") as raised:
        get_backend("cupy")
    assert "\n" not in str(raised.value)
    for _ in range(2):
        assert get_backend("auto").name != "cupy"
    assert len([record for record in caplog.records if "cupy" in record.message]) == 1


def test_auto_says_nothing_of_a_package_that_nobody_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log_once.cache_clear()
    missing = registry.Candidate("cupy", package="no_such_package")
    monkeypatch.setattr(registry, "PREFERENCE", (missing, *registry.PREFERENCE[1:]))
    be = get_backend("auto")
    assert be.name != "cupy"
    assert "cupy" not in be.why
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
