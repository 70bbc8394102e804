"""The tests' own tools: the comparator, the shape checker and the strict module fail when they must."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

import npllm
from npllm import blocks
from npllm.arrays import Array
from npllm.backend import Backend
from npllm.blocks import rope as rope_module
from npllm.models import interpret
from npllm.numpy_backend import NumpyBackend
from npllm.testing.compare import unmodified
from npllm.weights import Linear
from tests.compare import LIMITS, agree
from tests.export import TRUTH
from tests.shapecheck import ShapeError, block_functions, checked, returned_names, shapes_checked
from tests.steps import in_pieces
from tests.strict import STRICT

WANT = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)


# -- the comparator ---------------------------------------------------------------------------------------------------


def changed(index: Any, value: float, x: Array = WANT) -> Array:
    x = x.copy()
    x[index] = value
    return x


def test_equal_arrays_agree() -> None:
    agree(WANT.copy(), WANT, "exact")
    agree(WANT * np.float32(1 + 1e-6), WANT, "truth")


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (WANT * np.float32(1 + 1e-4), "relative error 1"),
        (-WANT, "relative error 2"),
        (np.zeros_like(WANT), "relative error 1"),
        (changed((3, 7), WANT[3, 7] + 0.001), r"worst at \[3, 7\]"),
        (WANT[:, ::-1], "relative error"),
        (WANT.astype(np.float64), r"got float64\[40, 30\], want float32\[40, 30\]"),
        (WANT[:1], r"got float32\[1, 30\]"),
        (WANT.reshape(-1), r"got float32\[1200\]"),
        (WANT.tolist(), "got list"),
        (changed((1, 2), np.nan), r"NaN in other places, 1 of 1200; worst at \[1, 2\]"),
        (changed((1, 2), np.inf), r"\+inf in other places"),
        (changed((1, 2), -np.inf), "-inf in other places"),
    ],
)
def test_a_planted_error_is_found(got: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=f"head: .*{message}"):
        agree(got, WANT, "truth", what="head")


def test_the_message_says_how_far_and_where() -> None:
    with pytest.raises(AssertionError) as raised:
        agree(changed((3, 7), 9.0), changed((3, 7), 1.0), "truth")
    message = str(raised.value)
    assert "largest error 8.000e+00" in message
    assert f"worst at [3, 7]: got 9.0, want 1.0 [{LIMITS['truth'].why}]" in message


def test_one_wrong_element_of_many_is_found() -> None:
    """Where the norm over everything would pass it: 1e-3 in one of 180,000."""
    want = np.tile(WANT, (50, 3))
    with pytest.raises(AssertionError, match=r"worst at \[777, 5\]"):
        agree(changed((777, 5), want[777, 5] + 1e-3, want), want, "truth")


def test_infinities_must_match_in_sign_and_place() -> None:
    want = changed((0, 0), -np.inf)
    agree(want.copy(), want, "exact")
    for got in (WANT, changed((0, 0), np.inf), changed((0, 1), -np.inf, want)):
        with pytest.raises(AssertionError, match="inf in other places"):
            agree(got, want, "truth")


@pytest.mark.parametrize(
    ("want", "why"),
    [
        (np.zeros((3, 4), np.float32), "zero throughout"),
        (np.full((3, 4), 0.5, np.float32), r"constant \(0.5\)"),
        (changed((2, 2), np.nan), "has NaN"),
        (np.full((2, 2), np.nan, np.float32), "has NaN"),
        (np.zeros((0, 4), np.float32), "is empty"),
    ],
)
def test_a_reference_that_proves_nothing_is_refused(want: Array, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        agree(want.copy(), want, "truth")


def test_a_literal_may_be_constant_but_not_wrong() -> None:
    ones = np.ones(3, np.float32)
    agree(ones.copy(), ones, "exact", literal=True)
    with pytest.raises(AssertionError, match="relative error"):
        agree(2 * ones, ones, "truth", literal=True)
    with pytest.raises(AssertionError, match="relative error inf"):
        agree(ones, 0 * ones, "truth", literal=True)


def test_every_limit_has_a_reason_and_is_no_blanket() -> None:
    for name, limit in LIMITS.items():
        assert len(limit.why) > 20, name
        assert 0 <= limit.relative <= limit.element <= 3e-3, name


def test_a_modified_input_is_found() -> None:
    x = np.ones(3)
    with unmodified(x):
        x + 1
    with pytest.raises(AssertionError, match=r"input 1, float64\[3\], was modified"), unmodified(np.ones(3), x):
        x += 1


# -- the comparator against faults of the kind that people make ----------------------------------------------------------


def check_llama() -> None:
    folder = TRUTH / "models" / "llama3-scaling"
    truth = load_file(folder / "trace.safetensors")
    agree(npllm.load(folder, "numpy", dtype="float32").forward(truth["tokens"]), truth["logits"], "truth")


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "interleaved RoPE": (blocks, "rotate_halves", blocks.rotate_interleaved),
    "angles in half precision": (
        blocks,
        "angles",
        lambda xp, rope, at, dtype: blocks.Angles(*(x.astype("f2").astype(dtype) for x in ANGLES(xp, rope, at, dtype))),
    ),
    "no llama3 scaling": (rope_module, "_llama3", lambda inverse, rope: inverse),
    "a window where none is": (blocks.Mask, "reach", lambda mask, first, last: (max(0, last - 20), last + 1)),
    "eps a hundred times too large": (blocks, "rms_norm", lambda xp, x, w, eps, offset: NORM(xp, x, w, 100 * eps, offset)),
}
ANGLES, NORM = blocks.angles, blocks.rms_norm


@pytest.mark.parametrize("fault", FAULTS)
def test_the_truth_notices(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_llama()
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError, match="relative error"):
        check_llama()


def test_the_invariants_notice_an_unmasked_future(monkeypatch: pytest.MonkeyPatch) -> None:
    described = interpret({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 20,
                               "intermediate_size": 9, "num_hidden_layers": 1})  # fmt: skip
    llm, tokens_T = npllm.LLM.random(described, Backend("float64")), np.arange(9)
    agree(in_pieces(llm, tokens_T, [4]), llm.forward(tokens_T)[0], "reordered float64")
    monkeypatch.setattr(blocks.Mask, "allowed", lambda mask, xp, query, key: np.ones((len(query), len(key)), bool))
    with pytest.raises(AssertionError, match="relative error"):
        agree(in_pieces(llm, tokens_T, [4]), llm.forward(tokens_T)[0], "reordered float64")


# -- the shape checker ------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    a_MJ: Array
    b_MJ: Array


@checked
def product(x_MK: Array, y_KN: Array | None = None, pair: Pair | None = None, one_1K: Array | None = None) -> Array:
    """A product -> z_MN, or of another shape when there is no y."""
    return x_MK if y_KN is None else x_MK @ y_KN


@checked
def last_axis(x_D: Array, weight_D: Array) -> Array:
    """Something over the last axis (any leading axes)."""
    return x_D * weight_D


def ones(*shape: int) -> Array:
    return np.ones(shape)


def test_shapes_that_fit_pass() -> None:
    product(ones(2, 3), ones(3, 4), Pair(ones(2, 5), ones(2, 5)), ones(1, 3))
    product(ones(2, 0), ones(0, 4))
    last_axis(ones(2, 7, 3), ones(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: product(ones(2, 3), ones(4, 3)), r"product: y_KN has shape \[4, 3\], but K = 3"),
        (lambda: product(ones(2, 3, 1)), r"x_MK has shape \[2, 3, 1\]"),
        (lambda: product(ones(2, 3), y_KN=ones(3)), r"y_KN has shape \[3\]"),
        (lambda: product(ones(2, 3), pair=Pair(ones(2, 5), ones(2, 4))), r"b_MJ has shape \[2, 4\], but J = 5"),
        (lambda: product(ones(2, 3), pair=Pair(ones(3, 5), ones(3, 5))), r"a_MJ has shape \[3, 5\], but M = 2"),
        (lambda: product(ones(2, 3), one_1K=ones(2, 3)), r"one_1K has shape \[2, 3\], but 1 = 1"),
        (lambda: product(ones(2, 3), ones(3, 4)[..., None]), r"y_KN has shape \[3, 4, 1\]"),
        (lambda: last_axis(ones(2, 3), ones(2)), r"weight_D has shape \[2\], but D = 3"),
        (lambda: last_axis(np.float64(1), ones(2)), r"x_D has shape \[\]"),
    ],
)
def test_a_shape_that_does_not_fit_is_found(call: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        call()


def test_the_result_is_checked_by_the_name_in_the_docstring() -> None:
    @checked
    def transposed(x_MK: Array) -> Array:
        """Forgets -> y_MK."""
        return x_MK.T

    transposed(ones(3, 3))
    with pytest.raises(ShapeError, match=r"y_MK has shape \[3, 2\], but M = 2"):
        transposed(ones(2, 3))
    assert returned_names(Backend.project_heads) == ["q_MHK", "k_MGK", "v_MGK"]
    assert returned_names(blocks.softmax_attention) == ["o_THV"]


def test_blocks_and_backend_are_checked_inside_the_context_only() -> None:
    wrong = blocks.Angles(ones(3, 2), ones(3, 2))
    backend, parts = Backend("float64"), NumpyBackend("float64")
    with shapes_checked():
        for call in (
            lambda: blocks.rotate_halves(np, ones(1, 2, 4), wrong),
            lambda: backend.rope(ones(1, 2, 4), wrong),
            lambda: parts.rope(ones(1, 2, 4), wrong),
            lambda: backend.linear(ones(2, 4), Linear(ones(3, 4)), ones(1, 3)),
        ):
            with pytest.raises(ShapeError):
                call()
    with pytest.raises(ValueError, match="broadcast"):
        blocks.rotate_halves(np, ones(1, 2, 4), wrong)
    assert {"npllm.blocks.attention.softmax", "npllm.blocks.norms.rms_norm"} <= block_functions().keys()


# -- the strict module ------------------------------------------------------------------------------------------------


def test_the_strict_module_offers_only_what_is_shared() -> None:
    with pytest.raises(AttributeError):
        STRICT.trapezoid(ones(3))
    with pytest.raises(TypeError, match="initial"):
        STRICT.max(ones(3), initial=0.0)
    assert np.isnan(STRICT.empty((2,), "float32")).all()
    assert STRICT.sum(ones(2, 3), axis=-1, keepdims=True).shape == (2, 1)
