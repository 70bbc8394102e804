"""Mixtures of experts: by hand, then every router and block of transformers from the truth files."""

import math
from typing import Any

import numpy as np
import pytest

from npllm import blocks
from npllm.arrays import Array
from npllm.backend import Backend
from npllm.backends.numba_cpu.backend import NumbaBackend
from npllm.blocks import Router
from npllm.numpy_backend import NumpyBackend
from npllm.testing.compare import norm, unmodified
from npllm.weights import GatedFFN, Linear
from tests.compare import agree
from tests.exported import (
    Parameters,
    both_dtypes,
    cases_of,
    config_of,
    experts_of,
    gate_of,
    gated_ffn_of,
    lookup,
    mixture,
    prepared,
)
from tests.strict import STRICT, StrictBackend

pytestmark = pytest.mark.usefixtures("checked_shapes")

every_backend = pytest.mark.parametrize(
    "make", [Backend, StrictBackend, NumpyBackend, NumbaBackend], ids=lambda each: each.__name__
)


@pytest.fixture(params=[np, STRICT], ids=["numpy", "strict"])
def xp(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(autouse=True)
def split_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend "numpy" cuts these small steps into parts, as it does large ones."""
    monkeypatch.setattr("npllm.numpy_backend.SPLIT", 1)
    monkeypatch.setattr("npllm.numpy_backend.SMALL_PRODUCT", 1)


def f32(*values: Any) -> Array:
    return np.array(values, dtype=np.float32)


# -- by hand ----------------------------------------------------------------------------------------------------------

# Odds of 1, 2 and 5: softmax gives 1/8, 2/8 and 5/8.
ODDS = [[0.0, math.log(2), math.log(5)]]


@pytest.mark.parametrize(
    ("router", "index", "weights"),
    [
        (Router(2), [2, 1], [5 / 8, 2 / 8]),
        (Router(2, normalise=True), [2, 1], [5 / 7, 2 / 7]),
        (Router(2, normalise=True, floor=1 / 8, scale=4.0), [2, 1], [4 * 5 / 8, 4 * 2 / 8]),
        (Router(1, scores="sigmoid", by="logits"), [2], [5 / 6]),
        (Router(3, scores="sigmoid"), [2, 1, 0], [5 / 6, 2 / 3, 1 / 2]),
    ],
)
def test_weights_of_the_chosen_of_three_experts(xp: Any, router: Router, index: list[int], weights: list[float]) -> None:
    logits_ME = f32(*ODDS)
    with unmodified(logits_ME):
        index_MC, weight_MC = blocks.route(xp, logits_ME, router)
    assert index_MC.tolist() == [index]
    agree(weight_MC, f32(weights), "block", literal=True)


def test_ties_go_to_the_lowest_index(xp: Any) -> None:
    index_MC, _ = blocks.route(xp, np.zeros((2, 6), np.float32), Router(3, groups=3, kept_groups=2, ranking="pair"))
    assert index_MC.tolist() == [[0, 1, 2]] * 2


def test_raw_logits_tell_experts_apart_where_sigmoids_do_not(xp: Any) -> None:
    """The sigmoids of 20, 30 and 25 are all 1 in float32."""
    rule = Router(1, scores="sigmoid", by="logits")
    for by, index in (("logits", 1), ("scores", 0)):
        assert blocks.route(xp, f32([20, 30, 25]), rule._replace(by=by))[0].tolist() == [[index]]


def test_groups_are_ranked_by_their_best_or_by_their_two_best(xp: Any) -> None:
    """Sigmoids 0.9 and 0.1 against 0.6 and 0.7: the best expert is in the first group, the better pair in the second."""
    scores = np.array([[0.9, 0.1, 0.6, 0.7]])
    logits_ME = np.log(scores / (1 - scores)).astype(np.float32)
    rule = Router(2, scores="sigmoid", groups=2, kept_groups=1)
    for ranking, index in (("max", [0, 1]), ("pair", [3, 2])):
        assert blocks.route(xp, logits_ME, rule._replace(ranking=ranking))[0].tolist() == [index]


def test_a_correction_takes_part_in_the_choice_only(xp: Any) -> None:
    index_MC, weight_MC = blocks.route(xp, f32(*ODDS), Router(1), f32(1, 0, 0))
    assert index_MC.tolist() == [[0]]
    agree(weight_MC, f32([1 / 8]), "block", literal=True)


def test_weights_on_the_input_are_not_weights_on_the_output(xp: Any) -> None:
    """With an expert that squares: (x / 2)^2 is not x^2 / 2. Both forms, and an expert that gets no token."""
    x_MD, index_MC, weight_MC = f32([2, 4], [6, 8]), np.array([[1, 0], [1, 1]]), f32([0.5, 1], [0.5, 0.5])

    def expert(e: int, x_TD: Array) -> Array:
        assert e < 2
        return x_TD**2 if e else 10 * x_TD

    for weigh, want in (
        ("output", f32([0.5 * 4 + 20, 0.5 * 16 + 40], [36, 64])),
        ("input", f32([1 + 20, 4 + 40], [2 * 9, 2 * 16])),
    ):
        agree(blocks.moe_by_token(xp, x_MD, expert, index_MC, weight_MC, weigh), want, "exact")
        out_MCD = np.full((2, 2, 2), np.nan, np.float32)
        for piece in reversed(blocks.moe_pieces(xp, x_MD, expert, index_MC, weight_MC, out_MCD, weigh)):
            piece()
        agree(out_MCD.sum(axis=1), want, "exact")


# -- truth files ------------------------------------------------------------------------------------------------------


def dense(index_MC: Array, weight_MC: Array, experts: int) -> Array:
    """The weight of every expert [M, E], 0 where it was not chosen."""
    weights_ME = np.zeros((len(index_MC), experts), weight_MC.dtype)
    np.put_along_axis(weights_ME, index_MC, weight_MC, axis=1)
    return weights_ME


@every_backend
@both_dtypes
@cases_of("routers")
def test_routers_choose_and_weigh_as_transformers(make: type[Backend], file: str, case: str, dtype: str) -> None:
    given, t, limit = lookup(file, case, dtype)
    be, router = make(dtype), config_of(given).router
    gate = prepared(be, gate_of(t, ""))
    with unmodified(*t.values()):
        index_MC, weight_MC = be.route(t["x"], gate, router)
    assert index_MC.shape == weight_MC.shape == (len(t["x"]), given["num_experts_per_tok"])
    agree(be.linear(t["x"], gate.gate), t["logits"], limit)
    agree(dense(index_MC, weight_MC, t["weights"].shape[1]), t["weights"], limit)
    assert (np.diff(np.sort(index_MC, axis=1), axis=1) > 0).all()


MISTAKES: list[tuple[str, Parameters]] = [
    ("qwen3", {"normalise": False}),
    ("qwen3-raw", {"normalise": True}),
    ("mixtral", {"normalise": False}),
    ("deepseek-v2-groups", {"ranking": "pair"}),
    ("deepseek-v2-groups", {"kept_groups": 4}),
    ("deepseek-v2-groups", {"scale": 1.0}),
    ("deepseek-v3", {"ranking": "max"}),
    ("deepseek-v3", {"scores": "softmax"}),
    ("deepseek-v3", {"groups": 1, "kept_groups": 1}),
    ("mistral4-groups", {"ranking": "max"}),
    ("mistral4", {"scores": "sigmoid"}),
    ("llama4-top1", {"scores": "softmax"}),
    ("llama4-top2", {"normalise": True}),
]


@pytest.mark.parametrize(("case", "mistake"), MISTAKES)
def test_the_truth_tells_a_wrong_rule(case: str, mistake: Parameters) -> None:
    given, t, _ = lookup("routers", case, "float32")
    index_MC, weight_MC = Backend().route(t["x"], gate_of(t, ""), config_of(given).router._replace(**mistake))
    got_ME = dense(index_MC, weight_MC, t["weights"].shape[1])
    assert norm(got_ME - t["weights"]) > 0.01 * norm(t["weights"])


@pytest.mark.parametrize("case", ["deepseek-v3", "deepseek-v3-raw", "deepseek-v3-negative"])
def test_the_truth_tells_a_correction_in_the_weights(case: str) -> None:
    """Without the correction, and with it in the weights."""
    given, t, _ = lookup("routers", case, "float32")
    router = config_of(given).router
    right_MC, _ = blocks.route(np, t["logits"], router, t["e_score_correction_bias"])
    wrong_MC, _ = blocks.route(np, t["logits"], router)
    assert (np.sort(right_MC) != np.sort(wrong_MC)).any()
    corrected_ME = blocks.sigmoid(np, t["logits"]) + t["e_score_correction_bias"]
    wrong_ME = dense(right_MC, np.take_along_axis(corrected_ME, right_MC, axis=1), corrected_ME.shape[1])
    assert norm(wrong_ME - t["weights"]) > 0.01 * norm(t["weights"])


@every_backend
@both_dtypes
@cases_of("moe", "moe_shared")
def test_mixtures_give_what_transformers_gives(make: type[Backend], file: str, case: str, dtype: str) -> None:
    given, t, limit = lookup(file, case, dtype)
    with unmodified(*t.values()):
        y_MD = mixture(make(dtype), given, t, t["x"])
    agree(y_MD, t["y"], limit)


@both_dtypes
@cases_of("moe")
def test_the_definition_by_token_gives_what_transformers_gives(xp: Any, file: str, case: str, dtype: str) -> None:
    given, t, limit = lookup(file, case, dtype)
    be, llama4, act = Backend(dtype), given["model"] == "llama4_text", given["hidden_act"]
    index_MC, weight_MC = be.route(t["x"], gate_of(t, "router." if llama4 else "gate."), config_of(given).router)
    w = experts_of(t, llama4)

    def expert(e: int, x_TD: Array) -> Array:
        return be.gated_ffn(x_TD, GatedFFN(*(Linear(part.weight[e]) for part in w)), act)

    y_MD = blocks.moe_by_token(xp, t["x"], expert, index_MC, weight_MC, "input" if llama4 else "output")
    if llama4:
        y_MD += be.gated_ffn(t["x"], gated_ffn_of(t, "shared_expert"), act)
    agree(y_MD, t["y"], limit)
