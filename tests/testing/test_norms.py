"""The kit's norms and embedding: budgets against correct kernels, and against every known mistake."""

import inspect
import secrets
import time

import numpy as np
import pytest

from npllm.backend import Backend
from npllm.numpy_backend import NumpyBackend
from npllm.testing.checking import check, truth, verdicts_on
from npllm.testing.operation import operation
from npllm.testing.rounding import FORMATS, Rounding

NORMS = ("rms_norm", "layer_norm", "embed")
KINDS = ("f32", "bf16", "f16")
F = np.float32


def drawn(op, rounding, seed):
    """(case, inputs) of every case at each of its scales, as they are asked for."""
    form = rounding.format("inputs")
    return ((case, case.inputs(seed, scale, form)) for case in op.cases for scale in case.scales)


def by_canon(op, be, rounding):
    """A kernel: the operation by a backend, its results rounded to the output's format once."""
    out = rounding.format("output")
    return lambda case, inputs: {n: out.round(x.astype(np.float64)) for n, x in truth(op, case, inputs, be).items()}


def by_hand(op, kernel):
    """A kernel that names what it takes."""
    named = inspect.signature(kernel).parameters

    def called(case, inputs):
        given = {name: x for name, x in inputs.items() if name in named}
        results = kernel(**given, **case.settings)
        results = results if isinstance(results, tuple) else (results,)
        return {name: np.asarray(x).astype(np.float64) for name, x in zip(op.outputs, results, strict=True)}

    return called


def verdicts(op, kernel, rounding, seed):
    """(case, verdict) for each output of every case; one after the other, as they are asked for."""
    for case, inputs in drawn(op, rounding, seed):
        with np.errstate(all="ignore"):
            results = kernel(case, inputs)
        for verdict, _ in verdicts_on(op, case, inputs, rounding, results).values():
            yield case, verdict


def spreads(op, kernel, rounding, seed):
    """The spread of each case, after none has failed."""
    found = {}
    for case, verdict in verdicts(op, kernel, rounding, seed):
        assert not verdict.problem, (case.id, seed, str(rounding), verdict.problem, verdict.spread, verdict.share)
        found[case.name] = max(found.get(case.name, 0.0), verdict.spread)
    return found


def assert_caught(op, mistake, kind, seed):
    rounding = Rounding(kind)
    kernel = by_canon(op, mistake.made_by(Backend)("float64"), rounding)
    assert any(verdict.problem for _, verdict in verdicts(op, kernel, rounding, seed)), (mistake.name, kind, seed)


def assert_values_true(op, kind, seed):
    rounding = Rounding(kind)
    for case, inputs in drawn(op, rounding, seed):
        exact = truth(op, case, inputs)
        judged = verdicts_on(op, case, inputs, rounding, exact)
        for name, right in exact.items():
            value = judged[name][1].value
            assert value.shape == right.shape
            assert np.max(np.abs(value - right), initial=0.0) <= 1e-12 * np.max(np.abs(right), initial=0.0), case.id


def mistakes_of(names):
    return [pytest.param(name, each, id=f"{name}-{each.name}") for name in names for each in operation(name).mistakes]


# -- correct kernels --------------------------------------------------------------------------------------------------


def one_by_one(x):
    """The mean in float32, in a plain loop over features: the least exact order."""
    total = np.zeros(x.shape[:-1], F)
    for column in np.moveaxis(x, -1, 0):
        total = total + column
    return (total / F(x.shape[-1]))[..., None]


def mean_of(x):
    return x.mean(-1, keepdims=True, dtype=F)


def rms_norm_in(mean):
    def kernel(x, weight=None, *, eps, offset=0.0):
        wide = x.astype(F)
        out = wide / np.sqrt(mean(wide * wide) + F(eps))
        if weight is not None:
            out = out * (weight.astype(F) + F(offset))
        return out.astype(x.dtype)

    return kernel


def rms_norm_gain_first(x, weight=None, *, eps, offset=0.0):
    """The gain meets the row before the root does, and the root is a reciprocal."""
    wide = x.astype(F)
    gained = wide if weight is None else wide * (F(offset) + weight.astype(F))
    return (gained * (F(1) / np.sqrt(mean_of(wide * wide) + F(eps)))).astype(x.dtype)


def rms_norm_rounded(x, weight=None, *, eps, offset=0.0):
    """As transformers' Llama: rounded to the type of the inputs before the gain."""
    out = rms_norm_in(mean_of)(x, eps=eps)
    return out if weight is None else (out.astype(F) * (weight.astype(F) + F(offset))).astype(x.dtype)


def layer_norm_in(mean):
    def kernel(x, weight, bias, *, eps):
        centred = x.astype(F) - mean(x.astype(F))
        out = centred * (F(1) / np.sqrt(mean(centred * centred) + F(eps)))
        return (out * weight.astype(F) + bias.astype(F)).astype(x.dtype)

    return kernel


