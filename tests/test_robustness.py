"""What goes wrong only around a model: threads, forks, caches in the wrong hands, memory that runs out."""

from __future__ import annotations

import multiprocessing
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import npllm
from npllm import blocks, machine, parallel
from npllm.backend import Backend, accelerates
from npllm.bench import measure
from npllm.errors import ArgumentError, MemoryLimitError, NumericsError
from npllm.llm import LLM
from npllm.models import interpret
from npllm.numpy_backend import SPLIT, NumpyBackend
from npllm.weights import Linear, count_parameters
from tests.models import make_checkpoint

CONFIG = {
    "model_type": "qwen3", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 1024,
}  # fmt: skip
LONG = list(range(200))


def model(backend: Backend | None = None, seed: int = 0, **options: Any) -> LLM:
    return LLM.random(interpret(CONFIG), backend or NumpyBackend(threads=2), seed=seed, **options)


@pytest.mark.parametrize("length", [3, SPLIT - 1, SPLIT, 200])
def test_damaged_weights_are_reported_whatever_the_length_of_the_prompt(length: int) -> None:
    llm = model()
    llm.model.weights.layers[0].self_attn.o_proj.weight[:] = np.nan
    with pytest.raises(NumericsError, match="not finite"):
        llm.generate(LONG[:length], max_tokens=1)


def _child(queue: Any) -> None:
    queue.put(model().forward(LONG).sum())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    expected = model().forward(LONG).sum()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    assert queue.get(timeout=30) == pytest.approx(expected)
    child.join(30)
    assert child.exitcode == 0


def test_threads_are_shared_by_all_calls() -> None:
    llm = model(NumpyBackend(threads=3))
    llm.forward(LONG)
    before = threading.active_count()
    for length in (70, 100, 130, 160):
        llm.forward(LONG[:length])
    assert threading.active_count() <= before + 3


def test_omp_num_threads_is_what_no_threads_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine.default_threads() == NumpyBackend().parts == 1
    for other in ("", "many", "0", "100000"):
        monkeypatch.setenv("OMP_NUM_THREADS", other)
        assert machine.default_threads() == machine.cores()


def test_a_limit_on_blas_ends_with_its_block() -> None:
    before = [library.num_threads for library in parallel._blas.libraries]
    with parallel.blas_threads(2), parallel.blas_threads(1):
        assert parallel.blas_is_alone()
    assert [library.num_threads for library in parallel._blas.libraries] == before


def test_a_cache_serves_its_own_model_only() -> None:
    llm, other = model(), model(seed=1)
    with pytest.raises(ArgumentError, match="another model"):
        other.generate(LONG, cache=llm.prompt_cache())
    wide = model(NumpyBackend("float64"))
    with pytest.raises(ArgumentError, match="dtype"):
        wide.generate(LONG, cache=llm.prompt_cache())
    with pytest.raises(ArgumentError, match="prompt_cache"):
        llm.generate(LONG, cache=llm.new_cache())  # type: ignore[arg-type]


def test_what_a_trace_changes_stays_in_the_trace(tmp_path: Path) -> None:
    llm = npllm.load(make_checkpoint(tmp_path / "m"), backend="numpy")
    messages = [{"role": "user", "content": "hello"}]
    expected = llm.chat(messages, max_tokens=6).tokens
    with llm.trace() as trace:
        trace.patch("layers.0.attention.v", np.zeros_like)
        assert llm.chat(messages, max_tokens=6).usage.cached_tokens == 0
        with pytest.raises(ArgumentError, match="patches"):
            llm.generate([1, 2], cache=llm.prompt_cache(), max_tokens=1)
    assert llm.chat(messages, max_tokens=6).tokens == expected


def test_a_cache_that_could_not_grow_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = model().new_cache()
    slot = cache.add()
    cache.reserve(100)
    monkeypatch.setattr(cache, "available", lambda: 0)
    with pytest.raises(MemoryLimitError, match="is available"):
        cache.add()
    assert cache.lengths == [0]
    monkeypatch.undo()
    assert cache.add() == slot + 1


def test_slots_that_are_not_in_use_are_refused() -> None:
    cache = model().new_cache()
    slot = cache.add()
    cache.free(slot)
    for act in (cache.free, cache.fork, lambda s: cache.truncate(s, 0), lambda s: cache.plan([s], [1])):
        with pytest.raises(ArgumentError, match="not in use"):
            act(slot)
    slot = cache.add()
    with pytest.raises(ArgumentError, match="twice"):
        cache.plan([slot, slot], [1, 1])


def test_attention_memory_grows_with_the_length_and_not_its_square() -> None:
    def peak(length: int) -> int:
        q, k = np.ones((length, 1, 8), np.float32), np.ones((length, 1, 8), np.float32)
        tracemalloc.start()
        blocks.blocked_attention(np, q, k, k, first_query=0, first_key=0, mask=blocks.CAUSAL, scale=1.0)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(4096) < 3 * peak(2048)


def test_float16_is_computed_in_float32() -> None:
    q, v = np.full((1, 1, 64), 100, np.float16), np.full((2, 1, 4), 3, np.float16)
    k = np.full((2, 1, 64), 100, np.float16)
    o = blocks.softmax_attention(np, q, k, v, np.ones((1, 2), bool), scale=1.0)
    assert o.dtype == np.float16
    assert (o == 3).all()
    with pytest.raises(TypeError, match="floating-point"):
        blocks.silu(np, np.array([1], np.int16))


def test_bench_refuses_more_tokens_than_fit() -> None:
    with pytest.raises(ArgumentError, match="context of 32"):
        measure(model(max_context=32), 8, 128, 1)


@pytest.mark.parametrize("same", [True, False], ids=["equal", "different"])
def test_a_head_stored_beside_its_embedding(tmp_path: Path, same: bool) -> None:
    folder = make_checkpoint(tmp_path / "m", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors["lm_head.weight"] = tensors[name] * np.float32(1 if same else 2)
    save_file(tensors, folder / "model.safetensors")
    llm = npllm.load(folder, backend="numpy")
    weights = llm.model.weights
    assert (weights.lm_head.weight is weights.embed_tokens.weight) is same
    assert llm.parameters == count_parameters(llm.model.spec)


def test_an_override_must_have_the_canons_signature() -> None:
    def never(self: Backend, *args: Any, **kwargs: Any) -> None:
        return None

    with pytest.raises(TypeError, match="canon's"):

        class OtherDefault(Backend):
            @accelerates(never)
            def rms_norm(self, x_D: Any, w: Linear | None, /, eps: float, offset: float = 1.0) -> Any: ...


def test_a_declined_call_goes_to_the_parents_override() -> None:
    def always(self: Backend, *args: Any, **kwargs: Any) -> str:
        return "not today"

    calls = []

    class Parent(Backend):
        def embed(self, tokens_M: Any, w: Linear, /) -> Any:
            calls.append("parent")
            return super().embed(tokens_M, w)

    class Child(Parent):
        @accelerates(always)
        def embed(self, tokens_M: Any, w: Linear, /) -> Any:
            raise AssertionError

    model(Child()).forward([1])
    assert calls == ["parent"]
