"""config.json: both spellings, class defaults, and every bad value refused in one line that names its field."""

import json
import logging
import math
import time
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllm.blocks import CAUSAL, Rope, Router, chunked, sliding
from npllm.config import Reader, nearest
from npllm.errors import ConfigError, NpllmError
from npllm.models import REGISTRY, interpret, read_config
from tests.models import ABSENT, make_config
from tests.refusals import refused

ARCHITECTURES = sorted(REGISTRY)


def read(architecture: str = "qwen3", **changes: Any) -> Any:
    return interpret(make_config(architecture, **changes)).config


# -- the file --


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    refused(ConfigError, lambda: read_config(tmp_path), str(tmp_path / "config.json"), "no such file")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "JSON"), (b"{", "JSON"), (b"{'a': 1}", "JSON"), (b"\xff\xfe{}", "JSON"), (b"\xef\xbb\xbf{}", "JSON"),
        (b'{"hidden_size": 1' + b"0" * 5000 + b"}", "JSON"), (b"[" * 100_000, "JSON"), (b'{"a":' * 100_000, "JSON"),
        (b"[]", "object"), (b"null", "object"), (b'"qwen3"', "object"), (b"NaN", "object"), (b"{} {}", "JSON"),
        (b'{"rope_scaling":' + b"[" * 300 + b"]" * 300 + b"}", "deep"),
    ],
    ids=range(14),
)  # fmt: skip
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes, problem: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    refused(ConfigError, lambda: read_config(tmp_path), str(path), problem)


def test_a_folder_in_the_place_of_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    refused(ConfigError, lambda: read_config(tmp_path), "config.json", "cannot be read")


# -- model_type --


def test_without_model_type_the_supported_ones_are_listed() -> None:
    refused(ConfigError, lambda: read(model_type=ABSENT), "model_type", *ARCHITECTURES)


@pytest.mark.parametrize(("kind", "first"), [("qwen4", "qwen3"), ("Qwen3", "qwen3"), ("LLAMA", "llama"), ("gpt_2", "gpt2")])
def test_an_unknown_model_type_lists_the_nearest_first(kind: str, first: str) -> None:
    refused(ConfigError, lambda: read(model_type=kind), repr(kind), f"supported: {first}")


@pytest.mark.parametrize("kind", ["", "mamba", 7, [], {}, ["qwen3"], True, "x" * 10**6, "\x1b[2J\n"])
def test_a_model_type_that_is_nothing_known_is_refused(kind: Any) -> None:
    refused(ConfigError, lambda: read(model_type=kind), "model_type", *ARCHITECTURES)


def test_nearest_puts_likely_names_first_and_keeps_all() -> None:
    assert nearest("qwen", ["gpt2", "llama", "qwen3"]) == "qwen3, gpt2, llama"
    assert nearest("", ["b", "a"]) == "a, b"


# -- values --

