"""Operation `linear`: its budget holds for every honest way to compute it, and for no wrong one."""

import time

import ml_dtypes
import numpy as np
import pytest

from npllm.testing.case import cases
from npllm.testing.operation import operation
from npllm.testing.ops.quantised import packed
from npllm.testing.rounding import FORMATS, Rounding
from tests.testing.products import (
    DTYPES,
    assert_backends_pass,
    assert_faults_show,
    assert_half_inputs_show,
    assert_value_is_the_truth,
    spreads,
    trials,
)

LINEAR = operation("linear")


def numbers(weight, scales, storage, group=32, block=(128, 128)):
    """The weight in float32, by loops over bytes and blocks that owe nothing to the kit."""
    if storage is None:
        return weight.astype(np.float32)
    if storage == "fp8":
        out = weight.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                out[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] *= scales[i, j]
        return out
    if storage == "q4":
        wide = np.empty((len(weight), 2 * weight.shape[1]), np.float32)
        wide[:, 0::2], wide[:, 1::2] = weight & 15, weight >> 4
        wide -= 8
    else:
        wide = weight.astype(np.float32)
    for g in range(scales.shape[1]):
        wide[:, g * group : (g + 1) * group] *= scales[:, g : g + 1].astype(np.float32)
    return wide


def added(y, x, bias, residual):
    """The output in the type of x, after bias and residual in float32."""
    for each in (bias, residual):
        if each is not None:
            y = y + each.astype(np.float32)
    return y.astype(x.dtype)


def matmul(x, weight, scales=None, bias=None, residual=None, *, storage=None, group=32, block=(128, 128)):
    return added(x.astype(np.float32) @ numbers(weight, scales, storage, group, block).T, x, bias, residual)


def rounded_before(x, weight, bias=None, residual=None):
    """Each of bias and residual is added by a kernel of its own, in the type of x."""
    y = (x.astype(np.float32) @ weight.astype(np.float32).T).astype(x.dtype)
    for each in (bias, residual):
        if each is not None:
            y = y + each
    return y


def split(x, weight, scales=None, bias=None, residual=None, *, storage=None, group=32, block=(128, 128)):
    """Partial sums of 48 columns each, added at the end."""
    w, f = numbers(weight, scales, storage, group, block), x.astype(np.float32)
    parts = [f[:, k : k + 48] @ w[:, k : k + 48].T for k in range(0, w.shape[1], 48)]
    return added(sum(parts, np.float32(0)), x, bias, residual)


def loop(x, weight, scales=None, bias=None, residual=None, *, storage=None, group=32, block=(128, 128)):
    """A column at a time, the sum beginning with the bias and the residual."""
    w, f = numbers(weight, scales, storage, group, block), x.astype(np.float32)
    total = np.zeros((len(f), len(w)), np.float32)
    for each in (bias, residual):
        if each is not None:
            total = total + each.astype(np.float32)
    for k in range(w.shape[1]):
        total += f[:, k : k + 1] * w[:, k]
    return total.astype(x.dtype)


def scaled_sums(x, weight, scales=None, bias=None, residual=None, *, storage=None, group=32, block=(128, 128)):
    """Products of the codes, and the factor of each block on its sum: nothing is dequantised."""
    F, f = len(weight), x.astype(np.float32)
    columns = group if storage != "fp8" else block[1]
    codes = numbers(weight, np.ones((1, 1), np.float32), storage, 1 << 30, (1 << 30, 1 << 30))
    factors = np.repeat(scales, block[0], axis=0)[:F] if storage == "fp8" else scales
    total = np.zeros((len(f), F), np.float32)
    for b in range(scales.shape[1]):
        part = slice(b * columns, (b + 1) * columns)
        total += (f[:, part] @ codes[:, part].T) * factors[:, b].astype(np.float32)
    return added(total, x, bias, residual)


def through_bf16(x, weight, scales=None, bias=None, residual=None, *, storage=None, group=32, block=(128, 128)):
    """A quantised weight in bf16, as tensor cores ask."""
    w = numbers(weight, scales, storage, group, block).astype(ml_dtypes.bfloat16)
    return added(x.astype(np.float32) @ w.astype(np.float32).T, x, bias, residual)


