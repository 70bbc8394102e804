"""The kit's rotary embedding and its angles: budgets against correct kernels, and against every known mistake."""

import secrets
import time

import numpy as np
import pytest

from npllm.backend import Backend
from npllm.blocks.rope import Angles, Rope, frequencies
from npllm.numpy_backend import NumpyBackend
from npllm.testing.checking import check
from npllm.testing.operation import operation
from npllm.testing.rounding import FORMATS, Rounding
from tests.testing.test_norms import assert_caught, assert_values_true, by_canon, by_hand, mistakes_of, spreads, verdicts

NAMES = ("rope", "angles")
KINDS = ("f32", "bf16", "f16")
F = np.float32


def turned(x, cos, sin, interleaved):
    """In float32, rounded once."""
    wide, J = x.astype(F), cos.shape[-1]
    first, second = (slice(0, 2 * J, 2), slice(1, 2 * J, 2)) if interleaved else (slice(0, J), slice(J, 2 * J))
    a, b, cos, sin = wide[..., first], wide[..., second], cos[:, None], sin[:, None]
    out = wide.copy()
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out.astype(x.dtype)


def given_angles(x, cos, sin, *, interleaved=False):
    return turned(x, cos, sin, interleaved)


def own_phases(x, positions, inv_freq, *, interleaved=False):
    phase = positions.astype(F)[:, None] * inv_freq
    return turned(x, np.cos(phase), np.sin(phase), interleaved)


def own_frequencies(x, positions, theta, inv_freq, *, interleaved=False):
    """Powers by exponential and logarithm, in float32, as a kernel computes them on the fly."""
    J = len(inv_freq)
    inverse = np.exp(-(np.arange(J, dtype=F) / F(max(J, 1))) * np.log(theta))
    return own_phases(x, positions, inverse, interleaved=interleaved)


def complex_numbers(x, cos, sin, *, interleaved=False):
    """As complex products, which Meta's code takes; in complex128, hence without rounding of its own."""
    J = cos.shape[-1]
    order = np.arange(2 * J).reshape(J, 2) if interleaved else np.arange(2 * J).reshape(2, J).T
    pairs = x.astype(float)[..., order] @ [1.0, 1.0j] * (cos + 1j * sin.astype(float))[:, None]
    out = x.astype(float)
    out[..., order] = np.stack([pairs.real, pairs.imag], axis=-1)
    return out.astype(F).astype(x.dtype)


def angles_in(real):
    """cos and sin of phases in `real`; rounded by the caller."""

    def kernel(positions, **settings):
        inverse, factor = frequencies(Rope(**settings), real)
        phase = positions.astype(real)[:, None] * inverse
        return np.cos(phase) * real(factor), np.sin(phase) * real(factor)

    return kernel


def angles_by_exponential(positions, *, dim, theta, kind="default", **scaling):
    """Frequencies as `exp(-e log(theta))` in float32; scaled ones as they are for everybody."""
    inverse = np.exp(-(np.arange(0, dim, 2, dtype=F) / F(dim)) * np.log(F(theta)))
    if kind != "default":
        inverse = frequencies(Rope(dim, theta, kind, **scaling), "float32").inverse_J
    phase, factor = positions.astype(F)[:, None] * inverse, frequencies(Rope(dim, theta, kind, **scaling)).attention_factor
    return np.cos(phase) * F(factor), np.sin(phase) * F(factor)


def rounded_to(form, kernel):
    def called(case, inputs):
        return {name: form.round(x) for name, x in kernel(case, inputs).items()}

    return called


ROPES = (given_angles, own_phases, own_frequencies, complex_numbers)
ANGLES = (angles_in(np.float32), angles_in(np.float64), angles_by_exponential)


