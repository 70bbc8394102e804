"""Models in q8 and q4: quantised when they are loaded, and written by `npllm quantize`."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import npllm
from npllm import Backend
from npllm.arrays import Array
from npllm.checkpoint import Checkpoint, read_header
from npllm.cli import main
from npllm.errors import ArgumentError, BackendError, CheckpointError, ConfigError
from npllm.grouped import marked, quantised
from npllm.handles import Handle, Stack, Weight
from npllm.loading import locate
from npllm.matching import match
from npllm.models import read_config
from npllm.quantise import quantise_folder
from tests import fp8
from tests.models import CONFIGS, make_checkpoint, make_config, make_tensors, save_tensors
from tests.refusals import refused

FORMATS = ["q8", "q4"]
every_format = pytest.mark.parametrize("format", FORMATS)

Q = "layers.0.self_attn.q_proj.weight"


def wide(architecture: str) -> dict[str, Any]:
    """Changes that give a tiny model's experts and FFNs rows of whole groups."""
    sizes = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp")
    return {key: 64 for key in sizes if key in make_config(architecture)}


def handles(folder: Path, format: str | None = None) -> dict[str, Handle]:
    """What a folder's model is made of; quantised by the canon when a format is given."""
    described = read_config(folder)
    found = match(described, Checkpoint(folder, described.block))
    if format is None:
        return found
    spec = described.architecture.weight_spec(described.config)
    return {name: turned(each, spec[name].stored, format) for name, each in marked(spec, found, format).items()}


def turned(each: Handle, stored: str, format: str) -> Handle:
    if isinstance(each, Stack):
        return Stack(each.name, tuple(w for e in each.weights if isinstance(w := turned(e, "oi", format), Weight)))
    if not each.quantisable:
        return each
    return quantised(each.transposed(), format).transposed() if stored == "io" else quantised(each, format)


def same(got: dict[str, Handle], want: dict[str, Handle]) -> None:
    assert got.keys() == want.keys()
    for name, each in got.items():
        other = want[name]
        pairs = zip(each.weights, other.weights, strict=True) if isinstance(each, Stack) else [(each, other)]  # type: ignore[union-attr]
        assert all(mine.equals(theirs) for mine, theirs in pairs), name


def logits(folder: Path, **options: Any) -> Array:
    return npllm.load(folder, **options).forward(np.arange(40).reshape(2, 20))


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", CONFIGS)
@every_format
def test_every_architecture_comes_back(tmp_path: Path, architecture: str, format: str) -> None:
    """The folder that is written holds, bit for bit, what the canon makes of the model's matrices."""
    folder = make_checkpoint(tmp_path / "model", architecture, storage="BF16", **wide(architecture))
    made = quantise_folder(folder, tmp_path / "out", format)
    want = handles(folder, format)
    same(handles(made.folder), want)
    assert made.matrices > 0
    assert np.all(np.isfinite(logits(made.folder, backend="numpy")))


@every_format
def test_fused_and_transposed_experts(tmp_path: Path, format: str) -> None:
    """Llama 4's files: [E, D, 2F] and [E, F, D], whose rows are inputs."""
    folder = make_checkpoint(tmp_path / "model", "llama4_text", **wide("llama4_text"))
    tensors = make_tensors(json.loads((folder / "config.json").read_text()))
    for name in [name for name in tensors if ".experts.0.gate_proj" in name]:
        before = name.partition("0.gate_proj")[0]
        gate, up, down = (
            [tensors.pop(f"{before}{e}.{part}_proj.weight") for e in range(3)] for part in ("gate", "up", "down")
        )
        tensors[f"{before}gate_up_proj"] = np.stack([np.concatenate([g, u]).T for g, u in zip(gate, up, strict=True)])
        tensors[f"{before}down_proj"] = np.stack([each.T for each in down])
    apart = handles(quantise_folder(folder, tmp_path / "apart", format).folder)
    save_tensors(folder, tensors)
    same(handles(quantise_folder(folder, tmp_path / "fused", format).folder), apart)


