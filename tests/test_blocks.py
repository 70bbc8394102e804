"""The blocks: numbers that can be checked by hand, then the operations' truth files under `tests/truth/blocks`.

Each runs on NumPy and on the strict module (tests.strict).
"""

import itertools
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from npllm import blocks
from npllm.arrays import Array
from npllm.backend import LN, RMS, Backend
from npllm.blocks.rope import yarn_attention_factor
from npllm.cache import Cache, Keys, LayerSpec, Rows
from npllm.config import Reader, read_rope
from npllm.testing.compare import unmodified
from npllm.weights import Linear
from tests.compare import agree
from tests.exported import FILES, both_dtypes, cases_of, fed_forward, feed_forward, lookup
from tests.strict import STRICT, StrictBackend

pytestmark = pytest.mark.usefixtures("checked_shapes")


@pytest.fixture(params=[np, STRICT], ids=["numpy", "strict"])
def xp(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=[Backend, StrictBackend], ids=["numpy", "strict"])
def be(request: pytest.FixtureRequest) -> Backend:
    backend: Backend = request.param("float32")
    return backend


def f32(*values: Any) -> Array:
    return np.array(values, dtype=np.float32)


# -- by hand: norms ---------------------------------------------------------------------------------------------------


def test_rms_norm_of_three_and_four(xp: Any) -> None:
    """The mean square of 3 and 4 is 12.5."""
    got = blocks.rms_norm(xp, f32(3, 4), f32(2, -1), 0.0)
    agree(got, f32(6 / math.sqrt(12.5), -4 / math.sqrt(12.5)), "block")


def test_eps_stands_inside_the_root(xp: Any) -> None:
    """1e-3 squared is 1e-6: with as much eps the result is 1 / sqrt(2), not 1 / 1.001; a row of zeros gives zeros."""
    x_TD = f32([1e-3, -1e-3], [0, 0])
    root = 1 / math.sqrt(2)
    agree(blocks.rms_norm(xp, x_TD, f32(1, 1), 1e-6), f32([root, -root], [0, 0]), "block")
    agree(blocks.layer_norm(xp, x_TD, f32(1, 1), f32(0, 0), 1e-6), f32([root, -root], [0, 0]), "block")


def test_layer_norm_has_the_population_variance(xp: Any) -> None:
    """1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5."""
    got = blocks.layer_norm(xp, f32(1, 3, 5, 7), f32(1, 1, 1, 2), f32(0, 0, 1, 0), 0.0)
    agree(got, f32(-3 / math.sqrt(5), -1 / math.sqrt(5), 1 + 1 / math.sqrt(5), 6 / math.sqrt(5)), "block")


def test_half_precision_is_widened_inside(xp: Any) -> None:
    """300 squared is beyond float16."""
    got = blocks.rms_norm(xp, np.array([300, -300, 300, 300], np.float16), np.ones(4, np.float32), 1e-6)
    agree(got, np.array([1, -1, 1, 1], np.float16), "exact")
    with pytest.raises(TypeError, match="floating-point arrays, not int64"):
        blocks.rms_norm(xp, np.arange(4), np.ones(4), 1e-6)


# -- by hand: AltUp and sparse gates ----------------------------------------------------------------------------------


def test_altup_of_two_streams(xp: Any) -> None:
    """Streams 1 and 10; each takes C[n, j] of stream j besides itself: 1 + 2 * 10, and 10 + 3 * 1 - 10."""
    x_MAD, mixing_MAA = f32([[1], [10]]), f32([[0, 2], [3, -1]])
    predicted_MAD = blocks.altup_predict(xp, x_MAD, mixing_MAA)
    agree(predicted_MAD, f32([[21], [3]]), "exact")
    # The layer made 25 of stream 0: 4 more. Stream 0 moves by 1 + 0.5 times that, stream 1 by 1 - 3 times.
    agree(blocks.altup_correct(xp, predicted_MAD, f32([25]), 0, f32([0.5, -3])), f32([[27], [-5]]), "exact")
    # As the last stream's 4 (1 more), with the same gains.
    agree(blocks.altup_correct(xp, predicted_MAD, f32([4]), 1, f32([0.5, -3])), f32([[22.5], [1]]), "exact")


