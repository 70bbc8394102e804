"""Ring 3, truth: every checkpoint under `tests/truth/models` against what transformers computed with it.

A case that fails names the first part of the model that diverges: the embedding, a block, the final norm, the logits.
"""

import json
import shutil
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import npllm
from npllm.arrays import Array
from npllm.backend import Backend
from tests.compare import agree
from tests.export import CASES, ONE_OF_EACH, TRUTH, read_provenance, stale
from tests.steps import in_pieces, step

pytestmark = pytest.mark.usefixtures("checked_shapes")

MODELS = TRUTH / "models"
OLD_SPELLING = [name for name, case in CASES.items() if case.old_rope_key]
every_case = pytest.mark.parametrize("name", CASES)
every_backend = pytest.mark.parametrize("kind", ["canon", "numpy", "numba"])


@cache
def truth(name: str) -> dict[str, Array]:
    """The content of trace.safetensors; a failure that names the command to run if it is out of date."""
    if why := stale(read_provenance(name), name):
        pytest.fail(why)
    return load_file(MODELS / name / "trace.safetensors")


@cache
def model(name: str, dtype: str = "float32", kind: str = "canon") -> npllm.LLM:
    """The loaded case on the canon itself, on the backend "numpy", which cuts it into parts, or on "numba"."""
    if kind == "numba":
        pytest.importorskip("numba")
        return npllm.load(MODELS / name, backend="numba", dtype=dtype)
    llm = npllm.load(MODELS / name, backend="numpy", dtype=dtype)
    if kind == "canon":
        llm.backend = Backend(dtype)
    return llm


def trace_of(llm: npllm.LLM, tokens_BT: Array) -> dict[str, Array]:
    """What npllm computes under the names of trace.safetensors, each [B, T, ...], in the model's order."""
    with llm.trace() as recorded:
        llm.forward(tokens_BT)
    count = getattr(llm.config, "n_layer", None) or llm.config.num_hidden_layers
    layers = {f"layers.{i}": f"layers.{i}.output" for i in range(count)}
    names = {"embedding": "embedding"} | layers | {"norm": "norm", "logits": "logits"}
    return {name: recorded[ours].reshape(*tokens_BT.shape, -1) for name, ours in names.items()}


def limit(kind: str, name: str) -> str:
    """The name of the limit that holds for a case: Gemma 3n has its own."""
    return f"{kind} Gemma 3n" if CASES[name].model == "gemma3n_text" else kind


def test_every_folder_is_a_declared_case() -> None:
    assert sorted(CASES) == sorted(folder.name for folder in MODELS.iterdir())


@every_backend
@every_case
def test_trace(name: str, kind: str) -> None:
    want = truth(name)
    got = trace_of(model(name, kind=kind), want["tokens"])
    for part, value in got.items():
        agree(value, want[part], limit("truth", name), what=f"{name} diverges first in {part}")


@every_case
def test_float32_is_near_float64(name: str) -> None:
    tokens_BT = truth(name)["tokens"]
    single, double = (trace_of(model(name, dtype), tokens_BT) for dtype in ("float32", "float64"))
    for part, value in single.items():
        agree(value.astype("float64"), double[part], limit("own float64", name), what=f"{name} diverges first in {part}")


@every_case
def test_float64(name: str) -> None:
    want = truth(name)
    logits_BTN = model(name, "float64").forward(want["tokens"][:1])
    agree(logits_BTN[0], want["logits_f64"], "truth float64", what=name)


def crossed(names: str, settings: Sequence[tuple[str, ...]], rarely: Sequence[tuple[str, ...]]) -> pytest.MarkDecorator:
    """Parametrise with every case in all of the settings; those in `rarely` with one of each architecture, but `-m full`."""
    return pytest.mark.parametrize(
        ("name", *names.split()),
        [
            pytest.param(name, *each, marks=[pytest.mark.full] * (each in rarely and name not in ONE_OF_EACH))
            for each, name in product(settings, CASES)
        ],
    )


# In float64 a fault of logic stands out by ten orders of magnitude; float32 is what users run.
ARITHMETICS = [("canon", "float32"), ("canon", "float64"), ("numba", "float32")]
every_arithmetic = crossed("kind dtype", ARITHMETICS, rarely=[("canon", "float32")])


