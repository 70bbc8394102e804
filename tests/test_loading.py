"""From a folder to a model: spellings, storage formats, head rules, memory, and what is refused on the way."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import npllm
from npllm.errors import (
    ArgumentError,
    BackendError,
    CheckpointError,
    ConfigError,
    HubError,
    MemoryLimitError,
    NumericsError,
    TokenizerError,
)
from npllm.handles import Weight
from npllm.models import read_config
from npllm.weights import leaves
from tests.compare import agree
from tests.models import ABSENT, PREFIX, STORAGE, make_checkpoint, make_config, make_tensors, make_tokenizer, save_tensors
from tests.refusals import refused

ARCHITECTURES = sorted(PREFIX)
IDS = np.array([[5, 250, 17, 3, 99]])
Tensors = dict[str, np.ndarray[Any, Any]]


def logits(folder: Path, **options: Any) -> np.ndarray[Any, Any]:
    return npllm.load(folder, backend="numpy", **options).forward(IDS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    """Change the tensors of model.safetensors in place."""
    tensors = {name: values.copy() for name, values in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def renamed(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    return {rename(name): values for name, values in tensors.items()}


# -- storage and shards --


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("storage", ["F16", "BF16"])
def test_narrow_storage_gives_what_its_widened_values_give(tmp_path: Path, architecture: str, storage: str) -> None:
    narrow = make_checkpoint(tmp_path / "narrow", architecture, storage=storage)
    tensors = make_tensors(make_config(architecture))
    widened = {name: values.astype(STORAGE[storage]).astype(np.float32) for name, values in tensors.items()}
    wide = make_checkpoint(tmp_path / "wide", architecture)
    save_tensors(wide, widened)
    np.testing.assert_array_equal(logits(narrow), logits(wide), strict=True)
    np.testing.assert_array_equal(logits(narrow, dtype="float64"), logits(wide, dtype="float64"), strict=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shards_give_what_one_file_gives(tmp_path: Path, architecture: str) -> None:
    whole = make_checkpoint(tmp_path / "whole", architecture)
    sharded = make_checkpoint(tmp_path / "sharded", architecture)
    (sharded / "model.safetensors").unlink()
    save_tensors(sharded, make_tensors(make_config(architecture)), shards=3)
    np.testing.assert_array_equal(logits(sharded), logits(whole))


def test_the_index_outranks_a_single_file(folder: Path) -> None:
    wanted = logits(folder)
    save_tensors(folder, make_tensors(make_config()), shards=2)
    save_tensors(folder, make_tensors(make_config(), seed=1))
    np.testing.assert_array_equal(logits(folder), wanted)


def test_mixed_formats_in_one_file(folder: Path) -> None:
    wanted = logits(folder)
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].astype(np.float64)}))
    np.testing.assert_array_equal(logits(folder), wanted)


# -- names --


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "model.language_model.", "language_model."])
def test_wrappers_prefixes_are_taken_off(tmp_path: Path, prefix: str) -> None:
    wanted = logits(make_checkpoint(tmp_path / "plain", tie_word_embeddings=False))
    folder = make_checkpoint(tmp_path / "wrapped", tie_word_embeddings=False)
    save_tensors(folder, make_tensors(make_config(tie_word_embeddings=False), prefix=prefix))
    np.testing.assert_array_equal(logits(folder), wanted)
    rewrite(folder, lambda tensors: tensors.update({"language_model.lm_head.weight": tensors.pop("lm_head.weight")}))
    np.testing.assert_array_equal(logits(folder), wanted)


def test_gpt2_as_it_was_published(tmp_path: Path) -> None:
    wanted = logits(make_checkpoint(tmp_path / "transformer", "gpt2"))
    folder = make_checkpoint(tmp_path / "bare", "gpt2")
    save_tensors(folder, make_tensors(make_config("gpt2"), prefix=""))
    mask = np.tril(np.ones((1, 1, 8, 8), np.float32))
    buffers = {"h.0.attn.bias": mask, "h.1.attn.bias": mask.astype(np.uint8), "h.0.attn.masked_bias": np.float32([-1e4])}
    rewrite(folder, lambda tensors: tensors.update(buffers))
    np.testing.assert_array_equal(logits(folder), wanted)


def test_rotary_buffers_are_passed_over(folder: Path) -> None:
    wanted, buffer = logits(folder), np.ones(8, np.float32)
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    rewrite(folder, lambda tensors: tensors.update(dict.fromkeys(names, buffer)))
    np.testing.assert_array_equal(logits(folder), wanted)


def test_towers_of_a_multimodal_model_are_skipped_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = logits(make_checkpoint(tmp_path / "plain"))
    folder = make_checkpoint(tmp_path / "wrapped")
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "vl", "text_config": text, "vision_config": {}}))
    towers = {"vision_tower.a.weight": IDS, "vision_tower.b": np.ones(2), "multi_modal_projector.c": np.ones(2)}
    tensors = make_tensors(make_config(), prefix="language_model.model.")
    save_file(tensors | towers, folder / "model.safetensors")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "npllm"):
        np.testing.assert_array_equal(logits(folder), wanted)
    (line,) = [record.getMessage() for record in caplog.records if "tensors" in record.getMessage()]
    assert "vision_tower (2), multi_modal_projector (1)" in line


# -- the head --


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tied_head_is_the_embedding_itself(tmp_path: Path, architecture: str) -> None:
    llm = npllm.load(make_checkpoint(tmp_path / "m", architecture), backend="numpy")
    weights = llm.model.weights
    embedding = weights.wte if architecture == "gpt2" else weights.embed_tokens
    assert weights.lm_head.weight is embedding.weight


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_stored_head_is_used_though_the_config_ties_it(tmp_path: Path, architecture: str) -> None:
    untied = make_checkpoint(tmp_path / "untied", architecture, tie_word_embeddings=False)
    wanted = logits(untied)
    (untied / "config.json").write_text(json.dumps(make_config(architecture, tie_word_embeddings=True)))
    np.testing.assert_array_equal(logits(untied), wanted)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_stored_head_that_equals_the_embedding_is_kept_once(tmp_path: Path, architecture: str) -> None:
    folder = make_checkpoint(tmp_path / "m", architecture)
    stored = load_file(folder / "model.safetensors")
    (embedding,) = (values for name, values in stored.items() if name.endswith(("wte.weight", "embed_tokens.weight")))
    save_tensors(folder, stored | {"lm_head.weight": embedding})
    weights = npllm.load(folder, backend="numpy").model.weights
    assert weights.lm_head.weight is (weights.wte if architecture == "gpt2" else weights.embed_tokens).weight


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_untied_head_must_be_there(tmp_path: Path, architecture: str) -> None:
    folder = make_checkpoint(tmp_path / "m", architecture)
    (folder / "config.json").write_text(json.dumps(make_config(architecture, tie_word_embeddings=False)))
    refused(CheckpointError, lambda: logits(folder), str(folder), "lm_head.weight", "tie_word_embeddings = false")


# -- tensors that do not fit --

NORM = "model.layers.1.input_layernorm.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NORM), [NORM, "missing"]),
        (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name], ["layers.1", "and 8 more", "missing"]),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[NORM]}), ["layers.2.mlp.up_proj.weight", "expected"]),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[NORM]}), ["q_proj.bias", "expected"]),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].T}), [Q_PROJ, "[32, 64]", "[64, 32]"]),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].reshape(-1)}), [Q_PROJ, "[2048]", "[64, 32]"]),
        (lambda t: t.update({"layers.1.input_layernorm.weight": t[NORM]}), [NORM, "two spellings"]),
        (lambda t: t.clear(), ["missing"]),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(folder: Path, change: Callable[..., Any], words: list[str]) -> None:
    rewrite(folder, change)
    refused(CheckpointError, lambda: logits(folder), str(folder), *words)


def test_names_of_missing_tensors_are_spelled_as_the_file_spells_others(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    save_tensors(folder, make_tensors(make_config(), prefix="model.language_model."))
    rewrite(folder, lambda tensors: tensors.pop("model.language_model.norm.weight"))
    refused(CheckpointError, lambda: logits(folder), "model.language_model.norm.weight")


def stored_as(folder: Path, name: str, dtype: str, itemsize: int) -> None:
    """Replace the format of one tensor in the header, with as many bytes as that format takes."""
    tensors = {key: values.tobytes() for key, values in load_file(folder / "model.safetensors").items()}
    shapes = {key: values.shape for key, values in load_file(folder / "model.safetensors").items()}
    tensors[name] = bytes(int(np.prod(shapes[name])) * itemsize)
    header, position = {}, 0
    for key, data in tensors.items():
        offsets = [position, position := position + len(data)]
        header[key] = {"dtype": dtype if key == name else "F32", "shape": shapes[key], "data_offsets": offsets}
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + b"".join(tensors.values())
    (folder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(("dtype", "itemsize"), [("F8_E4M3", 1), ("F8_E5M2", 1), ("I8", 1), ("U8", 1), ("I32", 4)])
def test_weights_in_another_format_are_refused_by_name(folder: Path, dtype: str, itemsize: int) -> None:
    stored_as(folder, Q_PROJ, dtype, itemsize)
    refused(CheckpointError, lambda: logits(folder), "model.safetensors", Q_PROJ, dtype, "BF16")


def test_pickled_weights_are_refused_and_left_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")
    refused(CheckpointError, lambda: logits(folder), "pytorch_model.bin", f"npllm convert {folder} OUT")


def test_a_truncated_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(CheckpointError, lambda: logits(folder), str(path), "truncated")


# -- memory --


def test_a_model_beyond_the_memory_is_refused_before_anything_is_allocated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_tree(*arguments: Any) -> Any:
        raise AssertionError("allocated")

    monkeypatch.setattr("npllm.loading.build_tree", build_tree)
    monkeypatch.setattr("npllm.backend.available_memory", lambda: 50_000)
    needed = ("weights need", "float64", "available", "float32", "weights='disk'")
    demand = {"backend": "numpy", "dtype": "float64", "weights": "memory"}
    refused(MemoryLimitError, lambda: npllm.load(folder, **demand), str(folder), *needed)
    refused(MemoryLimitError, lambda: npllm.LLM.random(read_config(folder), npllm.get_backend("numpy")), "weights need")


def test_a_model_beyond_the_memory_stays_on_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = npllm.load(folder, backend="numpy").forward([[1, 2, 3]])
    monkeypatch.setattr("npllm.loading.check_memory", lambda *how, **options: False)
    llm = npllm.load(folder, backend="numpy")
    assert all(isinstance(weight, Weight) for _, weight in leaves(llm.model.weights))
    agree(llm.forward([[1, 2, 3]]), wanted, "reordered")


def test_absurd_sizes_that_are_each_allowed_are_refused_for_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1 << 24, "intermediate_size": 1 << 30, "num_hidden_layers": 4096, "vocab_size": 1 << 30}
    (tmp_path / "config.json").write_text(json.dumps(make_config(**sizes)))
    refused(MemoryLimitError, lambda: npllm.LLM.random(read_config(tmp_path), npllm.get_backend("numpy")), "GiB")


def test_a_cache_beyond_the_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = npllm.load(folder, backend="numpy")
    monkeypatch.setattr("npllm.backend.available_memory", lambda: 50_000)
    refused(MemoryLimitError, lambda: llm.generate([1, 2, 3]), "max_context")


MEASURE = """
import json, sys, tracemalloc
import npllm

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

