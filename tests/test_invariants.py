"""Ring 1, invariants: what must hold for every model and every shape, without an oracle.

Everything computes in float64, where a fault of logic stands out from rounding by ten orders of magnitude.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from npllm import LLM, Backend, blocks
from npllm.arrays import Array
from npllm.blocks import chunked, sliding
from npllm.blocks.attention import softmax
from npllm.cache import FIRST_CAPACITY, KV_BYTES, Cache, Keys, LayerSpec, cache_bytes, capacity
from npllm.errors import ArgumentError
from npllm.models import interpret
from npllm.numpy_backend import NumpyBackend
from tests import strategies as our
from tests.compare import agree
from tests.steps import in_pieces, step

pytestmark = pytest.mark.usefixtures("checked_shapes")

every_architecture = pytest.mark.parametrize("architecture", our.CONFIGS)
f64 = "reordered float64"


# -- models -----------------------------------------------------------------------------------------------------------


@every_architecture
@given(data=st.data())
def test_decode_is_prefill_is_prefill_in_pieces(architecture: str, data: st.DataObject) -> None:
    llm, (tokens_T,) = data.draw(our.model_and_tokens(architecture=architecture))
    full_TN = llm.forward(tokens_T)[0]
    agree(in_pieces(llm, tokens_T, range(1, len(tokens_T))), full_TN, f64, what="one by one")
    agree(in_pieces(llm, tokens_T, data.draw(our.cuts(len(tokens_T)))), full_TN, f64, what="in pieces")


@every_architecture
@given(data=st.data())
def test_a_row_does_not_see_its_company(architecture: str, data: st.DataObject) -> None:
    """Two steps of a packed batch, the rows in another order in the second."""
    llm, rows = data.draw(our.model_and_tokens(architecture=architecture, rows=data.draw(our.SIZES["B"])))
    halves = [data.draw(st.integers(0, len(tokens_T))) for tokens_T in rows]
    cache = llm.new_cache()
    slots = [cache.add() for _ in rows]
    before = step(llm, cache, slots, [tokens_T[:half] for tokens_T, half in zip(rows, halves, strict=True)])
    order = data.draw(st.permutations(range(len(rows))))
    after = step(llm, cache, [slots[r] for r in order], [rows[r][halves[r] :] for r in order])
    for place, r in enumerate(order):
        agree(np.concatenate([before[r], after[place]]), llm.forward(rows[r])[0], f64, what=f"row {r}")


@every_architecture
@given(data=st.data())
def test_causality(architecture: str, data: st.DataObject) -> None:
    """What comes later changes nothing before."""
    llm, (tokens_T,) = data.draw(our.model_and_tokens(architecture=architecture))
    cut = data.draw(st.integers(1, len(tokens_T)))
    agree(llm.forward(tokens_T)[0, :cut], llm.forward(tokens_T[:cut])[0], f64)


@every_architecture
@given(data=st.data())
def test_bfloat16_cache_rounds_keys_and_values_and_nothing_else(architecture: str, data: st.DataObject) -> None:
    described, seed = data.draw(our.tiny_config(architecture)), data.draw(our.seeds)
    exact, rounded = (
        LLM.random(described, Backend("float64"), seed=seed, kv_dtype=kv_dtype) for kv_dtype in (None, "bfloat16")
    )
    tokens_T = np.arange(20) % described.config.vocab_size
    with exact.trace() as trace:
        for i in range(len(exact.new_cache().layers)):
            for name in ("k", "v", "latent"):
                trace.patch(f"layers.{i}.attention.{name}", as_bfloat16)
        want_BTN = exact.forward(tokens_T)
    agree(rounded.forward(tokens_T), want_BTN, f64)
    agree(in_pieces(rounded, tokens_T, [7, 8, 9]), want_BTN[0], f64)


def as_bfloat16(x: Array) -> Array:
    rounded = x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    assert (np.abs(rounded - x) <= 2.0**-8 * np.abs(x)).all()
    return rounded


@every_architecture
@given(data=st.data())
@settings(max_examples=4)
def test_generation_in_a_batch_is_generation_alone(architecture: str, data: st.DataObject) -> None:
    llm, rows = data.draw(our.model_and_tokens(architecture=architecture, rows=3))
    options: dict[str, Any] = {"max_tokens": data.draw(st.integers(1, 12)), "temperature": 0}
    together = llm.generate(rows, **options)
    assert [output.tokens for output in together] == [llm.generate(tokens_T, **options).tokens for tokens_T in rows]
    copies = llm.generate(rows[0], n=3, **options)
    assert [output.tokens for output in copies] == [together[0].tokens] * 3


@given(data=st.data())
def test_copies_draw_as_rows_do(data: st.DataObject) -> None:
    """`n` answers to a prompt are those of a batch that holds the prompt n times; the first is that of the prompt alone."""
    llm, (tokens_T,) = data.draw(our.model_and_tokens())
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "seed": data.draw(our.seeds)}
    copies = [output.tokens for output in llm.generate(tokens_T, n=3, **options)]
    assert copies == [output.tokens for output in llm.generate([tokens_T] * 3, **options)]
    assert copies[0] == llm.generate(tokens_T, **options).tokens


def test_rows_and_seeds_draw_from_streams_of_their_own() -> None:
    """40 tokens, and 8 drawn of them: two streams that agree would be the same stream."""
    values = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 48}
    llm = LLM.random(interpret(values), Backend("float64"))

    def drawn(seed: int) -> list[tuple[int, ...]]:
        outputs = llm.generate([[1, 2]] * 2, n=2, max_tokens=8, temperature=1.0, seed=seed)
        return [tuple(output.tokens) for pair in outputs for output in pair]

    assert len({*drawn(0), *drawn(1)}) == 8
    assert drawn(0) == drawn(0)


@given(data=st.data())
def test_greedy_generation_follows_the_largest_logit(data: st.DataObject) -> None:
    llm, (tokens_T,) = data.draw(our.model_and_tokens())
    new = llm.generate(tokens_T, max_tokens=10, temperature=0).tokens
    logits_TN = llm.forward(np.concatenate([tokens_T, new]))[0]
    assert new == logits_TN[len(tokens_T) - 1 : -1].argmax(axis=1).tolist()


# -- RoPE -------------------------------------------------------------------------------------------------------------

rotations = pytest.mark.parametrize("rotate", ["rotate_halves", "rotate_interleaved"])


@st.composite
def ropes(draw: st.DrawFn, dim: int) -> blocks.Rope:
    kind = draw(st.sampled_from(["default", "linear", "llama3", "yarn"]))
    theta, factor = draw(st.sampled_from([100.0, 10000.0])), draw(st.sampled_from([2.0, 8.0]))
    return blocks.Rope(dim=dim, theta=theta, kind=kind, factor=factor, original=64)


@rotations
@given(data=st.data())
def test_rope_depends_on_relative_position_only(rotate: str, data: st.DataObject) -> None:
    q_MHK, k_MHK = data.draw(our.arrays("q_MHK", "k_MHK"))
    rope = data.draw(ropes(2 * data.draw(st.integers(1, q_MHK.shape[-1] // 2))))
    far = data.draw(st.integers(0, 5000))
    query_M, key_M = (data.draw(positions(len(q_MHK))) for _ in range(2))

    def products(shift: int) -> Array:
        angles = (blocks.angles(np, rope, at_M + shift, "float64") for at_M in (query_M, key_M))
        turned = (getattr(blocks, rotate)(np, x, angle) for x, angle in zip((q_MHK, k_MHK), angles, strict=True))
        return np.einsum("mhk,nhk->hmn", *turned)

    np.testing.assert_allclose(products(far), products(0), rtol=0, atol=1e-10 * q_MHK.shape[-1])


def positions(length: int) -> st.SearchStrategy[Array]:
    return st.lists(st.integers(0, 300), min_size=length, max_size=length).map(np.array)


@rotations
@given(data=st.data())
def test_rope_keeps_lengths(rotate: str, data: st.DataObject) -> None:
    """But for the attention factor, which scales what turns; and position 0 turns nothing."""
    (x_MHK,) = data.draw(our.arrays("x_MHK"))
    rope = data.draw(ropes(x_MHK.shape[-1]))
    angles = blocks.angles(np, rope, data.draw(positions(len(x_MHK))), "float64")
    factor = blocks.frequencies(rope).attention_factor
    turned = getattr(blocks, rotate)(np, x_MHK, angles)
    agree(np.linalg.norm(turned, axis=-1), factor * np.linalg.norm(x_MHK, axis=-1), f64, literal=True)
    still = blocks.angles(np, rope, np.zeros(len(x_MHK), np.int64), "float64")
    agree(getattr(blocks, rotate)(np, x_MHK, still), factor * x_MHK, f64)


# -- attention --------------------------------------------------------------------------------------------------------

NAMES = ("q_THK", "k_SGK", "v_SGV")


def attend(q_THK: Array, k_SGK: Array, v_SGV: Array, mask: blocks.Mask, **options: Any) -> Array:
    """softmax_attention where the last query and the last key share a position, and key 0 stands at 0."""
    T, S = len(q_THK), len(k_SGK)
    allowed_TS = mask.allowed(np, np.arange(S - T, S), np.arange(S))
    return blocks.softmax_attention(np, q_THK, k_SGK, v_SGV, allowed_TS, **{"scale": 0.5} | options)


@given(arrays=our.arrays(*NAMES), more=st.integers(0, 3))
def test_a_window_or_chunk_as_long_as_the_row_is_full_attention(arrays: list[Array], more: int) -> None:
    full, S = attend(*arrays, blocks.CAUSAL), len(arrays[1])
    for mask in (blocks.sliding(S + more), blocks.chunked(S + more)):
        agree(attend(*arrays, mask), full, "exact", literal=True)


@given(arrays=our.arrays(*NAMES), mask=our.masks)
def test_grouped_heads_are_repeated_heads(arrays: list[Array], mask: blocks.Mask) -> None:
    q_THK, k_SGK, v_SGV = arrays
    R = q_THK.shape[1] // k_SGK.shape[1]
    repeated = attend(q_THK, np.repeat(k_SGK, R, axis=1), np.repeat(v_SGV, R, axis=1), mask)
    agree(attend(*arrays, mask), repeated, f64, literal=True)


@given(arrays=our.arrays(*NAMES), mask=our.masks, data=st.data())
def test_heads_and_queries_are_independent(arrays: list[Array], mask: blocks.Mask, data: st.DataObject) -> None:
    """Heads in another order give outputs in that order; one query alone gives its row."""
    q_THK, k_SGK, v_SGV = arrays
    (T, H, _), (S, G, _) = q_THK.shape, k_SGK.shape
    order = np.array(data.draw(st.permutations(range(G))))
    of_queries = (order[:, None] * (H // G) + np.arange(H // G)).reshape(-1)
    full = attend(*arrays, mask)
    agree(attend(q_THK[:, of_queries], k_SGK[:, order], v_SGV[:, order], mask), full[:, of_queries], f64, literal=True)
    t = data.draw(st.integers(max(0, T - S), T - 1)) if T <= S else T - 1
    end = S - T + t + 1
    agree(attend(q_THK[t : t + 1], k_SGK[:end], v_SGV[:end], mask), full[t : t + 1], f64, literal=True)


@given(
    scores=our.arrays("scores_TS", scale=30.0),
    hidden=our.arrays("hidden_TS"),
    how_much=st.sampled_from([-9.0, 0.0, 1.0, 9.0]),
)
def test_softmax_rows_sum_to_one_or_zero(scores: list[Array], hidden: list[Array], how_much: float) -> None:
    T, S = (min(sizes) for sizes in zip(scores[0].shape, hidden[0].shape, strict=True))
    scores_TS, hidden_TS = scores[0][:T, :S].copy(), hidden[0][:T, :S] < how_much
    scores_TS[hidden_TS] = -np.inf
    probabilities_TS = softmax(np, scores_TS)
    assert (probabilities_TS >= 0).all()
    assert not probabilities_TS[hidden_TS].any()
    np.testing.assert_allclose(probabilities_TS.sum(axis=1), 1.0 - hidden_TS.all(axis=1), rtol=0, atol=1e-15 * S)


@given(
    sizes=st.tuples(st.integers(0, 23), st.integers(0, 30)),
    place=st.tuples(st.integers(-4, 40), st.integers(0, 30)),
    block=st.integers(1, 9),
    scores=st.sampled_from([1, 50, 1 << 18]),
    softcap=st.none() | st.just(2.0),
    mask=our.masks,
    data=st.data(),
)
@settings(max_examples=150)
def test_blocked_attention_is_softmax_attention(
    sizes: tuple[int, int],
    place: tuple[int, int],
    block: int,
    scores: int,
    softcap: float | None,
    mask: blocks.Mask,
    data: st.DataObject,
) -> None:
    """Whatever the positions: queries before all keys, after them, among them."""
    (T, S), (first_query, first_key) = sizes, place
    q_THK, k_SGK, v_SGV = data.draw(our.arrays(*NAMES, T=T, S=S))
    query_T, key_S = np.arange(first_query, first_query + T), np.arange(first_key, first_key + S)
    allowed_TS = mask.allowed(np, query_T, key_S)
    options: dict[str, Any] = {"scale": 0.7, "softcap": softcap}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("npllm.blocks.attention.SCORES", scores)
        got = blocks.blocked_attention(
            np, q_THK, k_SGK, v_SGV, first_query=first_query, first_key=first_key, mask=mask, block=block, **options
        )
    agree(got, blocks.softmax_attention(np, q_THK, k_SGK, v_SGV, allowed_TS, **options), f64, literal=True)


@pytest.mark.parametrize("threads", [1, 2, 3])
@given(data=st.data())
def test_a_step_cut_into_parts_is_the_whole_step(threads: int, data: st.DataObject) -> None:
    """The backend "numpy", over threads, attention in pieces of few heads; the thresholds are lowered to get there."""
    described, seed = data.draw(our.tiny_config()), data.draw(our.seeds)
    whole = LLM.random(described, Backend("float64"), seed=seed)
    cut = LLM.random(described, NumpyBackend("float64", threads=threads), seed=seed)
    tokens = np.arange(40).reshape(2, 20) % described.config.vocab_size
    want = whole.forward(tokens)
    with pytest.MonkeyPatch.context() as patch:
        for threshold in ("numpy_backend.SPLIT", "numpy_backend.SMALL_PRODUCT", "parallel.SMALL"):
            patch.setattr(f"npllm.{threshold}", 1)
        patch.setattr("npllm.numpy_backend.FEATURES", data.draw(st.sampled_from([1, 3, 256])))
        patch.setattr("npllm.blocks.attention.SCORES", data.draw(st.sampled_from([1, 200])))
        agree(cut.forward(tokens), want, f64)
        agree(in_pieces(cut, tokens[0], [3, 4, 11]), want[0], f64)


@given(mask=our.masks, first=st.integers(0, 40), length=st.integers(1, 12))
def test_reach_holds_every_visible_key(mask: blocks.Mask, first: int, length: int) -> None:
    key_S = np.arange(60)
    seen = np.flatnonzero(mask.allowed(np, np.arange(first, first + length), key_S).any(axis=0))
    low, high = mask.reach(first, first + length - 1)
    assert low <= seen.min()
    assert seen.max() == high - 1
    assert length > 1 or low == seen.min()


def test_the_span_is_that_of_the_narrower_rule() -> None:
    masks = (blocks.Mask(), sliding(3), chunked(5), blocks.Mask(3, 5), blocks.Mask(5, 3))
    assert [mask.span for mask in masks] == [None, 3, 5, 3, 3]


# -- the cache --------------------------------------------------------------------------------------------------------

SPECS = [LayerSpec(1, 2, 3), LayerSpec(2, 1, 1)]
RINGS = [
    LayerSpec(2, 1, 2, sliding(5)),
    LayerSpec(1, 2, 1, chunked(7)),
    LayerSpec(1, 3, 0, latent=2),
    LayerSpec(1, 1, 1, sliding(300)),
]
MOST_TOKENS = 700


@pytest.mark.parametrize(
    ("length", "room"), [(0, 256), (1, 256), (256, 256), (257, 512), (513, 1024), (1025, 2048), (2049, 2500), (2500, 2500)]
)
def test_growth_rule(length: int, room: int) -> None:
    """256, doubled as often as needed, at most the context."""
    assert FIRST_CAPACITY == 256
    assert capacity(length, 2500) == room


class CacheMachine(RuleBasedStateMachine):
    """A cache against lists of what each row was given."""

    kv_dtype, specs = "float32", SPECS

    @initialize(seed=our.seeds)
    def begin(self, seed: int) -> None:
        self.cache = Cache(np, self.specs, "float32", MOST_TOKENS, self.kv_dtype)
        self.dice = np.random.default_rng(seed)
        self.rows: dict[int, list[Array]] = {}

    def draw_slot(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.rows)), label="slot")

    @rule()
    def add(self) -> None:
        slot = self.cache.add()
        assert slot not in self.rows
        self.rows[slot] = [self.tokens(0, spec) for spec in self.specs]

    def tokens(self, count: int, spec: LayerSpec) -> Array:
        """Keys and values side by side, [count, G * (K + V)], in numbers that bfloat16 holds."""
        return self.dice.integers(-128, 128, (count, spec.heads * (spec.key_dim + spec.value_dim))).astype(np.float32)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        slot = self.draw_slot(data)
        self.cache.free(slot)
        del self.rows[slot]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        slot = self.draw_slot(data)
        held = len(self.rows[slot][0])
        length = self.cut(slot, data.draw(st.integers(0, held)))
        for wrong in (-1, length + 1):
            with pytest.raises(ArgumentError, match="cannot truncate"):
                self.cache.truncate(slot, wrong)

    def cut(self, slot: int, length: int) -> int:
        """Truncate the row; a ring that has moved on cannot go back, and then all is forgotten."""
        moved_on = any(layer.reached[slot] > layer.spec.kept(MOST_TOKENS) for layer in self.cache.layers)
        kept = self.cache.truncate(slot, length)
        assert kept == length or (kept == 0 and moved_on)
        self.rows[slot] = [layer[:kept] for layer in self.rows[slot]]
        return kept

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        slot = self.draw_slot(data)
        new = self.cache.fork(slot)
        assert new not in self.rows
        self.rows[new] = list(self.rows[slot])

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def move_through_a_copy(self, data: st.DataObject) -> None:
        """`contents` of one row fill another."""
        slot = self.draw_slot(data)
        new = self.cache.add()
        self.cache.restore(new, self.cache.contents(slot), self.cache.lengths[slot])
        self.rows[new] = list(self.rows[slot])

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), done=st.booleans())
    def bring_tokens(self, data: st.DataObject, done: bool) -> None:
        """A step over some rows, in any order; one that fails leaves the rows of full caches as they were."""
        slots = data.draw(st.lists(st.sampled_from(sorted(self.rows)), unique=True, min_size=1), label="slots")
        counts = [data.draw(st.sampled_from([0, 1, 2, 5, 100]), label="count") for _ in slots]
        lengths = [len(self.rows[slot][0]) for slot in slots]
        if max(length + count for length, count in zip(lengths, counts, strict=True)) > MOST_TOKENS:
            with pytest.raises(ArgumentError, match="do not fit into a context"):
                self.cache.plan(slots, counts)
            return
        rows = self.cache.plan(slots, counts)
        wanted = [length + i for length, count in zip(lengths, counts, strict=True) for i in range(count)]
        assert rows.positions_M.tolist() == wanted
        longer = {slot: list(self.rows[slot]) for slot in slots}
        for layer, spec in enumerate(self.specs):
            new = self.tokens(sum(counts), spec)
            k_MGK, v_MGV = split(new, spec)
            keys = self.cache.layers[layer].append(k_MGK, None if spec.latent else v_MGV, rows)
            for slot, piece in zip(slots, np.split(new, np.cumsum(counts)[:-1]), strict=True):
                longer[slot][layer] = np.concatenate([longer[slot][layer], piece])
            self.compare(keys, [longer[slot][layer] for slot in slots], spec, lengths)
        if done:
            self.cache.advance(rows)
            self.rows |= longer
        else:
            for slot in slots:
                self.cut(slot, len(self.rows[slot][0]))

    @staticmethod
    def compare(keys: Keys, wanted: list[Array], spec: LayerSpec, starts: list[int]) -> None:
        """All keys that the row's new tokens can see, and none before."""
        for r, (tokens, start) in enumerate(zip(wanted, starts, strict=True)):
            k_SGK, v_SGV, first = keys.row(r)
            assert first == min(start, spec.mask.reach(start, start)[0])
            for got, want in zip((k_SGK, v_SGV), split(tokens[first:], spec), strict=True):
                np.testing.assert_array_equal(got, want, strict=True)

    @precondition(lambda self: hasattr(self, "cache"))
    @invariant()
    def lengths_and_bytes_are_as_predicted(self) -> None:
        cache = self.cache
        assert {slot: cache.lengths[slot] for slot in self.rows} == {slot: len(row[0]) for slot, row in self.rows.items()}
        per_token = [spec.heads * (spec.key_dim + spec.value_dim) * KV_BYTES[self.kv_dtype] for spec in self.specs]
        assert cache.bytes_per_token == sum(per_token)
        kept = [min(cache.size, spec.mask.window or spec.mask.chunk or cache.size) for spec in self.specs]
        assert cache.nbytes == len(cache.lengths) * sum(np.multiply(per_token, kept))
        assert cache.nbytes == cache_bytes(self.specs, self.kv_dtype, cache.size, MOST_TOKENS, len(cache.lengths))
        assert cache.size in (0, *(capacity(length, MOST_TOKENS) for length in (1, 257, 513)))
        assert cache.size >= max(cache.lengths, default=0)


