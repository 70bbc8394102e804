"""Rings 1 to 3 on a real GPU: `pytest -m gpu`. Without one, every test says why it is skipped."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import npllm
from npllm import LLM
from npllm.arrays import Array
from npllm.backend import Backend
from npllm.backends.cupy_gpu.backend import CupyBackend
from npllm.errors import BackendError
from npllm.models import interpret
from npllm.numpy_backend import NumpyBackend
from npllm.registry import get_backend
from npllm.testing.conformance import MODEL, conformance
from npllm.testing.operation import operations
from tests import strategies as our
from tests.compare import agree
from tests.export import CASES, TRUTH
from tests.gpu import test_formats, test_heads, test_route, test_sampling
from tests.gpu.test_bfloat16_keys import InBoth, attended
from tests.gpu.test_formats import FORMATS
from tests.gpu.test_sampling import SIZES
from tests.models import CONFIGS
from tests.steps import in_pieces, step

pytestmark = pytest.mark.gpu

OPERATIONS = [op.name for op in operations() if op.backends] + [MODEL]
KINDS = ("float32", "bfloat16")
PROMPTS = [[5, 9, 33, 7], [11], [200, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]


@cache
def unusable() -> str:
    try:
        get_backend("cupy")
    except BackendError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True, scope="module")
def needs_gpu() -> None:
    if unusable():
        pytest.skip(unusable())


@cache
def gpu(dtype: str = "float32") -> Backend:
    return get_backend("cupy", dtype=dtype)


# -- ring 2: conformance, and pairs of backends ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "stored", "float64"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_conformance(operation: str, dtype: str) -> None:
    conformance("cupy", [operation], dtypes=[dtype], seed=2).raise_on_failure()


@pytest.mark.parametrize("architecture", our.CONFIGS)
@given(data=st.data())
@settings(max_examples=8)
def test_a_model_on_two_backends(architecture: str, data: st.DataObject) -> None:
    """At once, in pieces, and in a batch whose rows are out of step."""
    described, seed = data.draw(our.tiny_config(architecture)), data.draw(our.seeds)
    others = [Backend("float32"), NumpyBackend("float32", threads=2), get_backend("numba", dtype="float32")]
    other, kv_dtype = data.draw(st.sampled_from(others)), data.draw(st.sampled_from([None, "bfloat16"]))
    ours, theirs = (LLM.random(described, be, seed=seed, kv_dtype=kv_dtype) for be in (gpu(), other))
    token = st.integers(0, described.config.vocab_size - 1)
    ids = st.lists(token, min_size=1, max_size=30).map(lambda row: np.array(row, dtype=np.int64))
    rows = [data.draw(ids) for _ in range(data.draw(st.integers(1, 3)))]
    cuts = data.draw(our.cuts(len(rows[0])))
    limit = "reordered Gemma 3n" if architecture == "gemma3n_text" else "turned keys" if kv_dtype else "reordered"
    for way in (
        lambda llm: llm.forward(rows[0])[0],
        lambda llm: in_pieces(llm, rows[0], cuts),
        lambda llm: ragged(llm, rows),
    ):
        agree(way(ours), way(theirs), limit)


def ragged(llm: LLM, rows: list[Array]) -> Array:
    """Each row half, then the rest, of the last row first."""
    cache = llm.new_cache()
    slots = [cache.add() for _ in rows]
    got = step(llm, cache, slots, [row[: len(row) // 2] for row in rows])
    got += step(llm, cache, slots[::-1], [row[len(row) // 2 :] for row in rows[::-1]])
    return np.concatenate(got)


# -- what the kit does not ask: tests of the emulated device, on the GPU ----------------------------------------------------

KERNELS: list[tuple[Callable[..., None], dict[str, Any]]] = [
    *((test_formats.test_products, {"format": name, "tokens": n}) for name in FORMATS for n in (1, 2, 4, 8, 70)),
    *((test_formats.test_experts, {"format": name, "tokens": n}) for name in FORMATS for n in (3, 20)),
    *((test_formats.test_absorbed_latents, {"format": name, "stored_keys": kind}) for name in FORMATS for kind in KINDS),
    *((test_heads.test_heads_go_to_the_cache, {"kv_dtype": kind}) for kind in (None, "bfloat16")),
    *((test_heads.test_a_norm_after_a_branch, {"kind": kind, "width": 1100}) for kind in ("rms", "unit", "layer")),
    (test_heads.test_streams_are_predicted_from_all_of_them, {"tokens": 3, "streams": 2, "width": 5}),
    (test_route.test_any_router, {}),
    *((test_sampling.test_the_host_draws_the_same, {"kind": k, "size": n}) for k in test_sampling.KINDS for n in SIZES),
    *((test_sampling.test_few_of_many, {"kind": kind}) for kind in ("plain", "ties", "peaked")),
    (test_sampling.test_any_settings, {}),
]


@pytest.mark.parametrize(
    ("test", "of"), KERNELS, ids=[f"{test.__name__}-{'-'.join(map(str, of.values()))}" for test, of in KERNELS]
)
def test_kernels(test: Callable[..., None], of: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[test.__module__], "EmulatedBackend", CupyBackend)
    test(**of)


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_few_tokens_on_tensor_cores(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_formats, "EmulatedBackend", CupyBackend)
    test_formats.test_products_of_few_tokens_on_tensor_cores(8, 2048, rows, monkeypatch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "stored"])
@pytest.mark.parametrize("operation", ["attention", "latent_attention"])
def test_keys_in_bfloat16(operation: str, dtype: str) -> None:
    attended(InBoth, operation, dtype)


# -- ring 3: truth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_truth(name: str) -> None:
    want = load_file(TRUTH / "models" / name / "trace.safetensors")
    llm = npllm.load(TRUTH / "models" / name, backend="cupy", dtype="float32")
    limit = "truth Gemma 3n" if CASES[name].model == "gemma3n_text" else "truth"
    agree(llm.forward(want["tokens"]), want["logits"], limit, what=name)
    output = llm.generate(want["tokens"][0, :9], max_tokens=24, temperature=0, ignore_eos=True)
    assert output.tokens == want["greedy"][0].tolist()


# -- ring 1: what must hold -----------------------------------------------------------------------------------------------


def random_model(name: str, be: Backend) -> LLM:
    return LLM.random(interpret(CONFIGS[name] | {"model_type": name}, name), be)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_is_a_graph(name: str) -> None:
    """Greedy tokens are the canon's, step after step out of one captured graph."""
    from npllm.backends.cupy_gpu.steps import Step

    seen: list[Step] = []
    made = Step.__init__

    def remembered(self: Step, *args: Any) -> None:
        made(self, *args)
        seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__init__", remembered)
        got = random_model(name, gpu()).generate(PROMPTS, max_tokens=24, ignore_eos=True)
    want = random_model(name, Backend("float32")).generate(PROMPTS, max_tokens=24, ignore_eos=True)
    assert [each.tokens for each in got] == [each.tokens for each in want]
    assert seen
    assert all(step.graph is not None and not step.problem for step in seen)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "llama4_text", "deepseek_v3"])
