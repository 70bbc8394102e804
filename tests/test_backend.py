"""Choosing a backend, overriding its operations, and tracing."""

import logging
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest

import npllm
from npllm import backend, registry
from npllm.arrays import Array
from npllm.backend import OPERATIONS, Backend, accelerates
from npllm.errors import ArgumentError, BackendError
from npllm.models import interpret
from npllm.numpy_backend import NumpyBackend
from npllm.registry import available_backends, get_backend
from npllm.trace import Trace, Tracer
from npllm.weights import Linear
from tests.compare import agree
from tests.steps import step

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 31,
    "hidden_size": 15,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
}
TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def model(backend: Backend | None = None, **changes: Any) -> npllm.LLM:
    return npllm.LLM.random(interpret(CONFIG | changes), backend or Backend("float64"))


# -- overriding operations --------------------------------------------------------------------------------------------


def wide(self: Backend, x_MD: Array, w: Linear, residual_MF: Array | None = None) -> str | None:
    return "more than two tokens" if len(x_MD) > 2 else None


class Doubling(Backend):
    """Takes up to two tokens; its result is twice the canon's, so that one sees who computed."""

    name = "doubling"

    @accelerates(wide)
    def linear(self, x_MD: Array, w: Linear, /, residual_MF: Array | None = None) -> Array:
        return 2 * super().linear(x_MD, w, residual_MF)


W = Linear(np.eye(3))


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Reasons that were logged before are logged again."""
    backend.log_once.cache_clear()
    yield
    backend.log_once.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_an_override_takes_its_calls_and_declines_the_others_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "npllm")
    be = Doubling("float64")
    agree(be.linear(np.eye(3)[:2], W), 2 * np.eye(3)[:2], "exact")
    assert not caplog.messages
    for _ in range(3):
        agree(be.linear(np.eye(3), W), np.eye(3), "exact")
    assert caplog.messages == ["doubling.linear falls back: more than two tokens"]


def test_strict_raises_in_place_of_falling_back() -> None:
    be = Doubling("float64", strict=True)
    agree(be.linear(np.eye(3)[:2], W), 2 * np.eye(3)[:2], "exact")
    with pytest.raises(BackendError, match=r"doubling\.linear declines: more than two tokens"):
        be.linear(np.eye(3), W)


def test_a_checker_sees_every_argument() -> None:
    seen: list[Any] = []

    class Watching(Backend):
        @accelerates(lambda self, *args, **kwargs: seen.append((args, kwargs)))
        def linear(self, x_MD: Array, w: Linear, /, residual_MF: Array | None = None) -> Array:
            return x_MD

    be = Watching()
    assert be.linear(TOKENS, W, residual_MF=TOKENS) is TOKENS
    assert [(len(args), list(kwargs)) for args, kwargs in seen] == [(2, ["residual_MF"])]


def test_a_checker_that_raises_is_a_bug_and_not_a_decline() -> None:
    def broken(self: Backend, *args: Any, **kwargs: Any) -> str | None:
        raise ZeroDivisionError("in the checker")

    class Broken(Backend):
        @accelerates(broken)
        def embed(self, tokens_M: Array, w: Linear, /) -> Array:
            return w.weight

    with pytest.raises(ZeroDivisionError, match="in the checker"):
        Broken().embed(TOKENS, W)


def test_an_override_has_the_signature_of_the_canon() -> None:
    with pytest.raises(TypeError, match=r"linear\(self, x, w\) must have the canon's \(self, x_MD"):

        class Wrong(Backend):
            @accelerates(wide)
            def linear(self, x, w):  # type: ignore[no-untyped-def,override]
                return x


def test_an_override_of_an_unknown_operation_is_refused() -> None:
    with pytest.raises((TypeError, AttributeError), match="matmul"):

        @accelerates(wide)
        def matmul(self: Backend, x_MD: Array, w: Linear) -> Array:
            return x_MD


def test_either_grain_may_be_overridden() -> None:
    """A fine operation serves the canonical bodies of the coarse ones; a coarse one replaces them."""
    calls: list[str] = []

    class Fine(Backend):
        def linear(self, x_MD: Array, w: Linear, /, residual_MF: Array | None = None) -> Array:
            calls.append("linear")
            return super().linear(x_MD, w, residual_MF)

    class Coarse(Fine):
        def gated_ffn(self, x_MD: Array, w: Any, /, act: Any, **options: Any) -> Array:
            calls.append("gated_ffn")
            return super().gated_ffn(x_MD, w, act, **options)

    want = model().forward(TOKENS)
    agree(model(Fine("float64")).forward(TOKENS), want, "exact")
    assert calls == ["linear"] * (2 * 7 + 1)
    calls.clear()
    agree(model(Coarse("float64")).forward(TOKENS), want, "exact")
    assert calls.count("gated_ffn") == 2


def test_operations_are_methods() -> None:
    assert all(callable(getattr(Backend, name)) for name in OPERATIONS)


# -- the registry -----------------------------------------------------------------------------------------------------


class Other(Backend):
    """What a third party's entry point names."""

    name = "other"


