"""What keeps memory of the device, and for how long: nothing that no row and no step needs any more."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from npllm.arrays import Array
from npllm.backends.cupy_gpu import cuda
from npllm.backends.cupy_gpu.cache import DeviceCache, DeviceLayerCache
from npllm.backends.cupy_gpu.device import Memory
from npllm.errors import MemoryLimitError
from npllm.llm import LLM
from npllm.models import interpret
from tests.gpu.emulator import EmulatedBackend, Emulator, emulated
from tests.gpu.test_device import ERRORS, OutOfMemoryError
from tests.gpu.test_lookahead import Rows
from tests.models import CONFIGS

pytestmark = emulated


def model() -> LLM:
    """One whose cache can grow."""
    values = CONFIGS["qwen3"] | {"model_type": "qwen3", "max_position_embeddings": 1024}
    return LLM.random(interpret(values, "qwen3"), EmulatedBackend("float32"))


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Cycles stay where they are."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


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


def guarded(self: Emulator) -> contextlib.AbstractContextManager[None]:
    """As CuPy's errors are."""
    cupy = SimpleNamespace(cuda=SimpleNamespace(**ERRORS))
    device: Any = SimpleNamespace(cupy=cupy, release=self.release, memory=self.memory)
    return cuda.MemoryErrors(device)


def test_a_cache_that_cannot_grow_says_so_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(("method", "at"), [("copy", 3), ("_read", 2), ("_write", 3)])
def test_a_row_that_finds_no_room_to_be_copied_can_be_copied_later(
    method: str, at: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To other rows, to a file and from one: memory runs out in the middle of it, once."""
    llm, path = model(), tmp_path / "saved"
    kept = llm.prompt_cache()
    said = llm.generate([5, 6, 7, 8], max_tokens=6, cache=kept, ignore_eos=True).tokens
    kept.save(path)
    acts: dict[str, Callable[[], list[int] | None]] = {
        "copy": lambda: kept.cache.spread(kept.slot, 3),
        "_read": lambda: kept.save(path),
        "_write": lambda: kept.load(path),
    }
    before, calls = getattr(DeviceLayerCache, method), [0]

    def full(self: DeviceLayerCache, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise OutOfMemoryError("Out of memory allocating 4,096 bytes")
        return before(self, *args)

    monkeypatch.setattr(Emulator, "guarded", guarded)
    monkeypatch.setattr(DeviceLayerCache, method, full)
    with pytest.raises(MemoryLimitError, match="the GPU's memory is full"):
        acts[method]()
    assert set(range(len(kept.cache.lengths))) - kept.cache.unused == {kept.slot}
    slots = acts[method]() or [kept.slot]
    for slot in slots:
        held, same = kept.cache.contents(slot), kept.cache.contents(kept.slot)
        assert all(np.array_equal(held[name], same[name]) for name in same)
    kept.load(path)
    assert llm.generate([5, 6, 7, 8], max_tokens=6, cache=kept, ignore_eos=True).tokens == said


def test_where_no_row_can_be_added_those_that_were_given_back_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = model().new_cache()
    kept, given_back = cache.add(), cache.add()
    cache.free(given_back)

    def full(self: DeviceLayerCache, *args: int) -> tuple[Array, ...]:
        raise OutOfMemoryError("Out of memory allocating 4,096 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(Emulator, "guarded", guarded)
        patch.setattr(DeviceLayerCache, "_empty", full)
        with pytest.raises(MemoryLimitError, match="the GPU's memory is full"):
            cache.spread(kept, 2)
    assert cache.unused == {given_back}
    assert cache.add() == given_back


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_generation_takes_its_cache_and_graphs_with_it(interrupted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it has ended, and when Ctrl-C has ended it, with a step under way."""
    made, turns, init, turn = list[weakref.ref[Any]](), [0], DeviceCache.__init__, Emulator.turn

    def remembered(self: DeviceCache, *args: Any) -> None:
        init(self, *args)
        made.append(weakref.ref(self))

    def launched(self: Emulator, *args: Any) -> Any:
        turns[0] += 1
        if interrupted and turns[0] == 4:
            raise KeyboardInterrupt
        return turn(self, *args)

    monkeypatch.setattr(DeviceCache, "__init__", remembered)
    monkeypatch.setattr(Emulator, "turn", launched)
    llm = model()
    with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext() as raised:
        llm.generate([[5, 6, 7], [8]], max_tokens=9, ignore_eos=True)
    del raised
    assert turns[0] >= 4
    assert made
    assert not any(cache() is not None for cache in made)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("what", ["cache", "weights"])
def test_what_a_cycle_holds_is_collected_before_anything_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model()
    lost: Any = llm.new_cache()
    lost.user = [lost]
    gone = weakref.ref(lost)
    monkeypatch.setattr(Emulator, "memory", lambda self: Memory(0 if gone() else 1 << 30, 1 << 30))
    act = model if what == "weights" else lambda: llm.generate([5, 6, 7], max_tokens=3)
    with pytest.raises(MemoryLimitError):
        act()
    del lost
    act()
    assert gone() is None