def test_looking_ahead_changes_nothing(name: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows leave the batch one by one, and a conversation is cut back by a token while a step ahead is under way."""
    told = []
    for ahead in ("1", "0"):
        monkeypatch.setenv("NPLLM_LOOKAHEAD", ahead)
        llm = random_model(name, get_backend("cupy", dtype="float32"))
        options: dict[str, Any] = {"max_tokens": 40, "temperature": temperature, "seed": 4}
        told += [[each.tokens for each in llm.generate(PROMPTS, stop_ids=range(0, 320, 40), **options)]]
        cache = llm.prompt_cache()
        with llm.stream([5, 6, 7], cache=cache, ignore_eos=True, **options) as stream:
            said = [next(stream).token for _ in range(20)]
        told += [said, llm.generate([5, 6, 7, *said[:-1]], cache=cache, ignore_eos=True, **options).tokens]
    assert told[:3] == told[3:]


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "qwen3_moe", "gemma3n_text"])
def test_the_same_bits_again(name: str) -> None:
    llm, tokens_T = random_model(name, gpu("bfloat16")), np.arange(40) % 97
    first = llm.forward(tokens_T)
    for _ in range(3):
        agree(llm.forward(tokens_T), first, "exact")


def test_memory_is_given_back() -> None:
    import gc

    be: Any = gpu()
    random_model("qwen3", be).generate(PROMPTS, max_tokens=8, ignore_eos=True)
    gc.collect()
    be.device.release()
    free = be.device.memory().free
    gc.disable()
    try:
        for _ in range(3):
            random_model("qwen3", be).generate(PROMPTS, max_tokens=8, ignore_eos=True)
    finally:
        gc.enable()
    be.device.release()
    assert be.device.memory().free >= free - (64 << 20)


def test_under_a_memory_limit() -> None:
    be: Any = gpu()
    pool = be.device.cupy.get_default_memory_pool()
    llm = random_model("qwen3", be)
    wanted = llm.generate(PROMPTS[0], max_tokens=4, ignore_eos=True).tokens
    pool.set_limit(size=pool.used_bytes() + (1 << 20))
    try:
        with pytest.raises(npllm.errors.MemoryLimitError):
            llm.generate([[7] * 200] * 64, max_tokens=40, ignore_eos=True)
    finally:
        pool.set_limit(size=0)
    assert llm.generate(PROMPTS[0], max_tokens=4, ignore_eos=True).tokens == wanted
