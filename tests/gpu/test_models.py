"""Whole models on the emulated device: against PyTorch, and captured steps against steps that run."""

from __future__ import annotations

import logging
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from npllm.backend import Backend, log_once
from npllm.backends.cupy_gpu import base
from npllm.backends.cupy_gpu.cache import DeviceCache
from npllm.errors import MemoryLimitError, NumericsError
from npllm.llm import LLM
from npllm.model import Model
from npllm.models import interpret
from npllm.weights import build_tree, leaves, random_weights
from tests.compare import agree
from tests.export import CASES, ONE_OF_EACH, TRUTH
from tests.gpu.emulator import EmulatedBackend, Emulator, checked, emulated
from tests.gpu.emulator.arrays import STREAM
from tests.gpu.emulator.launches import Launches
from tests.models import CONFIGS
from tests.steps import in_pieces

pytestmark = emulated

MODELS = TRUTH / "models"


def loaded(name: str, dtype: str = "float32") -> LLM:
    """A case of tests/truth on the emulated device."""
    from npllm.checkpoint import Checkpoint
    from npllm.matching import match
    from npllm.models import read_config

    described = read_config(MODELS / name)
    handles = match(described, Checkpoint(MODELS / name, described.block))
    spec = described.architecture.weight_spec(described.config)
    be = EmulatedBackend(dtype)
    return LLM(Model(described.architecture, described.config, build_tree(spec, handles, be.prepare), spec), be)


def limit(name: str) -> str:
    return "truth Gemma 3n" if CASES[name].model == "gemma3n_text" else "truth"


def agrees_with_pytorch(name: str) -> None:
    want, llm = load_file(MODELS / name / "trace.safetensors"), loaded(name)
    agree(llm.forward(want["tokens"]), want["logits"], limit(name), what=name)
    tokens_T = want["tokens"][0]
    got_TN = in_pieces(llm, tokens_T, [5, 9, *range(len(tokens_T) - 4, len(tokens_T))])
    agree(got_TN, want["logits"][0], limit(name), what=f"{name} in pieces")
    output = llm.generate(tokens_T[:9], max_tokens=8, temperature=0, ignore_eos=True)
    assert output.tokens == want["greedy"][0][:8].tolist()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_an_export_of_each_architecture(name: str) -> None:
    agrees_with_pytorch(name)


@checked
@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_every_export(name: str) -> None:
    agrees_with_pytorch(name)


# -- captured steps -----------------------------------------------------------------------------------------------------

PROMPTS = [[5, 9, 33, 7], [11], [200, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]


def random_model(name: str, dtype: str = "float32", **options: Any) -> LLM:
    described = interpret(CONFIGS[name] | {"model_type": name}, name)
    return LLM.random(described, EmulatedBackend(dtype, **options))


@cache
def canon_answers(name: str) -> list[list[int]]:
    described = interpret(CONFIGS[name] | {"model_type": name}, name)
    outputs = LLM.random(described, Backend("float32")).generate(PROMPTS, max_tokens=8, ignore_eos=True)
    return [output.tokens for output in outputs]


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_is_a_graph(name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Three rows, with room for four: each step after the second is one launch of a graph, with the canon's tokens."""
    launches = []
    turn = Emulator.turn
    monkeypatch.setattr(Emulator, "turn", lambda self, *args: (launches.append(1), turn(self, *args))[1])
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, "npllm"):
        outputs = random_model(name).generate(PROMPTS, max_tokens=8, ignore_eos=True)
    assert [output.tokens for output in outputs] == canon_answers(name)
    assert len(launches) >= 5, caplog.text
    assert "runs every time" not in caplog.text


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "deepseek_v3", "qwen3_moe", "gemma3n_text"])
def test_what_a_launch_reads_and_writes(name: str) -> None:
    """Nothing that may be fetched early is written, no kernel writes what it reads, and the host reads nothing meanwhile."""
    llm = random_model(name)
    device = llm.backend.device
    cache = llm.new_cache()
    slots = [cache.add() for _ in PROMPTS]
    cache.reserve(40)
    state = started(llm, cache, slots)
    for _ in range(3):
        state = llm.backend.step(llm.model, state) and again(llm, cache, slots)
    (step,) = cache.steps.values()
    assert step.graph is not None, step.problem
    device.launches, reads = Launches(), STREAM.host_reads
    try:
        step.graph.run()
        assert STREAM.host_reads == reads
        assert len(device.launches.all) > 8
        assert device.launches.hazards() == []
    finally:
        device.launches = None


def started(llm: LLM, cache: Any, slots: list[int]) -> Any:
    rows = cache.plan(slots, [len(prompt) for prompt in PROMPTS])
    llm.model.run(llm.backend, llm.backend.asarray(np.concatenate(PROMPTS), dtype="int64"), rows, cache)
    return again(llm, cache, slots)


def again(llm: LLM, cache: Any, slots: list[int]) -> Any:
    from npllm.generation import State
    from npllm.sampling import Sampler, Sampling

    rows = cache.plan(slots, [1] * len(slots), [True] * len(slots))
    samplers = tuple(Sampler(Sampling(), i, [1], llm.config.vocab_size) for i in range(len(slots)))
    return State(np.full(len(slots), 7), rows, cache, samplers, False)


