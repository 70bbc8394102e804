"""Known mistakes with these architectures, one test for each, which fails when the mistake is made.

The numbers are those of the list of pitfalls that the project keeps. A test plants the mistake and shows that the
reference outputs tell it apart, or shows a number that only the right reading gives.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import npllm
from npllm import blocks
from npllm.backend import Backend
from npllm.blocks import CAUSAL, Rope, frequencies, sliding
from npllm.cache import round_to_bfloat16, widen_bfloat16
from npllm.checkpoint import find_weights
from npllm.errors import CheckpointError
from npllm.handles import Weight
from npllm.models import interpret
from npllm.quantised import scaled
from npllm.weights import count_parameters
from tests import fp8
from tests.compare import LIMITS, Array, norm
from tests.export import TRUTH
from tests.models import ABSENT
from tests.native import interleaved_rows, make_native

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


def test_pitfall_09_interleaved_and_half_split_pairs_are_told_apart(case: Callable[[str], Case]) -> None:
    mistral = case("mistral")
    names = [name for name in mistral.tensors if "q_proj" in name or "k_proj" in name]
    mistral.tensors |= {name: interleaved_rows(mistral.tensors[name], 10) for name in names}
    assert mistral.error(rope_interleave=True) < RIGHT
    assert mistral.error() > WRONG
    np.testing.assert_allclose(mistral.logits()[:, 0], mistral.truth["logits"][:, 0], rtol=1e-4, atol=1e-4)


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


def test_pitfall_43_a_tied_wrapper_does_not_replace_a_stored_head(case: Callable[[str], Case]) -> None:
    mistral = case("mistral")
    mistral.config = {"model_type": "mistral3", "tie_word_embeddings": True, "text_config": mistral.config}
    assert mistral.error() < RIGHT
    del mistral.tensors["lm_head.weight"]
    assert mistral.error() > WRONG
