"""`npllm.describe` against published numbers, arithmetic by hand, and models that are built and run."""

import dataclasses
import functools
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st

import npllm
from npllm import LLM, describe, published
from npllm.blocks import CAUSAL, Mask, chunked, sliding
from npllm.cache import KV_BYTES
from npllm.describing import Description, description_of
from npllm.describing.description import FFN, Norm, Run, Scores
from npllm.describing.explaining import sections_of, statement
from npllm.describing.limits import Machine, limit, measure, parse_machine
from npllm.describing.steps import DEFINITIONS
from npllm.describing.structure import pattern_of
from npllm.describing.weights import FORMATS, stored_bytes
from npllm.errors import ArgumentError, ConfigError
from npllm.hub import fetch
from npllm.models import REGISTRY, Described
from npllm.published import MODELS
from npllm.quantised import Block
from npllm.weights import Tensor, leaves, random_weights
from tests import strategies as our
from tests.counting import Counted, CountingBackend

PACKAGE = Path(npllm.__file__).parent

# Descriptions do not change, so one of each is enough.
known = functools.cache(describe)

every_model = pytest.mark.parametrize("name", MODELS)
# Of each architecture.
few = settings(max_examples=5)
every_architecture = pytest.mark.parametrize("architecture", our.CONFIGS)

SHORT = """deepseek-v3 deepseek-v2 deepseek-v2-lite mistral-large-3 olmo-2-1b olmo-2-7b olmo-2-13b olmo-2-32b gemma-2-2b
    gemma-2-9b gemma-2-27b gemma-3-270m gemma-3-1b gemma-3-4b gemma-3-12b gemma-3-27b gemma-3n-e2b gemma-3n-e4b mistral-7b
    mixtral-8x7b mistral-small-3.1 llama-3.1-8b llama-3.1-70b llama-3.1-405b llama-3.2-1b llama-3.2-3b llama-4-scout
    llama-4-maverick qwen2.5-0.5b qwen2.5-1.5b qwen2.5-3b qwen2.5-7b qwen2.5-14b qwen2.5-32b qwen2.5-72b qwen3-0.6b
    qwen3-1.7b qwen3-4b qwen3-8b qwen3-14b qwen3-32b qwen3-30b-a3b qwen3-235b-a22b gpt2 gpt2-medium gpt2-large
    gpt2-xl""".split()


# -- published numbers ------------------------------------------------------------------------------------------------


@every_model
def test_published_numbers(name: str) -> None:
    """Parameters in all and active, bytes of cache per token, and what still grows when windows are full."""
    d, model = known(name), MODELS[name]
    assert d.parameters.total == model.parameters
    assert d.kv_bytes_per_token() == model.kv_bytes
    assert d.kv_growth_per_token() == (model.kv_bytes if model.growing is None else model.growing)
    if model.active is None:
        assert d.parameters.active == d.parameters.total
    else:
        assert f"{d.parameters.active / 1e9:.{len(model.active.partition('.')[2])}f}" == model.active


def test_short_names() -> None:
    assert set(SHORT) <= set(published.NAMES)
    assert {published.NAMES[name] for name in published.NAMES} == set(MODELS)
    assert published.find("DeepSeek_V3") == published.find(" deepseek-v3 ") == "DeepSeek V3"
    assert set(published.CLAIMS) <= set(MODELS)


# What is claimed: name, which of the sums, billions as the publisher rounds them. The vision encoder of 2.5 B (Mistral Large
# 3), 0.4 B (Gemma 3, Mistral Small 3.1) or 1.2 B (Llama 4 Scout) is not described, so these have the text's own number.
CLAIMED = [
    ("deepseek-v3", "total", "671"),
    ("deepseek-v3", "active", "37.55"),
    ("deepseek-v3", "active without input", "36.63"),
    ("deepseek-v2", "total", "236"),
    ("deepseek-v2", "active", "21"),
    ("deepseek-v2-lite", "total", "15.7"),
    ("kimi-k2", "active without input", "32"),
    ("mistral-large-3", "total", "673"),
    ("mistral-large-3", "active without input", "39"),
    ("llama-4-scout", "total", "107.8"),
    ("llama-4-scout", "active", "17"),
    ("llama-4-maverick", "total", "401"),
    ("llama-4-maverick", "active", "17"),
    ("mixtral-8x7b", "total", "46.7"),
    ("mixtral-8x7b", "active", "12.9"),
    ("mixtral-8x22b", "total", "141"),
    ("mixtral-8x22b", "active", "39"),
    ("qwen3-0.6b", "total without input", "0.44"),
    ("qwen3-8b", "total without both", "6.95"),
    ("qwen3-14b", "total without both", "13.2"),
    ("qwen3-32b", "total without both", "31.2"),
    ("qwen3-30b-a3b", "total", "30.5"),
    ("qwen3-30b-a3b", "active", "3.35"),
    ("qwen3-30b-a3b", "total without both", "29.9"),
    ("qwen3-235b-a22b", "total", "235"),
    ("qwen3-235b-a22b", "active", "22"),
    ("qwen3-235b-a22b", "total without both", "234"),
    ("gemma-3-27b", "total", "27"),
    ("mistral-small-3.1", "total", "23.6"),
]