def brought(cache: Cache, slot: int, count: int) -> None:
    """A step that brings `count` ones to a row of a cache of one layer."""
    rows = cache.plan([slot], [count])
    new_MGK = np.ones((count, 1, 1), np.float32)
    cache.layers[0].append(new_MGK, new_MGK, rows)
    cache.advance(rows)


def test_a_ring_remembers_how_far_it_was_written() -> None:
    """Token 9 lies where token 5 lay, whatever becomes of it: from 8 on, which sees 5, no row can go on, nor a copy."""
    cache = Cache(np, [LayerSpec(1, 1, 1, sliding(4))], "float32", MOST_TOKENS)
    slot = cache.add()
    brought(cache, slot, 10)
    assert cache.truncate(slot, 9) == 9
    copied = cache.fork(slot)
    brought(cache, slot, 0)
    assert (cache.truncate(slot, 8), cache.truncate(copied, 8)) == (0, 0)


def test_a_row_begins_afresh_where_another_was_written() -> None:
    cache = Cache(np, [LayerSpec(1, 1, 1, sliding(4))], "float32", MOST_TOKENS)
    slot = cache.add()
    brought(cache, slot, 10)
    cache.free(slot)
    assert cache.add() == slot
    for length in (3, 4, 6):
        brought(cache, slot, length - cache.lengths[slot])
        assert cache.truncate(slot, length - 1) == length - 1