@every_format
def test_the_layout_of_the_file(tmp_path: Path, format: str) -> None:
    folder = make_checkpoint(tmp_path / "model", "qwen3", storage="BF16")
    out = quantise_folder(folder, tmp_path / "out", format).folder
    entries, _, _ = read_header(out / "model.safetensors")
    assert entries[Q][:2] == (("I8", (64, 32)) if format == "q8" else ("U8", (64, 16)))
    assert entries[f"{Q}_factors"][:2] == ("F16", (64, 1))
    assert entries["embed_tokens.weight"][0] in ("I8", "U8")
    assert entries["norm.weight"][0] == "BF16"
    assert entries["layers.0.mlp.down_proj.weight"][0] == "BF16"  # rows of 48
    sizes = {"I8": 1, "U8": 1, "F16": 2, "BF16": 2}
    assert all(begin % sizes[dtype] == 0 for dtype, _, begin, _ in entries.values())
    config = json.loads((out / "config.json").read_text())
    quantisation = config.pop("quantization_config")
    assert quantisation == {"quant_method": "npllm", "bits": 8 if format == "q8" else 4, "group_size": 32}
    assert config == json.loads((folder / "config.json").read_text())
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    found = handles(out)[Q]
    assert isinstance(found, Weight)
    assert found.mapping is not None
    assert np.shares_memory(found.data, np.frombuffer(found.mapping, np.uint8))


def test_shards_and_progress(tmp_path: Path) -> None:
    folder, seen = make_checkpoint(tmp_path / "model", "qwen3"), []
    made = quantise_folder(
        folder, tmp_path / "out", "q4", shard_bytes=8_000, progress=lambda done, total: seen.append((done, total))
    )
    assert len(list(made.folder.glob("model-*.safetensors"))) > 2
    same(handles(made.folder), handles(folder, "q4"))
    assert seen[-1] == (made.nbytes, made.nbytes)
    assert seen == sorted(seen)


@every_format
def test_fp8_becomes_fewer_bits(tmp_path: Path, format: str) -> None:
    """The numbers of an FP8 checkpoint are quantised; what is not, stays in FP8, in blocks of its own size."""
    folder = make_checkpoint(tmp_path / "model", "qwen3", hidden_size=64, head_dim=32)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    tensors: dict[str, Any] = {}
    for name, values in load_file(folder / "model.safetensors").items():
        tensors[name] = ("F32", values)
        if "_proj" in name:
            grid = tuple(-(-size // 16) for size in values.shape)
            tensors[name] = ("F8_E4M3", np.random.default_rng(1).integers(0, 0x60, values.shape).astype(np.uint8))
            tensors[f"{name}_scale_inv"] = ("F32", np.full(grid, 0.01, np.float32))
    fp8.save(folder / "model.safetensors", tensors)
    out = quantise_folder(folder, tmp_path / "out", format).folder
    same(handles(out), handles(folder, format))
    down = handles(out)["layers.0.mlp.down_proj.weight"]  # rows of 48
    assert isinstance(down, Weight)
    assert down.format == "f8_e4m3"
    assert json.loads((out / "config.json").read_text())["quantization_config"]["weight_block_size"] == [16, 16]


def test_a_tied_head_that_is_stored_twice_is_written_once(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "qwen3")
    tensors = load_file(folder / "model.safetensors")
    save_tensors(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    out = quantise_folder(folder, tmp_path / "out", "q4").folder
    assert "lm_head.weight" not in Checkpoint(out)


def test_an_embedding_that_is_no_head_stays(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "qwen3", tie_word_embeddings=False, storage="BF16")
    out = Checkpoint(quantise_folder(folder, tmp_path / "out", "q8").folder)
    assert (out.format("embed_tokens.weight"), out.format("lm_head.weight")) == ("BF16", "I8")


# -- on load ----------------------------------------------------------------------------------------------------------


@every_format
def test_quantised_on_load_is_what_the_folder_holds(tmp_path: Path, format: str) -> None:
    """Numba's answer, quantising as it loads, is that of the canon on the folder that was written."""
    pytest.importorskip("numba", reason="Numba is not installed")
    folder = make_checkpoint(tmp_path / "model", "qwen3", storage="BF16", **wide("qwen3"))
    out = quantise_folder(folder, tmp_path / "out", format).folder
    want = logits(out, backend="numpy")
    got = logits(folder, backend="numba", dtype="float32", quantize=format)
    read = logits(out, backend="numba", dtype="float32")
    assert np.array_equal(got, read)
    assert np.linalg.norm(got - want) <= 2e-5 * np.linalg.norm(want)


def test_saved_prompts_know_the_quantisation(tmp_path: Path) -> None:
    pytest.importorskip("numba", reason="Numba is not installed")
    folder = make_checkpoint(tmp_path / "model", "qwen3")
    models = [npllm.load(folder, backend="numba", dtype="float32", quantize=each) for each in (None, *FORMATS)]
    assert len({llm.fingerprint for llm in models}) == 3


def test_who_quantises(tmp_path: Path) -> None:
    refused(BackendError, lambda: Backend(quantize="q4"), "numpy", "'q4'", "numba")
    refused(BackendError, lambda: npllm.load(backend="numpy", quantize="q8"), "numba")
    pytest.importorskip("numba", reason="Numba is not installed")
    refused(BackendError, lambda: npllm.load(backend="numba", quantize="q5"), "'q5'", "q8 and q4")
    out = quantise_folder(locate(None), tmp_path / "out", "q8").folder
    refused(ArgumentError, lambda: npllm.load(out, backend="numba", quantize="q4"), "q8 already")
    assert npllm.load(out, backend="numba", quantize="q8").generate("Hello", max_tokens=1).usage


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return quantise_folder(make_checkpoint(folder / "model", "qwen3"), folder / "out", "q4").folder


def changed(
    whole: Path, folder: Path, tensors: Callable[[dict[str, Array]], Any] = dict, config: dict[str, Any] | None = None
) -> Path:
    shutil.copytree(whole, folder)
    values = load_file(folder / "model.safetensors")
    tensors(values)
    save_file(values, folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    text["quantization_config"] |= config or {}
    (folder / "config.json").write_text(json.dumps(text))
    return folder


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "other"}, ["quant_method", "other"]),
        ({"bits": 3}, ["bits", "8 or 4"]),
        ({"bits": None}, ["bits"]),
        ({"group_size": 64}, ["group_size", "32"]),
        ({"weight_block_size": [0, 1]}, ["weight_block_size"]),
    ],
)
def test_strange_configs(whole: Path, tmp_path: Path, config: dict[str, Any], words: list[str]) -> None:
    folder = changed(whole, tmp_path / "model", config=config)
    refused(ConfigError, lambda: npllm.load(folder, backend="numpy"), "quantization_config", *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{Q}_factors"), [Q, "without its factors", "quantise the model again"]),
        (lambda t: t.pop(Q), [f"{Q}_factors", "belongs to no q8 or q4 tensor"]),
        (lambda t: t.update({f"{Q}_factors": t[f"{Q}_factors"][:-1]}), [f"{Q}_factors", "[63, 1]", "[64, 16]"]),
        (lambda t: t.update({f"{Q}_factors": t[f"{Q}_factors"].astype(np.float32)}), [f"{Q}_factors", "F32"]),
        (lambda t: t.update({Q: t[Q][:, :-1]}), [Q, "[64, 15]"]),
        (lambda t: t.update({Q: t[Q].view(np.int8)}), [Q, "[64, 16]"]),
        (lambda t: t.update({Q: t[Q][0], f"{Q}_factors": t[f"{Q}_factors"][0]}), [Q]),
        (lambda t: t.update({f"{Q}_factors": t[f"{Q}_factors"] * np.float16(np.nan)}), [f"{Q}_factors", "nan"]),
    ],
)
def test_damaged_files(whole: Path, tmp_path: Path, change: Any, words: list[str]) -> None:
    folder = changed(whole, tmp_path / "model", change)
    refused(CheckpointError, lambda: npllm.load(folder, backend="numpy"), *words)


