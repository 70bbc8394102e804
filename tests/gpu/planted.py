"""Kernels with something changed in them, for tests that have to notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from npllm.backends.cupy_gpu import sources
from tests.gpu.emulator import EmulatedBackend, Emulator
from tests.gpu.emulator import device as emulated


def plant(patch: pytest.MonkeyPatch, file: str, change: Callable[[str], str]) -> None:
    """Have a device of their own, checked, compile the kernels as if this file were changed so."""
    changed = change(sources.text(file))
    assert changed != sources.text(file)

    def text(name: str, text: Callable[[str], str] = sources.text) -> str:
        return changed if name == file else text(name)

    patch.setattr(sources, "text", text)
    whole = sources.source.__wrapped__  # which keeps nothing
    for module in (sources, emulated):
        patch.setattr(module, "source", whole)
    patch.setattr(EmulatedBackend, "shared_device", Emulator(checked=True))