def layer_norm_folded(x, weight, bias, *, eps):
    """Gain and reciprocal root are multiplied first."""
    centred = x.astype(F) - mean_of(x.astype(F))
    factor = weight.astype(F) / np.sqrt(mean_of(centred * centred) + F(eps))
    return (centred * factor + bias.astype(F)).astype(x.dtype)


def embed(tokens, weight):
    return weight.take(tokens, axis=0)


HONEST = {
    "rms_norm": [rms_norm_in(mean_of), rms_norm_in(one_by_one), rms_norm_gain_first],
    "layer_norm": [layer_norm_in(mean_of), layer_norm_in(one_by_one), layer_norm_folded],
    "embed": [embed],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NORMS)
def test_correct_kernels_pass(name, kind):
    op, rounding, seed = operation(name), Rounding(kind), secrets.randbelow(1 << 30)
    kernels = [by_hand(op, kernel) for kernel in HONEST[name]]
    kernels += [by_canon(op, be(dtype), rounding) for be in (Backend, NumpyBackend) for dtype in ("float32", "float64")]
    for kernel in kernels:
        spreads(op, kernel, rounding, seed)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_a_correct_kernel_of_16_bits_has_the_expected_error(name, kind):
    op = operation(name)
    found = spreads(op, by_hand(op, HONEST[name][0]), Rounding(kind), secrets.randbelow(1 << 30))
    assert 0.9 < found["plain"] < 1.15


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_rounding_before_the_gain_must_be_declared(kind):
    op, seed = operation("rms_norm"), secrets.randbelow(1 << 30)
    kernel = by_hand(op, rms_norm_rounded)
    declared = spreads(op, kernel, Rounding(kind, normed=kind), seed)
    assert declared["plain"] > 0.9
    failed = {case.name for case, verdict in verdicts(op, kernel, Rounding(kind), seed) if verdict.problem}
    assert {"plain", "wide", "heads", "offset"} <= failed
    assert not failed & {"no-gain", "heads-no-gain"}
    # Rounding where one may does not make a fault of not rounding there.
    spreads(op, by_hand(op, HONEST["rms_norm"][0]), Rounding(kind, normed=kind), seed)


def test_sums_in_float64_have_a_budget_of_their_own():
    rounding = Rounding("f64")
    for name in ("rms_norm", "layer_norm"):
        op = operation(name)
        assert any(verdict.problem for _, verdict in verdicts(op, by_canon(op, Backend("float32"), rounding), rounding, 3))
    spreads(operation("layer_norm"), by_hand(op, layer_norm_in_longdouble), rounding, secrets.randbelow(1 << 30))


def layer_norm_in_longdouble(x, weight, bias, *, eps):
    wide = x.astype(np.longdouble)
    centred = wide - wide.mean(-1, keepdims=True)
    return (centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + np.longdouble(eps)) * weight + bias).astype(
        x.dtype
    )


@pytest.mark.parametrize("to", ["bf16", "f16", "f32"])
def test_an_embedding_may_be_rounded_only_where_the_output_is_smaller(to):
    op, rounding = operation("embed"), Rounding("f32", output=to)
    form = FORMATS[to]
    kernel = by_hand(op, lambda tokens, weight: form.round(weight[tokens].astype(np.float64)))
    spreads(op, kernel, rounding, secrets.randbelow(1 << 30))
    coarse = by_hand(op, lambda tokens, weight: form._replace(bits=7).round(weight[tokens].astype(np.float64)))
    assert any(verdict.problem for _, verdict in verdicts(op, coarse, rounding, 5))


# -- the corpus -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NORMS)
def test_the_value_of_an_estimate_is_the_canons(name, kind):
    assert_values_true(operation(name), kind, secrets.randbelow(1 << 30))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "mistake"), mistakes_of(NORMS))
def test_every_mistake_is_caught(name, mistake, kind):
    assert_caught(operation(name), mistake, kind, secrets.randbelow(1 << 30))


@pytest.mark.parametrize("name", NORMS)
def test_a_suite_takes_seconds(name):
    op = operation(name)
    began = time.process_time()
    for case in op.cases:
        assert check(name, HONEST[name][0], case, "bf16").ok
    assert time.process_time() - began < 10.0


def test_the_explanation_names_the_mistake():
    gemma = check("rms_norm", lambda x, weight=None, *, eps, offset=0.0: HONEST["rms_norm"][0](x, weight, eps=eps), "offset")
    assert gemma.explanation == "offset of the gain left out"
    report = check(
        "layer_norm", lambda x, weight, bias, *, eps: HONEST["layer_norm"][0](x, weight, 0 * bias, eps=eps), "plain"
    )
    assert report.explanation == "bias left out"
