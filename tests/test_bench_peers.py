"""The comparison with other engines: what it counts, what it writes, and the tables it makes of what was measured."""

import importlib.util
import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import npllm
from bench import checkpoints, counting, limits, numba, peers
from bench.__main__ import VERBS, parser
from bench.contestants import gguf_file, serving
from bench.processes import Contestant, ContestantError, attempt
from npllm.models import interpret

QWEN3, TINY = "qwen3-0.6b", "tiny-qwen3-0.6b"
LIMITS: limits.Limits = {
    "read_anonymous": 30e9, "read_mapped": 28e9, "read_sustained": 24e9,
    "float32": 200e9, "float32_sustained": 190e9, "bfloat16": 400e9, "bfloat16_sustained": 380e9, "int8": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.checkpoint(tmp_path_factory.mktemp("bench"), TINY)


def described(shape: str) -> tuple:
    found = interpret(checkpoints.values_of(shape), shape)
    return found.config, found.architecture.weight_spec(found.config)


def test_flops_by_hand() -> None:
    """Qwen3-0.6B: a layer has (2 x 2048 + 2 x 1024) x 1024 elements in attention and 3 x 1024 x 3072 in its FFN."""
    c, spec = described(QWEN3)
    layers = 28 * ((2 * 2048 + 2 * 1024) * 1024 + 3 * 1024 * 3072)
    assert counting.layer_parameters(spec) == layers
    assert counting.attention_flops(c, 1) == 28 * 4 * 16 * 128
    assert counting.attention_flops(c, 3) == 6 * counting.attention_flops(c, 1)
    assert counting.prompt_flops(c, spec, 512) == 2 * layers * 512 + counting.attention_flops(c, 512) + 2 * 151936 * 1024
    assert counting.active_bytes(c, spec) == 2 * (layers + 151936 * 1024)


def test_a_mixture_counts_what_is_active() -> None:
    """Eight experts of width 768 are a dense FFN of width 6144; besides there is the router, 64 x 2048 a layer."""
    (_, dense), (_, mixture) = described("dense"), described("moe-64-8")
    assert counting.layer_parameters(mixture, 8) - counting.layer_parameters(dense) == 4 * 64 * 2048


def test_latent_flops_by_hand() -> None:
    c, _ = described("latent")
    assert counting.latent_flops(c, 10) == 8 * 2 * 16 * 10 * (512 + 64 + 512)


def test_checkpoints_load_and_are_written_once(folder: Path) -> None:
    llm = npllm.load(folder, backend="numpy")
    assert llm.config.tie_word_embeddings
    _, spec = described(TINY)
    # The backend "numpy" keeps float32.
    assert counting.weight_bytes(llm.model.weights) == 2 * counting.active_bytes(llm.config, spec)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert checkpoints.checkpoint(folder.parent, TINY) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(npllm.NpllmError, match="unknown"):
        checkpoints.values_of("qwen3-0.7b")


def test_an_embedding_that_is_looked_up_is_not_read(tmp_path: Path) -> None:
    llm = npllm.load(checkpoints.checkpoint(tmp_path, "tiny-latent"), backend="numpy")
    embedding, head = llm.model.weights.embed_tokens.weight, llm.model.weights.lm_head.weight
    assert embedding is not head
    matrices = sum(leaf.nbytes for leaf in counting.distinct(llm.model.weights) if leaf.ndim == 2)
    assert counting.weight_bytes(llm.model.weights) == matrices - embedding.nbytes


def test_everybody_gets_the_same_ids() -> None:
    ids = serving.prompt_ids(100, 50)
    assert ids[:40] == serving.prompt_ids(40, 50)
    assert set(ids) <= set(range(50))
    assert len(set(ids)) > 30


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SIDE", 64)
    monkeypatch.setattr(limits, "SUSTAINED", 0.0)
    machine = limits.Machine(tmp_path, 1, size=1 << 20)
    machine.loops, machine.how = None, "NumPy"
    found = machine.measure()
    assert all(found[name] > 0 for name in (*limits.READS, "read_sustained", "float32", "float32_sustained"))
    assert found["bfloat16"] is None
    assert limits.peak(found, "bfloat16") == found["float32"]
    assert limits.arithmetic(found, "bfloat16") == found["float32_sustained"]
    assert limits.better(LIMITS, {**LIMITS, "read_mapped": 31e9, "int8": 1.0}) == {
        **LIMITS, "read_mapped": 31e9, "int8": 1.0,
    }  # fmt: skip
    assert limits.burst(LIMITS) == 30e9
    assert limits.bandwidth(LIMITS) == 24e9
    assert limits.arithmetic(LIMITS, "bfloat16") == 380e9
    assert limits.arithmetic({"float32": 1e9, "bfloat16": None}, "bfloat16") == 1e9
    assert limits.better({}, LIMITS) == LIMITS
    assert limits.described(LIMITS, "C")[2] == "| read, anonymous | 30.0 GB/s |"


# -- GGUF -------------------------------------------------------------------------------------------------------------


def test_every_tensor_has_a_gguf_name(folder: Path) -> None:
    names = {gguf_file.tensor_name(name) for name, _ in gguf_file.tensors(folder)}
    assert len(names) == 2 + 2 * len(gguf_file.OF_LAYER)
    assert gguf_file.tensor_name("model.layers.11.self_attn.q_norm.weight") == "blk.11.attn_q_norm.weight"
    with pytest.raises(KeyError):
        gguf_file.tensor_name("model.layers.0.mlp.experts.0.gate_proj.weight")


def test_gguf_reads_the_bytes_of_the_checkpoint(folder: Path) -> None:
    llm = npllm.load(folder, backend="numpy")
    values = dict(gguf_file.tensors(folder))
    np.testing.assert_array_equal(values["model.embed_tokens.weight"], llm.model.weights.embed_tokens.weight)


def test_gguf_metadata(folder: Path) -> None:
    about = gguf_file.metadata(json.loads((folder / "config.json").read_text()))
    assert about["qwen3.attention.head_count_kv"] == 8
    assert about["qwen3.attention.key_length"] == 128
    assert about["qwen3.rope.freq_base"] == 1e6
    assert {type(value) for value in about.values()} == {int, float, str}


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="package gguf is not installed")
def test_gguf_names_are_those_of_the_package(folder: Path) -> None:
    import gguf

    about = gguf_file.metadata(json.loads((folder / "config.json").read_text()))
    known = {
        value.replace("{arch}", "qwen3")
        for group in vars(gguf.Keys).values()
        for value in getattr(group, "__dict__", {}).values()
        if isinstance(value, str)
    }
    assert set(about) <= known
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    for name, _ in gguf_file.tensors(folder):
        assert names.get_name(name, (".weight",)) == gguf_file.tensor_name(name)


