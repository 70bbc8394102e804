"""A device on the CPU for the backend "cupy": the same .cu text compiled by g++, arrays that behave like CuPy's."""

import shutil

import pytest

from tests.gpu.emulator.device import EmulatedBackend, Emulator

# Marks of tests: those that run on it, and those for which it tells what a GPU would leave undefined (checker.cpp).
emulated = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ compiles the kernels for the CPU, and is not installed"
)
checked = pytest.mark.usefixtures("checked_device")

__all__ = ["EmulatedBackend", "Emulator", "checked", "emulated"]