class Half(Backend):
    """Computes in bfloat16 alone."""

    name = "half"
    dtypes = ("bfloat16",)


NOT_A_BACKEND = object()


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make entry points be those given: name="object of this module", or name=None for a module that is not there."""

    def register(**points: str | None) -> None:
        found = [
            EntryPoint(name, f"{__name__}:{value}" if value else "not_installed_anywhere", "npllm.backends")
            for name, value in points.items()
        ]
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found if group == "npllm.backends" else [])

    return register


def test_numpy_is_always_there(register: Callable[..., None]) -> None:
    register()
    assert available_backends() == {"numpy": ""}
    assert type(get_backend("numpy")) is type(get_backend("auto")) is NumpyBackend
    assert get_backend("numpy").dtype == "float32"
    assert get_backend("numpy", dtype="float64").dtype == "float64"


def test_an_entry_point_adds_a_backend(register: Callable[..., None]) -> None:
    register(other="Other")
    be = get_backend("other", dtype="float64", strict=True, threads=2)
    assert type(be) is Other
    assert (be.dtype, be.strict, be.threads) == ("float64", True, 2)
    assert type(get_backend("auto")) is NumpyBackend, "auto knows the order of npllm's own backends only"


def test_an_unknown_backend_names_the_nearest(register: Callable[..., None]) -> None:
    register(other="Other", half="Half")
    with pytest.raises(BackendError, match="backend 'nunpy' is not installed; installed: numpy, half, other"):
        get_backend("nunpy")


def test_a_backend_that_cannot_load_says_why(register: Callable[..., None]) -> None:
    register(gone=None, wrong="NOT_A_BACKEND")
    with pytest.raises(BackendError, match="backend 'gone' cannot load: No module named 'not_installed_anywhere'"):
        get_backend("gone")
    with pytest.raises(BackendError, match="'wrong': its entry point must name a subclass"):
        get_backend("wrong")
    reasons = available_backends()
    assert reasons["numpy"] == ""
    assert "not_installed_anywhere" in reasons["gone"]


@pytest.mark.usefixtures("forgotten")
def test_auto_takes_the_first_that_loads_and_says_once_what_it_passed(
    register: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "PREFERENCE", (registry.Candidate("cupy"), *registry.PREFERENCE[1:]))
    caplog.set_level(logging.INFO, "npllm")
    register(numba="Other", cupy=None)
    assert type(get_backend("auto")) is type(get_backend("auto")) is Other
    assert caplog.messages == ["backend auto: backend 'cupy' cannot load: No module named 'not_installed_anywhere'"]
    register(numba="Half")
    assert type(get_backend("auto", dtype="float64")) is NumpyBackend


def test_bad_settings_are_refused() -> None:
    with pytest.raises(BackendError, match="the numpy backend computes in float32 or float64, not in bfloat16"):
        Backend("bfloat16")
    with pytest.raises(ArgumentError, match="threads = 0 must be a whole number"):
        Backend(threads=0)
    with pytest.raises(BackendError, match="does not quantise weights to 'q4'"):
        Backend(quantize="q4")


# -- tracing ----------------------------------------------------------------------------------------------------------

LAYER = """attention.input attention.q attention.k attention.v attention.heads attention.output
    ffn.input ffn.gate ffn.up ffn.hidden output""".split()


def test_a_trace_names_every_intermediate() -> None:
    llm = model()
    with llm.trace() as trace:
        logits_BTN = llm.forward(TOKENS)
    layers = [f"layers.{i}.{name}" for i in range(2) for name in LAYER]
    assert sorted(trace) == sorted(["embedding", *layers, "norm", "logits"])
    assert len(trace) == len(list(trace))
    assert trace["layers.1.attention.q"].shape == (10, 4, 6)
    assert trace["layers.1.attention.k"].shape == (10, 2, 6)
    agree(trace["logits"].reshape(logits_BTN.shape), logits_BTN, "exact")
    agree(model().forward(TOKENS), logits_BTN, "exact")


def test_gpt2_uses_the_same_names() -> None:
    config = {"model_type": "gpt2", "vocab_size": 31, "n_embd": 12, "n_head": 3, "n_layer": 1, "n_positions": 32}
    llm = npllm.LLM.random(interpret(config), Backend("float64"))
    with llm.trace() as trace:
        llm.forward(TOKENS)
    inside = {name.removeprefix("layers.0.") for name in trace} - {"embedding", "norm", "logits"}
    assert inside == set(LAYER) - {"ffn.gate"}


def test_a_trace_keeps_every_pass_in_order() -> None:
    llm = model()
    with llm.trace() as trace:
        llm.forward(TOKENS[:, :2])
        llm.forward(TOKENS)
    assert [len(each) for each in trace.every("norm")] == [4, 10]
    assert len(trace["norm"]) == 10


def test_a_record_is_a_copy() -> None:
    """What a later operation does in place does not reach back."""
    trace = Trace()
    x = Tracer(Backend("float64"), trace).layer(2).mark("ffn.gate", np.arange(3.0))
    x += 1
    agree(trace["layers.2.ffn.gate"], np.arange(3.0), "exact")
    llm = model()
    with llm.trace() as trace:
        llm.forward(TOKENS)
    gate, up, hidden = (trace[f"layers.0.ffn.{name}"] for name in ("gate", "up", "hidden"))
    agree(gate / (1 + np.exp(-gate)) * up, hidden, "reordered float64")


@pytest.mark.parametrize("value", [np.zeros((10, 15)), lambda x: 0 * x], ids=["array", "function"])
def test_a_patch_takes_the_place_of_an_intermediate(value: Any) -> None:
    """With the last block's output gone, the logits are those of the norm of zero: zero."""
    llm = model()
    with llm.trace() as trace:
        trace.patch("layers.1.output", value)
        agree(llm.forward(TOKENS), np.zeros((2, 5, 31)), "exact", literal=True)
        agree(trace["layers.1.output"], np.zeros((10, 15)), "exact", literal=True)
    assert llm.forward(TOKENS).any(), "a patch ends with its trace"