# -- correct kernels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_correct_kernels_pass(name, kind):
    op, rounding, seed = operation(name), Rounding(kind), secrets.randbelow(1 << 30)
    kernels = [by_hand(op, kernel) for kernel in (ROPES if name == "rope" else ANGLES)]
    if name == "angles":
        kernels = [rounded_to(FORMATS[kind], kernel) for kernel in kernels]
    kernels += [by_canon(op, be(dtype), rounding) for be in (Backend, NumpyBackend) for dtype in ("float32", "float64")]
    for kernel in kernels:
        spreads(op, kernel, rounding, seed)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_a_correct_kernel_of_16_bits_has_the_expected_error(kind):
    op = operation("rope")
    for kernel in ROPES:
        found = spreads(op, by_hand(op, kernel), Rounding(kind), secrets.randbelow(1 << 30))
        assert all(0.85 < found[name] < 1.15 for name in ("halves-d128", "interleaved-d128", "packed", "partial"))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_cosines_of_16_bits_must_be_declared(kind):
    op, seed = operation("rope"), secrets.randbelow(1 << 30)
    form = FORMATS[kind]

    def coarse(x, cos, sin, *, interleaved=False):
        return turned(x, *(form.round(each.astype(float)).astype(F) for each in (cos, sin)), interleaved)

    declared = spreads(op, by_hand(op, coarse), Rounding(kind, angles=kind), seed)
    assert 0.9 < declared["halves-d128"] < 1.15
    failed = {case.name for case, verdict in verdicts(op, by_hand(op, coarse), Rounding(kind), seed) if verdict.problem}
    assert {"halves-d128", "interleaved-d128", "packed"} <= failed


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_declared_cosines_do_not_excuse_phases_of_16_bits(kind):
    """The declaration is about what is multiplied; nobody may count positions in such a type."""
    form = FORMATS[kind]

    def coarse(x, positions, inv_freq, *, interleaved=False):
        phase = form.round(positions[:, None] * inv_freq.astype(float)).astype(F)
        return turned(x, np.cos(phase), np.sin(phase), interleaved)

    op = operation("rope")
    assert any(
        v.problem for _, v in verdicts(op, by_hand(op, coarse), Rounding(kind, angles=kind), secrets.randbelow(1 << 30))
    )


def test_float64_angles_are_judged_as_such():
    op, rounding = operation("angles"), Rounding("f64")
    spreads(op, by_hand(op, angles_in(np.float64)), rounding, 1)
    assert any(verdict.problem for _, verdict in verdicts(op, by_hand(op, angles_in(np.float32)), rounding, 1))


def test_a_rope_of_float64_may_have_been_given_float32_angles():
    op, rounding = operation("rope"), Rounding("f64")

    def kernel(x, cos, sin, *, interleaved=False):
        return Backend("float64").rope(x, Angles(cos.astype(float), sin.astype(float)), interleaved=interleaved)

    spreads(op, by_hand(op, kernel), rounding, secrets.randbelow(1 << 30))


# -- the corpus -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_value_of_an_estimate_is_the_canons(name, kind):
    assert_values_true(operation(name), kind, secrets.randbelow(1 << 30))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "mistake"), mistakes_of(NAMES))
def test_every_mistake_is_caught(name, mistake, kind):
    assert_caught(operation(name), mistake, kind, secrets.randbelow(1 << 30))


def test_a_suite_takes_seconds():
    began = time.process_time()
    for case in operation("rope").cases:
        assert check("rope", given_angles, case, "bf16").ok
    assert time.process_time() - began < 10.0


def test_the_explanation_names_the_mistake():
    report = check(
        "rope", lambda x, cos, sin, *, interleaved=False: turned(x, cos, sin, not interleaved), "halves-d128", "bf16"
    )
    assert report.explanation == "pairs in the other order"

    def coarse(x, positions, inv_freq, *, interleaved=False):
        rounded = FORMATS["bf16"].round(inv_freq.astype(float)).astype(F)
        return own_phases(x, positions, rounded, interleaved=interleaved)

    assert check("rope", coarse, "far", "f16").explanation == "frequencies in bf16"
    assert check(
        "angles", lambda positions, *, dim, theta: angles_in(F)(positions, dim=dim, theta=1e4), "decode"
    ).explanation == ("theta 10000 whatever the model says")