def dynamic(how):
    """W8A8: x is quantised by groups, on the fly."""
    size, most = {"int8": (32, 127), "fp8": (128, 448)}[how]

    def kernel(x, weight, scales=None, bias=None, residual=None, *, storage=None, group=32, block=(128, 128)):
        f = x.astype(np.float32)
        for k in range(0, f.shape[1], size):
            part = f[:, k : k + size]
            scale = np.max(np.abs(part), axis=1, keepdims=True, initial=0) / np.float32(most)
            scale[scale == 0] = 1
            codes = part / scale
            codes = np.rint(codes) if how == "int8" else codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
            f[:, k : k + size] = codes * scale
        return added(f @ numbers(weight, scales, storage, group, block).T, x, bias, residual)

    return kernel


def test_estimated_value_is_the_truth():
    assert_value_is_the_truth("linear")


@pytest.mark.parametrize("kernel", [matmul, split, loop])
@pytest.mark.parametrize("dtype", DTYPES)
def test_honest_kernels_pass(kernel, dtype):
    found = spreads(LINEAR, Rounding(dtype), kernel)
    assert np.median(found) < 1.1
    assert dtype == "f32" or np.median(found) > 0.85, "the budget is too wide"


@pytest.mark.parametrize("storage", ["fp8", "q8", "q4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_that_scale_sums_pass(storage, dtype):
    spreads(LINEAR, Rounding(dtype), scaled_sums, storage)


def test_a_declared_bf16_weight_passes_and_an_undeclared_one_does_not():
    for storage in ("fp8", "q8", "q4"):
        spreads(LINEAR, Rounding("bf16", weights="bf16"), through_bf16, storage)
        with pytest.raises(AssertionError):
            spreads(LINEAR, Rounding("bf16"), through_bf16, storage)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_product_rounded_before_the_residual_passes_where_that_is_declared_and_not_otherwise(dtype):
    for tags in ("basic", "residual", "bias prefill odd residual"):
        spreads(LINEAR, Rounding(dtype, partial=dtype), rounded_before, tags, rounds=5)
    for _ in range(5):
        with pytest.raises(AssertionError):
            spreads(LINEAR, Rounding(dtype), rounded_before, "residual cancelling")


@pytest.mark.parametrize("tags", ["", "fp8"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_inputs_through_float16_show(dtype, tags):
    assert_half_inputs_show("linear", dtype, tags)


@pytest.mark.parametrize("how", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_declared_dynamic_quantisation_passes(how, dtype):
    found = spreads(LINEAR, Rounding(dtype, activations=how), dynamic(how), "prefill", rounds=3)
    assert np.median(found) > 0.6, "the budget is far too wide"
    with pytest.raises(AssertionError):
        spreads(LINEAR, Rounding(dtype), dynamic(how), "prefill")


@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_pass(dtype):
    assert_backends_pass("linear", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_faults_show(dtype):
    assert_faults_show("linear", dtype)


def test_nibbles_and_numbers_agree_with_the_truth():
    codes = np.arange(64, dtype=np.uint8).reshape(2, 32) % 16
    scales = np.array([[1.0], [0.5]], np.float16)
    assert (numbers(packed(codes), scales, "q4") == (codes - 8.0) * scales).all()


def test_corpus_has_what_its_tags_say():
    assert len(cases("linear", "fp8")) >= 6
    edge = next(each for each in cases("linear", "edge") if "fp8" in each.tags)
    codes = edge.inputs(0, 1.0, FORMATS["f32"])["weight"]
    assert {0x00, 0x80, 0x01, 0x7E, 0xFE} <= set(codes.flat)
    assert not np.isin(codes, (0x7F, 0xFF)).any()
    halves = next(each for each in cases("linear", "edge") if "q4" in each.tags).inputs(0, 1.0, FORMATS["f32"])
    assert set((halves["weight"] & 15).flat) == {0, 15}
    assert (halves["scales"] == 0).any()


def test_the_suite_is_quick():
    began = time.process_time()
    spreads(LINEAR, Rounding("bf16"), matmul)
    assert time.process_time() - began < 5.0
    assert sum(1 for _ in trials(LINEAR, 0, "bf16")) >= 30