def reordered(name: str, dtype: str) -> str:
    return limit("reordered", name) if dtype == "float32" else "reordered float64"


@every_arithmetic
def test_a_prompt_in_pieces_is_the_full_forward(name: str, kind: str, dtype: str) -> None:
    llm, tokens_T = model(name, dtype, kind), truth(name)["tokens"][0]
    agree(in_pieces(llm, tokens_T, [1, 8, 24]), llm.forward(tokens_T)[0], reordered(name, dtype), what=name)


@crossed("kind dtype", ARITHMETICS, rarely=ARITHMETICS)
def test_cached_decode_is_the_full_forward(name: str, kind: str, dtype: str) -> None:
    """Every case also decodes 24 tokens in `test_greedy_tokens`, against PyTorch."""
    llm, tokens_T = model(name, dtype, kind), truth(name)["tokens"][0]
    got_TN = in_pieces(llm, tokens_T, range(5, len(tokens_T)))
    agree(got_TN, llm.forward(tokens_T)[0], reordered(name, dtype), what=name)


@every_arithmetic
def test_ragged_batch(name: str, kind: str, dtype: str) -> None:
    """Rows of different lengths, out of step with one another, a row that brings nothing, a row that joins late."""
    llm, (a_T, b_T) = model(name, dtype, kind), truth(name)["tokens"]
    cache = llm.new_cache()
    a, b = cache.add(), cache.add()
    got = step(llm, cache, [b, a], [b_T[:11], a_T[:3]])
    got += step(llm, cache, [a, b], [a_T[3:20], b_T[11:11]])
    c = cache.add()
    got += step(llm, cache, [c, a, b], [a_T[:9], a_T[20:], b_T[11:12]])
    wanted = [b_T[:11], a_T[:3], a_T[:20], b_T[:11], a_T[:9], a_T, b_T[:12]]
    for logits_TN, tokens_T in zip(got, wanted, strict=True):
        if len(logits_TN):
            agree(logits_TN, llm.forward(tokens_T)[0, -len(logits_TN) :], reordered(name, dtype), what=name)


@every_case
def test_logits_of_the_last_token_only(name: str) -> None:
    llm, tokens_BT = model(name), truth(name)["tokens"]
    agree(llm.forward(tokens_BT, logits="last"), llm.forward(tokens_BT)[:, -1], reordered(name, "float32"), what=name)


@every_case
def test_what_is_not_traced(name: str) -> None:
    """Under a trace the canon's bodies run between the kernels; without one, all kernels do."""
    llm, want = model(name, kind="numba"), truth(name)
    agree(llm.forward(want["tokens"]), want["logits"], limit("truth", name), what=name)


@crossed("kind", [("numpy",), ("numba",), ("canon",)], rarely=[("canon",)])
def test_greedy_tokens(name: str, kind: str) -> None:
    want = truth(name)
    prompt = want["tokens"][0, :9]
    output = model(name, kind=kind).generate(prompt, max_tokens=24, temperature=0, ignore_eos=True)
    assert output.tokens == want["greedy"][0].tolist()


@pytest.mark.parametrize("name", OLD_SPELLING)
def test_old_spelling_of_the_config(name: str, tmp_path: Path) -> None:
    shutil.copytree(MODELS / name, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.old.json").replace(tmp_path / "config.json")
    old, new = npllm.load(tmp_path, backend="numpy", dtype="float32"), model(name, kind="numpy")
    assert old.config == new.config
    tokens_BT = truth(name)["tokens"]
    agree(old.forward(tokens_BT), new.forward(tokens_BT), "exact", what=name)


def test_stale_truth_names_the_command() -> None:
    current = read_provenance("qwen3")
    assert stale(current, "qwen3") is None
    for change in ({"format": 0}, {"declaration": "another"}):
        assert "python -m tests.export --only qwen3" in (stale(current | change, "qwen3") or "")


def test_provenance_is_complete() -> None:
    for name in CASES:
        provenance = read_provenance(name)
        assert {"torch", "transformers", "command", "seed", "storage", "figures"} <= provenance.keys(), name
        assert json.loads((MODELS / name / "config.json").read_text())["model_type"] == provenance["model_type"]
