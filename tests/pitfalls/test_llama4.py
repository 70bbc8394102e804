"""Pitfalls 18 to 25: Llama 4."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from npllm import blocks
from npllm.arrays import Array
from npllm.backend import Backend
from npllm.blocks import Rope, frequencies, sliding
from npllm.blocks.dtypes import round_to_bfloat16, widen_bfloat16
from npllm.errors import CheckpointError
from npllm.models import interpret
from tests.models import ABSENT
from tests.pitfalls.case import RIGHT, WRONG, Case


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
