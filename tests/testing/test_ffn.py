"""project_heads, gated_ffn and mlp: budgets that honest kernels keep and wrong ones do not."""

import math
import time

import numpy as np
import pytest

from npllm.testing.estimate import Estimate, applied
from npllm.testing.operation import operation
from npllm.testing.rounding import FORMATS, Rounding
from tests.testing.products import (
    DTYPES,
    assert_backends_pass,
    assert_faults_show,
    assert_half_inputs_show,
    assert_value_is_the_truth,
    spreads,
)

OPERATIONS = ("project_heads", "gated_ffn", "mlp")

erf = np.vectorize(math.erf, otypes=[np.float32])


def silu(x):
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def gelu(x):
    """As PyTorch writes it: 1 + erf cancels in the tail."""
    return np.float32(0.5) * x * (1 + erf(x * np.float32(math.sqrt(0.5))))


def gelu_of_polynomial(x):
    """erf within 1.5e-7, as float32 libraries have it (Abramowitz and Stegun 7.1.26), and always off to the same side."""
    z = np.abs(x) * np.float32(math.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * z)
    series = np.zeros_like(t)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(factor)) * t
    return np.float32(0.5) * x * (1 + np.copysign(1 - series * np.exp(-z * z), x))


def silu_of_tanh(x):
    return np.float32(0.5) * x * (1 + np.tanh(np.float32(0.5) * x))


def gelu_tanh(x):
    return np.float32(0.5) * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)))


def relu(x):
    return np.maximum(x, np.float32(0))


ACTS = {"silu": silu, "gelu": gelu, "gelu_new": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh, "relu": relu}


OTHER_ACTS = ACTS | {"silu": silu_of_tanh, "gelu": gelu_of_polynomial}


def f32(x):
    return x.astype(np.float32)


def same(x, dtype):
    """What a kernel that keeps float32 does at a rounding point."""
    return x


def through(x, dtype):
    return x.astype(dtype).astype(np.float32)


def normed(x, norm, eps):
    if norm is None:
        return f32(x)
    wide = f32(x)
    return through(wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(eps)) * f32(norm), x.dtype)


def product(x, w, start=None):
    return x @ f32(w).T if start is None else x @ f32(w).T + f32(start)


def looped(x, w, start=None):
    """A column at a time, from what is to be added."""
    total = np.zeros((len(x), len(w)), np.float32) if start is None else np.zeros((len(x), len(w)), np.float32) + f32(start)
    for k in range(w.shape[1]):
        total += x[:, k : k + 1] * f32(w[:, k])
    return total


def product_then_sum(x, w, start=None):
    """The product in the type that the addend has, then the sum in that type."""
    return product(x, w) if start is None else f32(product(x, w).astype(start.dtype) + start)


def project_heads(multiply, at):
    def kernel(x, q, k, v, q_bias=None, k_bias=None, v_bias=None, norm=None, *, head_dim, eps=0.0):
        h = normed(x, norm, eps)
        flat = (multiply(h, w, b).astype(x.dtype) for w, b in ((q, q_bias), (k, k_bias), (v, v_bias)))
        return tuple(y.reshape(len(x), y.shape[1] // head_dim, head_dim) for y in flat)

    return kernel


def gated_ffn(multiply, at, acts=ACTS):
    def kernel(x, gate, up, down, residual=None, norm=None, *, act, eps=0.0):
        h = normed(x, norm, eps)
        active = at(acts[act](at(multiply(h, gate), x.dtype)), x.dtype)
        hidden = through(active * at(multiply(h, up), x.dtype), x.dtype)
        return multiply(hidden, down, residual).astype(x.dtype)

    return kernel


def mlp(multiply, at, acts=ACTS):
    def kernel(x, up, up_bias, down, down_bias, *, act):
        hidden = through(acts[act](at(multiply(f32(x), up, up_bias), x.dtype)), x.dtype)
        return multiply(hidden, down, down_bias).astype(x.dtype)

    return kernel


KERNELS = {"project_heads": project_heads, "gated_ffn": gated_ffn, "mlp": mlp}


@pytest.mark.parametrize("name", OPERATIONS)
def test_estimated_value_is_the_truth(name):
    assert_value_is_the_truth(name)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiply", [product, looped])
def test_fused_kernels_pass(name, dtype, multiply):
    found = spreads(operation(name), Rounding(dtype), KERNELS[name](multiply, same))
    assert np.median(found) < 1.1
    assert dtype == "f32" or np.median(found) > 0.85, "the budget is too wide"


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_separate_kernels_pass_where_that_is_declared(name, dtype):
    spreads(operation(name), Rounding(dtype, features=dtype), KERNELS[name](product, through))


@pytest.mark.parametrize("name", ["gated_ffn", "mlp"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_by_other_formulas_pass(name, dtype):
    spreads(operation(name), Rounding(dtype), KERNELS[name](product, same, OTHER_ACTS))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_products_rounded_before_what_is_added_pass_where_that_is_declared(name, dtype):
    spreads(operation(name), Rounding(dtype, features=dtype, partial=dtype), KERNELS[name](product_then_sum, same))


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_products_rounded_before_the_residual_fail_where_it_is_not(dtype):
    for _ in range(5):
        with pytest.raises(AssertionError):
            spreads(operation("gated_ffn"), Rounding(dtype), gated_ffn(product_then_sum, same), "residual cancelling")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_inputs_through_float16_show(dtype):
    assert_half_inputs_show("gated_ffn", dtype)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_separate_kernels_fail_where_it_is_not(dtype):
    with pytest.raises(AssertionError):
        spreads(operation("gated_ffn"), Rounding(dtype), gated_ffn(product, through))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_pass(name, dtype):
    assert_backends_pass(name, dtype)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_faults_show(name, dtype):
    assert_faults_show(name, dtype)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_suite_is_quick(name):
    began = time.process_time()
    spreads(operation(name), Rounding("bf16"), KERNELS[name](product, same))
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("deviation", [1e-6, 1e-3, 0.1])
def test_the_budget_of_an_activation_is_what_its_argument_brings(act, deviation):
    """Against drawn errors of the argument: in the tails, at the bends, where the slope is 0."""
    from npllm import blocks

    dice = np.random.default_rng(3)
    x = np.concatenate([np.linspace(-6.0, 6.0, 97), [0.0, -0.7518, -1.2785]])
    errors = deviation * dice.uniform(-np.sqrt(3.0), np.sqrt(3.0), (4000, len(x)))
    function = lambda value: blocks.ACTIVATIONS[act](np, value)  # noqa: E731
    bound = np.full_like(x, np.sqrt(3.0) * deviation)
    estimate = applied(function, Estimate(x, np.full_like(x, deviation**2), bound), FORMATS["f64"])
    drawn = function(x + errors) - function(x)
    assert (np.max(np.abs(drawn), axis=0) <= estimate.bound).all()
    measured = np.sqrt(np.mean(drawn**2, axis=0))
    # Where relu bends within the interval, three points hit the mean over neighbours, not each.
    assert np.sum(measured**2) == pytest.approx(np.sum(estimate.variance), rel=0.02)
    if act != "relu":
        assert (measured <= 1.1 * np.sqrt(estimate.variance)).all()
        assert (np.sqrt(estimate.variance) <= 1.1 * measured + 1e-12).all()