@pytest.mark.parametrize(("name", "what", "claimed"), CLAIMED)
def test_claimed_numbers(name: str, what: str, claimed: str) -> None:
    p = known(name).parameters
    sums = {"": p.without(), " without input": p.without("embedding"), " without both": p.without("embedding", "head")}
    whole, _, part = what.partition(" ")
    value = getattr(sums[f" {part}" if part else ""], whole)
    assert f"{value / 1e9:.{len(claimed.partition('.')[2])}f}" == claimed


def test_deepseek_v3_by_hand() -> None:
    """The arithmetic of one MoE layer and of the whole, and the cache against expanded keys and values."""
    attention = 7168 * 1536 + 1536 + 1536 * 24576 + 7168 * 576 + 512 + 512 * 32768 + 16384 * 7168
    moe = 256 * 3 * 7168 * 2048 + 3 * 7168 * 2048 + 256 * 7168
    layer, dense = attention + moe + 2 * 7168, attention + 3 * 7168 * 18432 + 2 * 7168
    d = known("deepseek-v3")
    assert sum(step.parameters for step in d.steps if step.layer == 3) == layer
    assert sum(step.parameters for step in d.steps if step.layer == 0) == dense
    assert d.parameters.total == 58 * layer + 3 * dense + 2 * 129280 * 7168 + 7168 == 671_026_404_352
    assert d.parameters.active == d.parameters.total - 58 * 248 * 3 * 7168 * 2048 == 37_552_282_624
    assert d.kv_bytes_per_token() == (512 + 64) * 2 * 61 == 70_272
    assert d.kv_bytes_as(None, 1) == 128 * (192 + 128) * 2 * 61 == 4_997_120
    assert d.kv_bytes_as(8, 1) == 8 * (192 + 128) * 2 * 61


def test_windows_by_hand() -> None:
    """Gemma 3 27B: 52 layers keep 1,024 tokens, 10 keep all; what an engine that keeps all would take."""
    d = known("gemma-3-27b")
    per_layer = 2 * 16 * 128 * 2
    assert d.kv_bytes(100_000) == per_layer * (52 * 1024 + 10 * 100_000)
    assert d.kv_without_windows(100_000) == per_layer * 62 * 100_000
    assert d.kv_allocated(100_000) == per_layer * (52 * 1024 + 10 * 131_072)
    assert d.kv_bytes(1) == d.kv_bytes_per_token() == 507_904


def test_gemma_3n_by_hand() -> None:
    """Effective parameters; layers that share keys keep none, and read those of others once more."""
    for name, layers, inner in (("gemma-3n-e4b", 35, 16384), ("gemma-3n-e2b", 30, 8192)):
        d = known(name)
        assert d.parameters["lookup"].total == 262_144 * 256 * layers
        assert d.parameters["embedding"].total == 262_400 * 2048
        unused = (layers - 20) * (2 * 512 * 2048 + 256)
        effective = d.parameters.without("embedding", "lookup").total
        assert f"{(effective + unused) / 1e9:.2f}" in d.claim
        assert f"{unused / 1e6:.1f} M" in d.claim
        assert d.parameters["dense"].total == layers * 3 * 2048 * inner
        assert len(d.cache) == 20
        sources = [layer.attention.shares_keys_of for layer in d.layers]
        assert sources == [None] * 20 + [(18, 18, 18, 18, 19)[i % 5] for i in range(layers - 20)]
        keys = sum(step.bytes(4095, "bf16", "bfloat16") for step in d.steps if step.op == "attention")
        whole = layers // 5
        assert keys == 2 * 2 * 256 * 2 * ((layers - whole) * 512 + whole * 4096)


def test_llama_4_by_hand() -> None:
    """Chunks: a token at the start of one reads little, whatever lies before; 36 layers keep at most a chunk."""
    d = known("llama-4-scout")
    per_layer = 2 * 8 * 128 * 2
    assert d.kv_bytes(1_000_000) == per_layer * (36 * 8192 + 12 * 1_000_000)
    read = d.decode_bytes(8193) - d.weights_read("bf16")
    assert read == per_layer * (36 * 1 + 12 * 8193)