def test_match_rms(xp: Any) -> None:
    """Mean squares 25 / 2 and 50 / 2; a row whose mean square is below 1e-5 is divided by sqrt(1e-5)."""
    y_MD, x_MD = f32([1, 7], [1e-4, -1e-4]), f32([3, 4], [3, 4])
    tiny = 1e-4 * math.sqrt(12.5) / math.sqrt(1e-5)
    agree(blocks.match_rms(xp, y_MD, x_MD), f32([1 / math.sqrt(2), 7 / math.sqrt(2)], [tiny, -tiny]), "block")


def test_gaussian_topk_shifts_what_it_lets_through(xp: Any) -> None:
    """-3, -1, 1, 3: mean 0, deviation sqrt(5); the median cuts at the mean, and 0.9 leaves 3 - 1.2816 sqrt(5) = 0.134."""
    gate_MF = f32([-3, -1, 1, 3], [7, 9, 11, 13])
    agree(blocks.gaussian_topk(xp, gate_MF, 0.5), f32([0, 0, 1, 3], [0, 0, 1, 3]), "block")
    left = 3 - 1.2815515655446004 * math.sqrt(5)
    agree(blocks.gaussian_topk(xp, gate_MF, 0.9), f32([0, 0, 0, left], [0, 0, 0, left]), "layer_norm")


# -- by hand: RoPE ----------------------------------------------------------------------------------------------------


def test_rope_of_ones(xp: Any) -> None:
    """A head of width 2 turns by one radian per position, whatever theta."""
    angles = blocks.angles(xp, blocks.Rope(dim=2), np.array([0, 1, 5]), "float32")
    want = f32(*([[math.cos(p) - math.sin(p), math.cos(p) + math.sin(p)]] for p in (0, 1, 5)))
    for rotate in (blocks.rotate_halves, blocks.rotate_interleaved):
        agree(rotate(xp, np.ones((3, 1, 2), np.float32), angles), want, "block")


def test_rope_pairs(xp: Any) -> None:
    """A quarter turn takes the pair (a, b) to (-b, a); widths beyond the rotated ones pass."""
    quarter = blocks.Angles(f32([0, 0]), f32([1, 1]))
    x_MHK = f32([[1, 2, 3, 4, 5]])
    agree(blocks.rotate_halves(xp, x_MHK, quarter), f32([[-3, -4, 1, 2, 5]]), "exact")
    agree(blocks.rotate_interleaved(xp, x_MHK, quarter), f32([[-2, 1, -4, 3, 5]]), "exact")


def test_rope_frequencies() -> None:
    agree(blocks.frequencies(blocks.Rope(dim=6, theta=1000.0)).inverse_J, f32(1, 0.1, 0.01), "block")
    linear = blocks.Rope(dim=6, theta=1000.0, kind="linear", factor=4.0)
    agree(blocks.frequencies(linear).inverse_J, f32(0.25, 0.025, 0.0025), "block")


def test_llama3_scaling_has_three_bands() -> None:
    """Wavelengths 6.3, 63 and 628 in a context of 100: kept below 100 / 4, slowed above 100 / 1, blended between."""
    rope = blocks.Rope(dim=6, theta=1000.0, kind="llama3", factor=8.0, original=100)
    smooth = (100 / (2 * math.pi / 0.1) - 1) / (4 - 1)
    blended = (1 - smooth) * 0.1 / 8 + smooth * 0.1
    agree(blocks.frequencies(rope).inverse_J, f32(1, blended, 0.01 / 8), "block")


def test_yarn_attention_factor() -> None:
    """0.1 ln(4) + 1, unless given; the ratio of two mscales where there are two."""
    yarn = {"dim": 4, "kind": "yarn", "factor": 4.0, "original": 16}
    assert yarn_attention_factor(blocks.Rope(**yarn)) == pytest.approx(0.1 * math.log(4) + 1)
    assert yarn_attention_factor(blocks.Rope(**yarn, attention_factor=1.5)) == 1.5
    assert yarn_attention_factor(blocks.Rope(**yarn, mscale=0.7, mscale_all_dim=0.7)) == 1.0