def split(tokens: Array, spec: LayerSpec) -> tuple[Array, Array]:
    """k [M, G, K] and v [M, G, V] of what `CacheMachine.tokens` draws."""
    if spec.latent:
        keys = tokens.reshape(-1, spec.heads, spec.key_dim)
        return keys, keys[..., : spec.latent]
    keys, values = np.split(tokens, [spec.heads * spec.key_dim], axis=1)
    return keys.reshape(-1, spec.heads, spec.key_dim), values.reshape(-1, spec.heads, spec.value_dim)


class HalfCacheMachine(CacheMachine):
    """The same with keys and values in bfloat16."""

    kv_dtype = "bfloat16"


class RingCacheMachine(CacheMachine):
    """The same with rings, of windows and chunks shorter and longer than the first allocation, and latents."""

    specs = RINGS


class HalfRingCacheMachine(RingCacheMachine):
    """The same with keys and values in bfloat16."""

    kv_dtype = "bfloat16"


TestCache, TestHalfCache = CacheMachine.TestCase, HalfCacheMachine.TestCase
TestRingCache, TestHalfRingCache = RingCacheMachine.TestCase, HalfRingCacheMachine.TestCase
TestCache.settings = TestHalfCache.settings = settings(max_examples=15, stateful_step_count=25)
TestRingCache.settings = TestHalfRingCache.settings = settings(max_examples=40, stateful_step_count=25)


@given(counts=st.lists(st.integers(0, 3), min_size=1, max_size=5), data=st.data())
def test_wanted_are_the_last_tokens_of_the_rows_that_draw(counts: list[int], data: st.DataObject) -> None:
    """A row that brings nothing has no last token, whatever is wanted of it."""
    last = [data.draw(st.booleans()) for _ in counts]
    cache = Cache(np, SPECS, "float32", MOST_TOKENS)
    slots = [cache.add() for _ in counts]
    x_MD = np.arange(float(sum(counts)))[:, None]
    ends = np.cumsum(counts) - 1
    want = [[end] for end, count, wanted in zip(ends.tolist(), counts, last, strict=True) if wanted and count]
    assert cache.plan(slots, counts, last).wanted(x_MD).tolist() == want
    assert cache.plan(slots, counts).wanted(x_MD) is x_MD


def test_an_unknown_type_of_cache_is_refused() -> None:
    with pytest.raises(ArgumentError, match="kv_dtype 'int3' is unknown; choose one of float32, float64, bfloat16"):
        Cache(np, SPECS, "float32", 8, "int3")
