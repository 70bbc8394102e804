"""Ring 2 by pairs: random operations and whole random models on the canon, on "numpy" and on "numba", with more threads or
fewer, in each arithmetic; and what must not change a single bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from npllm import LLM
from npllm.arrays import Array
from npllm.backend import Backend
from npllm.backends.numba_cpu.backend import NumbaBackend
from npllm.models import interpret
from npllm.numpy_backend import NumpyBackend
from npllm.testing import strategies as kit
from npllm.testing.case import Case
from npllm.testing.checking import check
from npllm.testing.compare import Limit
from npllm.testing.compare import agree as within
from npllm.testing.conformance import backend_kernel, policy
from npllm.testing.operation import operations
from tests import strategies as our
from tests.compare import agree
from tests.models import make_config
from tests.steps import in_pieces, step

DTYPES = ["float32", "bfloat16", "stored"]
COARSE = Limit(0.1, 0.2, "up to three layers that multiply in bfloat16, as small as 5 numbers wide; most are within 2e-2")

every_architecture = pytest.mark.parametrize("architecture", our.CONFIGS)
every_operation = pytest.mark.parametrize("op", [op.name for op in operations() if op.backends])


@cache
def backend(dtype: str, threads: int = 2) -> NumbaBackend:
    return NumbaBackend(dtype, threads=threads)


# -- operations -------------------------------------------------------------------------------------------------------


def checked(op: str, case: Case, dtype: str, storage: str) -> None:
    be = backend(dtype)
    check(op, backend_kernel(op, be), case, policy(be, storage, op, case)).raise_on_failure()


@every_operation
@given(data=st.data())
@settings(max_examples=6)
def test_operations_with_other_numbers(op: str, data: st.DataObject) -> None:
    """Cases of the kit with numbers that nobody has seen, in each arithmetic and storage."""
    case = data.draw(kit.cases(op))
    checked(op, case, data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(["f32", "f16", "bf16"])))


@pytest.mark.parametrize("op", kit.SIZED)
@given(data=st.data())
@settings(max_examples=40)
def test_operations_of_any_size(op: str, data: st.DataObject) -> None:
    """Odd ones, and none at all; in float32, where a number that is missing shows."""
    checked(op, data.draw(kit.sized_cases(op)), "float32", data.draw(st.sampled_from(["f32", "f16", "bf16"])))


# -- models -----------------------------------------------------------------------------------------------------------


def tokens_of(data: st.DataObject, described: Any, rows: int) -> list[Array]:
    token = st.integers(0, described.config.vocab_size - 1)
    ids = st.lists(token, min_size=1, max_size=30).map(lambda row: np.array(row, dtype=np.int64))
    return [data.draw(ids) for _ in range(rows)]


@every_architecture
@given(data=st.data())
@settings(max_examples=6)
def test_a_model_on_two_backends(architecture: str, data: st.DataObject) -> None:
    """At once, in pieces, and in a batch whose rows are out of step."""
    described, seed = data.draw(our.tiny_config(architecture)), data.draw(our.seeds)
    other = data.draw(st.sampled_from([Backend("float32"), NumpyBackend("float32", threads=2)]))
    kv_dtype = data.draw(st.sampled_from([None, "bfloat16"]))
    ours = LLM.random(described, backend("float32", data.draw(st.integers(1, 2))), seed=seed, kv_dtype=kv_dtype)
    theirs = LLM.random(described, other, seed=seed, kv_dtype=kv_dtype)
    rows = tokens_of(data, described, data.draw(st.integers(1, 3)))
    cuts = data.draw(our.cuts(len(rows[0])))
    ways: list[Callable[[LLM], Array]] = [
        lambda llm: llm.forward(rows[0])[0],
        lambda llm: in_pieces(llm, rows[0], cuts),
        lambda llm: ragged(llm, rows),
    ]
    for way in ways:
        agree(way(ours), way(theirs), REORDERED[kv_dtype] if architecture != "gemma3n_text" else "reordered Gemma 3n")


def ragged(llm: LLM, rows: list[Array]) -> Array:
    """Each row half, then the rest, of the last row first."""
    cache = llm.new_cache()
    slots = [cache.add() for _ in rows]
    got = step(llm, cache, slots, [row[: len(row) // 2] for row in rows])
    got += step(llm, cache, slots[::-1], [row[len(row) // 2 :] for row in rows[::-1]])
    return np.concatenate(got)


@pytest.mark.parametrize("lengths", [(150, 3), (3, 150, 1), (150, 40, 1, 0), (1, 1, 1, 40, 150), (0, 70, 600)])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text", "llama4_text", "deepseek_v3"])
def test_rows_of_every_length_in_one_step(architecture: str, lengths: tuple[int, ...]) -> None:
    """Single tokens, a few, and prompts, in any order: each kind has kernels of its own. And then a token more for each."""
    described = interpret(make_config(architecture, max_position_embeddings=700))
    dice = np.random.default_rng(5)
    rows = [dice.integers(0, 300, length) for length in lengths]
    got, want = (mixed(LLM.random(described, be), rows) for be in (backend("float32"), Backend("float32")))
    agree(got, want, "reordered")


def mixed(llm: LLM, rows: list[Array]) -> Array:
    cache = llm.new_cache()
    slots = [cache.add() for _ in rows]
    got = step(llm, cache, slots, rows)
    return np.concatenate(got + step(llm, cache, slots, [np.array([7])] * len(rows)))


# Where keys are rounded to bfloat16, a rounding error before that may turn one of them.
REORDERED: dict[str | None, str] = {None: "reordered", "bfloat16": "turned keys"}


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "llama", "mistral", "qwen2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "stored"])
@given(data=st.data())
@settings(max_examples=8)
def test_coarse_arithmetic_is_near_the_canon(architecture: str, dtype: str, data: st.DataObject) -> None:
    """Of models whose errors stay small: choices of experts may turn, and norms of what is small enlarge its errors."""
    described, seed = data.draw(our.tiny_config(architecture)), data.draw(our.seeds)
    ours, theirs = (LLM.random(described, be, seed=seed) for be in (backend(dtype), Backend("float32")))
    (tokens_T,) = tokens_of(data, described, 1)
    within(ours.forward(tokens_T), theirs.forward(tokens_T), COARSE)


# -- bits -------------------------------------------------------------------------------------------------------------


@every_architecture
@given(data=st.data())
@settings(max_examples=4)
def test_the_same_bits_whenever_and_on_however_many_threads(architecture: str, data: st.DataObject) -> None:
    described, seed = data.draw(our.tiny_config(architecture)), data.draw(our.seeds)
    dtype = data.draw(st.sampled_from(DTYPES))
    one, two = (LLM.random(described, backend(dtype, threads), seed=seed) for threads in (1, 2))
    rows = tokens_of(data, described, 3)
    wanted = ragged(one, rows)
    for _ in range(2):
        agree(ragged(two, rows), wanted, "exact", what=dtype)


@every_architecture
@given(data=st.data())
@settings(max_examples=4)
def test_the_company_of_a_row_does_not_change_its_bits(architecture: str, data: st.DataObject) -> None:
    """Three rows of the same lengths; the first and the last bring other tokens, before and in the step that is compared."""
    described, seed = data.draw(our.tiny_config(architecture)), data.draw(our.seeds)
    dtype = data.draw(st.sampled_from(DTYPES))
    llm, (row, *company) = LLM.random(described, backend(dtype), seed=seed), tokens_of(data, described, 3)
    others = [(tokens_T + 1) % described.config.vocab_size for tokens_T in company]
    halves = [between(llm, row, these) for these in (company, others)]
    for got, want in zip(*halves, strict=True):
        agree(got, want, "exact", what=dtype, literal=True)


def between(llm: LLM, row: Array, company: list[Array]) -> list[Array]:
    """The logits of a row, in two halves, between two others."""
    cache = llm.new_cache()
    rows, slots = [company[0], row, company[1]], [cache.add() for _ in range(3)]
    first = step(llm, cache, slots, [each[: len(each) // 2] for each in rows])
    return [first[1], step(llm, cache, slots, [each[len(each) // 2 :] for each in rows])[1]]