DECODER_SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings"]  # fmt: skip
SIZES = {
    "gemma2": [*DECODER_SIZES, "head_dim"],
    "gemma3_text": [*DECODER_SIZES, "head_dim"],
    "qwen3": [*DECODER_SIZES, "head_dim"],
    "qwen2": DECODER_SIZES,
    "llama": DECODER_SIZES,
    "llama4_text": [
        *DECODER_SIZES,
        "intermediate_size_mlp",
        "num_local_experts",
        "num_experts_per_tok",
        "floor_scale",
        "no_rope_layer_interval",
        "interleave_moe_layer_step",
    ],
    "mistral": [*DECODER_SIZES, "head_dim"],
    "olmo2": DECODER_SIZES,
    "gpt2": ["vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "n_inner"],
}
NAMED_SIZES = [(architecture, key) for architecture, keys in SIZES.items() for key in keys]


@pytest.mark.parametrize(("architecture", "key"), NAMED_SIZES)
def test_sizes_that_no_model_has_are_refused(architecture: str, key: str) -> None:
    for value in (0, -1, 10**18, 10**4000, 1.5, "32", [], {}, True, math.nan, math.inf, 1e300):
        refused(ConfigError, lambda value=value: read(architecture, **{key: value}), key)


@pytest.mark.parametrize(("architecture", "key"), [pair for pair in NAMED_SIZES if pair[1] != "num_key_value_heads"])
def test_null_and_absent_mean_the_class_default(architecture: str, key: str) -> None:
    roomy = {"n_embd": 768} if architecture == "gpt2" else {"hidden_size": 4096, "num_attention_heads": 32}
    by_null = read(architecture, **roomy | {key: None})
    assert by_null == read(architecture, **roomy | {key: ABSENT})


def test_null_key_value_heads_are_all_heads() -> None:
    assert read("qwen3", num_key_value_heads=None).num_key_value_heads == 4
    assert read("llama", num_key_value_heads=None).num_key_value_heads == 4
    assert read("llama", num_key_value_heads=ABSENT).num_key_value_heads == 4
    refused(ConfigError, lambda: read("mistral", num_key_value_heads=ABSENT), "num_key_value_heads = 8")
    refused(ConfigError, lambda: read("qwen3", num_key_value_heads=ABSENT), "num_key_value_heads = 32")


def test_class_defaults_are_those_of_transformers() -> None:
    qwen = interpret({"model_type": "qwen3"}).config
    assert (qwen.vocab_size, qwen.hidden_size, qwen.head_dim, qwen.num_key_value_heads) == (151936, 4096, 128, 32)
    assert (qwen.rms_norm_eps, qwen.tie_word_embeddings, qwen.rope.theta) == (1e-6, False, 10000.0)
    llama = interpret({"model_type": "llama"}).config
    assert (llama.vocab_size, llama.intermediate_size, llama.head_dim) == (32000, 11008, 128)
    assert (llama.num_key_value_heads, llama.max_position_embeddings, llama.rms_norm_eps) == (32, 2048, 1e-6)
    qwen2 = interpret({"model_type": "qwen2"}).config
    assert (qwen2.vocab_size, qwen2.head_dim, qwen2.num_key_value_heads, qwen2.masks) == (151936, 128, 32, (CAUSAL,) * 32)
    mistral = interpret({"model_type": "mistral"}).config
    assert (mistral.intermediate_size, mistral.num_key_value_heads, mistral.head_dim) == (14336, 8, 128)
    assert (mistral.max_position_embeddings, mistral.rms_norm_eps, mistral.mask) == (131072, 1e-6, sliding(4096))
    olmo2 = interpret({"model_type": "olmo2"}).config
    assert (olmo2.vocab_size, olmo2.num_key_value_heads, olmo2.rms_norm_eps) == (50304, 32, 1e-5)
    gpt2 = interpret({"model_type": "gpt2"}).config
    assert (gpt2.n_embd, gpt2.n_inner, gpt2.n_positions, gpt2.tie_word_embeddings) == (768, 3072, 1024, True)


def test_class_defaults_of_llama4() -> None:
    c = interpret({"model_type": "llama4_text"}).config
    assert (c.vocab_size, c.hidden_size, c.intermediate_size, c.intermediate_size_mlp) == (202048, 5120, 8192, 16384)
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rms_norm_eps) == (40, 8, 128, 1e-5)
    assert (c.max_position_embeddings, c.rope, c.tie_word_embeddings) == (131072, Rope(128, 5e5), False)
    assert (c.num_local_experts, c.router) == (16, Router(1, scores="sigmoid", by="logits"))
    assert (c.use_qk_norm, c.attention_bias) == (True, False)
    assert (c.attn_temperature_tuning, c.floor_scale, c.attn_scale) == (True, 8192, 0.1)
    assert [layer.mask for layer in c.layers] == [chunked(8192), chunked(8192), chunked(8192), CAUSAL] * 12
    assert all(layer.moe for layer in c.layers)


def test_which_layers_of_llama4_do_what() -> None:
    """Lists before intervals; `layer_types` names masks and leaves RoPE alone."""

    def layers(**said: Any) -> list[tuple[bool, bool, bool]]:
        found = read("llama4_text", num_hidden_layers=4, **said).layers
        return [(layer.rope, layer.moe, layer.mask != CAUSAL) for layer in found]

    both = {"no_rope_layer_interval": 3, "interleave_moe_layer_step": 2}
    assert layers(**both) == [(True, False, True), (True, True, True), (False, False, False), (True, True, True)]
    assert layers(**both, moe_layers=[], no_rope_layers=[]) == [(rope, False, mask) for rope, _, mask in layers(**both)]
    listed = layers(**both, moe_layers=[0, 9], no_rope_layers=[0, 1, 0, 1])
    assert listed == [(False, True, False), (True, False, True), (False, False, False), (True, False, True)]
    types = ["full_attention", "chunked_attention"] * 2
    assert [mask for *_, mask in layers(**both, layer_types=types)] == [False, True, False, True]
    assert layers(layer_types=["full_attention"] * 4, attention_chunk_size=None)[0] == (True, False, False)


