"""Known mistakes with these architectures, one test for each, which fails when the mistake is made.

The numbers are those of the list of pitfalls that the project keeps. A test plants the mistake and shows that the
reference outputs tell it apart, or shows a number that only the right reading gives.
"""

import functools
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import npllm
from npllm import blocks
from npllm.backend import Backend
from npllm.blocks import CAUSAL, Rope, Router, frequencies, sliding
from npllm.blocks.moe import eligible
from npllm.cache import round_to_bfloat16, widen_bfloat16
from npllm.checkpoint import find_weights
from npllm.errors import CheckpointError
from npllm.handles import Weight
from npllm.models import gemma3n, interpret
from npllm.quantised import scaled
from npllm.weights import count_parameters
from tests import fp8
from tests.compare import LIMITS, Array, norm
from tests.export import TRUTH
from tests.models import ABSENT, make_checkpoint
from tests.native import interleaved_rows, make_native
from tests.refusals import refused

LINEAR = {"rope_type": "linear", "factor": 4.0}
RIGHT, WRONG = LIMITS["truth"].relative, 0.01
Tensors = dict[str, Array]


class Case:
    """A copy of a truth case whose files can be changed, and the error of what is then computed."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, source = folder, TRUTH / "models" / name
        self.config: dict[str, Any] = json.loads((source / "config.json").read_text())
        self.tensors: Tensors = load_file(source / "model.safetensors")
        self.truth = load_file(source / "trace.safetensors")

    def logits(self, backend: Backend | None = None) -> Array:
        (self.folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, self.folder / "model.safetensors")
        llm = npllm.load(self.folder, backend="numpy", dtype="float32")
        llm.backend = backend or llm.backend
        return llm.forward(self.truth["tokens"])

    def error(self, backend: Backend | None = None, **changes: Any) -> float:
        """||logits - truth|| / ||truth||, with `changes` of config.json (ABSENT takes a key away)."""
        kept = self.config
        changed = kept | changes
        self.config = {key: value for key, value in changed.items() if value is not ABSENT}
        got, want = self.logits(backend), self.truth["logits"]
        self.config = kept
        return norm(got - want) / norm(want)


@pytest.fixture
def case(tmp_path: Path) -> Callable[[str], Case]:
    return lambda name: Case(tmp_path, name)


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
    llm = npllm.load(qwen.folder, backend="numpy", dtype="float32")
    dense, sparse = (layer.mlp for layer in llm.model.weights.layers[:2])
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
    rope = scaled(held, Weight.of("kv_a.weight_scale_inv", factors), (128, 128))[512:].array("float32")
    np.testing.assert_array_equal(rope[:, ::128], np.tile(factors[4], (64, 1)))
    with pytest.raises(CheckpointError, match=r"\[4, 2\].*\[5, 2\]"):
        scaled(held, Weight.of("kv_a.weight_scale_inv", factors[:4]), (128, 128))

    def without_the_last(tensors: fp8.Stored) -> fp8.Stored:
        return {name: (dtype, factors[[0] * len(factors)]) for name, (dtype, factors) in scales(tensors).items()}

    assert fp8_error(tmp_path, "llama3-fp8", lambda tensors: {}) < RIGHT
    assert fp8_error(tmp_path, "llama3-fp8", without_the_last) > WRONG


def test_pitfall_15_scales_multiply_though_they_are_called_inverse(tmp_path: Path) -> None:
    def inverted(tensors: fp8.Stored) -> fp8.Stored:
        return {name: (dtype, 1 / factors) for name, (dtype, factors) in scales(tensors).items()}

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


class WeighedOutput(Backend):
    """Plants a mistake in Llama 4: the router's score scales what an expert gives, not what it gets."""

    def moe(self, x_MD: Array, w: Any, index_MC: Array, weight_MC: Array, /, act: str, *, weigh: str = "output") -> Array:
        return super().moe(x_MD, w, index_MC, weight_MC, act, weigh="output")


class NormedEverywhere(Backend):
    """Plants a mistake in Llama 4: q and k of the NoPE layer 3 are normed too."""

    def layer(self, index: int) -> Backend:
        return self if index == 3 else Backend()

    def project_heads(self, x_MD: Array, w: Any, /, head_dim: int, *, norm: Any = None) -> tuple[Array, Array, Array]:
        q_MHK, k_MGK, v_MGK = super().project_heads(x_MD, w, head_dim, norm=norm)
        return self.rms_norm(q_MHK, None, 1e-3), self.rms_norm(k_MGK, None, 1e-3), v_MGK


