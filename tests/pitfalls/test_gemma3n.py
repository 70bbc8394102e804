"""Pitfalls 36 to 41: Gemma 3n. That it has no 1 + w is with the other Gemmas."""

import functools
import itertools
import logging
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from npllm import blocks
from npllm.arrays import Array
from npllm.models import gemma3n
from npllm.testing.compare import norm
from tests.pitfalls.case import RIGHT, WRONG, Case


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
    small = case("gemma3n")
    assert small.error() < RIGHT
    monkeypatch.setattr(blocks, "gaussian_topk", functools.partial(mistake, blocks.gaussian_topk))
    assert small.error() > WRONG


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
    small = case("gemma3n")
    assert small.error() < RIGHT
    monkeypatch.setattr(gemma3n, "add_input", functools.partial(mistake, gemma3n.add_input))
    assert small.error() > WRONG


def test_pitfall_39_altups_coefficients_are_target_by_source(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stream n takes C[n, j] of stream j; by hand, then planted."""
    x_MAD, mixing_MAA = np.array([[[1.0], [10.0]]]), np.array([[[0.0, 2.0], [0.0, 0.0]]])
    np.testing.assert_array_equal(blocks.altup_predict(np, x_MAD, mixing_MAA), [[[21.0], [10.0]]])
    right, small = blocks.altup_predict, case("gemma3n")
    assert small.error() < RIGHT
    monkeypatch.setattr(blocks, "altup_predict", lambda xp, x_MAD, c_MAA: right(xp, x_MAD, c_MAA.transpose(0, 2, 1)))
    assert small.error() > WRONG


def test_pitfall_40_laurels_residual_is_the_normed_input_and_the_sum_is_scaled(case: Callable[[str], Case]) -> None:
    small = case("gemma3n")
    want, layer = small.truth["logits"], "layers.0."
    assert small.error() < RIGHT
    llm = small.load()

    def residual_not_normed(laurel_MD: Array) -> Array:
        a_MD = recorded[layer + "altup.predicted"][:, 0]
        return laurel_MD - llm.backend.rms_norm(a_MD, llm.model.weights.layers[0].input_layernorm, 1e-6) + a_MD

    mistakes = {"laurel.branch": residual_not_normed, "attention.output": lambda x_MD: x_MD * np.sqrt(np.float32(2))}
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
