"""What keeps memory of the device, and for how long: nothing that no row and no step needs any more."""

from __future__ import annotations

import contextlib
import shutil
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

if shutil.which("g++") is None:
    pytest.skip("g++ compiles the kernels for the CPU, and is not installed", allow_module_level=True)

from npllm.arrays import Array
from npllm.backends.cupy_gpu import cuda
from npllm.backends.cupy_gpu.cache import DeviceLayerCache
from npllm.errors import MemoryLimitError
from npllm.llm import LLM
from npllm.models import interpret
from tests.gpu.emulator import EmulatedBackend, Emulator
from tests.gpu.test_lookahead import Rows
from tests.models import CONFIGS


def model() -> LLM:
    """One whose cache can grow."""
    values = CONFIGS["qwen3"] | {"model_type": "qwen3", "max_position_embeddings": 1024}
    return LLM.random(interpret(values, "qwen3"), EmulatedBackend("float32"))


def owner(array: Any) -> Any:
    """The array whose memory this one shows."""
    while array.base is not None:
        array = array.base
    return array


def test_a_cache_that_grows_lets_the_old_memory_go_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever steps were captured over it, for this many rows and for fewer, and a step under way."""
    rows = Rows(model())
    rows.answers(4, [0])
    rows.answers(4)
    assert rows.under_way()
    assert [step.graph is not None for step in rows.cache.steps.values()] == [True, True]
    old = [weakref.ref(owner(array)) for layer in rows.cache.layers for array in layer.stored]
    empty, held = DeviceLayerCache._empty, []

    def counted(self: DeviceLayerCache, *args: int) -> tuple[Array, ...]:
        held.append(sum(each() is not None for each in old))
        return empty(self, *args)

    monkeypatch.setattr(DeviceLayerCache, "_empty", counted)
    rows.cache.reserve(300)
    assert held == list(range(len(old), 0, -len(old) // len(rows.cache.layers)))
    assert not any(each() is not None for each in old)


def test_a_cache_that_cannot_grow_says_so_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfMemoryError(MemoryError):
        """CuPy's."""

    def guarded(self: Emulator) -> contextlib.AbstractContextManager[None]:
        errors = SimpleNamespace(
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError), runtime=SimpleNamespace(CUDARuntimeError=RuntimeError)
        )
        device: Any = SimpleNamespace(cupy=SimpleNamespace(cuda=errors), release=self.release, memory=self.memory)
        return cuda.MemoryErrors(device)

    empty = DeviceLayerCache._empty

    def full(self: DeviceLayerCache, slots: int, size: int) -> tuple[Array, ...]:
        if size > 256:
            raise OutOfMemoryError("Out of memory allocating 4,096 bytes")
        return empty(self, slots, size)

    monkeypatch.setattr(Emulator, "guarded", guarded)
    monkeypatch.setattr(DeviceLayerCache, "_empty", full)
    llm = model()
    with pytest.raises(MemoryLimitError, match="the GPU's memory is full"):
        llm.generate([5] * 250, max_tokens=14, ignore_eos=True)
    monkeypatch.undo()
    assert len(llm.generate([5] * 250, max_tokens=14, ignore_eos=True).tokens) == 14