def test_temperature_tuning_may_be_a_number() -> None:
    said = [
        read("llama4_text", attn_temperature_tuning=value).attn_temperature_tuning for value in (4, True, None, 0, False)
    ]
    assert said == [True, True, True, False, False]


def test_a_head_dim_of_null_is_not_the_class_default_of_llama4() -> None:
    assert read("llama4_text", head_dim=ABSENT).head_dim == 128
    assert read("llama4_text", head_dim=None).head_dim == 8


def test_class_defaults_of_gemma() -> None:
    gemma2, gemma3 = (interpret({"model_type": kind}).config for kind in ("gemma2", "gemma3_text"))
    for c in (gemma2, gemma3):
        assert (c.hidden_size, c.intermediate_size, c.num_hidden_layers) == (2304, 9216, 26)
        assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.query_pre_attn_scalar) == (8, 4, 256, 256)
        assert (c.hidden_act, c.rms_norm_eps, c.tie_word_embeddings) == ("gelu_pytorch_tanh", 1e-6, True)
    assert (gemma2.vocab_size, gemma2.max_position_embeddings, gemma2.rope.theta) == (256000, 8192, 1e4)
    assert (gemma2.attn_logit_softcapping, gemma2.final_logit_softcapping) == (50.0, 30.0)
    assert gemma2.masks == (sliding(4096), CAUSAL) * 13
    assert (gemma3.vocab_size, gemma3.max_position_embeddings) == (262208, 131072)
    assert (gemma3.rope.theta, gemma3.local_rope.theta, gemma3.final_logit_softcapping) == (1e6, 1e4, None)
    assert gemma3.masks == ((sliding(4096),) * 5 + (CAUSAL,)) * 4 + (sliding(4096),) * 2


def test_a_cap_of_null_is_none() -> None:
    uncapped = read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (uncapped.attn_logit_softcapping, uncapped.final_logit_softcapping) == (None, None)


def test_gemma_reads_hidden_activation_and_not_hidden_act() -> None:
    assert read("gemma2", hidden_act="mish", hidden_activation="silu").hidden_act == "silu"
    assert read("gemma2", hidden_act="silu").hidden_act == "gelu_pytorch_tanh"


def test_what_says_which_layers_are_global() -> None:
    """`layer_types`, then `sliding_window_pattern`, then the default of 6; what transformers writes besides is not read."""

    def full_layers(**said: Any) -> list[int]:
        masks = read("gemma3_text", num_hidden_layers=12, **{"sliding_window_pattern": ABSENT} | said).masks
        return [i for i, mask in enumerate(masks) if mask == CAUSAL]

    assert full_layers() == full_layers(sliding_window_pattern=None) == [5, 11]
    assert full_layers(_sliding_window_pattern=4) == [5, 11]
    assert full_layers(_sliding_window_pattern=4, sliding_window_pattern=5) == [4, 9]
    types = ["full_attention"] + ["sliding_attention"] * 11
    assert full_layers(_sliding_window_pattern=4, sliding_window_pattern=5, layer_types=types) == [0]
    assert full_layers(layer_types=["full_attention"] * 12, sliding_window=None) == list(range(12))