def test_places_that_cannot_be_written(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = make_checkpoint(tmp_path / "model", "qwen3"), tmp_path / "out"
    refused(CheckpointError, lambda: quantise_folder(model, model, "q4"), str(model), "not an empty folder")
    refused(CheckpointError, lambda: quantise_folder(model, whole, "q4"), str(whole), "not an empty folder")
    refused(CheckpointError, lambda: quantise_folder(whole, out, "q4"), "quantised already", "q4")
    monkeypatch.setattr("npllm.saving.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    refused(CheckpointError, lambda: quantise_folder(model, out, "q4"), "are needed and 0 are free")
    assert not out.exists()


def test_a_damaged_model_leaves_nothing_behind(tmp_path: Path) -> None:
    model, out = make_checkpoint(tmp_path / "model", "qwen3"), tmp_path / "out"
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.{Q}"][3, 3] = np.nan
    save_tensors(model, tensors)
    refused(
        CheckpointError, lambda: quantise_folder(model, out, "q4"), "model.safetensors", f"model.{Q}", "cannot be quantised"
    )
    assert not out.exists()


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = make_checkpoint(tmp_path / "model", "qwen3"), tmp_path / "out"
    assert main(["quantize", str(model), str(out), "--quantize", "q4"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert main(["quantize", str(model), str(tmp_path / "other"), "--quantize", "q8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    import npllm.cli.quantize as verb

    assert list(document) == re.findall(r"^    (\w+)  +\S", verb.__doc__ or "", re.MULTILINE)
    assert (document["schema"], document["quantize"]) == ("npllm.quantize/1", "q8")
    assert main(["quantize", str(model), str(out), "--quantize", "q4"]) == 1
    assert "not an empty folder" in capsys.readouterr().err
    assert main(["quantize", str(model), str(out)]) == 2
