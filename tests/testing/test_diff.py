"""`npllm diff`: mistakes planted in transformers and in npllm are named, honest dumps have no divergence."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import npllm
from npllm.backend import Backend
from npllm.cli import main
from npllm.errors import ArgumentError
from npllm.llm import LLM
from npllm.testing.divergence.conventions import Convention, conventions, overriding
from npllm.testing.divergence.exporter import EXPORTER
from npllm.testing.divergence.finder import diff
from npllm.testing.rounding import FORMATS
from npllm.weights import Linear
from tests.export import TRUTH

DUMPS = TRUTH / "dumps"
MODELS = TRUTH / "models"

# A dump with a planted mistake: its model, the operation, the layer, the convention.
PLANTED = {
    "llama-pairs-interleaved": ("llama3-bf16", "attention", 0, "pairs the other way"),
    "llama-eps": ("llama3", "norm", 0, "eps 1e-06"),
    "llama-scaling-ignored": ("llama3-scaling", "angles", None, "scaling ignored"),
    "llama-theta": ("llama3-bf16", "angles", None, "theta 10000"),
    "llama-head-tied": ("llama3-bf16", "linear", None, "head tied"),
    "llama-heads-modulo": ("llama3-bf16", "attention", 0, "h % G"),
    "gemma2-cap-omitted": ("gemma2-bf16", "attention", 0, "soft cap of the scores left out"),
    "gemma2-window": ("gemma2-bf16", "attention", 0, "window one key too wide"),
    "gemma2-window-everywhere": ("gemma2-bf16", "attention", 1, "window on all layers"),
    "gemma2-embedding-scale": ("gemma2-bf16", "embedding", None, "embedding not scaled"),
    "gemma2-gain": ("gemma2-bf16", "norm", 0, "w, not 1 + w"),
    "gemma2-final-cap": ("gemma2-bf16", "logits", None, "soft cap of the logits left out"),
    "gemma2-scale": ("gemma2-bf16", "attention", 0, "scale 1 / sqrt(head_dim)"),
    "gemma2-activation": ("gemma2-bf16", "activation", 0, "activation silu"),
    "gemma3-qk-norm": ("gemma3-bf16", "attention", 0, "norms of q and k left out"),
    "gemma3-local-everywhere": ("gemma3-bf16", "angles", None, "RoPE of the sliding layers on all"),
    "gemma3-window-ignored": ("gemma3-bf16", "attention", 0, "window ignored"),
    "deepseek-correction": ("deepseek-v3", "router weights", 1, "correction in the weights"),
    "deepseek-not-normalised": ("deepseek-v3", "router weights", 1, "not renormalised"),
    "deepseek-scaling-factor": ("deepseek-v3", "router weights", 1, "scaling factor left out"),
    "deepseek-groups": ("deepseek-v3", "choice of experts", 1, "groups ignored"),
    "deepseek-halves": ("deepseek-v3", "attention", 0, "pairs the other way"),
    "deepseek-mscale": ("deepseek-v3", "attention", 0, "scale 1 / sqrt(head_dim)"),
    "deepseek-shared": ("deepseek-v3", "residual sum", 1, "shared experts left out"),
    "qwen3-moe-not-normalised": ("qwen3-moe", "router weights", 0, "not renormalised"),
    "qwen3-moe-fewer": ("qwen3-moe", "choice of experts", 0, "one expert too few"),
    "qwen3-moe-gate-up": ("qwen3-moe", "experts", 0, "gate and up exchanged"),
    "qwen3-moe-activation": ("qwen3-moe", "experts", 0, "activation gelu"),
}

HONEST = sorted(path.stem for path in DUMPS.glob("*.*.safetensors"))

FAMILIES = ("llama3-bf16", "gemma2-bf16", "gemma3-bf16", "deepseek-v3", "qwen3-moe", "olmo2", "gpt2", "mixtral", "gemma3n")


@pytest.mark.parametrize("name", PLANTED)
def test_a_mistake_planted_in_transformers_is_named(name: str) -> None:
    model, operation, layer, convention = PLANTED[name]
    found = diff(MODELS / model, DUMPS / f"{name}.safetensors")
    assert found.first is not None, found
    assert found.first.layer == layer, found
    assert operation in found.first.operation, found
    assert convention in found.convention, found
    assert found.explained > 0.99


def test_every_dump_is_used() -> None:
    assert {path.stem for path in DUMPS.glob("*.safetensors")} == {*PLANTED, *HONEST}
    assert sum(path.stat().st_size for path in DUMPS.iterdir()) < 600_000


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_dump_of_transformers_has_no_divergence(name: str) -> None:
    case, _, dtype = name.rpartition(".")
    found = diff(MODELS / case, DUMPS / f"{name}.safetensors")
    assert found.ok, found
    assert len(found.points) > 40, found
    assert found.format == {"bfloat16": "bf16", "float32": "f32"}[dtype]
    assert "no divergence" in str(found)


# -- npllm's own traces -------------------------------------------------------------------------------------------------


def traced(model: str, backend: Backend | None = None, config: Any = None) -> tuple[LLM, dict[str, Any]]:
    """A model in float32, and the trace of 2 x 12 tokens on another backend or with another configuration."""
    llm = npllm.load(MODELS / model, backend="numpy", dtype="float32")
    other = LLM(llm.model, backend or llm.backend, name=model)
    if config is not None:
        other.model = replace(llm.model, config=config)
    tokens = np.random.default_rng(5).integers(0, llm.config.vocab_size, (2, 12))
    with other.trace() as trace:
        other.forward(tokens)
    return llm, {**{name: np.asarray(x) for name, x in trace.items()}, "tokens": tokens}


@pytest.mark.parametrize("model", FAMILIES)
def test_npllms_own_trace_has_no_divergence(model: str) -> None:
    llm, dump = traced(model)
    found = diff(llm, dump)
    assert found.ok, found
    assert len(found.points) > 10, found


@pytest.mark.parametrize("model", FAMILIES)
def test_only_the_layers_outputs_rounded_to_bfloat16_have_no_divergence(model: str) -> None:
    llm, dump = traced(model)
    kept = {name: x for name, x in dump.items() if re.fullmatch(r"layers\.\d+\.output|logits|tokens", name)}
    rounded = {name: x if name == "tokens" else x.astype(ml_dtypes.bfloat16) for name, x in kept.items()}
    found = diff(llm, rounded)
    assert found.ok, found
    assert found.format == "bf16", found


CHANGES: dict[str, tuple[str, Any, str]] = {
    "normalise": ("qwen3-moe", lambda c: {"router": c.router._replace(normalise=False)}, "not renormalised"),
    "scale": ("deepseek-v3", lambda c: {"router": c.router._replace(scale=1.0)}, "scaling factor left out"),
    "cap": ("gemma2-bf16", lambda c: {"final_logit_softcapping": None}, "soft cap of the logits"),
    "eps": ("llama3", lambda c: {"rms_norm_eps": 1e-3}, "eps 0.001"),
    "local": ("gemma3-bf16", lambda c: {"rope": c.local_rope}, "RoPE of the sliding layers"),
    "act": ("llama3", lambda c: {"hidden_act": "gelu"}, "activation gelu"),
    "act-gpt2": ("gpt2", lambda c: {"activation_function": "relu"}, "activation relu"),
    "eps-gpt2": ("gpt2", lambda c: {"layer_norm_epsilon": 1e-3}, "eps 0.001"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_configuration_is_named(name: str) -> None:
    model, change, convention = CHANGES[name]
    config = npllm.load(MODELS / model, backend="numpy").config
    llm, dump = traced(model, config=replace(config, **change(config)))
    found = diff(llm, dump)
    assert not found.ok, found
    assert convention in found.convention, found
    assert found.explained > 0.99, found


def test_weights_may_stay_on_disk() -> None:
    llm = npllm.load(MODELS / "deepseek-v3", backend="numpy", weights="disk")
    assert diff(llm, DUMPS / "deepseek-v3.bfloat16.safetensors").ok
    assert "scaling factor" in diff(llm, DUMPS / "deepseek-scaling-factor.safetensors").convention


def test_an_error_counts_where_it_arises_and_once() -> None:
    llm, dump = traced("llama3")
    dump["layers.1.ffn.up"] = dump["layers.1.ffn.up"] * np.float32(1.01)
    wrong = [point for point in diff(llm, dump).points if point.problem]
    assert [point.name for point in wrong] == ["layers.1.ffn.up", "layers.1.ffn.hidden"]


def test_a_near_tie_is_followed_and_reported() -> None:
    """Two experts whose logits are equal: either choice is right, and the expert that was taken is gone on with."""
    llm, dump = traced("qwen3-moe")
    logits = np.array(dump["layers.0.moe.logits"])
    best, second, third = np.argsort(-logits[0])[:3]
    logits[0, third] = logits[0, second]
    index = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    index[0] = [best, max(second, third)]
    weights = np.take_along_axis(np.exp(logits), index, axis=1)
    weights /= weights.sum(axis=1, keepdims=True)
    kept = {"tokens": dump["tokens"], "layers.0.moe.logits": logits, "layers.0.moe.topk_index": index}
    found = diff(llm, kept | {"layers.0.moe.topk_weight": weights})
    assert [point.problem for point in found.points if "topk" in point.name] == ["", ""]
    assert [(tie.layer, tie.token) for tie in found.ties] == [(0, 0)]
    assert "ties" in str(found)
    index[1] = np.argsort(logits[1])[:2]
    found = diff(llm, kept)
    assert [point.problem for point in found.points if "topk_index" in point.name] == ["choice"]


def test_experts_that_a_dump_does_not_tell_leave_tokens_in_doubt() -> None:
    """Two experts are made equal for token 0, and the dump took the other one: its output is not compared, others are."""
    llm, dump = traced("qwen3-moe")
    only = {"tokens": dump["tokens"], "layers.0.moe.logits": np.array(dump["layers.0.moe.logits"])}
    logits = only["layers.0.moe.logits"]
    order = np.argsort(-logits[0])
    logits[0, order[2]] = logits[0, order[1]]
    output = only["layers.0.output"] = np.array(dump["layers.0.output"])

    def problem() -> str:
        return next(point.problem for point in diff(llm, only, explain=False).points if point.name == "layers.0.output")

    output[0] += 1.0
    assert problem() == ""
    assert any((tie.token, tie.theirs) == (0, ()) for tie in diff(llm, only, explain=False).ties if tie.layer == 0)
    output[0, 3] = np.nan
    assert problem() == "non-finite"
    output[0] = 0.0
    output[5] += 1.0
    assert problem() == "bound"


def test_mistakes_in_experts_show_in_the_layers_outputs_alone() -> None:
    planted = load_file(DUMPS / "qwen3-moe-not-normalised.safetensors")
    found = diff(MODELS / "qwen3-moe", {name: x for name, x in planted.items() if re.fullmatch(r".*layers\.0|tokens", name)})
    assert found.first is not None
    assert "experts" in found.first.operation
    assert "not renormalised" in found.convention


def test_mixtral_is_compared_under_the_names_of_transformers_5() -> None:
    llm, dump = traced("mixtral")
    theirs = {"": "output", ".mlp.gate": "moe.logits", ".mlp.experts": "moe.routed"}
    named = {f"model.layers.0{name}": dump[f"layers.0.{own}"] for name, own in theirs.items()} | {"tokens": dump["tokens"]}
    found = diff(llm, named)
    assert found.ok, found
    assert not found.unused
    assert len(found.points) == 3


# -- conventions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama3", "gemma3-bf16", "deepseek-v3", "qwen3-moe", "gpt2"])
def test_conventions_have_names_of_their_own(model: str) -> None:
    config = npllm.load(MODELS / model, backend="numpy").config
    everything = "RMS norm and RoPE's angles and attention with RoPE and linear and activation and router weights and logits"
    names = [each.name for each in conventions(config, everything.replace("attention with RoPE and ", ""))]
    assert len(set(names)) == len(names) > 15
    assert all(isinstance(each, Convention) for each in conventions(config, everything))


def test_conventions_that_come_to_the_same_are_all_named() -> None:
    """In a layer with a window, none at all looks like one on the other layers only."""
    found = diff(MODELS / "gemma3-bf16", DUMPS / "gemma3-window-ignored.safetensors")
    assert found.convention == "window ignored or window on the other layers"


def test_half_an_explanation_is_none() -> None:
    llm, dump = traced("llama3")
    dump["layers.1.attention.input"] = dump["layers.2.attention.input"]
    found = diff(llm, dump)
    assert found.first is not None
    assert found.convention == "", found


def test_overriding_calls_the_canon() -> None:
    class Doubled(overriding("embed", lambda self, canon, tokens, w: 2.0 * canon(tokens, w)), Backend):  # type: ignore[misc]
        pass

    table = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    assert Doubled("float32").embed(np.array([1]), Linear(table)).tolist() == [[4.0, 6.0]]


# -- bad input ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def good() -> dict[str, Any]:
    return load_file(DUMPS / "llama3-bf16.float32.safetensors")


def refused(dump: Any, words: str, model: str = "llama3-bf16", **options: Any) -> None:
    with pytest.raises(ArgumentError, match=words) as error:
        diff(MODELS / model, dump, **options)
    assert "\n" not in str(error.value)


def test_bad_dumps_are_refused_in_one_line(good: dict[str, Any], tmp_path: Path) -> None:
    tokens = good["tokens"]
    refused({name: x for name, x in good.items() if name != "tokens"}, "has no tensor `tokens`")
    refused(good | {"tokens": tokens + 97}, "not in this model's vocabulary of 97")
    refused(good | {"tokens": tokens - 97}, "not in this model's vocabulary")
    refused(good | {"tokens": tokens.astype(np.float32)}, "must be integers")
    refused({"tokens": tokens}, "holds no activations")
    refused({"tokens": tokens, "blocks.0.attn.q": np.ones((1, 5, 60))}, "no name matches this model .* nearest: ")
    refused(good | {"model.layers.0.self_attn.q_proj": np.ones((1, 5, 59))}, "q_proj has shape .* need .* another model")
    refused(good, "unknown; known", dtype="bf17")
    refused(tmp_path / "nothing.safetensors", "is not a file")
    refused(load_file(DUMPS / "qwen3-moe.float32.safetensors"), "another model")


def test_only_the_last_tokens_logits_are_compared_too(good: dict[str, Any]) -> None:
    last = {"tokens": good["tokens"], "logits": good["logits"][:, -1]}
    assert diff(MODELS / "llama3-bf16", last).ok
    found = diff(MODELS / "llama3-bf16", last | {"logits": good["logits"][:, 0]})
    assert found.first is not None
    assert found.first.name == "logits"


def test_nan_and_other_weights_are_divergences(good: dict[str, Any]) -> None:
    good["model.layers.1.mlp.down_proj"][0, 2, 3] = np.nan
    found = diff(MODELS / "llama3-bf16", good)
    assert found.first is not None
    assert found.first.problem == "non-finite"
    assert "down_proj" in found.first.name
    assert "NaN" in str(found)
    found = diff(MODELS / "llama3", load_file(DUMPS / "llama3-bf16.float32.safetensors"))
    assert found.first is not None
    assert "embed_tokens" in found.first.name
    assert not found.convention


def test_what_is_no_number_is_listed(good: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "dump.safetensors"
    save_file(good | {"mask": np.ones(3, dtype=bool)}, path)
    found = diff(MODELS / "llama3-bf16", path)
    assert found.ok, found
    assert found.unused == ("mask",)


def test_a_format_wider_than_the_arithmetic_is_seen_through(good: dict[str, Any]) -> None:
    tokens = good.pop("tokens")
    rounded = {name: FORMATS["bf16"].round(x.astype(float)).astype(np.float32) for name, x in good.items()}
    assert diff(MODELS / "llama3-bf16", rounded | {"tokens": tokens}).format == "bf16"


# -- the command --------------------------------------------------------------------------------------------------------


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    honest, planted = DUMPS / "llama3-bf16.bfloat16.safetensors", DUMPS / "llama-pairs-interleaved.safetensors"
    model = str(MODELS / "llama3-bf16")
    assert main(["diff", model, str(honest)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("no divergence")
    assert "of budget" in out
    assert main(["diff", model, str(planted)]) == 1
    assert "RoPE pairs the other way" in capsys.readouterr().out
    assert main(["diff", model, str(planted), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "npllm.diff/1"
    assert document["first"]["layer"] == 0
    assert not document["ok"]
    assert main(["diff", "--exporter"]) == 0
    assert capsys.readouterr().out == EXPORTER
    assert main(["diff", model]) == 2
    assert main(["diff", model, str(honest), "--tokens", "a"]) == 2
    bare = tmp_path / "bare.safetensors"
    save_file({"model.norm": np.zeros((1, 5, 36), np.float32)}, bare)
    assert main(["diff", model, str(bare)]) == 1
    assert "tokens" in capsys.readouterr().err
