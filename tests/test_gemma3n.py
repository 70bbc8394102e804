"""Gemma 3n: how its config.json is read, what it keeps in memory, and what it refuses."""

from typing import Any

import numpy as np
import pytest

import npllm
from npllm.blocks import CAUSAL, sliding
from npllm.errors import ConfigError
from npllm.handles import Weight
from npllm.models import interpret
from tests.export import CASES, TRUTH
from tests.refusals import refused

TINY = {"model_type": "gemma3n_text"} | CASES["gemma3n"].config


def read(**changes: Any) -> Any:
    return interpret(TINY | changes).config


def test_class_defaults_are_e4bs() -> None:
    """Sliding layers read the keys of layer 18, full ones those of 19; cuts only in the first ten layers."""
    c = interpret({"model_type": "gemma3n_text"}).config
    assert [layer.keys_of for layer in c.layers] == [*range(20), *([18] * 4 + [19]) * 3]
    assert [layer.mask for layer in c.layers] == [*[sliding(512)] * 4, CAUSAL] * 7
    assert [layer.rope.theta for layer in c.layers] == [*[1e4] * 4, 1e6] * 7
    assert [layer.sparsity for layer in c.layers] == [0.95] * 10 + [0.0] * 25
    assert {layer.inner for layer in c.layers} == {16384}
    assert (c.owners, c.final_logit_softcapping, c.hidden_act) == (20, 30.0, "gelu_pytorch_tanh")


def test_up_to_ten_layers_are_dense_by_default() -> None:
    few = {"num_hidden_layers": 10, "num_kv_shared_layers": 5, "layer_types": None, "activation_sparsity_pattern": None}
    assert {layer.sparsity for layer in read(**few).layers} == {0.0}
    assert [layer.sparsity for layer in read(**few | {"num_hidden_layers": 11}).layers] == [0.95] * 10 + [0.0]


def test_a_number_stands_for_all_layers() -> None:
    c = read(intermediate_size=24, activation_sparsity_pattern=0.25)
    assert [(layer.inner, layer.sparsity) for layer in c.layers] == [(24, 0.25)] * 5
    assert [layer.inner for layer in read(intermediate_size=[1, 2, 3, 4, 5]).layers] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": [26] * 4}, ("intermediate_size names 4 layers, num_hidden_layers is 5",)),
        ({"intermediate_size": [26, 26, "26", 26, 26]}, ("intermediate_size", "integer")),
        ({"activation_sparsity_pattern": [0.5]}, ("activation_sparsity_pattern names 1 layers",)),
        ({"activation_sparsity_pattern": 1.0}, ("activation_sparsity_pattern", "1")),
        ({"activation_sparsity_pattern": 0.99999999}, ("activation_sparsity_pattern", "1")),
        ({"activation_sparsity_pattern": [-0.1] * 5}, ("activation_sparsity_pattern",)),
        ({"layer_types": ["sliding_attention"] * 4}, ("layer_types names 4 layers",)),
        ({"num_kv_shared_layers": 4}, ("num_kv_shared_layers = 4", "type")),
        ({"num_kv_shared_layers": 5}, ("num_kv_shared_layers = 5",)),
        ({"num_kv_shared_layers": 6}, ("num_kv_shared_layers = 6",)),
        ({"altup_num_inputs": 1}, ("altup_num_inputs", "between 2")),
        ({"altup_active_idx": 4}, ("altup_active_idx", "between 0 and 3")),
    ],
)
def test_values_that_fit_nothing_are_refused(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(ConfigError, lambda: read(**changes), *words)


@pytest.mark.parametrize("weights", ["memory", "disk"])
def test_the_per_layer_table_stays_mapped_as_it_is_stored(weights: Any) -> None:
    llm = npllm.load(TRUTH / "models" / "gemma3n-bf16", backend="numpy", weights=weights)
    table = llm.model.weights.embed_tokens_per_layer.weight
    assert isinstance(table, Weight)
    assert (table.format, table.mapping is not None) == ("bf16", True)


def test_the_cap_may_be_absent() -> None:
    """Null is none; without it, logits are beyond it."""
    described = interpret(TINY | {"final_logit_softcapping": None})
    assert described.config.final_logit_softcapping is None
    tokens = np.arange(20).reshape(1, 20)
    capped, free = (
        npllm.LLM.random(each, npllm.Backend("float64")).forward(tokens)
        for each in (interpret(TINY | {"final_logit_softcapping": 0.5}), described)
    )
    np.testing.assert_allclose(capped, 0.5 * np.tanh(free / 0.5), rtol=1e-12)
    assert np.abs(free).max() > 0.5