# -- by hand: masks and attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "query", "seen"),
    [
        (blocks.CAUSAL, 2, [1, 1, 1, 0]),
        (blocks.CAUSAL, 3, [1, 1, 1, 1]),
        (blocks.sliding(1), 2, [0, 0, 1, 0]),
        (blocks.sliding(2), 2, [0, 1, 1, 0]),
        (blocks.chunked(2), 2, [0, 0, 1, 0]),
        (blocks.chunked(2), 3, [0, 0, 1, 1]),
        (blocks.chunked(3), 2, [1, 1, 1, 0]),
        (blocks.Mask(window=2, chunk=3), 3, [0, 0, 0, 1]),
    ],
)
def test_mask_of_one_query_and_four_keys(xp: Any, mask: blocks.Mask, query: int, seen: list[int]) -> None:
    got = mask.allowed(xp, np.array([query]), np.arange(4))
    assert got.astype(int).tolist() == [seen]
    low, high = mask.reach(query, query)
    assert (low, min(high, 4)) == (seen.index(1), 4 - seen[::-1].index(1))


def test_an_empty_cache_entry_is_never_seen(xp: Any) -> None:
    assert blocks.CAUSAL.allowed(xp, np.array([1]), np.array([-1, 0, 1])).tolist() == [[False, True, True]]


def test_attention_of_equal_scores_is_the_mean_of_what_is_seen(xp: Any) -> None:
    """Queries of zero: each of the two heads of a group gives the mean of the visible values, or 0 where there is none."""
    q_THK, k_SGK = np.zeros((3, 2, 4), np.float32), np.ones((3, 1, 4), np.float32)
    v_SGV = f32([[1, 10]], [[2, 20]], [[6, 60]])
    seen_TS = np.array([[1, 0, 0], [1, 1, 1], [0, 0, 0]], bool)
    o_THV = blocks.softmax_attention(xp, q_THK, k_SGK, v_SGV, seen_TS, scale=1.0)
    agree(o_THV, f32([[1, 10], [1, 10]], [[3, 30], [3, 30]], [[0, 0], [0, 0]]), "block")


def test_attention_weighs_by_the_exponential(xp: Any) -> None:
    """Scores 0 and ln 3 give weights 1/4 and 3/4; heads 0 and 1 read values 0, heads 2 and 3 values 1."""
    q_THK, k_SGK = np.ones((1, 4, 1), np.float32), np.zeros((2, 2, 1), np.float32)
    k_SGK[1] = math.log(3) / 0.5
    v_SGV = f32([[0], [100]], [[4], [104]])
    o_THV = blocks.softmax_attention(xp, q_THK, k_SGK, v_SGV, np.ones((1, 2), bool), scale=0.5)
    agree(o_THV, f32([[3], [3], [103], [103]]), "block")


def test_softcap_comes_before_the_mask(xp: Any) -> None:
    """Scores far beyond the cap of 1 give +-1; the masked key stays out, where -inf capped to -1 would count."""
    q_THK, k_SGK = f32([[1.0]]), f32([[1e4]], [[-1e4]], [[1e4]])
    v_SGV, seen_TS = f32([[1.0]], [[0.0]], [[7.0]]), np.array([[True, True, False]])
    o_THV = blocks.softmax_attention(xp, q_THK, k_SGK, v_SGV, seen_TS, scale=1.0, softcap=1.0)
    agree(o_THV, f32([[math.e / (math.e + 1 / math.e)]]), "block", literal=True)


