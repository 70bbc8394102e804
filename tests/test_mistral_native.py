"""Models in Mistral's own files: the parameters, the names, which files are read, and what comes out."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hub_server import HubServer
from safetensors.numpy import load_file, save_file

import npllm
from npllm.arrays import Array
from npllm.checkpoint import Checkpoint, find_weights
from npllm.config import printable
from npllm.errors import CheckpointError, ConfigError, HubError
from npllm.hub import fetch
from npllm.matching import match
from npllm.mistral_native import TOWERS, config_values, own_name
from npllm.models import interpret, read_config
from npllm.published import mistral as published
from tests.compare import agree
from tests.export import TRUTH
from tests.native import make_native, native_tensors
from tests.refusals import refused

CASES = ["mistral", "mistral-7b", "mistral-window", "mistral-yarn", "mistral-bf16", "mixtral", "mistral4-large"]

SMALL = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "vocab_size": 16, "norm_eps": 1e-5, "head_dim": 4}

LATENT: dict[str, Any] = published.LARGE3_PARAMS


def logits(folder: Path, tokens_BT: Array) -> Array:
    return npllm.load(folder, backend="numpy", dtype="float32").forward(tokens_BT)


@pytest.fixture
def native(tmp_path: Path) -> Path:
    folder = tmp_path / "native"
    make_native(folder, "mistral")
    return folder


# -- what comes out --


@pytest.mark.parametrize("case", CASES)
def test_a_native_folder_gives_what_transformers_computed(tmp_path: Path, case: str) -> None:
    tokens_BT = make_native(tmp_path, case)
    agree(logits(tmp_path, tokens_BT), load_file(TRUTH / "models" / case / "trace.safetensors")["logits"], "truth")


@pytest.mark.parametrize("case", CASES)
def test_rows_are_not_copied(tmp_path: Path, case: str) -> None:
    make_native(tmp_path, case)
    described = read_config(tmp_path)
    handles = match(described, Checkpoint(tmp_path))
    assert all(part.mapping is not None for handle in handles.values() for part in getattr(handle, "weights", (handle,)))


def test_fp8_of_mistrals_own_is_read_in_place(tmp_path: Path) -> None:
    """`qscale_weight` is one factor for a tensor; `qscale_act` is not needed."""
    source = TRUTH / "models" / "mistral"
    config = json.loads((source / "config.json").read_text())
    rng = np.random.default_rng(0)
    narrow, wide = {}, {}
    for name, values in native_tensors(load_file(source / "model.safetensors"), config).items():
        if values.ndim < 2 or name in ("tok_embeddings.weight", "output.weight"):
            narrow[name] = wide[name] = values
            continue
        scale, module = np.float32(rng.uniform(1, 2) * np.abs(values).max() / 448), name.removesuffix("weight")
        narrow[name] = (values / scale).astype(ml_dtypes.float8_e4m3fn)
        wide[name] = narrow[name].astype(np.float32) * scale
        narrow |= {module + "qscale_weight": np.array(scale), module + "qscale_act": np.float32([1.0])}
    for folder, tensors in ((tmp_path / "narrow", narrow), (tmp_path / "wide", wide)):
        tokens_BT = make_native(folder, "mistral")
        save_file(tensors, folder / "consolidated.safetensors")
    params = json.loads((tmp_path / "narrow" / "params.json").read_text())
    params["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    (tmp_path / "narrow" / "params.json").write_text(json.dumps(params))
    agree(logits(tmp_path / "narrow", tokens_BT), logits(tmp_path / "wide", tokens_BT), "reordered")


def test_other_towers_are_skipped_with_one_line(native: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens_BT = make_native(native, "mistral")
    wanted = logits(native, tokens_BT)
    towers = ("vision_encoder.transformer.layers.0.attention.wq.weight", "vision_language_adapter.w_in.weight")
    towers += ("patch_merger.merging_layer.weight", "pre_mm_projector_norm.weight")
    weights = load_file(native / "consolidated.safetensors") | dict.fromkeys(towers, np.ones((4, 4), np.float32))
    save_file(weights, native / "consolidated.safetensors")
    params = json.loads((native / "params.json").read_text())
    (native / "params.json").write_text(json.dumps(params | {"vision_encoder": {"hidden_size": 4}}))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "npllm"):
        np.testing.assert_array_equal(logits(native, tokens_BT), wanted)
    lines = [record.getMessage() for record in caplog.records]
    assert sum("vision_encoder (1), vision_language_adapter (1)" in line for line in lines) == 1
    assert sum("only its text part runs" in line for line in lines) == 1
    assert len(lines) == 2


# -- params.json --


def test_published_parameters_of_mistral_large_3() -> None:
    silent = {"architectures", "attention_bias"}
    wanted = {key: value for key, value in published.LARGE3.items() if key not in silent}
    wanted["rope_parameters"] = {key: value for key, value in wanted["rope_parameters"].items() if key != "type"}
    assert config_values(LATENT) == wanted | {"bos_token_id": 1, "eos_token_id": 2}


def test_mistral_small_with_its_tower_is_the_published_config() -> None:
    params = {"dim": 5120, "n_layers": 40, "head_dim": 128, "hidden_dim": 32768, "n_heads": 32, "n_kv_heads": 8}
    params |= {"rope_theta": 1e9, "norm_eps": 1e-5, "vocab_size": 131072, "max_seq_len": 131072}
    ours = interpret(config_values(params | {"vision_encoder": {"image_size": 1540}})).config
    theirs = interpret(published.SMALL31).config
    assert ours.rope_interleave
    assert not theirs.rope_interleave
    assert {**vars(ours), "rope_interleave": False} == vars(theirs)


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({}, {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ({"sliding_window": 4096}, {"sliding_window": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ({"sliding_window": [6, 6]}, {"model_type": "mistral", "sliding_window": 6}),
        ({"sliding_window": [None]}, {"model_type": "mistral", "sliding_window": None}),
        (
            {"sliding_window": [None, 6]},
            {"model_type": "ministral", "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6},
        ),
        ({"n_kv_heads": 1}, {"num_key_value_heads": 1}),
        ({}, {"num_key_value_heads": 2, "max_position_embeddings": 128_000, "tie_word_embeddings": False, "head_dim": 4}),
        ({"max_seq_len": 77}, {"max_position_embeddings": 77}),
        ({"max_seq_len": 77, "max_position_embeddings": 99}, {"max_position_embeddings": 99}),
        ({"tied_embeddings": True}, {"tie_word_embeddings": True}),
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 2}}, {"model_type": "mixtral", "num_local_experts": 8}),
        ({"quantization": {}}, {}),
        (
            {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "NO_SCALES"}},
            {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None}},
        ),
        (
            {"quantization": {"quant_method": "compressed_tensors", "config_groups": {}}},
            {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}},
        ),
        ({"quantization_config": {"quant_method": "awq"}}, {"quantization_config": {"quant_method": "awq"}}),
    ],
)
def test_what_parameters_stand_for(params: dict[str, Any], wanted: dict[str, Any]) -> None:
    values = config_values(SMALL | params)
    assert {key: values[key] for key in wanted} == wanted


@pytest.mark.parametrize(("latent", "applied"), [(False, {}), (True, {"mscale": 1.0, "mscale_all_dim": 1.0})])
def test_yarn_with_and_without_its_factor(latent: bool, applied: dict[str, float]) -> None:
    yarn = {"factor": 4, "original_max_position_embeddings": 64, "beta": 16, "alpha": 2}
    common = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    common |= {"beta_fast": 16.0, "beta_slow": 2.0}
    params = (LATENT if latent else SMALL) | {"rope_theta": 1e4, "llama_4_scaling": None}
    for says, extra in (
        ({}, applied),
        ({"apply_scale": True}, applied),
        ({"apply_scale": False}, {"attention_factor": 1.0}),
    ):
        assert config_values(params | {"yarn": yarn | says})["rope_parameters"] == common | extra


def test_query_temperature_without_latent_attention_is_ministral_3() -> None:
    """Which is refused by that name as long as there is no such model."""
    section = {"beta": 0.1, "original_max_position_embeddings": 64}
    values = config_values(
        SMALL | {"yarn": {"factor": 4, "original_max_position_embeddings": 64}, "llama_4_scaling": section}
    )
    refused(ConfigError, lambda: interpret(values), "ministral3")


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"dim": None}, ["dim"]),
        ({"norm_eps": None}, ["norm_eps"]),
        ({"n_layers": "2"}, ["n_layers", "integer"]),
        ({"model_type": "mamba"}, ["model_type", "mamba"]),
        ({"lora": {"rank": 4}}, ["lora"]),
        ({"activation": "relu"}, ["activation"]),
        ({"sliding_window": [6, None, 6]}, ["sliding_window", "n_layers = 2"]),
        ({"sliding_window": [6, 7]}, ["sliding_window", "several"]),
        ({"sliding_window": [[]]}, ["sliding_window"]),
        ({"sliding_window": "6"}, ["sliding_window"]),
        ({"moe": {}}, ["moe", "num_experts"]),
        ({"moe": 3}, ["moe"]),
        ({"yarn": {}}, ["yarn", "factor"]),
        ({"llama_4_scaling": {"beta": 0.1}}, ["llama_4_scaling", "yarn"]),
        ({"quantization": {"qformat_weight": "int8"}}, ["qformat_weight", "int8", "fp8_e4m3"]),
        ({"quantization": {"qscheme_act": "TENSOR"}}, ["qformat_weight"]),
        (LATENT | {"moe": None}, ["kv_lora_rank", "moe"]),
        (LATENT | {"v_head_dim": None}, ["v_head_dim"]),
        (LATENT | {"moe": LATENT["moe"] | {"route_every_n": 2}}, ["route_every_n"]),
        (LATENT | {"moe": LATENT["moe"] | {"use_load_balancing_bias": True}}, ["use_load_balancing_bias"]),
        (LATENT | {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 9}}, ["8192"]),
    ],
)
def test_parameters_that_do_not_fit_are_refused_by_name(params: dict[str, Any], words: list[str]) -> None:
    refused(ConfigError, lambda: config_values(SMALL | params, "a/params.json"), "a/params.json", *words)


def test_unknown_parameters_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    config_values(SMALL | {"max_batch_size": 4, "zebra": 1})
    (line,) = [record.getMessage() for record in caplog.records]
    assert "zebra" in line
    assert "max_batch_size" not in line


def test_errors_about_translated_values_say_where_they_come_from(native: Path) -> None:
    (native / "params.json").write_text(json.dumps(SMALL | {"n_heads": 3, "n_kv_heads": 2}))
    refused(ConfigError, lambda: npllm.load(native), str(native / "params.json"), "num_attention_heads = 3")


# -- names --


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("tok_embeddings.weight", "embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("layers.12.attention.wkv_a_with_mqa.qscale_weight", "layers.12.self_attn.kv_a_proj_with_mqa.qscale_weight"),
        ("layers.0.experts.127.w2.weight_scale", "layers.0.mlp.experts.127.down_proj.weight_scale"),
        ("layers.0.feed_forward.experts.7.w2.weight", "layers.0.block_sparse_moe.experts.7.w2.weight"),
        ("layers.0.feed_forward.gate.weight", "layers.0.block_sparse_moe.gate.weight"),
        ("layers.3.gate.weight", "layers.3.mlp.gate.weight"),
        ("vision_encoder.transformer.layers.0.attention.wq.weight", None),
        ("patch_merger.merging_layer.weight", None),
        ("layers.0.attention.wx.weight", "layers.0.attention.wx.weight"),
    ],
)
def test_names(name: str, own: str | None) -> None:
    assert own_name(name) == own
    assert (own is None) == bool(TOWERS.match(name))


def test_an_unknown_tensor_is_refused(native: Path) -> None:
    weights = load_file(native / "consolidated.safetensors")
    save_file(weights | {"layers.0.attention.wx.weight": np.ones(2)}, native / "consolidated.safetensors")
    refused(CheckpointError, lambda: npllm.load(native), "layers.0.attention.wx.weight", "not expected")


# -- which files --


def reshard(folder: Path, count: int = 3, index: bool = True) -> list[Path]:
    """consolidated.safetensors as shards -> their paths."""
    weights = load_file(folder / "consolidated.safetensors")
    (folder / "consolidated.safetensors").unlink()
    paths, weight_map = [], {}
    for i in range(count):
        paths.append(folder / f"consolidated-{i + 1:05}-of-{count:05}.safetensors")
        names = list(weights)[i::count]
        save_file({name: weights[name] for name in names}, paths[-1])
        weight_map |= dict.fromkeys(names, paths[-1].name)
    if index:
        (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return paths


@pytest.mark.parametrize("index", [True, False])
def test_shards_give_what_one_file_gives(native: Path, index: bool) -> None:
    tokens_BT = np.array([[5, 17, 3, 42]])
    wanted = logits(native, tokens_BT)
    reshard(native, index=index)
    np.testing.assert_array_equal(logits(native, tokens_BT), wanted)


def test_the_index_outranks_the_single_file_and_that_the_shards(native: Path) -> None:
    single = (native / "consolidated.safetensors").read_bytes()
    reshard(native)
    (native / "consolidated.safetensors").write_bytes(single)
    assert len(find_weights(native)) == 3
    (native / "consolidated.safetensors.index.json").unlink()
    assert list(find_weights(native)) == [native / "consolidated.safetensors"]


def test_hugging_faces_files_are_used_where_both_are(native: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("config.json", "model.safetensors"):
        (native / name).write_bytes((TRUTH / "models" / "qwen3" / name).read_bytes())
    caplog.clear()
    with caplog.at_level(logging.INFO, "npllm"):
        assert not Checkpoint(native).native
        assert npllm.load(native).model.config == read_config(TRUTH / "models" / "qwen3").config
    assert "consolidated.safetensors" in caplog.records[0].getMessage()
    assert "left alone" in caplog.records[0].getMessage()
    (native / "model.safetensors").unlink()
    assert Checkpoint(native).native
    assert npllm.load(native).model.config.rope_interleave


def swap(folder: Path, gone: str, come: str | None = None) -> None:
    (folder / gone).unlink()
    if come is not None:
        (folder / come).write_bytes((TRUTH / "models" / "mistral" / come).read_bytes())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda f: swap(f, "consolidated.safetensors"), CheckpointError, ["params.json", "without weights"]),
        (lambda f: swap(f, "params.json"), ConfigError, ["config.json", "no such file"]),
        (
            lambda f: swap(f, "params.json", "config.json"),
            CheckpointError,
            ["consolidated.safetensors", "needs params.json"],
        ),
        (
            lambda f: swap(f, "consolidated.safetensors", "model.safetensors"),
            CheckpointError,
            ["params.json", "Hugging Face", "download config.json"],
        ),
        (lambda f: reshard(f, index=False)[1].unlink(), CheckpointError, ["consolidated-00002-of-00003", "is missing"]),
        (lambda f: reshard(f)[1].unlink(), CheckpointError, ["consolidated-00002-of-00003", "which is missing"]),
        (
            lambda f: reshard(f, index=False)[1].rename(f / "consolidated-00002-of-00004.safetensors"),
            CheckpointError,
            ["3 and of 4", "keep one set"],
        ),
        (lambda f: (f / "params.json").write_text("{"), ConfigError, ["params.json", "not valid JSON"]),
    ],
)
def test_halves_and_gaps_are_refused(native: Path, change: Callable[[Path], Any], error: Any, words: list[str]) -> None:
    change(native)
    refused(error, lambda: npllm.load(native), str(native), *words)


def test_a_missing_tensor_is_named_in_a_spelling_that_is_said(native: Path) -> None:
    tensors = load_file(native / "consolidated.safetensors")
    del tensors["layers.0.attention.wq.weight"]
    save_file(tensors, native / "consolidated.safetensors")
    missing = "layers.0.self_attn.q_proj.weight is missing from the checkpoint (in Hugging Face's spelling)"
    refused(CheckpointError, lambda: npllm.load(native), missing)


def test_nothing_is_said_of_hugging_faces_files_where_none_are(native: Path, caplog: pytest.LogCaptureFixture) -> None:
    swap(native, "params.json", "config.json")
    with caplog.at_level(logging.INFO, "npllm"):
        refused(CheckpointError, lambda: Checkpoint(native), "needs params.json")
    assert "left alone" not in caplog.text


# -- from the hub --


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


def fetched(folder: Path, cache: Path, **options: Any) -> list[str]:
    """The names that are fetched of a repository that holds what `folder` holds; a second time comes from the cache."""
    with HubServer({"someone/native": folder}) as hub:
        got = fetch("someone/native", cache_dir=cache, endpoint=hub.url, **options)
        hub.faults.status = 500
        assert fetch("someone/native", cache_dir=cache, endpoint=hub.url, **options) == got
    return sorted(path.name for path in got.iterdir())


@pytest.mark.parametrize("index", [True, False])
def test_a_native_repository_is_fetched(native: Path, cache: Path, index: bool) -> None:
    for name in ("tekken.json", "README.md", "consolidated.00.pth"):
        (native / name).write_text("{}")
    shards = [path.name for path in reshard(native, index=index)]
    checked: list[dict[str, Any]] = []
    names = fetched(native, cache, check=checked.append)
    assert names == sorted(["params.json", "tekken.json", *shards, *["consolidated.safetensors.index.json"] * index])
    assert {values["model_type"] for values in checked} == {"mistral"}


def test_only_its_parameters_are_fetched(native: Path, cache: Path) -> None:
    assert fetched(native, cache, config_only=True) == ["params.json"]


def test_of_a_repository_with_both_forms_hugging_faces_is_fetched(native: Path, cache: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tekken.json"):
        (native / name).write_text("{}")
    (native / "model.safetensors").write_bytes(b"anything")
    assert fetched(native, cache, config_only=True) == ["config.json"]
    with HubServer({"someone/native": native}) as hub:
        got = fetch("someone/native", cache_dir=cache, endpoint=hub.url)
    assert sorted(path.name for path in got.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    ("gone", "come", "words"),
    [
        ("consolidated.safetensors", None, ["without weights"]),
        ("consolidated.safetensors", "model.safetensors", ["download config.json"]),
        ("params.json", None, ["has no config.json"]),
        ("params.json", "config.json", ["consolidated.safetensors", "params.json"]),
    ],
)
def test_halves_of_a_repository_are_refused(
    native: Path, cache: Path, gone: str, come: str | None, words: list[str]
) -> None:
    swap(native, gone, come)
    with HubServer({"someone/native": native}) as hub:
        refused(HubError, lambda: fetch("someone/native", cache_dir=cache, endpoint=hub.url), "someone/native", *words)


def test_a_model_that_is_refused_is_not_downloaded(native: Path, cache: Path) -> None:
    (native / "params.json").write_text(json.dumps(SMALL | {"model_type": "mamba"}))
    with HubServer({"someone/native": native}) as hub:
        act = lambda: fetch("someone/native", cache_dir=cache, endpoint=hub.url, check=lambda values: None)  # noqa: E731
        refused(ConfigError, act, "params.json", printable("mamba"))
        assert hub.fetched() == ["params.json"]