# -- contestants ------------------------------------------------------------------------------------------------------


def test_a_contestant_answers(folder: Path, tmp_path: Path) -> None:
    arguments = {"folder": str(folder), "backend": "numpy", "threads": 1}
    one = Contestant("npllm_model", arguments, sys.executable, 1, tmp_path / "log")
    try:
        assert one.about["dtype"] == "float32"
        assert one.ask("prefill", tokens=8) > 0
        assert one.ask("decode", tokens=2) > 0
        assert one.ask("decode", tokens=2, context=8) > 0
        # Two layers of 8 heads, keys and values 128 wide, float32.
        assert one.ask("context_bytes", length=10) == 2 * 10 * 8 * 2 * 128 * 4
        one.ask("logits", tokens=4, path=str(tmp_path / "logits.npy"))
        assert np.load(tmp_path / "logits.npy").shape == (4096,)
        assert one.ask("memory")["weights"] > 0
        with pytest.raises(ContestantError, match="prefill"):
            one.ask("prefill", length=3)
        assert one.ask("peak", tokens=8)["cache"] > 0
    finally:
        one.close()


def test_who_does_not_start_says_why(tmp_path: Path) -> None:
    failures: dict[str, str] = {}

    def start(module: str, **arguments: str) -> None:
        attempt(module, lambda: Contestant(module, arguments, sys.executable, 1, tmp_path / "log"), failures)

    start("npllm_model", folder="missing", backend="numpy")
    start("nobody")
    assert "missing" in failures["npllm_model"]
    assert "No module named" in failures["nobody"]


