"""The kit's latent attention: budgets against correct kernels of both forms, and against every known mistake."""

from __future__ import annotations

import secrets
import time

import ml_dtypes
import numpy as np
import pytest

from npllm.backend import Backend
from npllm.numpy_backend import NumpyBackend
from npllm.testing.checking import check, truth, widened
from npllm.testing.judge import judge
from npllm.testing.operation import operation
from npllm.testing.rounding import FORMATS, Rounding

OPERATIONS = [operation(name) for name in ("latent_project", "latent_expand", "latent_attention")]
MISTAKES = [pytest.param(op, each, id=f"{op.name}-{each.name}") for op in OPERATIONS for each in op.mistakes]
FORMS = ("bf16", "f16", "f32")
F = np.float32


def trials(op, kernels, rounding, seed):
    """(kernel, case, verdict) for each output of every case at each scale; one after the other, as they are asked for."""
    for case in op.cases:
        for scale in case.scales:
            inputs = case.inputs(seed, scale, rounding.format("inputs"))
            estimates = op.estimate(widened(inputs), case.settings, rounding, None)
            for kernel in kernels:
                results = kernel(**inputs, **case.settings)
                results = results if isinstance(results, tuple) else (results,)
                for x, estimate in zip(results, estimates, strict=True):
                    yield kernel, case, judge(np.asarray(x).astype(np.float64), estimate, rounding.format("output"))


def assert_pass(op, kernels, rounding):
    seed = secrets.randbelow(1 << 31)
    for kernel, case, verdict in trials(op, kernels, rounding, seed):
        numbers = verdict.problem, verdict.spread, verdict.limit, verdict.share
        assert not verdict.problem, (kernel.__qualname__, case.id, seed, *numbers)


def is_caught(op, kernel, rounding):
    return any(verdict.problem for *_, verdict in trials(op, [kernel], rounding, secrets.randbelow(1 << 31)))


def on_backend(op, be, form=None):
    """A kernel that is a backend's own method, its results rounded to a format."""

    def kernel(**given):
        inputs = {name: x for name, x in given.items() if name in op.inputs}
        settings = {name: x for name, x in given.items() if name not in op.inputs}
        with np.errstate(all="ignore"):
            results = [np.asarray(x, dtype=np.float64) for x in op.run(be, inputs, settings)]
        return tuple(results if form is None else [form.round(x) for x in results])

    return kernel


# -- correct kernels, in float32 but for the roundings they declare ---------------------------------------------------


def low(x, to):
    return x.astype(to).astype(F)


def project(rounds, own_angles):
    """`rounds`: the projection is put away in the inputs' type. `own_angles`: from positions and frequencies."""

    def latent_project(h, kv_a, norm, cos, sin, positions, inv_freq, *, eps, interleaved=False, **others):
        if own_angles:
            phase = positions.astype(F)[:, None] * inv_freq
            cos, sin = np.cos(phase), np.sin(phase)
        L, down = len(norm), h.astype(F) @ kv_a.astype(F).T
        down = low(down, h.dtype) if rounds else down
        c, k = down[:, :L], down[:, L:]
        c = c / np.sqrt(np.mean(c * c, axis=-1, keepdims=True) + F(eps)) * norm.astype(F)
        J = cos.shape[1]
        first, second = (np.s_[:, 0::2], np.s_[:, 1::2]) if interleaved else (np.s_[:, :J], np.s_[:, J:])
        turned = np.empty_like(k)
        turned[first], turned[second] = k[first] * cos - k[second] * sin, k[second] * cos + k[first] * sin
        return np.concatenate([c, turned], axis=1).astype(h.dtype)

    return latent_project