def test_a_patch_of_what_was_recorded_changes_nothing() -> None:
    llm = model()
    with llm.trace() as first:
        want = llm.forward(TOKENS)
    with llm.trace() as second:
        for name, value in first.items():
            second.patch(name, value)
        agree(llm.forward(TOKENS), want, "exact")


def test_a_patch_of_the_wrong_shape_is_refused() -> None:
    llm = model()
    with llm.trace() as trace:
        trace.patch("norm", np.zeros((3, 15)))
        with pytest.raises(ArgumentError, match=r"the patch of norm has shape \[3, 15\], the intermediate \[10, 15\]"):
            llm.forward(TOKENS)


def test_an_unknown_name_says_the_nearest() -> None:
    llm = model()
    with llm.trace() as trace:
        llm.forward(TOKENS)
    with pytest.raises(ArgumentError, match=r"named 'layers.0.atention.q'; nearest: layers.0.attention.q"):
        trace["layers.0.atention.q"]


def test_marks_cost_nothing_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mark` and `layer` hand back what they are given, and nothing is copied or recorded."""
    be = Backend("float64")
    x = np.ones(3)
    assert be.mark("anything", x) is x
    assert be.layer(3) is be
    monkeypatch.setattr(Backend, "to_numpy", lambda self, x: pytest.fail("copied") if x.ndim != 2 else x)
    llm = model(be)
    cache = llm.new_cache()
    step(llm, cache, [cache.add()], [TOKENS[0]])


def test_under_a_trace_coarse_operations_run_their_canonical_bodies() -> None:
    """And fine operations stay those of the backend."""
    calls: list[str] = []

    class Fused(Backend):
        def gated_ffn(self, *args: Any, **kwargs: Any) -> Array:
            calls.append("gated_ffn")
            return super().gated_ffn(*args, **kwargs)

        def project_heads(self, *args: Any, **kwargs: Any) -> Any:
            calls.append("project_heads")
            return super().project_heads(*args, **kwargs)

        def rms_norm(self, *args: Any, **kwargs: Any) -> Array:
            calls.append("rms_norm")
            return super().rms_norm(*args, **kwargs)

    llm = model(Fused("float64"))
    want = llm.forward(TOKENS)
    assert sorted(set(calls)) == ["gated_ffn", "project_heads", "rms_norm"]
    calls.clear()
    with llm.trace() as trace:
        agree(llm.forward(TOKENS), want, "exact")
    assert set(calls) == {"rms_norm"}
    assert "layers.0.ffn.gate" in trace


def test_generation_and_scores_can_be_traced() -> None:
    llm = model()
    want = llm.generate([1, 2, 3], max_tokens=4).tokens
    with llm.trace() as trace:
        assert llm.generate([1, 2, 3], max_tokens=4).tokens == want
    assert [len(each) for each in trace.every("embedding")] == [3, 1, 1, 1]
    with llm.trace() as trace:
        llm.score([1, 2, 3, 4])
    assert len(trace["logits"]) == 3