class SmallEps(Backend):
    """Plants a mistake in Llama 4: an eps of its own in the norm without a gain."""

    def rms_norm(self, x_D: Array, w: Any, /, eps: float, offset: float = 0.0) -> Array:
        return super().rms_norm(x_D, w, 1e-6 if w is None else eps, offset)


class WindowForChunk(Backend):
    """Plants a mistake in Llama 4: a window that moves with the query in the place of aligned chunks."""

    def attention(self, q_MHK: Array, keys: Any, rows: Any, /, *, mask: Any, scale: float, softcap: Any = None) -> Array:
        return super().attention(q_MHK, keys, rows, mask=sliding(mask.chunk) if mask.chunk else mask, scale=scale)


class HotRope(Backend):
    """Plants a mistake in Llama 4: the temperature of the NoPE layers in the others too."""

    def attention(self, q_MHK: Array, keys: Any, rows: Any, /, *, mask: Any, scale: float, softcap: Any = None) -> Array:
        factor_M = blocks.temperature(np, rows.positions_M + 1, 6, 0.8, "float32")
        q_MHK = q_MHK * factor_M[:, None, None] if mask.chunk else q_MHK
        return super().attention(q_MHK, keys, rows, mask=mask, scale=scale)


class CoarseRouter(Backend):
    """Logits of the router rounded to bfloat16, as transformers has them when the model runs in it."""

    def route(self, h_MD: Array, w: Any, /, router: Any) -> tuple[Array, Array]:
        logits_ME = widen_bfloat16(round_to_bfloat16(np, self.linear(h_MD, w.gate)), "float32")
        return blocks.route(np, logits_ME, router)


def test_pitfall_18_llama4s_fused_experts_are_stored_transposed(case: Callable[[str], Case]) -> None:
    """[E, D, 2F], gate before up, and [E, F, D]; each expert by itself is [out, in] under a name of its own."""
    llama4 = case("llama4")
    fused = {name: value for name, value in llama4.tensors.items() if ".experts." in name}
    llama4.tensors |= {name: np.roll(value, 12, axis=2) for name, value in fused.items() if "gate_up" in name}
    assert llama4.error() > WRONG
    llama4.tensors |= {name: np.ascontiguousarray(value.transpose(0, 2, 1)) for name, value in fused.items()}
    with pytest.raises(CheckpointError, match=r"gate_up_proj has shape \[4, 24, 28\], the config asks for \[4, 28, 24\]"):
        llama4.error()
    for name, value in fused.items():
        del llama4.tensors[name]
        parts = {"down_proj": value} if "down" in name else {"gate_proj": value[..., :12], "up_proj": value[..., 12:]}
        for part, stack in parts.items():
            path = name.rpartition(".")[0]
            llama4.tensors |= {f"{path}.{e}.{part}.weight": np.ascontiguousarray(one.T) for e, one in enumerate(stack)}
    assert llama4.error() < RIGHT


@pytest.mark.parametrize("name", ["llama4", "llama4-interleaved", "llama4-top2"])
def test_pitfall_19_llama4s_score_scales_the_experts_input(case: Callable[[str], Case], name: str) -> None:
    llama4 = case(name)
    assert llama4.error(Backend()) < RIGHT
    assert llama4.error(WeighedOutput()) > WRONG


def test_pitfall_20_llama4_norms_q_and_k_of_rope_layers_only(case: Callable[[str], Case]) -> None:
    """Before or after RoPE is the same in exact arithmetic: a rotation changes no mean square."""
    llama4 = case("llama4")
    assert llama4.error(Backend()) < RIGHT
    assert llama4.error(NormedEverywhere()) > WRONG
    assert llama4.error(SmallEps()) > 10 * RIGHT
    assert llama4.error(use_qk_norm=False) > WRONG
    be, x_MHK = Backend("float64"), np.random.default_rng(0).standard_normal((5, 3, 10))
    angles = be.angles(Rope(10, 80.0), np.arange(5))
    before, after = be.rms_norm(x_MHK, None, 1e-3), be.rope(x_MHK, angles, interleaved=True)
    np.testing.assert_allclose(be.rope(before, angles, interleaved=True), be.rms_norm(after, None, 1e-3), rtol=1e-12)