def test_whole_floats_are_integers() -> None:
    assert read(hidden_size=64.0).hidden_size == 64


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("qwen3", {"num_key_value_heads": 3}, ["num_attention_heads = 4", "num_key_value_heads = 3"]),
        ("qwen3", {"num_key_value_heads": 8}, ["num_attention_heads = 4", "num_key_value_heads = 8"]),
        ("llama", {"hidden_size": 30}, ["hidden_size = 30", "num_attention_heads = 4"]),
        ("gpt2", {"n_head": 5}, ["n_embd = 32", "n_head = 5"]),
        ("qwen3", {"head_dim": 15}, ["head_dim = 15", "even"]),
        ("llama", {"hidden_size": 28}, ["head_dim = 7", "even"]),
        ("qwen3", {"hidden_act": "relu6"}, ["hidden_act", "relu6", "silu"]),
        ("qwen3", {"hidden_act": ["silu"]}, ["hidden_act", "string"]),
        ("gpt2", {"activation_function": 3}, ["activation_function"]),
        ("qwen3", {"rms_norm_eps": 0}, ["rms_norm_eps"]),
        ("qwen3", {"rms_norm_eps": "1e-6"}, ["rms_norm_eps"]),
        ("qwen3", {"rms_norm_eps": 10**400}, ["rms_norm_eps"]),
        ("qwen3", {"attention_bias": "false"}, ["attention_bias", "true or false"]),
        ("llama", {"mlp_bias": 1}, ["mlp_bias"]),
        ("qwen3", {"tie_word_embeddings": 0}, ["tie_word_embeddings"]),
        ("qwen3", {"use_sliding_window": None, "sliding_window": -1}, ["sliding_window"]),
        ("qwen3", {"layer_types": ["full_attention"]}, ["layer_types", "1 layers", "2"]),
        ("qwen3", {"layer_types": ["full_attention", "mamba"]}, ["mamba"]),
        ("qwen3", {"layer_types": "full_attention"}, ["layer_types"]),
        ("qwen3", {"layer_types": [1, 2]}, ["layer_types"]),
        ("qwen3", {"layer_types": []}, ["layer_types", "0 layers", "2"]),
        ("gemma2", {"layer_types": ["sliding_attention"] * 3}, ["layer_types", "3 layers", "2"]),
        ("gemma3_text", {"layer_types": ["sliding_attention"]}, ["layer_types", "1 layers", "2"]),
        ("gemma3_text", {"layer_types": ["sliding_attention", "chunked_attention"]}, ["chunked_attention"]),
        ("gemma3_text", {"sliding_window_pattern": 0}, ["sliding_window_pattern = 0"]),
        ("gemma3_text", {"sliding_window": None}, ["sliding_window = null", "sliding_attention"]),
        ("gemma2", {"sliding_window": None}, ["sliding_window = null", "sliding_attention"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention = true"]),
        ("gemma3_text", {"use_bidirectional_attention": True}, ["use_bidirectional_attention = true"]),
        ("gemma2", {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar = 0"]),
        ("gemma2", {"attn_logit_softcapping": 0.0}, ["attn_logit_softcapping = 0.0"]),
        ("gemma2", {"final_logit_softcapping": -30.0}, ["final_logit_softcapping = -30.0"]),
        ("gemma2", {"hidden_activation": "relu6"}, ["hidden_activation", "relu6"]),
        ("gemma3_text", {"rope_local_base_freq": 0}, ["rope_local_base_freq = 0"]),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling", "factor"]),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "ntk"}}}, ["sliding_attention: rope_type"]),
        ("llama4_text", {"no_rope_layers": [1]}, ["no_rope_layers", "1 layers", "2"]),
        ("llama4_text", {"no_rope_layers": [1, "0"]}, ["no_rope_layers", "list of integers"]),
        ("llama4_text", {"no_rope_layers": 1}, ["no_rope_layers = 1"]),
        ("llama4_text", {"moe_layers": [-1]}, ["moe_layers = [-1]"]),
        ("llama4_text", {"layer_types": ["chunked_attention"] * 3}, ["layer_types", "3 layers", "2"]),
        ("llama4_text", {"layer_types": ["sliding_attention"] * 2}, ["sliding_attention"]),
        ("llama4_text", {"attention_chunk_size": None}, ["attention_chunk_size = null", "chunked_attention"]),
        ("llama4_text", {"attention_chunk_size": 0}, ["attention_chunk_size = 0"]),
        ("llama4_text", {"num_local_experts": 2, "num_experts_per_tok": 3}, ["num_experts_per_tok = 3", "2"]),
        ("llama4_text", {"attn_temperature_tuning": "yes"}, ["attn_temperature_tuning"]),
        ("llama4_text", {"attn_scale": float("nan")}, ["attn_scale"]),
        ("qwen3", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
        ("gpt2", {"num_attention_heads": 5}, ["n_embd = 32", "n_head = 5"]),
        ("gemma3_text", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, ["truncate = false"]),
    ],
)
def test_values_that_fit_nothing_are_refused(architecture: str, changes: dict[str, Any], words: list[str]) -> None:
    refused(ConfigError, lambda: read(architecture, **changes), *words)


def test_a_value_is_shown_short_and_on_one_line() -> None:
    refused(ConfigError, lambda: read(hidden_act="\x1b[31m\n" * 1000), "hidden_act = ", "...")
    refused(ConfigError, lambda: read(layer_types=["\x1b[31m\n" * 1000] * 2), "layer type", "...")


# -- RoPE --

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def test_old_and_new_spelling_of_rope_are_the_same() -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    for scaling in ({"rope_type": "llama3"} | llama3, YARN, {"rope_type": "linear", "factor": 2.0}):
        old = read(rope_theta=5e5, rope_scaling=scaling)
        assert read(rope_theta=ABSENT, rope_parameters=scaling | {"rope_theta": 5e5}) == old
        renamed = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
        assert read(rope_theta=5e5, rope_scaling=renamed) == old
        assert old.rope.kind == scaling["rope_type"]
        assert old.rope.theta == 5e5
    assert read(rope_theta=5e5, rope_scaling=None) == read(rope_theta=ABSENT, rope_parameters={"rope_theta": 5e5})


def test_yarn_falls_back_to_the_trained_context() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0}
    assert read(rope_scaling=scaling, max_position_embeddings=512).rope.original == 512
    assert read(rope_scaling=scaling, original_max_position_embeddings=128).rope.original == 128
    assert read(rope_scaling=YARN, original_max_position_embeddings=128).rope.original == 128


def test_rope_per_layer_type_in_both_spellings(caplog: pytest.LogCaptureFixture) -> None:
    slowed = {"rope_type": "linear", "factor": 8.0}
    sections = {"full_attention": slowed | {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 2e4}}
    new = read("gemma3_text", rope_theta=ABSENT, rope_parameters=sections)
    assert (new.rope.theta, new.rope.kind, new.rope.factor) == (5e5, "linear", 8.0)
    assert (new.local_rope.theta, new.local_rope.kind) == (2e4, "default")
    assert read("gemma3_text", rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling=slowed) == new
    assert read("gemma3_text", rope_theta=7, rope_local_base_freq=7, rope_parameters=sections) == new
    plain = {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 2e4}}
    assert read("gemma3_text", rope_theta=7, rope_parameters=plain, rope_scaling=slowed) == new
    assert not caplog.text
    read("gemma3_text", rope_parameters={"rope_type": "linear", "factor": 8.0})
    assert "rope_parameters: these keys are unknown to npllm and have no effect: factor, rope_type" in caplog.text


def test_rope_scaling_outranks_rope_parameters(caplog: pytest.LogCaptureFixture) -> None:
    """What people add to a file that transformers 5 wrote."""
    written = {"rope_type": "default", "rope_theta": 5e5}
    rope = read(rope_theta=1e6, rope_scaling=YARN, rope_parameters=written).rope
    assert (rope.kind, rope.theta) == ("yarn", 1e6)
    assert "rope_scaling" in caplog.text
    assert read(rope_scaling={}, rope_parameters=written).rope.theta == 5e5


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, ["rope_scaling", "rope_type", "longrope", "yarn"]),
        ({"type": "ntk", "factor": 2.0}, ["type", "ntk", "default"]),
        ({"rope_type": [["yarn"]], "factor": 2.0}, ["rope_type"]),
        ({"rope_type": "yarn"}, ["factor"]),
        ({"rope_type": "linear", "factor": 0}, ["factor"]),
        ({"rope_type": "linear", "factor": "2"}, ["factor"]),
        ({"rope_type": "linear", "factor": math.nan}, ["factor"]),
        ({"rope_type": "linear", "factor": 1e-300}, ["frequencies"]),
        (YARN | {"original_max_position_embeddings": 0}, ["original_max_position_embeddings"]),
        (YARN | {"beta_fast": -1}, ["beta_fast"]),
        (YARN | {"beta_slow": 1e-308}, ["frequencies"]),
        (YARN | {"beta_slow": 1e308}, ["frequencies"]),
        (YARN | {"mscale_all_dim": 1e200}, ["frequencies"]),
        (YARN | {"rope_theta": 1}, ["rope_theta"]),
        (YARN | {"rope_theta": math.inf}, ["rope_theta"]),
        (YARN | {"rope_theta": 1e300}, ["rope_theta"]),
        (YARN | {"rope_theta": 1e-300}, ["rope_theta"]),
        (YARN | {"truncate": "no"}, ["truncate"]),
        (YARN | {"mscale": -1}, ["mscale"]),
        (YARN | {"attention_factor": 0}, ["attention_factor"]),
        (YARN | {"partial_rotary_factor": 0.25}, ["partial_rotary_factor"]),
        ("yarn", ["rope_scaling"]),
        ([], ["rope_scaling"]),
    ],
)
def test_rope_parameters_that_fit_nothing_are_refused(scaling: Any, words: list[str]) -> None:
    refused(ConfigError, lambda: read(rope_scaling=scaling), *words)


