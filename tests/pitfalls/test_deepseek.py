"""Pitfalls 8 to 17: DeepSeek V2 and V3, Mistral Large 3, mixtures in general, FP8."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import npllm
from npllm import blocks
from npllm.arrays import Array
from npllm.backend import Backend
from npllm.blocks import Router
from npllm.blocks.moe import eligible
from npllm.errors import CheckpointError
from npllm.handles import Weight
from npllm.models import interpret
from npllm.quantised import BLOCK, scaled
from npllm.testing.compare import norm
from tests import fp8
from tests.export import TRUTH
from tests.models import ABSENT, make_checkpoint
from tests.native import interleaved_rows
from tests.pitfalls.case import RIGHT, WRONG, Case
from tests.refusals import refused


def test_pitfall_08_yarns_squared_factor_is_v3s_and_not_mistral_large_3s(case: Callable[[str], Case]) -> None:
    published = {"factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
    for model, mscale, scale in (("deepseek_v3", 1.0, 0.1352338), ("deepseek_v2", 0.707, 0.1147214)):
        rope = {"rope_scaling": published | {"mscale": mscale, "mscale_all_dim": mscale}}
        assert interpret({"model_type": model, "num_experts_per_tok": 6} | rope).config.scale == pytest.approx(
            scale, rel=1e-6
        )
    v3 = case("deepseek-v3")
    rope = v3.config["rope_parameters"]
    assert v3.error() < RIGHT
    assert v3.error(rope_parameters=rope | {"mscale_all_dim": 0, "attention_factor": 1.0}) > WRONG
    large = case("mistral4-large")
    rope = large.config["rope_parameters"]
    assert large.error() < RIGHT
    assert large.error(rope_parameters=rope | {"mscale": 1.0, "mscale_all_dim": 1.0}) > WRONG


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3-halves-bf16", "mistral4", "mistral4-groups"])
def test_pitfall_09_latent_attention_turns_the_pairs_that_the_config_says(case: Callable[[str], Case], name: str) -> None:
    """At position 0 nothing turns, and the mistake does not show."""
    right = case(name)
    assert right.error() < RIGHT
    assert right.error(rope_interleave=not right.config["rope_interleave"]) > WRONG
    right.config["rope_interleave"] ^= True
    np.testing.assert_allclose(right.logits()[:, 0], right.truth["logits"][:, 0], rtol=1e-4, atol=1e-4)


def test_pitfall_09_interleaved_and_half_split_pairs_are_told_apart(case: Callable[[str], Case]) -> None:
    mistral = case("mistral")
    names = [name for name in mistral.tensors if "q_proj" in name or "k_proj" in name]
    mistral.tensors |= {name: interleaved_rows(mistral.tensors[name], 10) for name in names}
    assert mistral.error(rope_interleave=True) < RIGHT
    assert mistral.error() > WRONG
    np.testing.assert_allclose(mistral.logits()[:, 0], mistral.truth["logits"][:, 0], rtol=1e-4, atol=1e-4)


class Routing(Backend):
    """Plants a mistake in the choice of experts: `mistake` takes the place of blocks.route."""

    def __init__(self, mistake: Callable[[Array, Array, Router], tuple[Array, Array]]) -> None:
        super().__init__()
        self.mistake = mistake

    def route(self, h_MD: Array, w: Any, /, router: Router) -> tuple[Array, Array]:
        correction = 0.0 if w.correction is None else w.correction.weight
        return self.mistake(self.linear(h_MD, w.gate), correction, router)


def biased_weights(logits_ME: Array, correction_E: Array, router: Router) -> tuple[Array, Array]:
    """The correction in the weights too."""
    index_MC, _ = blocks.route(np, logits_ME, router, correction_E)
    weight_MC = np.take_along_axis(blocks.sigmoid(np, logits_ME) + correction_E, index_MC, axis=-1)
    return index_MC, weight_MC / weight_MC.sum(axis=-1, keepdims=True) * router.scale


def unbiased_choice(logits_ME: Array, _: Array, router: Router) -> tuple[Array, Array]:
    return blocks.route(np, logits_ME, router)


def normalised_before(logits_ME: Array, correction_E: Array, router: Router) -> tuple[Array, Array]:
    """The sum of all scores in the place of the sum of the chosen ones."""
    index_MC, weight_MC = blocks.route(np, logits_ME, router._replace(normalise=False), correction_E)
    return index_MC, weight_MC / blocks.sigmoid(np, logits_ME).sum(axis=-1, keepdims=True)


def zero_outside(logits_ME: Array, correction_E: Array, router: Router) -> tuple[Array, Array]:
    """Experts of the other groups with the score 0, which beats a negative one, instead of -inf."""
    ranks_ME = eligible(np, blocks.sigmoid(np, logits_ME) + correction_E, router)
    index_MC = blocks.top_k(np, np.where(np.isinf(ranks_ME), 0.0, ranks_ME), router.experts_per_token)
    weight_MC = np.take_along_axis(blocks.sigmoid(np, logits_ME), index_MC, axis=-1)
    return index_MC, weight_MC / weight_MC.sum(axis=-1, keepdims=True) * router.scale


@pytest.mark.parametrize("mistake", [biased_weights, unbiased_choice, normalised_before])
def test_pitfall_10_the_correction_chooses_and_does_not_weigh(case: Callable[[str], Case], mistake: Any) -> None:
    v3 = case("deepseek-v3")
    assert v3.error(Backend()) < RIGHT
    assert v3.error(Routing(mistake)) > WRONG


def test_pitfall_10_no_expert_of_another_group_is_chosen(case: Callable[[str], Case]) -> None:
    """Where all scores of the kept groups are negative."""
    v3 = case("deepseek-v3")
    v3.tensors |= {name: values - 2 for name, values in v3.tensors.items() if "correction" in name}
    assert v3.error(Backend()) < RIGHT
    assert v3.error(Routing(zero_outside)) > WRONG


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "mistral4-groups"])
def test_pitfall_11_groups_are_ranked_by_their_best_or_their_two_best(case: Callable[[str], Case], name: str) -> None:
    def other(logits_ME: Array, correction_E: Array, router: Router) -> tuple[Array, Array]:
        ranking = "pair" if router.ranking == "max" else "max"
        return blocks.route(np, logits_ME, router._replace(ranking=ranking), correction_E)

    right = case(name)
    assert right.error(Backend()) < RIGHT
    assert right.error(Routing(other)) > WRONG


def test_pitfall_12_the_router_is_no_gate_projection(tmp_path: Path) -> None:
    """Where all of them have the same shape, so that no shape tells: 14 experts, each 14 wide, one shared, FFNs 14 wide."""
    sizes = {"n_routed_experts": 14, "n_group": 1, "moe_intermediate_size": 14, "intermediate_size": 14}
    folder = make_checkpoint(tmp_path, "deepseek_v3", with_tokenizer=False, **sizes)
    stored = load_file(folder / "model.safetensors")
    dense, sparse = (layer.mlp for layer in npllm.load(folder, backend="numpy", dtype="float32").model.weights.layers)
    for prepared, name in (
        (sparse.router.gate.weight, "layers.1.mlp.gate.weight"),
        (sparse.router.correction.weight, "layers.1.mlp.gate.e_score_correction_bias"),
        (sparse.shared_experts.gate_proj.weight, "layers.1.mlp.shared_experts.gate_proj.weight"),
        (sparse.experts.gate_proj.weight[3], "layers.1.mlp.experts.3.gate_proj.weight"),
        (dense.gate_proj.weight, "layers.0.mlp.gate_proj.weight"),
    ):
        np.testing.assert_array_equal(prepared, stored[f"model.{name}"])


def test_pitfall_12_a_dense_and_a_sparse_layer_side_by_side(case: Callable[[str], Case]) -> None:
    """`mlp.gate` of one layer is a router, `mlp.gate_proj` of the next a projection; neither serves for the other."""
    qwen = case("qwen3-moe-sparse-step")
    router, projection = "model.layers.1.mlp.gate.weight", "model.layers.0.mlp.gate_proj.weight"
    assert qwen.error() < RIGHT
    dense, sparse = (layer.mlp for layer in qwen.load().model.weights.layers[:2])
    np.testing.assert_array_equal(sparse.router.gate.weight, qwen.tensors[router])
    np.testing.assert_array_equal(dense.gate_proj.weight, qwen.tensors[projection])
    tensors = qwen.tensors
    for name in (router, projection):
        qwen.tensors = tensors | {name: tensors[name][::-1].copy()}
        assert qwen.error() > WRONG
    qwen.tensors = tensors | {router: tensors[projection]}
    refused(CheckpointError, qwen.error, router, "[26, 30]", "[6, 30]")


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "mistral4"])
def test_pitfall_13_head_dim_of_new_deepseek_files_is_not_attentions(case: Callable[[str], Case], name: str) -> None:
    """It is the width that turns, 8 here (Mistral's is a query's, 18); older files have none."""
    right = case(name)
    assert right.config["head_dim"] == (18 if name == "mistral4" else 8)
    described = [interpret(right.config | {"head_dim": value}).config for value in (right.config["head_dim"], None, 64)]
    assert described[0] == described[1] == described[2]
    assert (described[0].head_dim, described[0].rope.dim) == (18, 8)
    assert right.error(head_dim=ABSENT, qk_head_dim=ABSENT) < RIGHT


def fp8_error(folder: Path, name: str, change: Callable[[fp8.Stored], fp8.Stored]) -> float:
    """||logits - truth|| / ||truth|| of a truth case in FP8 whose tensors are changed; infinite if they are not finite."""
    source = TRUTH / "models" / name
    tensors = fp8.load(source / "model.safetensors")
    fp8.save(folder / "model.safetensors", tensors | change(tensors))
    (folder / "config.json").write_text((source / "config.json").read_text())
    truth = load_file(source / "trace.safetensors")
    error = norm(npllm.load(folder, backend="numpy").forward(truth["tokens"]) - truth["logits"]) / norm(truth["logits"])
    return error if np.isfinite(error) else np.inf


def scales(tensors: fp8.Stored) -> fp8.Stored:
    return {name: stored for name, stored in tensors.items() if name.endswith("_scale_inv")}


def test_pitfall_14_a_partial_block_has_a_scale_of_its_own(tmp_path: Path) -> None:
    """kv_a of DeepSeek V3 has 576 rows: 4 blocks of 128, and 64 rows (the rotated part of the keys) with a fifth scale."""
    codes, factors = np.full((576, 256), 0x38, np.uint8), np.arange(1, 11, dtype=np.float32).reshape(5, 2)
    held = Weight("kv_a.weight", codes.shape, "f8_e4m3", codes)
    whole = scaled(held, Weight.of("kv_a.weight_scale_inv", factors), BLOCK)
    for rope in (whole[512:].array("float32"), whole.array("float32")[512:]):
        np.testing.assert_array_equal(rope[:, ::128], np.tile(factors[4], (64, 1)))
    with pytest.raises(CheckpointError, match=r"\[4, 2\].*\[5, 2\]"):
        scaled(held, Weight.of("kv_a.weight_scale_inv", factors[:4]), BLOCK)

    def without_the_last(tensors: fp8.Stored) -> fp8.Stored:
        return {name: (dtype, factors[[0] * len(factors)]) for name, (dtype, factors) in scales(tensors).items()}

    assert fp8_error(tmp_path, "llama3-fp8", lambda tensors: {}) < RIGHT
    assert fp8_error(tmp_path, "llama3-fp8", without_the_last) > WRONG


def test_pitfall_15_scales_multiply_though_they_are_called_inverse(tmp_path: Path) -> None:
    def inverted(tensors: fp8.Stored) -> fp8.Stored:
        return {name: (dtype, 1 / factors) for name, (dtype, factors) in scales(tensors).items()}

    assert fp8_error(tmp_path, "llama3-fp8", lambda tensors: {}) < RIGHT
    assert fp8_error(tmp_path, "llama3-fp8", inverted) > WRONG


def test_pitfall_16_the_layer_that_predicts_further_tokens_is_no_layer(case: Callable[[str], Case]) -> None:
    v3 = case("deepseek-v3")
    last = {name: values for name, values in v3.tensors.items() if "layers.2." in name}
    v3.tensors |= {name.replace("layers.2.", "layers.3."): values for name, values in last.items()}
    v3.tensors["model.layers.3.eh_proj.weight"] = np.ones((28, 56), np.float32)
    assert v3.error() < RIGHT
    del v3.tensors["model.layers.3.eh_proj.weight"]
    assert v3.error(num_hidden_layers=4) > WRONG


class NormedWhole(Backend):
    """Plants a mistake in latent attention: the norm of the latent vector takes the key that turns along."""

    def latent_project(self, h_MD: Array, w: Any, angles: Any, /, eps: float, *, interleaved: bool = True) -> Array:
        gain_L = w.kv_a_layernorm.weight
        down_MF = self.linear(h_MD, w.kv_a_proj_with_mqa)
        gain_F = np.concatenate([gain_L, np.ones(down_MF.shape[1] - len(gain_L), np.float32)])
        normed_MGF = blocks.rms_norm(np, down_MF, gain_F, eps)[:, None]
        key_MGK = self.rope(normed_MGF[..., len(gain_L) :], angles, interleaved=interleaved)
        return np.concatenate([normed_MGF[..., : len(gain_L)], key_MGK], axis=-1)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "mistral4"])
def test_pitfall_17_the_latent_vector_is_normed_and_the_key_beside_it_is_not(case: Callable[[str], Case], name: str) -> None:
    right = case(name)
    assert right.error(Backend()) < RIGHT
    assert right.error(NormedWhole()) > WRONG
