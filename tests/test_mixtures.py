"""Mixtral, Qwen2-MoE and Qwen3-MoE: what their config.json may say, and how the tensors of their experts may be stored."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npllm
from npllm.blocks import CAUSAL, Mask, Router, sliding
from npllm.config import MOST_EXPERTS
from npllm.errors import CheckpointError, ConfigError
from npllm.models import interpret
from npllm.weights import active_parameters, count_parameters
from tests.compare import agree
from tests.experts import MLP, fused, save_model
from tests.models import ABSENT, make_config, make_tensors
from tests.refusals import refused

ARCHITECTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
IDS = np.array([[5, 250, 17, 3, 99, 7, 42, 11, 300]])

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def read(architecture: str, **changes: Any) -> Any:
    return interpret(make_config(architecture, **changes)).config


# -- config.json ------------------------------------------------------------------------------------------------------


def test_class_defaults_are_those_of_transformers() -> None:
    qwen3 = interpret({"model_type": "qwen3_moe"}).config
    assert (qwen3.hidden_size, qwen3.num_hidden_layers, qwen3.num_key_value_heads, qwen3.head_dim) == (2048, 24, 4, 64)
    assert (qwen3.num_experts, qwen3.moe_intermediate_size, qwen3.router) == (128, 768, Router(8))
    assert (qwen3.moe_layers, qwen3.mask, qwen3.attention_bias) == ((True,) * 24, CAUSAL, False)
    qwen2 = interpret({"model_type": "qwen2_moe"}).config
    assert (qwen2.intermediate_size, qwen2.num_key_value_heads, qwen2.head_dim) == (5632, 16, 128)
    assert (qwen2.num_experts, qwen2.moe_intermediate_size, qwen2.router) == (60, 1408, Router(4))
    assert (qwen2.shared_expert_intermediate_size, qwen2.masks, qwen2.qkv_bias) == (5632, (CAUSAL,) * 24, True)
    mixtral = interpret({"model_type": "mixtral"}).config
    assert (mixtral.intermediate_size, mixtral.num_hidden_layers, mixtral.num_key_value_heads) == (14336, 32, 8)
    assert (mixtral.num_local_experts, mixtral.router, mixtral.mask) == (8, Router(2, normalise=True), CAUSAL)
    assert (mixtral.rope.theta, mixtral.rms_norm_eps, mixtral.max_position_embeddings) == (1e6, 1e-5, 131072)


@every_architecture
def test_experts_are_counted_under_either_name(architecture: str) -> None:
    new = read(architecture, num_local_experts=5)
    assert read(architecture, num_local_experts=ABSENT, num_experts=5) == new
    assert read(architecture, num_local_experts=5, num_experts=5) == new
    refused(
        ConfigError,
        lambda: read(architecture, num_local_experts=5, num_experts=6),
        "num_experts = 6",
        "num_local_experts = 5",
    )


@pytest.mark.parametrize("architecture", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    ("changes", "moe_layers"),
    [
        ({}, "xxxxxx"),
        ({"decoder_sparse_step": 2}, ".x.x.x"),
        ({"decoder_sparse_step": 3}, "..x..x"),
        ({"decoder_sparse_step": 7}, "......"),
        ({"mlp_only_layers": [0, 4, 99]}, ".xxx.x"),
        ({"mlp_only_layers": [1, 2], "decoder_sparse_step": 2}, "...x.x"),
        ({"mlp_only_layers": None}, "xxxxxx"),
        ({"num_local_experts": 0}, "......"),
    ],
)
def test_which_layers_are_mixtures(architecture: str, changes: dict[str, Any], moe_layers: str) -> None:
    c = read(architecture, num_hidden_layers=6, **changes)
    assert "".join("x" if each else "." for each in c.moe_layers) == moe_layers


@pytest.mark.parametrize(
    ("architecture", "changes", "masks"),
    [
        ("mixtral", {"sliding_window": None}, [CAUSAL] * 4),
        ("mixtral", {"sliding_window": 4096}, [sliding(4096)] * 4),
        ("qwen3_moe", {"sliding_window": 7}, [CAUSAL] * 4),
        ("qwen3_moe", {"use_sliding_window": True}, [sliding(4096)] * 4),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": None}, [CAUSAL] * 4),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}, [sliding(7)] * 4),
        ("qwen2_moe", {"sliding_window": 7, "max_window_layers": 2}, [CAUSAL] * 4),
        ("qwen2_moe", {"sliding_window": 0}, [CAUSAL] * 4),
        ("qwen2_moe", {"use_sliding_window": True}, [sliding(4096), CAUSAL] * 2),
        (
            "qwen2_moe",
            {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
            [sliding(7)] + [CAUSAL] * 3,
        ),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, [CAUSAL] * 4),
    ],
)
def test_which_layers_see_a_window(architecture: str, changes: dict[str, Any], masks: list[Mask]) -> None:
    described = interpret(make_config(architecture, num_hidden_layers=4, **changes))
    assert [spec.mask for spec in described.architecture.cache_spec(described.config)] == masks


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("mixtral", {"num_local_experts": 0}, ["num_local_experts = 0"]),
        ("mixtral", {"num_experts_per_tok": 7}, ["num_experts_per_tok = 7", "6"]),
        ("mixtral", {"sliding_window": 0}, ["sliding_window = 0"]),
        ("qwen3_moe", {"num_experts_per_tok": 0}, ["num_experts_per_tok = 0"]),
        ("qwen3_moe", {"num_experts_per_tok": 7}, ["num_experts_per_tok = 7", "6"]),
        ("qwen3_moe", {"num_local_experts": MOST_EXPERTS + 1}, ["num_local_experts"]),
        ("qwen3_moe", {"moe_intermediate_size": 0}, ["moe_intermediate_size = 0"]),
        ("qwen3_moe", {"decoder_sparse_step": 0}, ["decoder_sparse_step = 0"]),
        ("qwen3_moe", {"mlp_only_layers": 1}, ["mlp_only_layers = 1"]),
        ("qwen3_moe", {"mlp_only_layers": ["1"]}, ["mlp_only_layers"]),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, ["norm_topk_prob"]),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, ["shared_expert_intermediate_size = 0"]),
        ("qwen2_moe", {"layer_types": ["full_attention"]}, ["layer_types", "1 layers", "2"]),
        ("qwen2_moe", {"layer_types": ["chunked_attention"] * 2}, ["chunked_attention"]),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 2}, ["sliding_window", "use_sliding_window"]),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 0}, ["sliding_window = 0"]),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": None}, ["sliding_window = null"]),
    ],
)
def test_values_that_fit_nothing_are_refused(architecture: str, changes: dict[str, Any], words: list[str]) -> None:
    refused(ConfigError, lambda: read(architecture, **changes), *words)


@every_architecture
def test_a_token_meets_the_experts_that_it_chooses(architecture: str) -> None:
    """Twice as many experts: twice their weights, and the same for a token but for the router's rows."""
    counts = []
    for experts in (6, 12):
        described = interpret(make_config(architecture, num_local_experts=experts))
        spec = described.architecture.weight_spec(described.config)
        counts.append((count_parameters(spec), active_parameters(spec, 2)))
    one_expert, layers, width = 3 * 14 * 32, 2, 32
    assert counts[1][0] - counts[0][0] == 6 * layers * (one_expert + width)
    assert counts[1][1] - counts[0][1] == 6 * layers * width
    assert counts[0][0] - counts[0][1] == 4 * layers * one_expert