def test_theta_is_checked_without_scaling_too() -> None:
    for theta in (0, -1, "1e4", math.nan, 1e-200, 1e300):
        refused(ConfigError, lambda theta=theta: read(rope_theta=theta), "rope_theta")


# -- sliding windows --


def test_layers_from_max_window_layers_on_see_a_window() -> None:
    window = {"use_sliding_window": True, "sliding_window": 7}
    assert read(**window, max_window_layers=1).masks == (CAUSAL, sliding(7))
    assert read(**window, layer_types=["sliding_attention", "full_attention"]).masks == (sliding(7), CAUSAL)
    assert read(use_sliding_window=False, sliding_window=7, max_window_layers=0).masks == (CAUSAL, CAUSAL)
    assert read(use_sliding_window=True, sliding_window=None, max_window_layers=0).masks == (CAUSAL, CAUSAL)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_encoder_is_refused(architecture: str) -> None:
    refused(ConfigError, lambda: read(architecture, is_causal=False), "is_causal = false", "is not supported")
    assert read(architecture, is_causal=True) == read(architecture)


def test_gpt2_reads_the_names_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    own = {"n_embd": 24, "n_positions": 50, "n_head": 3, "n_layer": 4}
    named = {"hidden_size": 24, "max_position_embeddings": 50, "num_attention_heads": 3, "num_hidden_layers": 4}
    assert read("gpt2", **named) == read("gpt2", **own)
    assert read("gpt2", **own | {"num_attention_heads": 2}) == read("gpt2", **own | {"n_head": 2})
    assert not caplog.records