def test_a_graph_serves_other_positions_and_a_cache_that_moves() -> None:
    described = interpret(CONFIGS["qwen3"] | {"model_type": "qwen3", "max_position_embeddings": 1024}, "qwen3")
    models = [LLM.random(described, be) for be in (EmulatedBackend("float32"), Backend("float32"))]
    got, want = (llm.generate([[5] * 250, [7] * 40, [9]], max_tokens=14, ignore_eos=True) for llm in models)
    assert [each.tokens for each in got] == [each.tokens for each in want]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_cache_is_saved_and_loaded(dtype: str, tmp_path: Path) -> None:
    """Of a model with full and sliding layers: what follows is as if nothing had been saved."""
    llm, prompt, file = random_model("gemma3_text", dtype), list(range(5, 45)), tmp_path / "prompt.safetensors"
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    first = llm.prompt_cache()
    wanted = llm.generate(prompt, cache=first, **options).tokens
    first.save(file)
    again = llm.prompt_cache()
    again.load(file)
    assert again.tokens == first.tokens
    for name, values in first.cache.contents(first.slot).items():
        np.testing.assert_array_equal(again.cache.contents(again.slot)[name], values, strict=True)
    longer = [*prompt, *wanted, 7]
    assert llm.generate(longer, cache=again, **options).tokens == llm.generate(longer, **options).tokens


# -- faults ---------------------------------------------------------------------------------------------------------------


def test_logits_that_are_not_finite_end_the_generation() -> None:
    llm = random_model("qwen3")
    llm.model.weights.norm.weight[0] = np.float32("nan")
    with pytest.raises(NumericsError, match=r"not finite.*norm"):
        llm.generate([5, 6, 7], max_tokens=4, ignore_eos=True)


@pytest.mark.parametrize("tied", [True, False])
def test_damage_is_looked_for_with_little_memory(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of the last row, in a matrix that is looked at by the row."""
    described = interpret(CONFIGS["qwen3"] | {"model_type": "qwen3", "tie_word_embeddings": tied}, "qwen3")
    llm = LLM.random(described, EmulatedBackend("float32"))
    matrix, device = getattr(llm.model.weights, "embed_tokens" if tied else "lm_head").weight, llm.backend.device
    matrix.rows_of_bytes[-1, :4] = device.upload(np.array([np.nan], np.float32).view(np.uint8))
    largest, empty = [0], Emulator.empty

    def small(self: Emulator, shape: Any, dtype: Any) -> Any:
        largest.append(math.prod(shape))
        return empty(self, shape, dtype)

    def looking(tree: Any) -> Any:
        monkeypatch.setattr(Emulator, "empty", small)
        return leaves(tree)

    monkeypatch.setattr(base, "LOOKED_AT", 100)
    monkeypatch.setattr("npllm.llm.leaves", looking)
    with pytest.raises(NumericsError, match=r"not finite.*; (embed_tokens|lm_head)\.weight holds such numbers"):
        llm.generate([5, 6, 7], max_tokens=4, ignore_eos=True)
    assert 0 < max(largest) <= max(100, matrix.shape[1])


def test_damage_that_cannot_be_looked_for_takes_nothing_from_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = random_model("qwen3")
    llm.model.weights.norm.weight[0] = np.float32("nan")

    def full(*args: Any) -> Any:
        raise MemoryLimitError("the GPU's memory is full")

    def looking(tree: Any) -> Any:
        monkeypatch.setattr(Emulator, "empty", full)
        return leaves(tree)

    monkeypatch.setattr("npllm.llm.leaves", looking)
    with pytest.raises(NumericsError, match=r"not finite[^;]*$"):
        llm.generate([5, 6, 7], max_tokens=4, ignore_eos=True)


def test_memory_that_runs_out_leaves_a_process_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = random_model("qwen3")
    wanted = llm.generate([5, 6, 7], max_tokens=6, ignore_eos=True).tokens
    empty, left = Emulator.empty, [60]

    def runs_out(self: Emulator, *args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryLimitError("the GPU's memory is full")
        return empty(self, *args)

    monkeypatch.setattr(Emulator, "empty", runs_out)
    with pytest.raises(MemoryLimitError, match="the GPU's memory is full"):
        llm.generate([5, 6, 7], max_tokens=6, ignore_eos=True)
    monkeypatch.undo()
    assert llm.generate([5, 6, 7], max_tokens=6, ignore_eos=True).tokens == wanted


def test_an_interrupt_between_steps_lets_the_graph_and_the_cache_go() -> None:
    import gc
    import weakref

    llm = random_model("qwen3")
    stream = llm.stream([5, 6, 7], max_tokens=30, ignore_eos=True)
    for _ in range(5):
        next(stream)
    # Not by isinstance: some objects of other packages warn when they are asked for their class.
    (cache,) = [each for each in gc.get_objects() if type(each) is DeviceCache and each.be is llm.backend]
    (step,) = cache.steps.values()
    gone = weakref.ref(step)
    assert step.graph is not None
    del step, cache
    gc.disable()
    try:
        stream.close()
        del stream
        assert gone() is None
    finally:
        gc.enable()


def test_a_table_that_is_only_looked_up_takes_no_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was foretold of the device and of the host is what the prepared weights take there."""
    monkeypatch.setattr(EmulatedBackend, "shared_device", Emulator())
    llm = random_model("gemma3n_text")
    device, handles = llm.backend.device, random_weights(llm.model.spec)
    assert device.allotted == llm.backend.bytes_needed(handles.values())
    assert device.pinned == llm.backend.pinned_bytes(handles.values())
    assert device.pinned == sum(4 * tensor.size for tensor in llm.model.spec.values() if tensor.part == "lookup") > 0


def test_a_table_that_the_host_has_no_room_for_is_refused_before_anything_is_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(EmulatedBackend, "shared_device", Emulator())
    monkeypatch.setattr("npllm.model.available_memory", lambda: 1000)
    with pytest.raises(MemoryLimitError, match=r"host's memory need \d+ MiB that cannot be swapped, 0 MiB is available"):
        random_model("gemma3n_text")
    assert EmulatedBackend("float32").device.allotted == 0  # type: ignore[attr-defined]
    random_model("qwen3")