folder, load = sys.argv[1], npllm.load  # naming it imports what it needs
before = anonymous() if sys.platform == "linux" else 0
tracemalloc.start()
llm = load(folder, backend="numpy", max_context=8)
peak = tracemalloc.get_traced_memory()[1]
tracemalloc.stop()
after = anonymous() if sys.platform == "linux" else 0
print(json.dumps({"parameters": llm.parameters, "peak": peak, "kept": after - before}))
"""


def test_a_bf16_checkpoint_takes_its_float32_size(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 7, "num_attention_heads": 8}
    folder = make_checkpoint(tmp_path / "m", storage="BF16", with_tokenizer=False, head_dim=64, **sizes)
    assert (folder / "model.safetensors").stat().st_size > 50 << 20
    done = subprocess.run([sys.executable, "-c", MEASURE, folder], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    float32 = 4 * measured["parameters"]
    assert measured["peak"] < 1.15 * float32
    assert measured["kept"] < 1.15 * float32


# -- damaged numbers --


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("name", ["model.norm.weight", Q_PROJ, "model.layers.0.mlp.down_proj.weight"])
def test_damaged_weights_stop_generation_and_scoring(folder: Path, name: str, value: float) -> None:
    rewrite(folder, lambda tensors: tensors[name].reshape(-1).__setitem__(slice(0, 20), value))
    llm = npllm.load(folder, backend="numpy")
    refused(NumericsError, lambda: llm.generate("Hello", max_tokens=3), "finite")
    refused(NumericsError, lambda: list(llm.stream("Hello", temperature=1.0)), "finite")
    refused(NumericsError, lambda: llm.generate(["Hello", "you"], n=2), "finite")
    refused(NumericsError, lambda: llm.score("Hello you"), "finite")
    refused(NumericsError, lambda: llm.chat([{"role": "user", "content": "hi"}]), "finite")


# -- the tokenizer --


def test_without_a_tokenizer_ids_still_work(tmp_path: Path) -> None:
    llm = npllm.load(make_checkpoint(tmp_path / "m", with_tokenizer=False), backend="numpy")
    out = llm.generate([5, 6], max_tokens=4, ignore_eos=True)
    assert (len(out.tokens), out.text) == (4, "")
    for act in (
        lambda: llm.generate("Hello"), lambda: llm.score("Hello"), lambda: llm.tokenizer,
        lambda: llm.generate([5], stop="x"), lambda: llm.chat([{"role": "user", "content": "hi"}]),
    ):  # fmt: skip
        refused(TokenizerError, act, "tokenizer")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', "\x00"])
def test_a_malformed_tokenizer_is_refused(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    refused(TokenizerError, lambda: npllm.load(folder), str(folder / "tokenizer.json"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"chat_template": 5}', '{"chat_template": [1]}', "9" * 5000])
def test_a_malformed_tokenizer_config_is_refused(folder: Path, text: str) -> None:
    (folder / "tokenizer_config.json").write_text(text)
    refused(TokenizerError, lambda: npllm.load(folder), str(folder))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", vocab_size=299)
    refused(TokenizerError, lambda: npllm.load(folder), "tokenizer.json", "299")
    assert npllm.load(make_checkpoint(tmp_path / "fits", vocab_size=300)).tokenizer.size == 300


# -- arguments --


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"max_context": 0}, ArgumentError, "max_context"),
        ({"max_context": -5}, ArgumentError, "max_context"),
        ({"max_context": 1.5}, ArgumentError, "max_context"),
        ({"max_context": "8"}, ArgumentError, "max_context"),
        ({"kv_dtype": "int8"}, ArgumentError, "kv_dtype"),
        ({"quantize": "q4"}, BackendError, "quantize"),
        ({"weights": "ram"}, ArgumentError, "weights"),
        ({"dtype": "float16"}, BackendError, "float16"),
        ({"backend": "nonesuch"}, BackendError, "nonesuch"),
        ({"threads": 0}, ArgumentError, "threads"),
    ],
)
def test_arguments_out_of_range_are_refused(folder: Path, options: dict[str, Any], error: Any, word: str) -> None:
    refused(error, lambda: npllm.load(folder, **{"backend": "numpy"} | options), word)


def test_the_context_is_never_longer_than_trained(folder: Path) -> None:
    assert npllm.load(folder, max_context=10**9).max_context == 256
    assert npllm.load(folder, max_context=7).max_context == 7


def test_a_source_that_is_no_model_is_refused(folder: Path, tmp_path: Path) -> None:
    refused(ArgumentError, lambda: npllm.load(""), "empty")
    refused(ConfigError, lambda: npllm.load(folder / "config.json"), "config.json", "folder")
    refused(ConfigError, lambda: npllm.load(tmp_path), "config.json", "no such file")
    for source in ("x" * 5000, "~no-such-user/model", "a/b/c/d", "\0", str(tmp_path / "nothing" / "here")):
        refused(HubError, lambda source=source: npllm.load(source))


def test_a_model_from_the_hub_is_checked_before_its_weights_and_warned_about_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fetch(model_id: str, *, revision: str | None, check: Callable[[dict[str, Any]], None]) -> Path:
        check(json.loads((folder / "config.json").read_text()))
        return folder

    monkeypatch.setattr("npllm.hub.fetch", fetch)
    (folder / "config.json").write_text(json.dumps(make_config(auto_map={"x": "y"}, zebra=1)))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "npllm"):
        npllm.load("someone/model")
    assert len(caplog.records) == 2
    (folder / "config.json").write_text(json.dumps(make_config(model_type="mamba")))
    refused(ConfigError, lambda: npllm.load("someone/model"), "someone/model: config.json", "mamba")
    assert not logging.getLogger("npllm").disabled


# -- generation_config.json --


def defaults(folder: Path, content: Any) -> Any:
    (folder / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return npllm.load(folder, backend="numpy").defaults


def test_generation_config_gives_defaults(folder: Path) -> None:
    assert npllm.load(folder).defaults.stop_ids == (0,)
    found = defaults(
        folder,
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2], "max_new_tokens": 9},
    )
    assert found.stop_ids == (1, 2)
    assert found.max_tokens == 9
    assert {key: found.sampling[key] for key in ("temperature", "top_k", "top_p")} == {
        "temperature": 0.6, "top_k": 20, "top_p": 0.95,
    }  # fmt: skip
    assert "temperature" not in defaults(folder, {"do_sample": False, "temperature": 0.6}).sampling
    assert defaults(folder, {"eos_token_id": 7}).stop_ids == (7,)
    assert defaults(folder, {"eos_token_id": None}).stop_ids == (0,)


def test_no_stop_ids_anywhere_is_fine(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", eos_token_id=ABSENT)
    assert npllm.load(folder).defaults.stop_ids == ()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "JSON"), ("[]", "object"), ("{", "JSON"), ("9" * 5000, "JSON"),
        ({"do_sample": "yes"}, "do_sample"),
        ({"do_sample": True, "temperature": -1}, "temperature"),
        ({"do_sample": True, "temperature": "hot"}, "temperature"),
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
        ({"do_sample": True, "top_p": 0}, "top_p"),
        ({"do_sample": True, "top_k": -1}, "top_k"),
        ({"do_sample": True, "min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": [1, None]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"max_new_tokens": -3}, "max_new_tokens"),
    ],
)  # fmt: skip
def test_a_malformed_generation_config_is_refused(folder: Path, content: Any, word: str) -> None:
    refused(ConfigError, lambda: defaults(folder, content), "generation_config.json", word)


def test_bad_stop_ids_of_config_are_reported_there(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(make_config(eos_token_id="</s>")))
    refused(ConfigError, lambda: npllm.load(folder), str(folder / "config.json"), "eos_token_id")


def test_loading_writes_nothing(folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    npllm.load(folder).generate("Hello", max_tokens=2)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_make_tokenizer_can_leave_the_template_out(folder: Path) -> None:
    make_tokenizer(folder, chat_template=False)
    llm = npllm.load(folder)
    refused(TokenizerError, lambda: llm.chat([{"role": "user", "content": "hi"}]), str(folder), "chat template")
