"""Whatever the case, the cut into steps, the company in a batch and the kind of cache: out comes what was exported.

The references are PyTorch's own outputs (tests/truth), never npllm's: for single operations, where only the mask says what
a cache keeps, and for whole models.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import npllm
from npllm import blocks
from npllm.arrays import Array
from npllm.backend import Backend
from npllm.backends.numba_cpu.backend import NumbaBackend
from npllm.cache import Cache, LayerSpec
from npllm.numpy_backend import NumpyBackend
from tests import strategies as our
from tests.compare import agree
from tests.export import CASES, TRUTH
from tests.exported import FILES, Parameters, latent_attention, latent_spec, lookup, mixture
from tests.steps import step

pytestmark = pytest.mark.usefixtures("checked_shapes")

dtypes = st.sampled_from(["float32", "float64"])
backends = st.sampled_from([Backend, NumpyBackend, NumbaBackend])


@pytest.fixture(autouse=True, scope="module")
def split_small_steps() -> Iterator[None]:
    """The backend "numpy" cuts these small steps into parts, as it does large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("npllm.numpy_backend.SPLIT", 2)
        patch.setattr("npllm.numpy_backend.SMALL_PRODUCT", 1)
        yield


def cases(*files: str) -> list[tuple[str, str]]:
    return [(file, case) for file in files for case in FILES[file].given]


def is_a_row(given: Parameters) -> bool:
    """Keys from position 0 on, in order, and queries at the last of their positions."""
    return not given["first_key"] and not given["turned_by"] and given["first_query"] == given["S"] - given["T"]


ROWS = [(file, case) for file, case in cases("attention", "attention_windowed") if is_a_row(FILES[file].given[case])]


def cuts(length: int) -> st.SearchStrategy[list[int]]:
    """Places to cut a row: a few, or one by one from somewhere on."""
    return our.cuts(length) | st.integers(0, length).map(lambda begin: list(range(begin, length)))


class Company:
    """A cache whose row `ours` is compared, among others that bring whatever they like."""

    def __init__(self, cache: Cache, others: int, data: st.DataObject) -> None:
        self.cache, self.data = cache, data
        self.slots = [cache.add() for _ in range(others + 1)]
        self.ours = data.draw(st.integers(0, others), label="our place")

    def steps(self, cuts: Sequence[int], length: int) -> Iterator[tuple[Any, slice, slice]]:
        """The plan of each step, the place of our tokens among its tokens, and their positions."""
        edges = [0, *cuts, length]
        for begin, end in pairwise(edges):
            counts = [self.data.draw(st.integers(0, 3), label="others bring") for _ in self.slots]
            counts[self.ours] = end - begin
            rows = self.cache.plan(self.slots, counts)
            at = sum(counts[: self.ours])
            yield rows, slice(at, at + end - begin), slice(begin, end)
            self.cache.advance(rows)


def among(x: Array, at: slice, total: int, dice: np.random.Generator) -> Array:
    """`x` at its place among `total` rows of other numbers."""
    packed = dice.standard_normal((total, *x.shape[1:])).astype(x.dtype)
    packed[at] = x
    return packed


@given(place=st.sampled_from(ROWS), make=backends, dtype=dtypes, ring=st.booleans(), seed=our.seeds, data=st.data())
@settings(max_examples=100)
def test_attention(place: tuple[str, str], make: Any, dtype: str, ring: bool, seed: int, data: st.DataObject) -> None:
    """Over a cache that keeps everything, and over one that keeps what the mask can reach."""
    (given, t, limit), be, dice = lookup(*place, dtype), make(dtype), np.random.default_rng(seed)
    mask = blocks.Mask(given.get("window"), given.get("chunk"))
    spec = LayerSpec(given["G"], given["K"], given["V"], mask if ring else blocks.CAUSAL)
    S, before = given["S"], given["S"] - given["T"]
    q_SHK = np.concatenate([dice.standard_normal((before, *t["q"].shape[1:])).astype(dtype), t["q"]])
    company = Company(be.new_cache([spec], 64), data.draw(st.integers(0, 2), label="others"), data)
    got = []
    for rows, at, part in company.steps(data.draw(cuts(S)), S):
        q_MHK, k_MGK, v_MGV = (among(x[part], at, sum(rows.counts), dice) for x in (q_SHK, t["k"], t["v"]))
        keys = company.cache.layers[0].append(k_MGK, v_MGV, rows)
        o_MHV = be.attention(q_MHK, keys, rows, mask=mask, scale=given["scale"], softcap=given["softcap"])
        got.append(o_MHV[at])
    agree(np.concatenate(got)[before:], t["y"], limit, what=str(place))


