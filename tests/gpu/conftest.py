"""Fixtures of the tests of kernels."""

from collections.abc import Iterator

import pytest

from tests.gpu.emulator import EmulatedBackend, Emulator


@pytest.fixture(scope="module")
def checked_device() -> Iterator[None]:
    """While the module's tests run, the emulated device tells what a GPU would leave undefined (emulator/checker.cpp)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmulatedBackend, "shared_device", Emulator(checked=True))
        yield