def latent_expand(latent, kv_b, *, nope, heads):
    S, L = len(latent), kv_b.shape[1]
    up = (latent[:, :L].astype(F) @ kv_b.astype(F).T).astype(latent.dtype).reshape(S, heads, len(kv_b) // heads)
    shared = np.broadcast_to(latent[:, None, L:], (S, heads, latent.shape[1] - L))
    return np.concatenate([up[..., :nope], shared], axis=-1), up[..., nope:]


def attend(q, k, v, seen, scale, probs):
    """Whole rows; weights are normalised, then rounded."""
    scores = np.where(seen, (q @ np.swapaxes(k, -1, -2)) * F(scale), F(-np.inf))
    e = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    return low(e / np.sum(e, axis=-1, keepdims=True), probs) @ v


def attend_tiled(q, k, v, seen, scale, probs, tile=16):
    """A tile of keys at a time, with a running maximum; the sum that normalises is that of unrounded weights."""
    scores = np.where(seen, (q * F(scale)) @ np.swapaxes(k, -1, -2), F(-np.inf))
    top = np.full((*scores.shape[:-1], 1), -np.inf, F)
    total, out = np.zeros_like(top), np.zeros((*scores.shape[:-1], v.shape[-1]), F)
    for begin in range(0, scores.shape[-1], tile):
        part = scores[..., begin : begin + tile]
        higher = np.maximum(top, np.max(part, axis=-1, keepdims=True))
        finite = np.where(np.isinf(higher), F(0.0), higher)
        kept, e = np.exp(top - finite), np.exp(part - finite)
        total, top = total * kept + np.sum(e, axis=-1, keepdims=True), higher
        out = out * kept + low(e, probs) @ v[..., begin : begin + tile, :]
    return out / total


def in_halves(partial):
    """Whole rows, but of either half of the keys for itself; what each sums up to is put away in `partial`."""

    def attend_halves(q, k, v, seen, scale, probs):
        p, half = attend(q, k, np.eye(v.shape[-2], dtype=F), seen, scale, probs), v.shape[-2] // 2
        parts = (p[..., :half] @ v[..., :half, :], p[..., half:] @ v[..., half:, :])
        return sum(low(part, partial) for part in parts)

    return attend_halves


def attention(form, core, hidden=None, probs=None):
    """`form`: absorbed or expanded; `hidden` and `probs`: NumPy's types of those roundings, or the inputs' own."""

    def latent_attention(q, latent, kv_b, *, scale, nope, window=None):
        kept, weights, given = hidden or q.dtype, probs or q.dtype, q.dtype
        (B, T, H, _), S, L = q.shape, latent.shape[1], kv_b.shape[1]
        q, c, up = q.astype(F).transpose(0, 2, 1, 3), latent.astype(F)[:, None], kv_b.astype(F).reshape(H, -1, L)
        query, key = np.arange(S - T, S)[:, None], np.arange(S)[None]
        seen = (key <= query) & (query - key < (window or S + 1))
        if form == "absorbed":
            q = np.concatenate([low(q[..., :nope] @ up[:, :nope], kept), q[..., nope:]], axis=-1)
            out = low(core(q, c, c[..., :L], seen, scale, weights), kept) @ np.swapaxes(up[:, nope:], -1, -2)
        else:
            made = low(c[..., :L] @ np.swapaxes(up, -1, -2), kept)
            shared = np.broadcast_to(c[..., L:], (B, H, S, c.shape[-1] - L))
            k = np.concatenate([made[..., :nope], shared], axis=-1)
            out = core(q, k, made[..., nope:], seen, scale, weights)
        return out.transpose(0, 2, 1, 3).astype(given)

    return latent_attention


BOTH_FORMS = [(form, core) for form in ("absorbed", "expanded") for core in (attend, attend_tiled)]
HONEST = {
    "latent_project": [project(rounds, own) for rounds in (False, True) for own in (False, True)],
    "latent_expand": [latent_expand],
    "latent_attention": [
        *(attention(form, core) for form, core in BOTH_FORMS),
        attention("absorbed", attend, hidden=F, probs=F),
        attention("expanded", attend_tiled, hidden=F, probs=F),
        *(attention(form, in_halves(F)) for form in ("absorbed", "expanded")),
    ],
}


@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: op.name)
@pytest.mark.parametrize("policy", [Rounding("bf16"), Rounding("f32"), Rounding("f16", output="f32", hidden="f32")], ids=str)
def test_the_estimate_has_the_truth(op, policy):
    for case in op.cases:
        for scale in case.scales:
            inputs = case.inputs(3, scale, policy.format("inputs"))
            expected = truth(op, case, inputs)
            estimates = op.estimate(widened(inputs), case.settings, policy, None)
            for (name, value), estimate in zip(expected.items(), estimates, strict=True):
                largest = np.max(np.abs(value), initial=0.0)
                np.testing.assert_allclose(estimate.value, value, rtol=0, atol=1e-12 * largest, err_msg=f"{case} {name}")
                assert estimate.variance.shape == estimate.bound.shape == value.shape
                assert (estimate.variance >= 0).all()
                assert np.isfinite(estimate.bound).all()


