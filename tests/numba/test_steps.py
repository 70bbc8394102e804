"""Played decode steps give, bit for bit, what the model's own text gives when it runs: every model, far into its context."""

from __future__ import annotations

import gc
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("numba")

from npllm.backend import log_once
from npllm.backends.numba_cpu import steps
from npllm.llm import LLM
from npllm.models import interpret
from npllm.registry import get_backend
from tests.models import CONFIGS

PROMPTS = [[5, 9, 33, 7], [11], [200, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]


class Never(dict):
    """No model is trusted: every played step is compared with one that runs."""

    def __setitem__(self, key, value):
        pass


def random_model(name, dtype="float32", **options):
    described = interpret(CONFIGS[name] | {"model_type": name}, name)
    return LLM.random(described, get_backend("numba", dtype=dtype, **options))


@pytest.fixture
def problems(monkeypatch):
    """What recordings could not do, by the time the test ends."""
    found = []
    record, played = steps.Recording.record, steps.Steps._played

    def recorded(self, *args):
        result = record(self, *args)
        found.append(self.problem)
        return result

    def compared(self, recording, *args):
        result = played(self, recording, *args)
        found.append(recording.problem)
        return result

    monkeypatch.setattr(steps.Recording, "record", recorded)
    monkeypatch.setattr(steps.Steps, "_played", compared)
    return found


# A model for each kind of cache; what it stores in is nothing that a recording knows of.
KINDS = ("qwen3", "gemma3_text", "gemma3n_text", "llama4_text", "deepseek_v3")


@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [
        *((name, None) for name in CONFIGS),
        *(pytest.param(name, "bfloat16", marks=[pytest.mark.full] * (name not in KINDS)) for name in CONFIGS),
    ],
)
def test_a_played_step_is_the_step_that_ran(name, kv_dtype, problems):
    llm = random_model(name)
    llm.kv_dtype = kv_dtype
    llm.backend._trusted = Never()
    llm.generate(PROMPTS, max_tokens=60, temperature=1.0, seed=1, ignore_eos=True)
    assert len(problems) > 50
    assert set(problems) == {""}


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "gemma3_text"])
def test_rows_that_end_and_caches_that_move_are_recorded_anew(name, problems):
    llm = random_model(name)
    llm.backend._trusted = Never()
    llm.generate(
        [[5] * 200, [7] * 40, [9]], max_tokens=60, temperature=1.0, seed=3, ignore_eos=False, stop_ids=list(range(40))
    )
    assert set(problems) == {""}


def test_what_a_recording_misses_is_found_at_the_second_step(monkeypatch, caplog):
    llm = random_model("qwen3")
    log_once.cache_clear()
    forward = llm.model.architecture.forward

    def hides(be, c, w, tokens_M, rows, cache):
        logits_WN = forward(be, c, w, tokens_M, rows, cache)
        return logits_WN + float(np.asarray(rows.positions_M)[0])

    expected = [int(token) for token in llm.generate([5, 6], max_tokens=6, temperature=0, ignore_eos=True).tokens]
    llm.backend._trusted.clear()
    monkeypatch.setattr(llm.model.architecture, "forward", hides)
    with caplog.at_level(logging.INFO, "npllm"):
        assert llm.generate([5, 6], max_tokens=6, temperature=0, ignore_eos=True).tokens == expected
    assert "a played step differs" in caplog.text


@pytest.mark.parametrize("name", KINDS)
def test_a_recording_serves_every_cache_that_is_laid_out_alike(name, problems, monkeypatch):
    llm = random_model(name)
    llm.backend._trusted = Never()
    first, last, other = ([5, 9, 33, 7], [8, 30, 31], [11, 12, 13, 14, 15, 2])

    def answers(llm):
        one, two = llm.prompt_cache(), llm.prompt_cache()
        steps_of = {"max_tokens": 7, "temperature": 0, "ignore_eos": True}
        # Two caches in turn, the first of them twice.
        asked = ((first, one), (other, two), (first + last, one))
        return [llm.generate(ids, cache=cache, **steps_of).tokens for ids, cache in asked]

    with_recordings = answers(llm)
    recorded = len(llm.backend._free)
    assert recorded
    assert answers(llm) == with_recordings
    assert len(llm.backend._free) == recorded
    monkeypatch.setattr(steps.Steps, "_take_back", lambda *_: None)
    llm.backend._free.clear()
    assert answers(llm) == with_recordings
    assert set(problems) == {""}


def test_threads_that_generate_at_once_do_not_share_a_recording():
    llm = random_model("qwen3")
    options = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
    questions = [[5 + i, 9, 33 + i] for i in range(6)]
    alone = [llm.generate(ids, **options).tokens for ids in questions]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda ids: llm.generate(ids, **options).tokens, questions * 4))
    assert together == alone * 4


def test_a_recording_that_the_interpreter_reads_the_cache_in_serves_that_cache_alone(monkeypatch, problems):
    llm = random_model("qwen3")
    attention = type(llm.backend).attention

    def looks(self, q_MHK, keys, rows, **options):
        out_MHV = attention(self, q_MHK, keys, rows, **options)
        return out_MHV + 0 * np.max(keys.k_BSGK * out_MHV[0, 0, :1], axis=(0, 1, 2))[:1]

    monkeypatch.setattr(type(llm.backend), "attention", looks)
    llm.generate([5, 6], max_tokens=3, temperature=0, ignore_eos=True)
    assert set(problems) == {""}
    assert not llm.backend._free


def test_a_recording_keeps_no_cache(monkeypatch):
    llm, caches = random_model("deepseek_v3"), []
    new_cache = type(llm.backend).new_cache
    monkeypatch.setattr(type(llm.backend), "new_cache", lambda *args: caches.append(new_cache(*args)) or caches[-1])
    llm.generate([5, 6], max_tokens=5, temperature=0, ignore_eos=True)
    memory = [weakref.ref(stored) for cache in caches for stored in cache.storage()]
    caches.clear()
    gc.collect()
    assert llm.backend._free
    assert memory
    assert not any(stored() is not None for stored in memory)