def test_flops_by_hand() -> None:
    """GPT-2, one token that sees 100: all matrices once, scores and values of 100 keys in 12 layers of 768."""
    d = known("gpt2")
    matrices = 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072) + 50257 * 768
    assert d.decode_flops(100) == 2 * (matrices + 12 * 2 * 768 * 100)
    layers = 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072)
    assert d.prefill_flops(100) == 2 * (100 * layers + 50257 * 768 + 12 * 2 * 768 * 100 * 101 // 2)


# -- structure --------------------------------------------------------------------------------------------------------


def rms(width: int, gain: str | None = "w", eps: float = 1e-6) -> Norm:
    return Norm("RMSNorm", width, gain, eps)


def places(d: Description) -> tuple[bool, ...]:
    """Which norms the first layer has: before and after attention, before and after the FFN."""
    layer = d.layers[0]
    return tuple(norm is not None for norm in (layer.pre_attention, layer.post_attention, layer.pre_ffn, layer.post_ffn))


def test_norms() -> None:
    before, after, both = (True, False, True, False), (False, True, False, True), (True,) * 4
    found = {name: places(known(name)) for name in SHORT}
    assert {name for name in found if found[name] == after} == {name for name in SHORT if name.startswith("olmo")}
    assert {name for name in found if found[name] == both} == {name for name in SHORT if name.startswith("gemma")}
    assert all(each in (before, after, both) for each in found.values())
    assert known("gpt2").layers[0].pre_ffn == Norm("LayerNorm", 768, "w", 1e-5, bias=True)
    assert known("gemma-2-2b").layers[0].post_ffn == rms(2304, "1 + w")
    assert known("gemma-3n-e4b").layers[0].pre_attention == known("gemma-3n-e4b").head.norm == rms(2048)


def test_head_norms() -> None:
    def forms(name: str, layer: int = 0) -> list[tuple[Norm, str, bool] | None]:
        a = known(name).layers[layer].attention
        norms = (a.query_norm, a.key_norm, a.value_norm)
        return [norm and (norm.norm, norm.over, norm.after_rope) for norm in norms]

    assert forms("qwen3-0.6b") == [(rms(128), "head", False)] * 2 + [None]
    assert forms("gemma-3-27b") == [(rms(128, "1 + w"), "head", False)] * 2 + [None]
    assert forms("olmo-2-32b") == [(rms(5120), "all heads", False), (rms(1024), "all heads", False), None]
    assert forms("gemma-3n-e2b") == [(rms(256), "head", False)] * 2 + [(rms(256, None), "head", False)]
    assert forms("llama-4-scout") == [(rms(128, None, 1e-5), "head", True)] * 2 + [None]
    assert forms("llama-4-scout", 3) == forms("llama-4-maverick") == forms("llama-3.1-8b") == forms("gpt2") == [None] * 3
    assert forms("deepseek-v3") == [(rms(1536), "latent", False), (rms(512), "latent", False), None]
    assert forms("deepseek-v2-lite") == [None, (rms(512), "latent", False), None]


def test_attention() -> None:
    kinds = {name: known(name).layers[0].attention.kind for name in SHORT}
    assert {name for name in SHORT if kinds[name] == "MLA"} == {
        "deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "mistral-large-3",
    }  # fmt: skip
    assert kinds["gemma-3-1b"] == kinds["gemma-3-270m"] == "MQA"
    assert kinds["olmo-2-7b"] == kinds["gpt2-xl"] == "MHA"
    assert kinds["olmo-2-32b"] == kinds["llama-3.2-1b"] == "GQA"
    a = known("deepseek-v3").layers[0].attention
    assert (a.heads, a.kv_heads, a.head_dim, a.value_dim, a.latent, a.rope_dim, a.query_rank) == (
        128,
        128,
        192,
        128,
        512,
        64,
        1536,
    )
    assert a.scale == pytest.approx(0.1352338, abs=1e-7)
    assert known("deepseek-v2-lite").layers[0].attention.query_rank is None
    assert known("gemma-2-27b").layers[0].attention.scale == 144**-0.5
    assert known("gemma-2-27b").layers[0].attention.softcap == 50
    assert known("qwen2.5-7b").layers[0].attention.biases == ("q_proj", "k_proj", "v_proj")


def test_rope_and_masks() -> None:
    gemma = [layer.attention for layer in known("gemma-3-27b").layers]
    assert [a.mask for a in gemma] == [CAUSAL if i % 6 == 5 else sliding(1024) for i in range(62)]
    assert {(a.rope.theta, a.rope.kind, a.rope.factor) for a in gemma if a.rope and a.mask == CAUSAL} == {
        (1e6, "linear", 8.0)
    }
    assert {(a.rope.theta, a.rope.kind) for a in gemma if a.rope and a.mask != CAUSAL} == {(1e4, "default")}
    llama = [layer.attention for layer in known("llama-4-scout").layers]
    assert [a.rope is None for a in llama] == [i % 4 == 3 for i in range(48)]
    assert [a.temperature for a in llama] == [i % 4 == 3 for i in range(48)]
    assert [a.mask for a in llama] == [CAUSAL if i % 4 == 3 else chunked(8192) for i in range(48)]
    assert all(a.interleaved for a in llama if a.rope)
    assert known("gpt2").layers[0].attention.rope is None
    assert known("gpt2").embedding.positions == 1024
    assert all(layer.attention.temperature for layer in known("mistral-large-3").layers)
    assert not any(layer.attention.temperature for layer in known("deepseek-v3").layers)


def test_feed_forward() -> None:
    v3, maverick = known("deepseek-v3"), known("llama-4-maverick")
    assert v3.layers[2].ffn == FFN("silu", 18432, gated=True)
    moe = v3.layers[3].ffn
    assert (moe.experts, moe.chosen, moe.width, moe.shared_width, moe.correction, moe.weigh) == (
        256,
        8,
        2048,
        2048,
        True,
        "output",
    )
    assert moe.router is not None
    assert (moe.router.scores, moe.router.groups, moe.router.kept_groups, moe.router.scale) == ("sigmoid", 8, 4, 2.5)
    assert [layer.ffn.experts for layer in maverick.layers] == [0, 128] * 24
    assert (maverick.layers[0].ffn.width, maverick.layers[1].ffn.weigh) == (16384, "input")
    assert known("qwen1.5-moe-a2.7b").layers[0].ffn.shared_gate
    assert not known("qwen3-30b-a3b").layers[0].ffn.shared_width
    assert known("gpt2").layers[0].ffn == FFN("gelu_tanh", 3072, gated=False, bias=True)
    assert [layer.ffn.sparsity for layer in known("gemma-3n-e4b").layers] == [0.95] * 10 + [None] * 25
    assert known("gemma-2-2b").layers[0].ffn.activation == "gelu_tanh"


def test_ends() -> None:
    assert known("gemma-3-12b").embedding.scale == 3840**0.5
    assert known("llama-3.2-1b").head.tied
    assert not known("llama-3.1-8b").head.tied
    assert (known("gemma-2-2b").head.softcap, known("gemma-3-1b").head.softcap) == (30, None)
    parts = {part.name: dict(part.sizes) for part in known("gemma-3n-e4b").layers[0].parts}
    assert parts["altup"]["A"] == 4
    assert (parts["laurel"]["F"], parts["per-layer"]["P"]) == (64, 256)


def test_patterns() -> None:
    assert known("deepseek-v3").pattern == (Run(3, ((0, 1),)), Run(58, ((1, 1),)))
    assert known("gemma-3-27b").pattern == (Run(10, ((0, 5), (1, 1))), Run(2, ((0, 1),)))
    assert known("llama-4-scout").pattern == (Run(12, ((0, 3), (1, 1))),)
    assert pattern_of(list("aabaaba")) == (Run(2, (("a", 2), ("b", 1))), Run(1, (("a", 1),)))
    assert pattern_of(["a"]) == (Run(1, (("a", 1),)),)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=20))