def test_attention_of_nothing(xp: Any) -> None:
    """No queries, no keys, neither: shapes hold, and a query without keys gives 0."""
    for T, S in ((0, 3), (2, 0), (0, 0)):
        q_THK, k_SGK, v_SGV = (np.ones(shape, np.float32) for shape in ((T, 4, 3), (S, 2, 3), (S, 2, 5)))
        want = np.zeros((T, 4, 5), np.float32)
        got = blocks.softmax_attention(xp, q_THK, k_SGK, v_SGV, np.ones((T, S), bool), scale=1.0)
        agree(got, want, "exact", literal=True)
        got = blocks.blocked_attention(xp, q_THK, k_SGK, v_SGV, first_query=S, first_key=0, mask=blocks.CAUSAL, scale=1.0)
        assert got.shape == want.shape


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_sink_is_a_key_without_a_value(xp: Any, dtype: str) -> None:
    """Against the softmax with one more column, which is then dropped; a sink is not scaled, capped or masked."""
    dice = np.random.default_rng(0)
    q_THK, k_SGK, v_SGV = (dice.standard_normal(shape).astype(dtype) for shape in ((3, 4, 6), (5, 2, 6), (5, 2, 7)))
    sinks_H = np.array([0.5, -3, 9, -np.inf], dtype)
    seen_TS = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    with unmodified(q_THK, k_SGK, v_SGV, sinks_H):
        got = blocks.softmax_attention(xp, q_THK, k_SGK, v_SGV, seen_TS, scale=0.4, softcap=2.0, sinks_H=sinks_H)
    assert got.dtype == dtype
    wide = [x.astype(np.float64) for x in (q_THK, k_SGK, v_SGV)]
    want = np.zeros((3, 4, 7))
    for t, h in np.ndindex(2, 4):
        scores = [2 * math.tanh(0.4 * float(wide[0][t, h] @ k) / 2) for k in wide[1][seen_TS[t], h // 2]]
        parts = np.exp([*scores, sinks_H[h]])
        want[t, h] = parts[:-1] / parts.sum() @ wide[2][seen_TS[t], h // 2]
    np.testing.assert_allclose(got, want, rtol=0, atol=16 * np.finfo(dtype).eps)


def test_a_sink_far_above_all_scores_leaves_nothing(xp: Any) -> None:
    """It takes part in the maximum, so that nothing overflows."""
    q_THK, k_SGK, v_SGV = f32([[1.0]]), f32([[2.0]], [[3.0]]), f32([[5.0]], [[6.0]])
    o_THV = blocks.softmax_attention(xp, q_THK, k_SGK, v_SGV, np.ones((1, 2), bool), scale=1.0, sinks_H=f32(1e4))
    agree(o_THV, f32([[0.0]]), "exact", literal=True)


@pytest.mark.parametrize("page", [1, 3, 4])
def test_rows_in_pages_are_rows(be: Backend, page: int) -> None:
    """Pages in any order, shared by rows, the last partly filled: what no key lies in is NaN and is not read."""
    dice, counts, starts = np.random.default_rng(0), (7, 0, 8, 5), (5, 0, 8, 2)
    rows = Rows((0, 1, 2, 3), starts, (2, 0, 0, 3), np.array([5, 6, 2, 3, 4]))
    k_BSGF, v_BSGF = (dice.standard_normal((4, 8, 2, width)).astype(np.float32) for width in (6, 7))
    k_BSGF[3, :page], v_BSGF[3, :page] = k_BSGF[0, :page], v_BSGF[0, :page]
    of_row = -(-8 // page)
    order = dice.permutation(4 * of_row)
    pages = [tuple(order[r * of_row : (r + 1) * of_row].tolist()) for r in range(4)]
    pages[3] = pages[0][:1] + pages[3][1:]
    stored = [np.full((4 * of_row, page, 2, x.shape[-1]), np.nan, np.float32) for x in (k_BSGF, v_BSGF)]
    for (r, count), (x_BSGF, paged) in itertools.product(enumerate(counts), zip((k_BSGF, v_BSGF), stored, strict=True)):
        for s in range(count):
            paged[pages[r][s // page], s % page] = x_BSGF[r, s]
    dense = Keys(k_BSGF, v_BSGF, rows.slots, counts, (0,) * 4, (0,) * 4, np)
    keys = Keys(*stored, (0,) * 4, counts, (0,) * 4, (0,) * 4, np, pages=tuple(pages))
    q_MHK = dice.standard_normal((5, 4, 6)).astype(np.float32)
    sinks = Linear(f32(0.3, -1, 2, 0))
    with unmodified(*stored):
        got = be.attention(q_MHK, keys, rows, mask=blocks.sliding(5), scale=0.4, sinks=sinks)
    agree(got, be.attention(q_MHK, dense, rows, mask=blocks.sliding(5), scale=0.4, sinks=sinks), "exact", literal=True)
    alone = be.attention(q_MHK[2:], keys.only(3), rows.only(3), mask=blocks.sliding(5), scale=0.4, sinks=sinks)
    agree(alone, got[2:], "exact", literal=True)
    # The first entry may lie within a page.
    behind = keys._replace(begins=(2,) * 4, counts=(5, 0, 6, 3), firsts=(2,) * 4)
    for mine, theirs in zip(behind.row(0), dense.row(0), strict=True):
        np.testing.assert_array_equal(mine, theirs[2:] if isinstance(theirs, np.ndarray) else 2)


# -- by hand: activations and backend operations ----------------------------------------------------------------------


def test_activations_at_known_points(xp: Any) -> None:
    x = f32(0, math.log(3), -math.log(3), 100, -100)
    agree(blocks.silu(xp, x), f32(0, math.log(3) * 3 / 4, -math.log(3) / 4, 100, 0), "block")
    agree(blocks.gelu_tanh(xp, f32(0, 100, -100)), f32(0, 100, 0), "block")
    agree(blocks.relu(xp, f32(0, 100, -100, np.inf)), f32(0, 100, 0, np.inf), "exact")
    assert not np.isnan(blocks.silu(xp, f32(1e30, -1e30, np.inf))).any()
    agree(blocks.gelu(xp, f32(1e30, -1e30, np.inf, -np.inf, np.nan)), f32(1e30, 0, np.inf, 0, np.nan), "exact", literal=True)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", "block"), ("float64", "block float64")])
def test_gelu_is_x_times_the_normal_distribution(xp: Any, dtype: str, limit: str) -> None:
    """Against the standard library's erfc, over the fitted range and past its end."""
    x = np.linspace(-12, 12, 4801).astype(dtype)
    want = np.array([0.5 * a * math.erfc(-a / math.sqrt(2)) for a in x.tolist()], dtype)
    with unmodified(x):
        got = blocks.gelu(xp, x)
    for part in (x >= 0, x < 0):
        agree(got[part], want[part], limit)


def test_every_activation_is_the_one_that_transformers_means() -> None:
    """At 1, where the tanh form is 0.8412 and the exact one 0.8413."""
    x = f32(1.0)
    values = {name: round(float(activation(np, x)[0]), 4) for name, activation in blocks.ACTIVATIONS.items()}
    tanh_form = dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), 0.8412)
    assert values == tanh_form | {"silu": 0.7311, "swish": 0.7311, "gelu": 0.8413, "gelu_python": 0.8413, "relu": 1.0}


def test_linear_and_embed(be: Backend) -> None:
    w = Linear(f32([1, 2], [3, 4], [5, 6]), f32(0, 100, 0))
    x_MD = f32([1, 10])
    with unmodified(x_MD, *w):
        agree(be.linear(x_MD, w), f32([21, 143, 65]), "exact")
        agree(be.linear(x_MD, w, f32([1, 1, 1000])), f32([22, 144, 1065]), "exact")
        agree(be.linear(x_MD, Linear(w.weight)), f32([21, 43, 65]), "exact")
        agree(be.embed(np.array([2, 0, 2]), w), f32([5, 6], [1, 2], [5, 6]), "exact")


def test_normed(be: Backend) -> None:
    x_MD = f32([3, 4])
    assert be.normed(x_MD, None) is x_MD
    agree(be.normed(x_MD, RMS(Linear(f32(1, 1)), 0.0)), f32([3, 4]) / np.float32(math.sqrt(12.5)), "block")
    agree(be.normed(x_MD, LN(Linear(f32(1, 1), f32(5, 5)), 0.0)), f32([4, 6]), "block")


def test_bfloat16_cache_rounds_to_even() -> None:
    """Every kind of float32: ties, denormals, infinities, NaN; as ml_dtypes rounds them."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32)
    special = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x80000000, 1]
    values = np.concatenate([bits, np.array(special, np.uint32)]).view(np.float32).reshape(-1, 1, 1)
    cache = Cache(np, [LayerSpec(1, 1, 1)], "float32", len(values), "bfloat16")
    rows = cache.plan([cache.add()], [len(values)])
    k_SGK, v_SGV, first = cache.layers[0].append(values, values, rows).row(0)
    with np.errstate(invalid="ignore"):
        want = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert first == 0
    for got in (k_SGK, v_SGV):
        np.testing.assert_array_equal(got, want, strict=True)


# -- truth files ------------------------------------------------------------------------------------------------------


@both_dtypes
@cases_of("rms_norm", "layer_norm")
def test_norms(xp: Any, file: str, case: str, dtype: str) -> None:
    given, t, limit = lookup(file, case, dtype)
    limit = limit.replace("block", "layer_norm") if file == "layer_norm" else limit
    parameters = [t[name] for name in ("weight", "bias") if name in t]
    with unmodified(t["x"], *parameters):
        y = getattr(blocks, file)(xp, t["x"], *parameters, given["eps"])
    agree(y, t["y"], limit)
    for row, want in zip(y, t["y"], strict=True):
        agree(row, want, limit, literal=True)


@both_dtypes
@cases_of("rms_norm_kinds")
def test_rms_norm_kinds(xp: Any, file: str, case: str, dtype: str) -> None:
    """Gains stored as an offset from 1, norms without a gain, means over all heads of a projection."""
    given, t, limit = lookup(file, case, dtype)
    with unmodified(*t.values()):
        y = blocks.rms_norm(xp, t["x"], t.get("weight"), given["eps"], given["offset"])
    agree(y, t["y"], limit)
    for row, want in zip(y, t["y"], strict=True):
        agree(row, want, limit, literal=True)


def rope_of(given: dict[str, Any]) -> blocks.Rope:
    values = {key: given[key] for key in ("rope_parameters", "max_position_embeddings")}
    return read_rope(Reader(values), given["head_dim"], theta=1.0, positions=given["max_position_embeddings"])


@both_dtypes
@cases_of("rope_frequencies")
def test_rope_frequencies_of_published_models(file: str, case: str, dtype: str) -> None:
    """Each frequency by itself: they span decades."""
    given, t, limit = lookup(file, case, dtype)
    inverse_J, factor = blocks.frequencies(rope_of(given), dtype)
    assert inverse_J.dtype == dtype
    agree(inverse_J / t["inv_freq"], np.ones_like(t["inv_freq"]), limit, literal=True)
    assert factor == pytest.approx(given["attention_factor"], rel=1e-12)


@cases_of("rope_frequencies")
def test_rope_frequencies_are_rounded_as_models_know_them(file: str, case: str) -> None:
    """Within three half units of the last place: the power itself may be off by two in torch, nothing else is."""
    given, t, _ = lookup(file, case, "float32")
    inverse_J = blocks.frequencies(rope_of(given)).inverse_J
    assert np.abs(inverse_J.astype(np.float64) / t["inv_freq"] - 1.0).max() < 3 * 2**-24


@both_dtypes
@cases_of("rope_apply")
def test_rotations(xp: Any, file: str, case: str, dtype: str) -> None:
    given, t, limit = lookup(file, case, dtype)
    rotate = blocks.rotate_halves if given["pairing"] == "half" else blocks.rotate_interleaved
    angles = blocks.angles(xp, rope_of(given), t["positions"], dtype)
    far = "-far-" in case
    for name in "qk":
        want = FILES[file].tensors[case][f"{name}_rotated_f64"].astype(dtype) if far else t[f"{name}_rotated"]
        with unmodified(t[name], *angles):
            got = rotate(xp, t[name], angles)
        agree(got, want, f"far {limit}" if far else limit, what=name)


@both_dtypes
@cases_of("attention", "attention_windowed")
def test_attention(xp: Any, file: str, case: str, dtype: str) -> None:
    given, t, limit = lookup(file, case, dtype)
    mask = blocks.Mask(given.get("window"), given.get("chunk"))
    seen_TS = mask.allowed(xp, t["q_positions"], t["k_positions"])
    np.testing.assert_array_equal(seen_TS, t["mask"], strict=True)
    options = {"scale": given["scale"], "softcap": given["softcap"]}
    with unmodified(*t.values()):
        y = blocks.softmax_attention(xp, t["q"], t["k"], t["v"], seen_TS, **options)
    agree(y, t["y"], limit)
    if not given["turned_by"]:
        where: dict[str, Any] = {"first_query": int(t["q_positions"][0]), "first_key": given["first_key"], "mask": mask}
        with unmodified(*t.values()):
            y = blocks.blocked_attention(xp, t["q"], t["k"], t["v"], **where, **options, block=3)
        agree(y, t["y"], limit)


@both_dtypes
@pytest.mark.parametrize("case", ["silu", "gelu_tanh"])
def test_activations(xp: Any, case: str, dtype: str) -> None:
    _, t, limit = lookup("activations", case, dtype)
    with unmodified(t["x"]):
        y = getattr(blocks, case)(xp, t["x"])
    for part in (t["x"] >= 0, t["x"] < 0):
        agree(y[part], t["y"][part], limit)


@both_dtypes
@cases_of("ffn")
def test_ffn(be: Backend, file: str, case: str, dtype: str) -> None:
    _, t, limit = lookup(file, case, dtype)
    residual_MD = t["x"][::-1].copy()
    with unmodified(*t.values(), residual_MD):
        y_MD = fed_forward(be, feed_forward(case, t), t["x"], residual_MD)
    agree(y_MD, residual_MD + t["y"], limit)


def test_every_truth_file_is_used() -> None:
    here = "activations attention attention_windowed ffn layer_norm rms_norm rms_norm_kinds rope_apply rope_frequencies"
    elsewhere = "fp8 mla moe moe_shared routers"
    assert sorted(here.split() + elsewhere.split()) == list(FILES)