# -- keys that nobody reads --


def warnings_of(caplog: pytest.LogCaptureFixture, values: dict[str, Any]) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "npllm"):
        interpret(values)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unknown_keys_are_warned_about_once_by_name(architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    values = make_config(architecture, zebra=1, alibi_slopes=30.0, _private=1)
    (warning,) = warnings_of(caplog, values)
    assert "alibi_slopes, zebra" in warning
    assert "_private" not in warning
    assert warnings_of(caplog, make_config(architecture)) == []


def test_unknown_keys_in_the_rope_section_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    (warning,) = warnings_of(caplog, make_config(rope_scaling=YARN | {"zebra": 1, "type": "yarn"}))
    assert "rope_scaling" in warning
    assert warning.endswith(": zebra")


def test_a_key_cannot_steer_the_terminal(caplog: pytest.LogCaptureFixture) -> None:
    (warning,) = warnings_of(caplog, make_config(**{"\x1b[2J\n": 1, "k" * 10_000: 1}))
    assert warning.isprintable()
    assert len(warning) < 500


def test_keys_of_real_files_without_effect_are_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    usual = {"torch_dtype": "bfloat16", "dtype": "bfloat16", "transformers_version": "5.2", "use_cache": True,
             "attention_dropout": 0.0, "initializer_range": 0.02, "_name_or_path": "x"}  # fmt: skip
    assert warnings_of(caplog, make_config("qwen3", **usual, pad_token_id=None, max_window_layers=28)) == []
    assert warnings_of(caplog, make_config("llama", **usual, pretraining_tp=1)) == []
    old = {"n_ctx": 1024, "summary_type": "cls_index", "task_specific_params": {}, "resid_pdrop": 0.1}
    assert warnings_of(caplog, make_config("gpt2", **usual, **old)) == []


def test_remote_code_is_ignored_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    (warning,) = warnings_of(caplog, make_config(auto_map={"AutoModelForCausalLM": "modeling.Evil"}))
    assert "auto_map" in warning


@pytest.mark.parametrize("value", [{"quant_method": "awq"}, {"bits": 4}, "gptq", ["awq"], {"quant_method": ["\n"]}])
def test_quantised_checkpoints_are_refused(value: Any) -> None:
    refused(ConfigError, lambda: read(quantization_config=value), "quantization_config")


def test_an_empty_quantisation_is_none() -> None:
    assert read(quantization_config=None) == read(quantization_config={}) == read()


# -- multimodal wrappers --


def test_the_text_part_of_a_wrapper_is_read(caplog: pytest.LogCaptureFixture) -> None:
    text = make_config()
    wrapper = {"model_type": "some_vl", "vision_config": {"depth": 3}, "text_config": text, "image_token_id": 5}
    with caplog.at_level(logging.WARNING, "npllm"):
        assert interpret(wrapper).config == interpret(text).config
    assert any("text part" in record.getMessage() for record in caplog.records)


def test_a_wrapper_and_its_text_part_can_each_tie_the_head() -> None:
    """transformers 5 writes a tied Mistral 3 with true in the wrapper and false in its text part."""
    silent, told = make_config(tie_word_embeddings=ABSENT), make_config(tie_word_embeddings=False)
    for text in (silent, told):
        assert interpret({"text_config": text, "tie_word_embeddings": True}).config.tie_word_embeddings
        assert not interpret({"text_config": text}).config.tie_word_embeddings
    assert interpret({"text_config": make_config(), "tie_word_embeddings": False}).config.tie_word_embeddings


def test_errors_in_the_text_part_say_where() -> None:
    refused(ConfigError, lambda: interpret({"text_config": make_config(hidden_size=-1)}), "text_config", "hidden_size")
    refused(ConfigError, lambda: interpret({"model_type": "qwen3", "text_config": {}}), "text_config", "model_type")


# -- the reader --


def test_a_reader_names_the_section_it_reads() -> None:
    inner = Reader({"a": {"b": "x"}}, "file.json").section("a")
    assert inner is not None
    refused(ConfigError, lambda: inner.integer("b", 1), 'file.json: a: b = "x"')


# -- fuzz --

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 70), st.integers(), st.integers(10**300, 10**400), st.floats(),
    st.text(max_size=8), st.sampled_from(["silu", "gelu_new", "yarn", "llama3", "linear", "default", "full_attention"]),
)  # fmt: skip
ROPE_KEYS = ["rope_type", "type", "factor", "original_max_position_embeddings", "rope_theta", "low_freq_factor", "beta_fast",
             "high_freq_factor", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"]  # fmt: skip
KEYS = st.one_of(st.text(max_size=4), st.sampled_from(ROPE_KEYS))
JSON_VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=8,
)
ROPES = st.dictionaries(st.sampled_from(ROPE_KEYS), LEAVES, max_size=6)