def test_a_pattern_is_the_sequence(sequence: list[int]) -> None:
    told = [
        kind for times, kinds in pattern_of(sequence) for _ in range(times) for kind, count in kinds for _ in range(count)
    ]
    assert told == sequence


@every_architecture
@few
@given(data=st.data())
def test_structure_equals_the_config(architecture: str, data: st.DataObject) -> None:
    """What a config says in so many words is what the recorded pass did."""
    described = data.draw(our.tiny_config(architecture))
    c, d = described.config, description_of(described, "tiny")
    heads = getattr(c, "num_attention_heads", None) or c.n_head
    assert len(d.layers) == (getattr(c, "num_hidden_layers", None) or c.n_layer)
    assert {layer.attention.heads for layer in d.layers} == {heads}
    assert {layer.attention.head_dim for layer in d.layers} == {c.head_dim}
    assert d.vocab_size == c.vocab_size
    assert d.head.tied == c.tie_word_embeddings
    own = [layer.attention.mask for layer in d.layers if layer.attention.shares_keys_of is None]
    assert own == [spec.mask for spec in d.cache]
    if hasattr(c, "num_key_value_heads") and d.layers[0].attention.kind != "MLA":
        assert {layer.attention.kv_heads for layer in d.layers} == {c.num_key_value_heads}
    for layer in d.layers:
        if layer.ffn.experts:
            assert layer.ffn.router == c.router
            assert layer.ffn.chosen == c.router.experts_per_token
        assert layer.attention.rope is None or layer.attention.rope in (c.rope, getattr(c, "local_rope", None))
    if hasattr(c, "moe_layers"):
        assert [bool(layer.ffn.experts) for layer in d.layers] == list(c.moe_layers)
    assert d.kinds == tuple(dict.fromkeys(d.kinds))
    assert sorted(i for kind in d.kinds for i in kind.indices) == list(range(len(d.layers)))


