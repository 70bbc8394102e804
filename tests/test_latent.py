"""DeepSeek V2, V3 and Mistral Large 3: what their config.json may say, how their tensors may be stored, latent attention."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import npllm
from npllm.backend import Backend
from npllm.cache import KV_BYTES, capacity
from npllm.errors import CheckpointError, ConfigError
from npllm.models import interpret
from npllm.weights import count_parameters
from tests import strategies as our
from tests.compare import agree
from tests.experts import fused, save_model
from tests.export import TRUTH
from tests.models import ABSENT, make_config, make_tensors
from tests.refusals import refused
from tests.steps import in_pieces

ARCHITECTURES = ("deepseek_v2", "deepseek_v3", "mistral4")
IDS = np.array([[5, 250, 17, 3, 99, 7, 42, 11, 300]])

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def read(architecture: str = "deepseek_v3", **changes: Any) -> Any:
    return interpret(make_config(architecture, **changes)).config


# -- config.json ------------------------------------------------------------------------------------------------------


def test_class_defaults_are_those_of_transformers() -> None:
    v3 = interpret({"model_type": "deepseek_v3"}).config
    assert v3 == interpret({"model_type": "kimi_k2"}).config
    assert (v3.hidden_size, v3.num_hidden_layers, v3.n_routed_experts, v3.router.scale) == (7168, 61, 256, 2.5)
    assert (v3.router.groups, v3.router.kept_groups, v3.router.experts_per_token) == (8, 4, 8)
    assert (v3.router.scores, v3.router.ranking, v3.router.normalise) == ("sigmoid", "pair", True)
    assert (v3.head_dim, v3.rope.dim, v3.moe_layers) == (192, 64, (False,) * 3 + (True,) * 58)
    v2 = interpret({"model_type": "deepseek_v2", "num_experts_per_tok": 6}).config
    assert (v2.hidden_size, v2.moe_intermediate_size, v2.n_routed_experts, v2.router.groups) == (4096, 1407, 64, 1)
    assert (all(v2.moe_layers), v2.router.normalise, v2.router.scale, v2.scale) == (True, False, 1.0, 192**-0.5)
    mistral4 = interpret({"model_type": "mistral4"}).config
    assert (mistral4.head_dim, mistral4.kv_lora_rank, mistral4.n_routed_experts) == (128, 256, 128)
    assert (mistral4.rope.kind, mistral4.rope.factor, mistral4.rope.original) == ("yarn", 128.0, 8192)
    assert (mistral4.llama_4_scaling_beta, mistral4.trained_context) == (0.1, 8192)
    assert (mistral4.router.scores, mistral4.router.normalise, mistral4.router.scale) == ("softmax", True, 1.0)


def test_null_is_one_group_of_all_experts() -> None:
    router = read("deepseek_v2", n_group=None, topk_group=None).router
    assert (router.groups, router.kept_groups) == (1, 1)
    assert (read(n_group=3, topk_group=None).router.kept_groups, read(n_group=None, topk_group=1).router.groups) == (3, 1)


def test_greedy_knows_no_groups() -> None:
    assert read("deepseek_v2", topk_method="greedy", n_group=5, num_experts_per_tok=6).router.groups == 1
    assert read("deepseek_v2", topk_method="group_limited_greedy").router.groups == 2


def test_which_layers_have_experts() -> None:
    layers: dict[str, Any] = {"num_hidden_layers": 6, "first_k_dense_replace": 1}
    assert read(**layers).moe_layers == (False,) + (True,) * 5
    assert read(**layers, moe_layer_freq=2).moe_layers == (False, False, True, False, True, False)
    assert not any(read(num_hidden_layers=2, first_k_dense_replace=2).moe_layers)


@every_architecture
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 2}, ["num_key_value_heads = 2"]),
        ({"qk_rope_head_dim": 5}, ["qk_rope_head_dim = 5", "even"]),
        ({"kv_lora_rank": 0}, ["kv_lora_rank = 0"]),
        ({"q_lora_rank": 0}, ["q_lora_rank = 0"]),
        ({"n_group": 4}, ["n_routed_experts = 6", "n_group = 4"]),
        ({"topk_group": 3}, ["topk_group = 3", "n_group = 2"]),
        ({"num_experts_per_tok": 4}, ["num_experts_per_tok = 4", "only 3"]),
        ({"routed_scaling_factor": 0}, ["routed_scaling_factor = 0"]),
        ({"first_k_dense_replace": -1}, ["first_k_dense_replace = -1"]),
        ({"moe_layer_freq": 0}, ["moe_layer_freq = 0"]),
    ],
)
def test_values_that_fit_nothing_are_refused(architecture: str, changes: dict[str, Any], words: list[str]) -> None:
    refused(ConfigError, lambda: read(architecture, **changes), *words)


def test_rules_of_other_routers_are_refused() -> None:
    refused(ConfigError, lambda: read(scoring_func="softmax"), "scoring_func", "sigmoid")
    refused(ConfigError, lambda: read(topk_method="greedy"), "topk_method", "noaux_tc")
    refused(ConfigError, lambda: read("deepseek_v2", scoring_func="sigmoid"), "scoring_func", "softmax")
    refused(ConfigError, lambda: read("deepseek_v2", topk_method="noaux_tc"), "topk_method", "noaux_tc")
    refused(ConfigError, lambda: read("deepseek_v2", rope_interleave=False), "rope_interleave")
    refused(ConfigError, lambda: read("deepseek_v2", num_experts_per_tok=ABSENT), "num_experts_per_tok is missing")


def test_the_part_of_a_query_that_turns_must_be_the_said_one() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.2}
    told = read("mistral4", rope_parameters=yarn | {"partial_rotary_factor": 6 / 16})
    assert told == read("mistral4", rope_parameters=yarn) == read("mistral4", rope_scaling=yarn)
    assert told == read("mistral4", rope_parameters=yarn, partial_rotary_factor=6 / 16)
    assert (told.rope.dim, told.llama_4_scaling_beta, told.trained_context) == (6, 0.2, 8)
    for wrong in ({"rope_parameters": yarn | {"partial_rotary_factor": 0.5}}, {"partial_rotary_factor": 1.0}):
        refused(ConfigError, lambda wrong=wrong: read("mistral4", **wrong), "partial_rotary_factor")


def test_without_a_beta_queries_stay_as_they_are() -> None:
    assert read("mistral4", rope_parameters={"rope_type": "default"}).llama_4_scaling_beta == 0
    assert read("mistral4", rope_parameters={"rope_type": "default"}).trained_context == 256


def test_an_unknown_key_beside_the_ropes_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "npllm"):
        read("mistral4", rope_parameters={"rope_type": "default", "llama_4_scaling_beta": 0.1, "zebra": 1})
        read("deepseek_v3", rope_parameters={"rope_type": "default", "llama_4_scaling_beta": 0.1})
        read("deepseek_v2", norm_topk_prob=True)
    endings = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    assert endings == ["zebra", "llama_4_scaling_beta", "norm_topk_prob has no effect in DeepSeek V2"]


# -- tensors ----------------------------------------------------------------------------------------------------------


@every_architecture
def test_experts_one_by_one_and_fused(architecture: str, tmp_path: Path) -> None:
    config = make_config(architecture)
    each = make_tensors(config)
    assert any(name.endswith("experts.5.up_proj.weight") for name in each)
    forms = (("each", each), ("fused", fused(each)))
    folders = [save_model(tmp_path / name, config, tensors) for name, tensors in forms]
    one, other = (npllm.load(folder, backend="numpy").forward(IDS) for folder in folders)
    agree(other, one, "exact")


@pytest.mark.parametrize("before", ["language_model.model.", "model.language_model."])
def test_mistral4_in_mistral3s_wrapper(before: str, tmp_path: Path) -> None:
    config = make_config("mistral4", tie_word_embeddings=False)
    tensors = make_tensors(config, prefix=before)
    head = "language_model.lm_head.weight" if before.endswith("model.model.") else "lm_head.weight"
    tensors[head] = tensors.pop("lm_head.weight")
    wrapper = {"model_type": "mistral3", "text_config": config, "vision_config": {"hidden_size": 8}}
    tower = {"vision_tower.patch_conv.weight": np.ones(3, np.float32)}
    wrapped = npllm.load(save_model(tmp_path / "wrapped", wrapper, tensors | tower), backend="numpy")
    plain = npllm.load(save_model(tmp_path / "plain", config, make_tensors(config)), backend="numpy")
    agree(wrapped.forward(IDS), plain.forward(IDS), "exact")


def test_a_model_without_shared_experts(tmp_path: Path) -> None:
    """transformers writes such tensors with no elements; they add nothing."""
    config = make_config("deepseek_v3", n_shared_experts=0)
    with_one = make_tensors(make_config("deepseek_v3"))
    silent = {name: values * ("shared_experts.down" not in name) for name, values in with_one.items()}
    none = {name: values for name, values in with_one.items() if "shared_experts" not in name}
    shapes = {"gate_proj": (0, 32), "up_proj": (0, 32), "down_proj": (32, 0)}
    none |= {f"model.layers.1.mlp.shared_experts.{k}.weight": np.zeros(v, np.float32) for k, v in shapes.items()}
    want = npllm.load(save_model(tmp_path / "silent", make_config("deepseek_v3"), silent), backend="numpy").forward(IDS)
    agree(npllm.load(save_model(tmp_path / "none", config, none), backend="numpy").forward(IDS), want, "reordered")


def test_an_expert_that_is_missing_or_too_many_is_named(tmp_path: Path) -> None:
    config = make_config("deepseek_v3")
    tensors = make_tensors(config)
    lost = "model.layers.1.mlp.experts.4.up_proj.weight"
    fewer = {name: values for name, values in tensors.items() if name != lost}
    refused(CheckpointError, lambda: npllm.load(save_model(tmp_path, config, fewer)), lost, "missing")
    more = tensors | {lost.replace("4", "6"): tensors[lost]}
    refused(CheckpointError, lambda: npllm.load(save_model(tmp_path, config, more)), "experts.6.up_proj", "not expected")


# -- latent attention -------------------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.usefixtures("checked_shapes")
@given(data=st.data())
def test_the_absorbed_form_is_the_expanded_form(architecture: str, data: st.DataObject) -> None:
    """For any number of queries at once, whichever of the two would cost less."""
    llm, (tokens_T,) = data.draw(our.model_and_tokens(architecture=architecture))
    cuts = data.draw(our.cuts(len(tokens_T)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("npllm.blocks.absorbed_is_cheaper", lambda *_: False)
        expanded_TN = in_pieces(llm, tokens_T, cuts)
        patch.setattr("npllm.blocks.absorbed_is_cheaper", lambda *_: True)
        agree(in_pieces(llm, tokens_T, cuts), expanded_TN, "reordered float64")


@every_architecture
@pytest.mark.parametrize("kv_dtype", KV_BYTES)
def test_the_cache_holds_a_latent_vector_and_one_key_per_token(architecture: str, kv_dtype: str) -> None:
    """12 + 6 numbers a layer, whatever the number of heads."""
    config = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 600}
    llm = npllm.LLM.random(interpret(make_config(architecture, **config)), Backend(), kv_dtype=kv_dtype)
    cache = llm.new_cache()
    slot = cache.add()
    per_token = 2 * (12 + 6) * KV_BYTES[kv_dtype]
    assert cache.bytes_per_token == per_token
    for length in (1, 255, 256, 257, 300):
        rows = cache.plan([slot], [length - cache.lengths[slot]])
        llm.model.run(llm.backend, np.arange(rows.counts[0]) % 320, rows, cache)
        assert cache.nbytes == per_token * capacity(length, 600)


# -- layers that predict further tokens -------------------------------------------------------------------------------


@pytest.fixture
def with_mtp(tmp_path: Path) -> Path:
    """The truth case deepseek-v3 (3 layers), with a fourth that has the tensors of a multi-token-prediction layer."""
    source = TRUTH / "models" / "deepseek-v3"
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    layer = {name.replace("layers.2.", "layers.3."): values for name, values in tensors.items() if "layers.2." in name}
    own = {"enorm.weight": (28,), "hnorm.weight": (28,), "eh_proj.weight": (28, 56), "shared_head.norm.weight": (28,)}
    shared = {"embed_tokens.weight": (89, 28), "shared_head.head.weight": (89, 28)}
    extra = {f"model.layers.3.{name}": np.ones(shape, np.float32) for name, shape in (own | shared).items()}
    save_file(tensors | layer | extra, tmp_path / "model.safetensors")
    return tmp_path


def test_they_are_skipped_with_one_line(with_mtp: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "npllm"):
        llm = npllm.load(with_mtp, backend="numpy", dtype="float32")
    (line,) = [record.getMessage() for record in caplog.records]
    assert "layers that predict further tokens (56)" in line
    truth = load_file(with_mtp / "trace.safetensors")
    agree(llm.forward(truth["tokens"]), truth["logits"], "truth")
    stored = load_file(TRUTH / "models" / "deepseek-v3" / "model.safetensors")
    of_model = sum(values.size for name, values in stored.items() if "correction" not in name)
    assert count_parameters(llm.model.spec) == of_model


def test_they_are_not_expected_where_the_config_counts_none(with_mtp: Path) -> None:
    config = json.loads((with_mtp / "config.json").read_text())
    (with_mtp / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    refused(CheckpointError, lambda: npllm.load(with_mtp), "model.layers.3.", "not expected")
