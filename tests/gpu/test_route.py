"""Any router, with logits that no model should give: route.cu chooses what the canon chooses."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

if shutil.which("g++") is None:
    pytest.skip("g++ compiles the kernels for the CPU, and is not installed", allow_module_level=True)

from npllm.backend import Backend
from npllm.blocks.moe import Router
from npllm.handles import Weight
from npllm.weights import Gate, Linear
from tests.gpu.emulator import EmulatedBackend

STRANGE = (np.nan, np.inf, -np.inf, 0.0, -0.0)


@st.composite
def routers(draw: Any) -> tuple[int, Router]:
    """A number of experts and a rule for them; more may be asked for than the best groups have."""
    groups, size = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    experts = groups * size
    rule = Router(
        draw(st.integers(1, min(experts, 12))), draw(st.sampled_from(["softmax", "sigmoid"])),
        draw(st.sampled_from(["scores", "logits"])), groups, draw(st.integers(1, groups)),
        draw(st.sampled_from(["max", "pair"])), draw(st.booleans()), draw(st.sampled_from([0.0, 1e-20])),
        draw(st.sampled_from([1.0, 2.5])),
    )  # fmt: skip
    return experts, rule


@given(routers(), st.booleans(), st.integers(0, 2**31), st.sampled_from([0.0, 0.1]))
def test_any_router(of: tuple[int, Router], corrected: bool, seed: int, strange: float) -> None:
    (E, router), dice = of, np.random.default_rng(seed)
    # Steps of an eighth: many are equal, and scores of others differ by more than rounding.
    logits_ME = dice.integers(-24, 24, (5, E)).astype(np.float32) / 8.0
    at = dice.random((5, E)) < strange
    logits_ME[at] = dice.choice(np.array(STRANGE, np.float32), int(at.sum()))
    # The router's matrix is the identity, whose products 0 * inf are NaN: the logits come in as its bias.
    correction = Linear(Weight.of("correction", dice.integers(-8, 8, E).astype(np.float32) / 32.0)) if corrected else None
    results = []
    for be in (Backend("float32"), EmulatedBackend("float32")):
        gates = [Linear(Weight.of("w", np.zeros((E, 4), np.float32)), Weight.of("b", row)) for row in logits_ME]
        h_MD = be.asarray(np.ones((1, 4), np.float32))
        with np.errstate(all="ignore"):
            rows = [be.route(h_MD, be.prepare(Gate(gate, correction)), router) for gate in gates]
        results.append([np.concatenate([be.to_numpy(row[i]) for row in rows]) for i in range(2)])
    (index, weight), (got_index, got_weight) = results
    np.testing.assert_array_equal(got_index, index)
    np.testing.assert_allclose(got_weight, weight, rtol=2e-6, atol=1e-30)