# -- against models that run ------------------------------------------------------------------------------------------


def counting(described: Described, *, visible: bool) -> LLM:
    be = CountingBackend("float64")
    be.visible = visible
    return LLM.random(described, be, seed=1)


@every_architecture
@few
@given(data=st.data(), kv_dtype=st.sampled_from(list(KV_BYTES)))
def test_parameters_and_cache_of_a_model_that_runs(architecture: str, data: st.DataObject, kv_dtype: str) -> None:
    """Distinct weights of the tree, buffers aside; bytes of the cache as allocated, and of what it holds."""
    described = data.draw(our.tiny_config(architecture))
    d, llm = description_of(described, "tiny"), LLM.random(described, CountingBackend(), seed=0, kv_dtype=kv_dtype)
    distinct = {id(weight): weight for name, weight in leaves(llm.model.weights) if ".correction." not in name}
    assert d.parameters.total == sum(int(np.prod(weight.shape)) for weight in distinct.values())
    cache = llm.new_cache()
    slot, length = cache.add(), 0
    for count in (1, 7, 1, 22):
        rows = cache.plan([slot], [count], [True])
        llm.model.run(llm.backend, np.zeros(count, dtype=np.int64), rows, cache)
        length += count
        assert cache.nbytes == d.kv_allocated(length, kv_dtype)
        assert sum(array.nbytes for array in cache.contents(slot).values()) == d.kv_bytes(length, kv_dtype)
    assert cache.bytes_per_token == d.kv_bytes_per_token(kv_dtype)


@every_architecture
@few
@given(data=st.data(), prompt=st.integers(1, 40), tokens=st.integers(1, 4))
def test_flops_of_a_model_that_runs(architecture: str, data: st.DataObject, prompt: int, tokens: int) -> None:
    """A prompt, with the scores that its masks let through, then tokens one by one, with every product that is computed."""
    described = data.draw(our.tiny_config(architecture))
    d, llm = description_of(described, "tiny"), counting(described, visible=True)
    cache = llm.new_cache()
    slot = cache.add()

    def run(count: int) -> int:
        Counted.products = 0
        rows = cache.plan([slot], [count], [True])
        llm.model.run(llm.backend, np.ones(count, dtype=np.int64), rows, cache)
        return 2 * Counted.products

    assert run(prompt) == d.prefill_flops(prompt)
    llm.backend.visible = False  # type: ignore[attr-defined]
    for i in range(tokens):
        assert run(1) == d.decode_flops(prompt + i + 1)


@every_architecture
@few
@given(data=st.data(), past=st.integers(0, 20), count=st.integers(1, 20))
def test_flops_of_a_piece_of_a_prompt(architecture: str, data: st.DataObject, past: int, count: int) -> None:
    described = data.draw(our.tiny_config(architecture))
    d, llm = description_of(described, "tiny"), counting(described, visible=True)
    cache = llm.new_cache()
    slot = cache.add()
    for piece in filter(None, (past, count)):
        Counted.products = 0
        rows = cache.plan([slot], [piece], [True])
        llm.model.run(llm.backend, np.ones(piece, dtype=np.int64), rows, cache)
    assert 2 * Counted.products == sum(step.flops(count, past) for step in d.steps)


@every_architecture
@few
@given(data=st.data(), context=st.integers(1, 40))
def test_sums(architecture: str, data: st.DataObject, context: int) -> None:
    """Steps add up to the whole: every weight is read by some step, but for a scale that Gemma 3n may switch off."""
    described = data.draw(our.tiny_config(architecture))
    d, spec = description_of(described, "tiny"), described.architecture.weight_spec(described.config)
    once = {step.weights: step for step in d.steps}
    read = {name for names in once for name in names}
    unread = {name: tensor for name, tensor in spec.items() if name not in read and tensor.alias is None}
    assert all(name.endswith("altup.correct_output_scale") and not described.config.altup_correct_scale for name in unread)
    assert sum(step.parameters for step in once.values()) + sum(t.size for t in unread.values()) == d.parameters.total
    keys = sum(step.scores.bytes(context - 1, "float32") for step in d.steps if step.scores)
    assert d.decode_bytes(context, "q8", "float32") - keys == d.weights_read("q8") <= dict(d.weight_bytes)["q8"]
    assert dict(d.weight_bytes)["f32"] >= 4 * d.parameters.total
    flops = [max(1, len(each.layers)) * sum(step.flops(1, context - 1) for step in each.steps) for each in sections_of(d)]
    assert sum(flops) == d.decode_flops(context)