@cache
def keys_of(architecture: str) -> list[str]:
    """The keys that an architecture reads."""
    reader = Reader(make_config(architecture))
    interpret(reader.values).architecture.Config.read(reader)
    return sorted(reader.seen)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A valid config with the values of some keys replaced by anything that JSON can say."""
    architecture = draw(st.sampled_from(ARCHITECTURES))
    keys = [*keys_of(architecture), "text_config", "quantization_config", "auto_map"]
    changed = draw(st.lists(st.sampled_from(keys), min_size=1, max_size=4, unique=True))
    values = {key: draw(st.one_of(JSON_VALUES, ROPES) if "rope" in key else JSON_VALUES) for key in changed}
    return make_config(architecture, **values) | draw(st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=2))


def reads_or_refuses(interpreted: Callable[[], Any]) -> None:
    """A Config whose spec can be counted, or a ConfigError of one line; quickly, and without a large allocation."""
    start = time.process_time()
    tracemalloc.start()
    try:
        described = interpreted()
        described.architecture.weight_spec(described.config)
    except ConfigError as refusal:
        problem = str(refusal)
    else:
        problem = ""
    largest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert problem == "" or problem.isprintable()
    assert time.process_time() - start < 5.0
    assert largest < 64 << 20


@given(configs())
def test_any_values_give_a_config_or_an_error_that_names_the_field(values: dict[str, Any]) -> None:
    reads_or_refuses(lambda: interpret(values))


@given(st.dictionaries(st.one_of(st.text(max_size=5), st.just("model_type")), JSON_VALUES, max_size=4))
def test_any_object_gives_a_config_or_an_error(values: dict[str, Any]) -> None:
    reads_or_refuses(lambda: interpret(values))


@given(st.one_of(st.binary(max_size=100), JSON_VALUES.map(lambda value: json.dumps(value).encode())))
def test_any_file_gives_a_config_or_an_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(NpllmError) as caught:
        read_config(folder)
    assert str(caught.value).isprintable()
