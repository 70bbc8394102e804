"""Pitfalls 26 to 35 and 43: Qwen, Mistral, OLMo 2, Llama 3, GPT-2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import npllm
from npllm.arrays import Array
from npllm.backend import Backend
from npllm.blocks import CAUSAL, sliding
from npllm.checkpoint import find_weights
from npllm.errors import CheckpointError
from npllm.models import interpret
from npllm.testing.compare import norm
from npllm.weights import count_parameters
from tests.models import ABSENT
from tests.native import interleaved_rows, make_native
from tests.pitfalls.case import RIGHT, WRONG, Case
from tests.refusals import refused


def test_pitfall_26_head_dim_of_qwen3_is_its_own_field(case: Callable[[str], Case]) -> None:
    """The published 0.6B and 30B-A3B: 16 heads of 128 at width 1024, 32 at 2048. hidden / heads would give 64 for both."""
    for model, width, heads in (("qwen3", 1024, 16), ("qwen3_moe", 2048, 32)):
        fields = {"model_type": model, "hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": 4}
        described = interpret(fields | {"num_hidden_layers": 1, "head_dim": 128})
        spec = described.architecture.weight_spec(described.config)
        assert spec["layers.0.self_attn.q_proj.weight"].shape == (heads * 128, width)
        assert spec["layers.0.self_attn.o_proj.weight"].shape == (width, heads * 128)
    qwen = case("qwen3-moe")
    assert qwen.error() < RIGHT
    assert qwen.config["head_dim"] == 10
    refused(CheckpointError, lambda: qwen.error(head_dim=8), "self_attn.q_proj.weight", "[40, 30]", "[32, 30]")


def test_pitfall_27_experts_are_counted_under_two_names(case: Callable[[str], Case]) -> None:
    """transformers 5 writes num_local_experts, published files say num_experts; without either, there would be 128."""
    qwen = case("qwen3-moe")
    assert qwen.config["num_local_experts"] == 6
    assert "num_experts" not in qwen.config
    assert qwen.error() < RIGHT
    assert qwen.error(num_local_experts=ABSENT, num_experts=6) < RIGHT
    refused(CheckpointError, lambda: qwen.error(num_local_experts=ABSENT), "mlp.experts.6.gate_proj.weight", "missing")


def test_pitfall_28_norm_topk_prob_is_false_unless_said(case: Callable[[str], Case]) -> None:
    for name, said in (("qwen3-moe-raw", False), ("qwen3-moe", True), ("qwen2-moe", False), ("qwen2-moe-sparse-step", True)):
        qwen = case(name)
        assert qwen.error(norm_topk_prob=said) < RIGHT
        assert qwen.error(norm_topk_prob=not said) > WRONG
        absent = qwen.error(norm_topk_prob=ABSENT)
        assert absent > WRONG if said else absent < RIGHT


def test_pitfall_29_a_window_that_is_not_used(case: Callable[[str], Case]) -> None:
    """Nor where the older keys tell which layers would have it, as published files do: 2.5 says 131072 and false."""
    qwen2 = case("qwen2-window-off")
    named = {"sliding_window": 7, "max_window_layers": 1}
    for unused in (False, ABSENT):
        assert qwen2.error(**named, use_sliding_window=unused) < RIGHT
        assert qwen2.error(**named, use_sliding_window=unused, layer_types=ABSENT) < RIGHT
    assert qwen2.error(**named, use_sliding_window=True, layer_types=ABSENT) > WRONG


def test_pitfall_30_an_absent_window_is_4096_and_null_is_none() -> None:
    """One layer: the first token reaches the one at position p through the window only if p < 4096."""
    sizes = {"vocab_size": 5, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    values: dict[str, Any] = {"model_type": "mistral", "num_key_value_heads": 1, **sizes}
    tokens_BT = np.zeros((2, 4098), np.int64)
    tokens_BT[1, 0] = 1
    for given, seen in (({}, [True, False, False]), ({"sliding_window": None}, [True] * 3)):
        described = interpret(values | given)
        assert described.config.mask == (CAUSAL if given else sliding(4096))
        logits_BTN = npllm.LLM.random(described, Backend("float64")).forward(tokens_BT)
        assert (logits_BTN[0, 4095:] != logits_BTN[1, 4095:]).any(axis=-1).tolist() == seen


def test_pitfall_31_head_dim_of_mistral_small_is_its_own_field() -> None:
    sizes = {"vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    described = interpret({"model_type": "mistral", "sliding_window": None, **sizes, **heads})
    spec = described.architecture.weight_spec(described.config)
    assert spec["layers.0.self_attn.q_proj.weight"].shape == (4096, 5120)
    assert spec["layers.39.self_attn.o_proj.weight"].shape == (5120, 4096)
    assert count_parameters(spec) == 23_572_403_200


def test_pitfall_32_one_of_two_forms_is_loaded_and_no_row_moves(case: Callable[[str], Case], tmp_path: Path) -> None:
    """Beside Hugging Face's files Mistral's own are not read, whatever they hold; alone they are read as they stand."""
    mistral = case("mistral")
    make_native(tmp_path, "mistral")
    (tmp_path / "consolidated.safetensors").rename(tmp_path / "good")
    (tmp_path / "consolidated.safetensors").write_bytes(b"never opened")
    assert mistral.error() < RIGHT
    assert list(find_weights(tmp_path)) == [tmp_path / "model.safetensors"]
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).unlink()
    (tmp_path / "good").rename(tmp_path / "consolidated.safetensors")
    llm, want = npllm.load(tmp_path, backend="numpy", dtype="float32"), mistral.truth["logits"]
    assert norm(llm.forward(mistral.truth["tokens"]) - want) / norm(want) < RIGHT
    stored = load_file(tmp_path / "consolidated.safetensors")
    names = ("layers.0.attention.wq.weight", "layers.1.attention.wk.weight")
    save_file(stored | {name: interleaved_rows(stored[name], 10) for name in names}, tmp_path / "consolidated.safetensors")
    permuted = npllm.load(tmp_path, backend="numpy", dtype="float32").forward(mistral.truth["tokens"])
    assert norm(permuted - want) / norm(want) > WRONG


class NormsPerHead(Backend):
    """Plants a mistake in OLMo 2: each head of q and of k (60 and 20 numbers here, not 36) has its own mean square."""

    def rms_norm(self, x_D: Array, w: Any, /, eps: float, offset: float = 0.0) -> Array:
        if x_D.shape[-1] == 36:
            return super().rms_norm(x_D, w, eps, offset)
        heads = super().rms_norm(x_D.reshape(len(x_D), -1, 10), None, eps)
        return heads.reshape(x_D.shape) * w.weight


def test_pitfall_33_olmo2_norms_whole_projections_and_no_input(case: Callable[[str], Case]) -> None:
    olmo2 = case("olmo2")
    assert olmo2.error(Backend()) < RIGHT
    assert olmo2.error(NormsPerHead()) > WRONG
    llm = olmo2.load()
    assert not [name for name in llm.model.spec if "input_layernorm" in name]
    assert llm.model.spec["layers.0.self_attn.q_norm.weight"].shape == (60,)
    assert llm.model.spec["layers.0.self_attn.k_norm.weight"].shape == (20,)
    with llm.trace() as recorded:
        llm.forward(olmo2.truth["tokens"])
    np.testing.assert_array_equal(recorded["layers.0.attention.input"], recorded["embedding"])
    np.testing.assert_array_equal(recorded["layers.1.ffn.input"], recorded["layers.1.attention.output"])


def test_pitfall_34_eps_is_the_files_and_not_the_class_default(case: Callable[[str], Case]) -> None:
    olmo2 = case("olmo2-eps")
    assert olmo2.error() < RIGHT
    assert olmo2.error(rms_norm_eps=ABSENT) > WRONG
    assert interpret(olmo2.config | {"rms_norm_eps": None}).config.rms_norm_eps == 1e-5
    assert interpret({"model_type": "llama"}).config.rms_norm_eps == 1e-6
    assert interpret({"model_type": "llama", "rms_norm_eps": 1e-5}).config.rms_norm_eps == 1e-5


@pytest.mark.parametrize("name", ["gpt2", "gpt2-inner"])
def test_pitfall_35_gpt2s_matrices_are_stored_in_by_out(case: Callable[[str], Case], name: str) -> None:
    """Only for the square one of attention's output does no shape tell."""
    gpt2 = case(name)
    tensors = gpt2.tensors
    transposed = {each: np.ascontiguousarray(values.T) for each, values in tensors.items() if values.ndim == 2}
    square, wide = "transformer.h.0.attn.c_proj.weight", "transformer.h.0.attn.c_attn.weight"
    assert gpt2.error() < RIGHT
    gpt2.tensors = tensors | {square: transposed[square]}
    assert gpt2.error() > WRONG
    gpt2.tensors = tensors | {wide: transposed[wide]}
    refused(CheckpointError, gpt2.error, wide, str(list(transposed[wide].shape)), str(list(tensors[wide].shape)))


def test_pitfall_43_a_tied_wrapper_does_not_replace_a_stored_head(case: Callable[[str], Case]) -> None:
    mistral = case("mistral")
    mistral.config = {"model_type": "mistral3", "tie_word_embeddings": True, "text_config": mistral.config}
    assert mistral.error() < RIGHT
    del mistral.tensors["lm_head.weight"]
    assert mistral.error() > WRONG