@every_architecture
@few
@given(data=st.data(), format=st.sampled_from(["q8", "q4"]))
def test_bytes_of_quantised_weights(architecture: str, data: st.DataObject, format: str) -> None:
    """Each matrix that quantising means takes what its codes and factors take; all else is bfloat16, buffers float32."""
    from npllm.grouped import marked, quantised
    from npllm.handles import Stack

    described = data.draw(our.tiny_config(architecture))
    spec = described.architecture.weight_spec(described.config)
    handles = marked(spec, random_weights(spec), format)
    size = 0
    for name, handle in handles.items():
        if isinstance(handle, Stack):
            parts = handle.weights
        else:
            parts = (handle.transposed() if spec[name].stored == "io" and len(handle.shape) == 2 else handle,)
        width = 4 if spec[name].part == "buffer" else 2
        size += sum(quantised(each, format).nbytes if each.quantisable else width * each.data.size for each in parts)
    assert dict(description_of(described, "tiny").weight_bytes)[format] == size


def test_bytes_of_quantised_weights_of_a_real_width() -> None:
    """Matrices of tiny models are too narrow for groups: Qwen3 0.6B, by hand."""
    d = known("qwen3-0.6b")
    norms = d.parameters["norms"].total
    quantised = d.parameters.total - norms  # the embedding too, which is the head
    assert dict(d.weight_bytes) == {
        "f32": 4 * d.parameters.total,
        "bf16": 2 * d.parameters.total,
        "f8_e4m3": 2 * (norms + d.parameters["embedding"].total) + fp8(d),
        "q8": 2 * norms + quantised * 34 // 32,
        "q4": 2 * norms + quantised * 18 // 32,
    }


def fp8(d: Description) -> int:
    """Bytes of attention and FFN of Qwen3 0.6B: a code each, and 4 bytes for each block of 128 x 128 (all are whole)."""
    coded = d.parameters["attention"].total + d.parameters["dense"].total
    return coded + coded // (128 * 128) * 4


def test_bytes_as_published() -> None:
    """By hand: a matrix of 300 x 200 in FP8 has 3 x 2 factors; only attention, FFN and experts are stored so."""
    matrix = Tensor((300, 200), "FD", "ffn")
    assert stored_bytes("", matrix, "bf16") == 120_000
    assert stored_bytes("", matrix, "f8_e4m3") == 60_000 + 4 * 6
    assert stored_bytes("", matrix, "f8_e4m3", Block(300, 10)) == 60_000 + 4 * 20
    assert stored_bytes("", Tensor((5, 300, 200), "EFD", "experts"), "f8_e4m3") == 5 * (60_000 + 4 * 6)
    assert stored_bytes("", Tensor((300, 200), "ED", "router"), "f8_e4m3") == 120_000
    assert stored_bytes("", Tensor((300,), "E", "buffer"), "bf16") == 1200


@given(
    window=st.none() | st.integers(1, 9),
    chunk=st.none() | st.integers(1, 9),
    start=st.integers(0, 30),
    count=st.integers(0, 30),
)
def test_pairs_of_a_mask(window: int | None, chunk: int | None, start: int, count: int) -> None:
    mask, stop = Mask(window, chunk), start + count
    assert mask.pairs(start, stop) == mask.allowed(np, np.arange(start, stop), np.arange(stop)).sum()


# -- the limit of a machine -------------------------------------------------------------------------------------------


def test_limits_by_hand() -> None:
    """Llama 3.1 8B in bf16: a token reads all but the embedding, and 8,192 tokens of keys and values."""
    d = known("llama-3.1-8b")
    read = 2 * (8_030_261_248 - 128256 * 4096 + 4096) + 8192 * 131_072
    assert d.decode_bytes(8192) == read
    most = limit(d, Machine(1e12, 1e15, ""), 8192, "bf16")
    assert (most.decode, most.decode_bound) == (pytest.approx(1e12 / read), "memory")
    assert (most.prefill, most.prefill_bound) == (pytest.approx(8192 * 1e15 / d.prefill_flops(8192)), "arithmetic")
    assert limit(d, Machine(1e12, 1e10, ""), 8192, "bf16").decode_bound == "arithmetic"


@pytest.mark.parametrize(
    ("text", "bandwidth", "flops"),
    [
        ("3350GB/s,989TFLOP/s", 3.35e12, 9.89e14),
        ("2 TFLOP/s, 100 GB/s", 1e11, 2e12),
        ("1e2GB/s 0.5TFLOPS", 1e11, 5e11),
    ],
)
def test_machines(text: str, bandwidth: float, flops: float) -> None:
    machine = parse_machine(text)
    assert (machine.bandwidth, machine.flops) == pytest.approx((bandwidth, flops))


