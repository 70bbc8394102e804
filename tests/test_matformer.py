"""MatFormer: the smaller model is the one that the bigger one's weights make, lazily or in a folder of its own."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import npllm
from npllm import LLM, Backend
from npllm.arrays import Array
from npllm.cache import Cache
from npllm.errors import ArgumentError, CheckpointError, ConfigError
from npllm.handles import Scale, Weight
from npllm.matformer import Columns, Slice, choose, slice_folder, sliced_model, sliced_values
from npllm.model import Model
from npllm.models import Described, interpret
from npllm.weights import build_tree, count_parameters, random_weights
from tests import strategies as our
from tests.compare import agree
from tests.export import CASES, TRUTH
from tests.models import make_checkpoint
from tests.refusals import refused

WHOLE, PART = TRUTH / "models" / "gemma3n", TRUTH / "models" / "gemma3n-sliced"
WANTED: dict[str, Any] = {"drop": [2, 3], "ffn": [18, 26, 17]}
E4B = {"model_type": "gemma3n_text"}


def read(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def logits(folder: Path, **options: Any) -> Array:
    return npllm.load(folder, backend="numpy", **options).forward(np.arange(40).reshape(2, 20))


# -- the same model by three roads ------------------------------------------------------------------------------------


def test_the_folder_is_what_torch_cut(tmp_path: Path) -> None:
    """`gemma3n-sliced` was cut and run in PyTorch, whose logits tests.test_truth compares with."""
    made = slice_folder(WHOLE, tmp_path / "out", WANTED)
    got, want = load_file(made.folder / "model.safetensors"), load_file(PART / "model.safetensors")
    assert got.keys() == want.keys()
    for name, values in got.items():
        agree(values, want[name], "exact", what=name)
    assert read(made.folder) == read(WHOLE) | read(PART)
    assert (made.layers, made.ffn) == (CASES["gemma3n-sliced"].kept_layers, (18, 26, 17))
    assert made.nbytes == 4 * made.parameters == sum(values.nbytes for values in want.values())


@pytest.mark.parametrize("weights", ["memory", "disk"])
def test_loading_a_part_is_loading_its_folder(tmp_path: Path, weights: Any) -> None:
    slice_folder(WHOLE, tmp_path / "out", WANTED)
    folder = logits(tmp_path / "out", weights=weights)
    for same in (WANTED, {"layers": [0, 1, 4], "ffn": (18, 26, 17)}, Slice((0, 1, 4), (18, 26, 17))):
        agree(logits(WHOLE, matformer=same, weights=weights), folder, "exact")
    agree(logits(PART, weights=weights), folder, "exact")


def by_hand(arrays: dict[str, Array], chosen: Slice, width: int) -> dict[str, Array]:
    """The tensors of the smaller model, straight from the definition."""
    kept: dict[str, Array] = {}
    for name, values in arrays.items():
        number = re.match(r"layers\.(\d+)\.", name)
        if name == "embed_tokens_per_layer.weight":
            kept[name] = np.concatenate([values[:, i * width : (i + 1) * width] for i in chosen.layers], axis=1)
        elif name == "per_layer_model_projection.weight":
            kept[name] = np.concatenate([values[i * width : (i + 1) * width] for i in chosen.layers])
        elif number is None:
            kept[name] = values
        elif int(number[1]) in chosen.layers:
            new = chosen.layers.index(int(number[1]))
            ffn = chosen.ffn[new]
            cut = values[:, :ffn] if "down_proj" in name else values[:ffn] if "mlp" in name else values
            kept[name.replace(number[0], f"layers.{new}.")] = cut
    return kept


def model_of(described: Described, handles: Any) -> LLM:
    spec = described.architecture.weight_spec(described.config)
    assert {name: handle.shape for name, handle in handles.items()} == {
        name: tensor.shape for name, tensor in spec.items() if tensor.alias is None
    }
    backend = Backend("float64")
    return LLM(Model(described.architecture, described.config, build_tree(spec, handles, backend.prepare), spec), backend)


@given(data=st.data())
def test_a_slice_is_the_model_built_small_from_the_same_weights(data: st.DataObject) -> None:
    described = data.draw(our.tiny_config("gemma3n_text"))
    layers, weights = described.config.layers, random_weights(described.architecture.weight_spec(described.config))
    needed = {layer.keys_of for layer in layers}
    spare = [i for i in range(len(layers)) if i not in needed]
    drop = data.draw(st.sets(st.sampled_from(spare))) if spare else set()
    kept = tuple(i for i in range(len(layers)) if i not in drop)
    chosen = Slice(kept, tuple(data.draw(st.integers(-(-layers[i].inner // 2), layers[i].inner)) for i in kept))
    smaller, handles = sliced_model(described, weights, chosen, "test")
    arrays = by_hand(
        {name: weight.data for name, weight in weights.items()}, chosen, smaller.config.hidden_size_per_layer_input
    )
    small = {name: npllm.handles.Weight.of(name, np.ascontiguousarray(values)) for name, values in arrays.items()}
    tokens = np.arange(12).reshape(1, 12) % described.config.vocab_size
    agree(model_of(smaller, handles).forward(tokens), model_of(smaller, small).forward(tokens), "reordered float64")


def test_all_of_a_model_is_the_model(tmp_path: Path) -> None:
    slice_folder(WHOLE, tmp_path / "out", {"layers": range(5)})
    agree(logits(tmp_path / "out"), logits(WHOLE), "exact")


# -- nothing is copied that need not be -------------------------------------------------------------------------------


def test_the_table_stays_where_it_is() -> None:
    table = npllm.load(WHOLE, backend="numpy", matformer=WANTED).model.weights.embed_tokens_per_layer.weight
    assert isinstance(table, Columns)
    assert table.mapping is not None
    assert (table.shape, table.data.shape) == ((53, 15), (53, 25))
    assert table.nbytes == 53 * 15 * 4
    whole = load_file(WHOLE / "model.safetensors")["model.embed_tokens_per_layer.weight"]
    kept = [*range(10), *range(20, 25)]
    agree(table.array("float32"), whole[:, kept], "exact")
    agree(table.rows(np.array([7, 52, 7])).array("float32"), whole[[7, 52, 7]][:, kept], "exact")
    agree(table[3:5].array("float32"), whole[3:5, kept], "exact")
    agree(table[-1].array("float32"), whole[-1, kept], "exact")


# -- folders ----------------------------------------------------------------------------------------------------------


def test_shards_as_in_the_input(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", "gemma3n_text", storage="BF16")
    wanted = {"drop": [3], "ffn": 24}
    one = slice_folder(whole, tmp_path / "one", wanted)
    assert [path.name for path in sorted(one.folder.glob("*.safetensors*"))] == ["model.safetensors"]
    slice_folder(whole, tmp_path / "three", {"layers": range(4)}, shard_bytes=one.nbytes // 2)
    shards = sorted(path.name for path in (tmp_path / "three").glob("*.safetensors"))
    assert len(shards) > 2
    seen: list[tuple[int, int]] = []
    many = slice_folder(tmp_path / "three", tmp_path / "many", wanted, progress=lambda *each: seen.append(each))
    index = json.loads((many.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == many.nbytes == one.nbytes
    assert len(set(index["weight_map"].values())) > 1
    assert seen[-1] == (many.nbytes, many.nbytes)
    agree(logits(many.folder), logits(one.folder), "exact")
    agree(logits(many.folder), logits(whole, matformer=wanted), "exact")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (many.folder / name).read_bytes() == (whole / name).read_bytes()
    assert npllm.load(many.folder, backend="numpy").generate("The quick", max_tokens=2).tokens


def test_a_multimodal_wrapper_keeps_its_towers(tmp_path: Path) -> None:
    """The text part shrinks; other towers are copied as they are, whatever their type, and unused keys with their layers."""
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_text(
        json.dumps({"model_type": "gemma3n", "text_config": read(WHOLE), "vision_config": {}})
    )
    tensors = load_file(WHOLE / "model.safetensors")
    stored = {name.replace("model.", "model.language_model.", 1): values for name, values in tensors.items()}
    stored["model.vision_tower.steps"] = np.array([3], np.int64)
    stored["model.language_model.layers.4.self_attn.k_proj.weight"] = np.ones((12, 20), np.float32)
    save_file(stored, whole / "model.safetensors")
    slice_folder(whole, tmp_path / "out", WANTED)
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made["model.vision_tower.steps"].tolist() == [3]
    assert "model.language_model.layers.2.self_attn.k_proj.weight" in made
    assert read(tmp_path / "out")["text_config"]["num_hidden_layers"] == 3
    agree(logits(tmp_path / "out"), logits(PART), "exact")


def test_a_folder_with_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    refused(CheckpointError, lambda: slice_folder(WHOLE, tmp_path, WANTED), str(tmp_path), "empty folder")
    refused(CheckpointError, lambda: slice_folder(WHOLE, tmp_path / "note", WANTED), "note", "empty folder")
    for name in ("note/out", "x" * 300):
        refused(CheckpointError, lambda name=name: slice_folder(WHOLE, tmp_path / name, WANTED), "cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slice_folder(WHOLE, tmp_path / "out", WANTED, progress=fail)
    assert not (tmp_path / "out").exists()


# -- published sizes --------------------------------------------------------------------------------------------------


def test_e2b_is_cut_out_of_e4b() -> None:
    """Numbers of the text parts; the rest of config.json stays as it is."""
    described = interpret(E4B)
    assert count_parameters(described.architecture.weight_spec(described.config)) == 6_835_235_568
    chosen = choose("e2b", described, "E4B")
    assert chosen == Slice((*range(20), *range(25, 35)), (8192,) * 30)
    values = sliced_values(E4B | {"vocab_size": 262400}, described.config, chosen)
    smaller = interpret(values)
    assert values["vocab_size"] == 262400
    assert values["layer_types"] == (["sliding_attention"] * 4 + ["full_attention"]) * 6
    assert values["activation_sparsity_pattern"] == [0.95] * 10 + [0.0] * 20
    assert values["num_kv_shared_layers"] == 10
    assert count_parameters(smaller.architecture.weight_spec(smaller.config)) == 4_435_182_688
    for each in (described, smaller):
        cache = Cache(np, each.architecture.cache_spec(each.config), "float32", 32768, "bfloat16")
        assert cache.bytes_per_token == 40_960
    between = {"drop": [20, 21, 22, 23, 24], "ffn": [8192] * 10 + [16384] * 20}
    assert choose(between, described, "E4B").ffn == (8192,) * 10 + (16384,) * 20


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("e3b", ("'e3b'", "e2b")),
        ({}, ("drop or layers",)),
        ({"drop": [2], "width": 8}, ("drop or layers",)),
        (5, ("drop or layers",)),
        ({"drop": [2], "layers": [0, 1]}, ("not both",)),
        ({"drop": "2"}, ("must be a list",)),
        ({"drop": [True]}, ("must be a list",)),
        ({"drop": [2, 2]}, ("once",)),
        ({"layers": [1, 0, 4]}, ("in order",)),
        ({"drop": [5]}, ("0 to 4", "no layer 5 to drop")),
        ({"layers": [-1, 0]}, ("no layer -1 to keep",)),
        ({"drop": [0, 1, 2, 3, 4]}, ("drops all 5",)),
        ({"drop": [1]}, ("layer 1 cannot be dropped", "layer 3 shares")),
        ({"layers": [1, 4]}, ("layer 0 cannot be dropped", "layer 4 shares")),
        ({"ffn": 12}, ("layer 0 was trained with FFNs 13 to 26 wide, not 12",)),
        ({"ffn": [26, 26, 26, 27, 26]}, ("layer 3", "not 27")),
        ({"drop": [4], "ffn": [26, 26, 26]}, ("3 widths", "4 layers")),
        ({"ffn": [26.0] * 5}, ("must be a width",)),
        ({"ffn": "26"}, ("must be a width",)),
        ("e2b", ("no layer 20 to drop",)),
    ],
)
def test_what_cannot_be_cut(tmp_path: Path, wanted: Any, words: tuple[str, ...]) -> None:
    refused(ArgumentError, lambda: npllm.load(WHOLE, backend="numpy", matformer=wanted), *words)
    refused(ArgumentError, lambda: slice_folder(WHOLE, tmp_path / "out", wanted), *words)
    assert not (tmp_path / "out").exists()


def test_widths_of_published_models_begin_at_8192() -> None:
    described = interpret(E4B)
    refused(ArgumentError, lambda: choose({"ffn": 8191}, described, "E4B"), "8192 to 16384", "8191")
    refused(ArgumentError, lambda: choose({"drop": [18]}, described, "E4B"), "layer 18", "layer 20 shares")
    refused(ArgumentError, lambda: choose({"drop": [19]}, described, "E4B"), "layer 19", "layer 24 shares")
    smaller = interpret(sliced_values(E4B, described.config, choose("e2b", described, "E4B")))
    refused(ArgumentError, lambda: choose({"ffn": 4096}, smaller, "E2B"), "8192 to 8192", "4096")


def test_another_architecture_is_no_matformer() -> None:
    qwen3 = TRUTH / "models" / "qwen3"
    refused(ConfigError, lambda: npllm.load(qwen3, matformer="e2b"), "qwen3", "not a MatFormer", "Gemma 3n")


def test_eight_bit_floats_are_not_cut() -> None:
    described = interpret(read(WHOLE))
    weights = random_weights(described.architecture.weight_spec(described.config))
    factors = Weight.of("scale", np.ones((1, 1), np.float32))
    name = "layers.0.mlp.up_proj.weight"
    weights[name] = replace(weights[name], scale=Scale(factors, (128, 128), (0, 0)))
    refused(CheckpointError, lambda: sliced_model(described, weights, WANTED, "a folder"), "a folder", name, "FP8")


def test_a_damaged_checkpoint_is_named_as_its_files_name_it(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", "gemma3n_text")
    tensors = load_file(whole / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, whole / "model.safetensors")
    refused(
        CheckpointError, lambda: slice_folder(whole, tmp_path / "out", {"drop": [2]}), "model.layers.3.mlp.up_proj.weight"
    )