# -- tables -----------------------------------------------------------------------------------------------------------


def figures() -> dict:
    """A run in which everything is half as fast as the machine allows, and llama.cpp's BF16 half as fast as npllm."""
    flops, size = 512e9, 1e9

    def one(arithmetic: str, slower: float) -> dict:
        prompt, token = (
            2 * slower * flops / limits.arithmetic(LIMITS, arithmetic),
            2 * slower * size / limits.bandwidth(LIMITS),
        )
        seconds = {"prefill": [prompt * 3, prompt, prompt * 2], "decode": [32 * token] * 3}
        return {"arithmetic": arithmetic, "weight_bytes": size, "seconds": seconds}

    return {
        "shape": QWEN3, "machine": "a machine", "versions": {"npllm": "1"}, "date": "2020-02-02", "threads": 2, "rounds": 3,
        "tokens": {"prefill": 512, "decode": 32}, "prompt_flops": flops, "limits": LIMITS, "limits_by": "C loops",
        "contestants": {
            peers.BF16: one("bfloat16", 1), peers.REFERENCE: one("float32", 1), "llama.cpp BF16": one("bfloat16", 2),
        },
        "logits": {peers.BF16: {"error": 0.01, "same_top": False}},
        "failures": {"transformers bf16": "not there"},
    }  # fmt: skip


def test_the_table_of_peers() -> None:
    lines = peers.table(figures()).splitlines()
    assert f"| {peers.BF16} | 190.0 | 95.0 | 190.0 | 0.50 | 12.0 | 12.0 | 12.0 | 0.50 |" in lines
    assert f"| {peers.REFERENCE} | 95.0 | 47.5 | 95.0 | 0.50 | 12.0 | 12.0 | 12.0 | 0.50 |" in lines
    at = lines.index(f"| decode: {peers.BF16} / its limit (read bandwidth) | 0.95 | 0.50 |")
    assert lines[at + 1] == "| the same / the fastest burst of reading | | 0.40 |"
    assert lines.count("| the same / the fastest burst of arithmetic | | 0.47 |") == 2
    assert f"| prefill: {peers.BF16} / llama.cpp BF16 | 1.40 | 2.00 |" in lines
    assert f"| decode: {peers.Q4} / llama.cpp Q4_0 | 1.20 | not measured |" in lines
    assert "transformers bf16: not there." in lines
    assert "npllm bf16 1.0e-02 (another likeliest token)" in lines[-2]
    assert len([line for line in lines if line.startswith(("| decode: ", "| prefill: "))]) == len(peers.TARGETS)


def test_a_contestant_that_failed_at_once_has_no_figures() -> None:
    found = figures()
    found["contestants"][peers.BF16]["seconds"] = {"prefill": [], "decode": []}
    assert f"| {peers.BF16} | - | - | - | - | - | - | - | - |" in peers.table(found).splitlines()
    assert peers.reached(found, peers.TARGETS[0]) is None


def test_every_round_begins_with_another() -> None:
    assert [peers.rotated([1, 2, 3], i)[0] for i in range(4)] == [1, 2, 3, 1]
    assert peers.rotated([], 3) == []


def test_the_table_of_figures() -> None:
    found = {
        "figures": [numba.Figure("memory", 1.05, 1.1, True, "1200 MiB")._asdict()], "limits": LIMITS, "limits_by": "C loops",
        "versions": {"npllm": "1"}, "machine": "a machine", "threads": 2, "rounds": 3, "date": "2020-02-02", "failures": {},
    }  # fmt: skip
    assert "| memory | at most 1.1 | 1.05 | 1200 MiB |" in numba.table(found).splitlines()


def test_arguments() -> None:
    args = parser().parse_args(["peers", "--with", "llama.cpp,transformers"])
    assert args.engines == "llama.cpp,transformers"
    with pytest.raises(SystemExit):
        parser().parse_args(["peers", "--with", "ollama"])
    for verb in VERBS:
        module = import_module(f"bench.{verb}")
        assert callable(module.run)
        assert callable(module.table)