def test_pitfall_21_an_empty_list_of_nope_layers_is_an_absent_one(case: Callable[[str], Case]) -> None:
    llama4 = case("llama4")
    for absent in ([], None, ABSENT):
        assert llama4.error(no_rope_layers=absent) < RIGHT
        assert llama4.error(no_rope_layers=absent, layer_types=ABSENT, moe_layers=ABSENT) < RIGHT
    assert llama4.error(no_rope_layers=[0, 0, 0, 0]) > WRONG
    ropes = [layer.rope for layer in interpret({"model_type": "llama4_text", "no_rope_layers": []}).config.layers]
    assert ropes == [True, True, True, False] * 12


def test_pitfall_22_llama3_scaling_with_high_equal_to_low() -> None:
    """Scout: no band to blend, 35 frequencies kept and 29 divided by 16."""
    plain = frequencies(Rope(128, 5e5)).inverse_J
    scout = Rope(128, 5e5, "llama3", factor=16.0, original=8192, low_freq_factor=1.0, high_freq_factor=1.0)
    with np.errstate(all="raise"):
        inverse_J = frequencies(scout).inverse_J
    np.testing.assert_array_equal(inverse_J, np.concatenate([plain[:35], plain[35:] / np.float32(16)]))


@pytest.mark.parametrize("name", ["llama4", "llama4-layer-types"])
def test_pitfall_23_chunks_are_aligned_and_do_not_slide(case: Callable[[str], Case], name: str) -> None:
    llama4 = case(name)
    assert llama4.error(Backend()) < RIGHT
    assert llama4.error(WindowForChunk()) > WRONG
    np.testing.assert_allclose(llama4.logits(WindowForChunk())[:, :8], llama4.truth["logits"][:, :8], rtol=1e-3, atol=1e-4)


