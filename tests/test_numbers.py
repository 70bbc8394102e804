"""Published models: their config.json, as published, gives the published number of parameters and size of the cache."""

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllm.blocks import chunked, sliding
from npllm.cache import KV_BYTES, Cache, LayerSpec, cache_bytes
from npllm.models import interpret
from npllm.published import MODELS
from npllm.weights import Spec, active_parameters, count_parameters
from tests import strategies as our
from tests.steps import step

every_model = pytest.mark.parametrize("name", MODELS)

# Warnings that a published file deserves: it has a vision tower, or it names code of its author.
EXPECTED_WARNINGS = ("a multimodal model; only its text part runs", "npllm never runs it")


def described(name: str) -> tuple[Any, Spec, list[LayerSpec]]:
    """The configuration of a published model, its weight spec and its cache spec."""
    found = interpret(MODELS[name].config, warn=lambda *_: None)
    return found.config, found.architecture.weight_spec(found.config), found.architecture.cache_spec(found.config)


def no_memory_limit() -> int:
    return 1 << 60


def new_cache(specs: list[LayerSpec], kv_dtype: str, max_context: int) -> Cache:
    return Cache(np, specs, "float32", max_context, kv_dtype, no_memory_limit)


@every_model
def test_no_key_of_the_file_is_unknown(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "npllm"):
        interpret(MODELS[name].config)
    assert not [record.getMessage() for record in caplog.records if not record.getMessage().endswith(EXPECTED_WARNINGS)]


@every_model
def test_parameters(name: str) -> None:
    assert count_parameters(described(name)[1]) == MODELS[name].parameters


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.active])
def test_active_parameters(name: str) -> None:
    config, spec, _ = described(name)
    printed = MODELS[name].active or ""
    active = active_parameters(spec, config.router.experts_per_token)
    assert f"{active / 1e9:.{len(printed.partition('.')[2])}f}" == printed


def test_what_gemma_3n_only_looks_up() -> None:
    """The per-layer embeddings: 2.3488 and 2.0133 billion of its parameters are read row by row."""
    for name, layers in (("Gemma 3n E4B", 35), ("Gemma 3n E2B", 30)):
        looked_up = sum(tensor.size for tensor in described(name)[1].values() if tensor.part == "lookup")
        assert looked_up == 262_144 * 256 * layers


@every_model
def test_cache_per_token(name: str) -> None:
    model, specs = MODELS[name], described(name)[2]
    assert new_cache(specs, "bfloat16", 16).bytes_per_token == model.kv_bytes
    growing = sum(spec.bytes_per_token("bfloat16") for spec in specs if spec.mask.span is None)
    assert growing == (model.kv_bytes if model.growing is None else model.growing)


def around(spans: set[int]) -> list[int]:
    """Lengths on both sides of the windows and of the steps in which a cache grows."""
    near = {span + more for span in spans for more in (-1, 0, 1)} | {3 * span for span in spans}
    return sorted({1, 256, 257, 5000} | near)


@every_model
def test_cache_at_a_length(name: str) -> None:
    """Windows stop growing: 256, 512, 1024 ... tokens of what sees everything, at most the window of the rest."""
    model, (config, _, specs) = MODELS[name], described(name)
    context = getattr(config, "max_position_embeddings", None) or config.n_positions
    spans = {spec.mask.span for spec in specs if spec.mask.span is not None}
    assert len(spans) <= 1
    growing = model.kv_bytes if model.growing is None else model.growing
    for length in around(spans):
        if length <= context:
            room = min(context, max(256, 1 << (length - 1).bit_length()))
            expected = growing * room + (model.kv_bytes - growing) * min({room} | spans)
            assert cache_bytes(specs, "bfloat16", length, context) == expected


@every_model
@pytest.mark.parametrize("kv_dtype", KV_BYTES)
def test_a_cache_is_as_large_as_predicted(name: str, kv_dtype: str) -> None:
    """One layer of each kind that the model has, really allocated."""
    config, _, specs = described(name)
    context = getattr(config, "max_position_embeddings", None) or config.n_positions
    kinds = list(dict.fromkeys(specs))
    cache = new_cache(kinds, kv_dtype, context)
    rows = [cache.add(), cache.add()]
    for length in around({spec.mask.span for spec in kinds if spec.mask.span is not None}):
        if length <= context:
            cache.reserve(length)
            assert cache.nbytes == cache_bytes(kinds, kv_dtype, length, context, rows=len(rows))


KINDS = {
    "full": LayerSpec(2, 6, 4),
    "ring": LayerSpec(2, 6, 4, sliding(300)),
    "small ring": LayerSpec(2, 6, 4, sliding(7)),
    "chunked ring": LayerSpec(3, 4, 4, chunked(300)),
    "latent": LayerSpec(1, 20, 0, latent=16),
}
NUMBERS = {"full": 20, "ring": 20, "small ring": 20, "chunked ring": 24, "latent": 20}


@pytest.mark.parametrize("kv_dtype", KV_BYTES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_in_use_is_as_large_as_predicted(kind: str, kv_dtype: str) -> None:
    """Token by token and in pieces, before, at and beyond the window: room for 256, 512, 1000 tokens, or the window."""
    spec, context = KINDS[kind], 1000
    cache = new_cache([spec], kv_dtype, context)
    slot, length = cache.add(), 0
    for count, room in ((1, 256), (6, 256), (1, 256), (248, 256), (1, 512), (42, 512), (1, 512), (1, 512), (600, 1000)):
        rows = cache.plan([slot], [count])
        shape = count, spec.heads
        values = None if spec.latent else np.ones((*shape, spec.value_dim), dtype=np.float32)
        cache.layers[0].append(np.ones((*shape, spec.key_dim), dtype=np.float32), values, rows)
        cache.advance(rows)
        length += count
        assert cache.nbytes == cache_bytes([spec], kv_dtype, length, context)
        assert cache.nbytes == min(room, spec.mask.span or room) * NUMBERS[kind] * KV_BYTES[kv_dtype]


@pytest.mark.parametrize("architecture", our.CONFIGS)
@given(data=st.data(), kv_dtype=st.sampled_from([None, "bfloat16"]))
def test_the_cache_of_a_model_in_use(architecture: str, data: st.DataObject, kv_dtype: str | None) -> None:
    """Layers that share another's keys keep none; the context of these models, 48, lies beyond their windows."""
    llm = data.draw(our.tiny_model(architecture, kv_dtype=kv_dtype))
    specs, cache = llm.model.architecture.cache_spec(llm.config), llm.new_cache()
    slot, length = cache.add(), 0
    for count in (1, 6, 1, 30):
        step(llm, cache, [slot], [np.zeros(count, dtype=np.int64)])
        length += count
        assert cache.nbytes == cache_bytes(specs, cache.kv_dtype, length, cache.max_context)