@given(place=st.sampled_from(cases("mla")), make=backends, dtype=dtypes, form=st.sampled_from(["as is", True, False]),
       seed=our.seeds, data=st.data())  # fmt: skip
@settings(max_examples=100)
def test_latent_attention(
    place: tuple[str, str], make: Any, dtype: str, form: bool | str, seed: int, data: st.DataObject
) -> None:
    """Over a cache of latent vectors; absorbed, expanded, or as the step's length decides."""
    (given, t, limit), be, dice = lookup(*place, dtype), make(dtype), np.random.default_rng(seed)
    company = Company(be.new_cache([latent_spec(given)], 64), data.draw(st.integers(0, 2), label="others"), data)
    got = []
    with pytest.MonkeyPatch.context() as patch:
        if form != "as is":
            patch.setattr("npllm.blocks.absorbed_is_cheaper", lambda *_: form)
        for rows, at, part in company.steps(data.draw(cuts(len(t["x"]))), len(t["x"])):
            x_MD = among(t["x"][part], at, sum(rows.counts), dice)
            got.append(latent_attention(be, given, t, x_MD, rows, company.cache.layers[0])[at])
    agree(np.concatenate(got), t["y"], limit, what=str(place))


@given(place=st.sampled_from(cases("moe", "moe_shared")), make=backends, dtype=dtypes, seed=our.seeds, data=st.data())
@settings(max_examples=100)
def test_mixtures(place: tuple[str, str], make: Any, dtype: str, seed: int, data: st.DataObject) -> None:
    """Tokens in any grouping, with others that go to the same experts or to none of them."""
    (given, t, limit), be, dice = lookup(*place, dtype), make(dtype), np.random.default_rng(seed)
    edges = [0, *data.draw(cuts(len(t["x"]))), len(t["x"])]
    got = []
    for begin, end in pairwise(edges):
        first, last = (data.draw(st.integers(0, 3), label="others") for _ in range(2))
        at = slice(first, first + end - begin)
        got.append(mixture(be, given, t, among(t["x"][begin:end], at, at.stop + last, dice))[at])
    agree(np.concatenate(got), t["y"], limit, what=str(place))


@cache
def model(name: str, kind: type[Backend], dtype: str) -> npllm.LLM:
    llm = npllm.load(TRUTH / "models" / name, backend=kind.name, dtype=dtype)
    llm.backend = kind(dtype)
    return llm


@cache
def trace(name: str) -> dict[str, Array]:
    return load_file(TRUTH / "models" / name / "trace.safetensors")


@given(name=st.sampled_from(list(CASES)), make=backends, dtype=dtypes, data=st.data())
@settings(max_examples=100)
def test_models(name: str, make: Any, dtype: str, data: st.DataObject) -> None:
    """Both rows of a case, cut differently, each bringing its tokens when it likes, in any order within a step."""
    llm, want = model(name, make, dtype), trace(name)
    kv_cache, tokens_BT = llm.new_cache(), want["tokens"]
    slots, T = [kv_cache.add() for _ in tokens_BT], tokens_BT.shape[1]
    got: list[list[Array]] = [[] for _ in tokens_BT]
    ends = [0] * len(slots)
    for last in (False, False, True):
        begins, ends = ends, [T if last else data.draw(st.integers(end, T), label="up to") for end in ends]
        order = data.draw(st.permutations(range(len(slots))))
        pieces = [tokens_BT[r, begins[r] : ends[r]] for r in order]
        for r, logits_TN in zip(order, step(llm, kv_cache, [slots[r] for r in order], pieces), strict=True):
            got[r].append(logits_TN)
    for row, logits_TN in zip(got, want["logits"], strict=True):
        agree(np.concatenate(row).astype("float32"), logits_TN, "truth", what=name)