# -- tensors ----------------------------------------------------------------------------------------------------------


# Where the published files keep experts, and what they call gate, up and down.
PLACES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": MLP,
    "qwen3_moe": MLP,
}


@every_architecture
def test_experts_one_by_one_and_fused(architecture: str, tmp_path: Path) -> None:
    config = make_config(architecture)
    each = make_tensors(config)
    forms = (("each", each), ("fused", fused(each, PLACES[architecture])))
    folders = [save_model(tmp_path / name, config, tensors) for name, tensors in forms]
    one, other = (npllm.load(folder, backend="numpy").forward(IDS) for folder in folders)
    agree(other, one, "exact")


@every_architecture
def test_the_experts_of_a_layer_come_in_one_form(architecture: str, tmp_path: Path) -> None:
    """Half of a fused tensor beside single matrices would leave its other half unread."""
    config, up = make_config(architecture), PLACES[architecture][2]
    each = make_tensors(config)
    stacked = fused(each, PLACES[architecture])
    mixed = {name: values for name, values in each.items() if not (".experts." in name and name.endswith(f"{up}.weight"))}
    mixed |= {name: values for name, values in stacked.items() if name.endswith("gate_up_proj")}
    refused(CheckpointError, lambda: npllm.load(save_model(tmp_path / "a", config, mixed)), "gate_up_proj", "not expected")
    half = {name: values for name, values in stacked.items() if not name.endswith("experts.down_proj")}
    refused(CheckpointError, lambda: npllm.load(save_model(tmp_path / "b", config, half)), "experts.down_proj", "missing")


@every_architecture
def test_more_experts_than_names_could_be_made_for(architecture: str, tmp_path: Path) -> None:
    tensors = make_tensors(make_config(architecture))
    config = make_config(architecture, num_local_experts=4096, num_hidden_layers=4096)
    refused(CheckpointError, lambda: npllm.load(save_model(tmp_path, config, tensors)), f"{3 * 4096**2} matrices of experts")


@every_architecture
@pytest.mark.parametrize("said", [5, 7])
def test_a_number_of_experts_that_the_tensors_contradict(architecture: str, said: int, tmp_path: Path) -> None:
    """The config says one less, or one more: the first tensor that does not fit is named."""
    each = make_tensors(make_config(architecture))
    config = make_config(architecture, num_local_experts=said)
    module, gate, *_ = PLACES[architecture]
    expert = f"model.layers.0.{module}.experts.{min(said, 6)}.{gate}.weight"
    words = ["not expected"] if said == 5 else [expert, "missing"]
    refused(CheckpointError, lambda: npllm.load(save_model(tmp_path / "each", config, each)), "experts", *words)
    stacked = save_model(tmp_path / "fused", config, fused(each, PLACES[architecture]))
    refused(CheckpointError, lambda: npllm.load(stacked), "has shape [6, ", f"the config asks for [{said}, ")


@every_architecture
def test_an_expert_of_another_width(architecture: str, tmp_path: Path) -> None:
    tensors = make_tensors(make_config(architecture))
    module, gate, *_ = PLACES[architecture]
    name = f"model.layers.1.{module}.experts.3.{gate}.weight"
    tensors[name] = tensors[name][:-1]
    folder = save_model(tmp_path, make_config(architecture), tensors)
    refused(CheckpointError, lambda: npllm.load(folder), name, "[13, 32]", "[14, 32]")