@pytest.mark.parametrize(
    "text", ["", "fast", "100GB/s", "1TFLOP/s,2TFLOP/s", "0GB/s,1TFLOP/s", "1GB/s,1TFLOP/s,x", "-1GB/s,1TFLOP/s"]
)
def test_machines_that_are_none(text: str) -> None:
    with pytest.raises(ArgumentError, match="give bandwidth and arithmetic"):
        parse_machine(text)


def test_this_machine() -> None:
    machine = measure(threads=1)
    assert machine.bandwidth > 1e8
    assert machine.flops > 1e8
    assert machine.name.endswith("1 thread, measured")


# -- where a description comes from -----------------------------------------------------------------------------------


def test_a_fresh_process_reads_the_config_alone_and_takes_less_than_a_second(tmp_path: Path) -> None:
    """Processor time of one process, imports and all; nothing that reads weights or tokenizers is loaded, no framework."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS["DeepSeek V3"].config))
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors file")
    script = (
        "import sys, time, npllm\n"
        f"total = npllm.describe({str(tmp_path)!r}).parameters.total\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "foreign = loaded - sys.stdlib_module_names - {'numpy', 'npllm', '__main__'}\n"
        "print(total, time.process_time(), *(name for name in foreign if not name.startswith('__editable__')))\n"
    )
    runs = [
        subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    ]
    assert {run[0] for run in runs} == {"671026404352"}
    assert min(float(run[1]) for run in runs) < 1
    assert not [
        name
        for run in runs
        for name in run[2:]
        if name in ("torch", "numba", "safetensors", "tokenizers", "huggingface_hub")
    ]


def plain(d: Description) -> Description:
    """What does not depend on where it came from."""
    return dataclasses.replace(d, name="", model_type="", claim="", stored="")


def test_sources_agree(tmp_path: Path) -> None:
    values = MODELS["Qwen3 0.6B"].config
    file = tmp_path / "some name.json"
    file.write_text(json.dumps(values))
    (tmp_path / "config.json").write_text(json.dumps(values))
    same = [describe(source) for source in ("qwen3-0.6b", "Qwen3 0.6B", file, str(file), tmp_path, values)]
    assert len(set(map(plain, same))) == 1
    assert [each.name for each in same[:2]] == ["Qwen3 0.6B"] * 2
    assert describe().parameters.total > 1_000_000


# The spelling of transformers 5 for a published file.
NEW = {
    "Llama 3.2 1B": lambda c: renamed(c, {"rope_scaling": None, "rope_theta": None, "torch_dtype": None}) | {
        "dtype": "bfloat16", "rope_parameters": {"rope_theta": 500000.0} | c["rope_scaling"],
    },
    "Qwen3 30B-A3B": lambda c: renamed(c, {"num_experts": "num_local_experts"}),
    "DeepSeek V3": lambda c: renamed(c, {"rope_scaling": None, "rope_theta": None}) | {
        "rope_parameters": renamed(c["rope_scaling"], {"type": "rope_type"}) | {"rope_theta": 10000.0},
        "head_dim": 64, "qk_head_dim": 192, "rope_interleave": True,
    },
    "Gemma 3 1B": lambda c: renamed(c, dict.fromkeys(("rope_theta", "rope_local_base_freq", "sliding_window_pattern"))) | {
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(26)],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}  # fmt: skip


def renamed(values: dict[str, Any], names: dict[str, str | None]) -> dict[str, Any]:
    """`values` with other keys, and without those whose new name is None."""
    moved = {new: values[old] for old, new in names.items() if new is not None}
    return {key: value for key, value in values.items() if key not in names} | moved


@pytest.mark.parametrize("name", NEW)
def test_either_spelling(name: str) -> None:
    old = MODELS[name].config
    assert plain(describe(NEW[name](old))) == plain(describe(old))


@pytest.mark.parametrize("kind", REGISTRY)
def test_any_registered_type(kind: str) -> None:
    """Class defaults are enough, but for a number that DeepSeek V2 has no default of. Every operation has a meaning."""
    values = {"model_type": kind} | ({"num_experts_per_tok": 6} if kind == "deepseek_v2" else {})
    d = describe(values)
    assert d.model_type == kind
    assert d.decode_flops(10) > d.parameters.active
    meanings = {step.op: step.meaning for step in d.steps}
    assert all(meaning for op, meaning in meanings.items() if op)
    assert "sqrt" in meanings.get("rms_norm", meanings.get("layer_norm", ""))
    assert inspect.cleandoc(DEFINITIONS["linear"].__doc__ or "").startswith(meanings["linear"])


def test_only_the_config_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / "served"
    served.mkdir()
    (served / "config.json").write_text(json.dumps(MODELS["gpt2"].config))
    (served / "model.safetensors").write_bytes(b"0" * 100)
    (served / "tokenizer.json").write_bytes(b"{}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with HubServer({"someone/tiny": served}) as hub:
        here = functools.partial(fetch, cache_dir=tmp_path / "cache", endpoint=hub.url)
        monkeypatch.setattr("npllm.hub.fetch", here)
        d = describe("someone/tiny")
    assert (d.name, d.parameters.total) == ("someone/tiny", 124_439_808)
    fetched = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_symlink() or path.suffix == ".json"}
    assert fetched == {"config.json"}


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("deepsek-v3", ArgumentError, r"^deepsek-v3: no such file or folder, .*nearest: deepseek-v3, "),
        ("qwen3-7b", ArgumentError, r"nearest: .*qwen3-1\.7b"),
        ("", ArgumentError, "the model's name is empty"),
        ("./nothing", ArgumentError, r"^\./nothing: no such file or folder$"),
        ("some/config.json", ArgumentError, r"^some/config\.json: no such file or folder$"),
        ({"model_type": "qwen4"}, ConfigError, "model_type 'qwen4' is not supported; supported: qwen"),
        ({"hidden_size": 8}, ConfigError, "has no model_type"),
        ({"model_type": "llama", "num_hidden_layers": "many"}, ConfigError, "num_hidden_layers"),
    ],
)
def test_bad_sources(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        describe(source)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size", "head_dim"])
def test_widths_beyond_any_model(key: str) -> None:
    """Refused at once, and not after filling the memory."""
    with pytest.raises(ConfigError, match="numbers per token: too wide"):
        describe({"model_type": "llama", key: 2**30})


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; a model folder needs one"):
        describe(tmp_path)
    for text, message in (("{", "not valid JSON"), ("[]", "must hold a JSON object"), ("\0", "not valid JSON")):
        (tmp_path / "config.json").write_text(text)
        for source in (tmp_path, tmp_path / "config.json"):
            with pytest.raises(ConfigError, match=message):
                describe(source)


def test_descriptions_do_not_change() -> None:
    d = known("gpt2")
    with pytest.raises(dataclasses.FrozenInstanceError):
        d.layers = ()  # type: ignore[misc]
    assert hash(d) == hash(describe("gpt2"))
    assert d == describe("gpt2") != known("gpt2-xl")


# -- places in the source ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["deepseek-v3", "gemma-3n-e4b", "llama-4-scout", "olmo-2-7b", "gpt2", "qwen1.5-moe-a2.7b", "mixtral-8x7b"]
)
def test_places_are_where_they_say(name: str) -> None:
    """The line of a step stands in the function of that name and asks for the operation; its block is a `def`."""
    for step in known(name).steps:
        lines = (PACKAGE.parent / step.place.file).read_text(encoding="utf-8").splitlines()
        above = [line for line in lines[: step.place.line] if line.lstrip().startswith("def ")]
        assert f"def {step.place.function}(" in above[-1]
        assert not step.place.file.startswith(("npllm/blocks", "npllm/backend", "npllm/describing"))
        if step.op in DEFINITIONS or step.op == "rope":
            assert "be." in statement(step.place)
        if step.op:
            assert step.block is not None
            assert step.meaning
            line = (PACKAGE.parent / step.block.file).read_text(encoding="utf-8").splitlines()[step.block.line - 1]
            assert line.lstrip().startswith(f"def {step.block.function}(")


def test_scores() -> None:
    """MLA, 2 heads, keys 3 + 2, values 4, latent 7: absorbed for one token, expanded for many; by hand."""
    scores = Scores(2, 1, 5, 4, CAUSAL, latent=7, rope_dim=2)
    assert scores.products(1, 9) == 2 * (3 * 7 + 7 * 4) + 10 * 2 * (9 + 7)
    assert scores.products(50, 0) == 50 * 7 * 2 * (3 + 4) + 50 * 51 // 2 * 2 * (5 + 4)
    assert scores.bytes(9, "bfloat16") == 10 * 9 * 2
    assert Scores(4, 2, 6, 6, sliding(3)).bytes(9, "float32") == 3 * 2 * 12 * 4


def test_formats() -> None:
    assert tuple(dict(known("gpt2").weight_bytes)) == FORMATS
    assert [known(name).stored for name in ("deepseek-v3", "olmo-2-7b", "llama-3.1-8b")] == ["f8_e4m3", "f32", "bf16"]