@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: op.name)
@pytest.mark.parametrize("form", FORMS)
def test_correct_kernels_pass(op, form):
    rounded_exactly = on_backend(op, Backend("float64"), FORMATS[form])
    assert_pass(op, [*HONEST[op.name], rounded_exactly], Rounding(form))


@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: op.name)
@pytest.mark.parametrize("form", FORMS)
def test_backends_pass_in_every_storage_format(op, form):
    policy = Rounding(form, output="f32", hidden="f32", probs="f32")
    assert_pass(op, [on_backend(op, backend("float32")) for backend in (Backend, NumpyBackend)], policy)


@pytest.mark.parametrize(("op", "mistake"), MISTAKES)
def test_every_mistake_is_caught(op, mistake):
    for form in FORMS:
        kernel = on_backend(op, mistake.made_by(Backend)("float64"), FORMATS[form])
        assert is_caught(op, kernel, Rounding(form)), form


@pytest.mark.parametrize(
    ("policy", "hidden", "probs"),
    [
        (Rounding("bf16", hidden="f32"), ml_dtypes.bfloat16, F),
        (Rounding("f16", hidden="f32"), np.float16, F),
        (Rounding("f16"), ml_dtypes.bfloat16, F),
        (Rounding("f32"), ml_dtypes.bfloat16, F),
        (Rounding("f32"), np.float16, F),
        (Rounding("f32"), F, np.float16),
        (Rounding("f32"), F, ml_dtypes.bfloat16),
    ],
)
def test_roundings_that_were_not_declared_are_caught(policy, hidden, probs):
    for form, core in BOTH_FORMS:
        assert is_caught(OPERATIONS[2], attention(form, core, hidden, probs), policy), (form, core.__name__)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize(
    ("policy", "partial"),
    [("bf16", ml_dtypes.bfloat16), ("f16", np.float16), ("f16", ml_dtypes.bfloat16), ("f32", np.float16)],
)
def test_sums_over_parts_of_the_keys_in_the_inputs_type_are_caught(policy, partial, form):
    assert is_caught(OPERATIONS[2], attention(form, in_halves(partial)), Rounding(policy))


@pytest.mark.parametrize("op", OPERATIONS[1:], ids=lambda op: op.name)
@pytest.mark.parametrize("policy", ["f32", "bf16"])
def test_inputs_taken_through_float16_are_caught(op, policy):
    """In float16 that is no mistake, which keeps it out of the list of mistakes."""
    right = on_backend(op, Backend("float64"), FORMATS[policy])

    def through_f16(**given):
        halves = {name: FORMATS["f16"].round(x.astype(float)) for name, x in given.items() if name in op.inputs}
        return right(**given | halves)

    assert is_caught(op, through_f16, Rounding(policy))


def test_the_budget_is_no_wider_than_rounding():
    """Where only the output is rounded to fewer bits, errors of either form are what the budget expects."""
    kernels = [attention(form, core, F, F) for form, core in BOTH_FORMS]
    policy = Rounding("bf16", hidden="f32", probs="f32")
    found = [verdict for *_, verdict in trials(OPERATIONS[2], kernels, policy, 5) if verdict.bad.size > 4000]
    assert len(found) > 80
    assert all(0.9 < verdict.spread < 1.15 for verdict in found)


def test_one_suite_takes_less_than_ten_seconds():
    began = time.process_time()
    assert_pass(OPERATIONS[2], [attention("expanded", attend_tiled)], Rounding("bf16"))
    assert time.process_time() - began < 10.0


def test_check_names_the_mistake():
    op = OPERATIONS[2]
    mistake = next(each for each in op.mistakes if each.name == "kv_b: value rows before key rows")
    wrong = on_backend(op, mistake.made_by(Backend)("float64"), FORMATS["bf16"])

    def latent_attention(q, latent, kv_b, *, scale, nope):
        (out,) = wrong(q=q, latent=latent, kv_b=kv_b, scale=scale, nope=nope)
        return out.astype(q.dtype)

    report = check(op, latent_attention, "prefill", "bf16")
    assert report.explanation == mistake.name
    assert report.explained > 0.99