def test_pitfall_24_the_temperature_counts_from_one_and_leaves_rope_layers_alone(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama4, right = case("llama4-interleaved"), blocks.temperature
    factors = right(np, np.array([8190, 8191, 16383, 131071]) + 1, 8192, 0.1, "float64")
    np.testing.assert_allclose(factors, [1, 1.0693147, 1.1098612, 1.2833213], atol=5e-8)
    assert llama4.error(Backend()) < RIGHT
    assert llama4.error(HotRope()) > WRONG
    assert llama4.error(attn_temperature_tuning=4) < RIGHT
    assert llama4.error(attn_temperature_tuning=False) > WRONG
    monkeypatch.setattr(blocks, "temperature", lambda xp, position_M, *rest: right(xp, position_M - 1, *rest))
    assert llama4.error() > 10 * RIGHT


def test_pitfall_25_the_router_computes_in_float32_whatever_the_weights_are_stored_in(case: Callable[[str], Case]) -> None:
    """A router in bfloat16, as transformers has it in a bfloat16 run, moves the last digits and is no mistake."""
    llama4 = case("llama4-bf16")
    assert llama4.error(Backend()) < RIGHT
    assert RIGHT < llama4.error(CoarseRouter()) < WRONG


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
    qwen2 = case("qwen2-window-off")
    named = {"sliding_window": 7, "max_window_layers": 1}
    assert qwen2.error(**named, use_sliding_window=False) < RIGHT
    assert qwen2.error(**named, use_sliding_window=ABSENT) < RIGHT
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
    llm = npllm.load(olmo2.folder, backend="numpy")
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


def test_pitfall_36_layers_that_share_keys_do_not_project_their_own(
    case: Callable[[str], Case], caplog: pytest.LogCaptureFixture
) -> None:
    """Published files hold projections of such layers, zeros perhaps: one line says that they are skipped."""
    small = case("gemma3n")
    for i, name in itertools.product((2, 3, 4), ("k_proj", "v_proj", "k_norm")):
        own = small.tensors[f"model.layers.1.self_attn.{name}.weight"]
        small.tensors[f"model.layers.{i}.self_attn.{name}.weight"] = own if "norm" in name else 0 * own
    with caplog.at_level(logging.WARNING, "npllm"):
        assert small.error() < RIGHT
    (line,) = [record.getMessage() for record in caplog.records]
    assert "skipped" in line
    assert "(9)" in line
    assert small.error(num_kv_shared_layers=0) > WRONG


def masked_topk(right: Any, xp: Any, gate_F: Array, sparsity: float) -> Array:
    return gate_F * (right(xp, gate_F, sparsity) > 0)


def sample_topk(right: Any, xp: Any, gate_F: Array, sparsity: float) -> Array:
    cut_F1 = np.mean(gate_F, -1, keepdims=True) + NormalDist().inv_cdf(sparsity) * np.std(gate_F, -1, ddof=1, keepdims=True)
    return np.maximum(gate_F - cut_F1, np.float32(0))


@pytest.mark.parametrize("mistake", [masked_topk, sample_topk])
def test_pitfall_37_sparse_gates_are_shifted_by_mean_and_population_deviation(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch, mistake: Any
) -> None:
    monkeypatch.setattr(blocks, "gaussian_topk", functools.partial(mistake, blocks.gaussian_topk))
    assert case("gemma3n").error() > WRONG


def added_everywhere(right: Any, be: Any, c: Any, w: Any, x_MAD: Array, input_MP: Array) -> Array:
    out_MAD = right(be, c, w, x_MAD, input_MP)
    added_MD = out_MAD[:, 1] - x_MAD[:, 1]
    return x_MAD + added_MD[:, None]


def overwritten(right: Any, be: Any, c: Any, w: Any, x_MAD: Array, input_MP: Array) -> Array:
    out_MAD = right(be, c, w, x_MAD, input_MP)
    out_MAD[:, 0] *= w.altup.correct_output_scale.weight
    return out_MAD


@pytest.mark.parametrize("mistake", [added_everywhere, overwritten])
def test_pitfall_38_the_layers_input_leaves_the_first_stream_alone(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch, mistake: Any
) -> None:
    monkeypatch.setattr(gemma3n, "add_input", functools.partial(mistake, gemma3n.add_input))
    assert case("gemma3n").error() > WRONG


def test_pitfall_39_altups_coefficients_are_target_by_source(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stream n takes C[n, j] of stream j; by hand, then planted."""
    x_MAD, mixing_MAA = np.array([[[1.0], [10.0]]]), np.array([[[0.0, 2.0], [0.0, 0.0]]])
    np.testing.assert_array_equal(blocks.altup_predict(np, x_MAD, mixing_MAA), [[[21.0], [10.0]]])
    right = blocks.altup_predict
    monkeypatch.setattr(blocks, "altup_predict", lambda xp, x_MAD, c_MAA: right(xp, x_MAD, c_MAA.transpose(0, 2, 1)))
    assert case("gemma3n").error() > WRONG


def test_pitfall_40_laurels_residual_is_the_normed_input_and_the_sum_is_scaled(case: Callable[[str], Case]) -> None:
    small = case("gemma3n")
    want, layer = small.truth["logits"], "layers.0."
    assert small.error() < RIGHT
    llm = npllm.load(small.folder, backend="numpy", dtype="float32")

    def residual_not_normed(laurel_MD: Array) -> Array:
        a_MD = recorded[layer + "altup.predicted"][:, 0]
        return laurel_MD - llm.backend.rms_norm(a_MD, llm.model.weights.layers[0].input_layernorm, 1e-6) + a_MD

    mistakes = {"laurel.output": residual_not_normed, "attention.output": lambda x_MD: x_MD * np.sqrt(np.float32(2))}
    for name, mistake in mistakes.items():
        with llm.trace() as recorded:
            recorded.patch(layer + name, mistake)
            assert norm(llm.forward(small.truth["tokens"]) - want) / norm(want) > WRONG


def test_pitfall_41_tokens_beyond_the_per_layer_table_take_its_first_row(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = case("gemma3n")
    assert small.truth["tokens"].max() >= len(small.tensors["model.embed_tokens_per_layer.weight"])
    assert small.error() < RIGHT
    right = gemma3n.per_layer_inputs

    def last_row(be: Any, c: Any, w: Any, tokens_M: Array, x_MD: Array) -> Array:
        return right(be, c, w, np.minimum(tokens_M, c.vocab_size_per_layer_input - 1), x_MD)

    monkeypatch.setattr(gemma3n, "per_layer_inputs", last_row)
    assert small.error() > WRONG


def test_pitfall_43_a_tied_wrapper_does_not_replace_a_stored_head(case: Callable[[str], Case]) -> None:
    mistral = case("mistral")
    mistral.config = {"model_type": "mistral3", "tie_word_embeddings": True, "text_config": mistral.config}
    assert mistral.error() < RIGHT
    del mistral.tensors["lm_head.weight"]
    assert mistral.error() > WRONG
