"""Any router, with logits that no model should give: route.cu chooses what the canon chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from npllm.backend import Backend
from npllm.blocks.moe import Router
from npllm.handles import Weight
from npllm.weights import Gate, Linear
from tests.gpu.emulator import EmulatedBackend, checked, emulated

pytestmark = [emulated, checked]

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


def asked(logits_ME: np.ndarray) -> list[tuple[np.ndarray, Linear]]:
    """Inputs and router's matrices that give these logits: of all tokens at once where products with 0 are 0; else they come
    in as biases, one by one."""
    M, E = logits_ME.shape
    if np.isfinite(logits_ME).all():
        return [(np.eye(M, dtype=np.float32), Linear(Weight.of("w", np.ascontiguousarray(logits_ME.T))))]
    zeros = Weight.of("w", np.zeros((E, 4), np.float32))
    return [(np.ones((1, 4), np.float32), Linear(zeros, Weight.of("b", row))) for row in logits_ME]


@given(routers(), st.booleans(), st.integers(0, 2**31), st.sampled_from([0.0, 0.1]))
def test_any_router(of: tuple[int, Router], corrected: bool, seed: int, strange: float) -> None:
    (E, router), dice = of, np.random.default_rng(seed)
    # Steps of an eighth: many are equal, and scores of others differ by more than rounding.
    logits_ME = dice.integers(-24, 24, (5, E)).astype(np.float32) / 8.0
    at = dice.random((5, E)) < strange
    logits_ME[at] = dice.choice(np.array(STRANGE, np.float32), int(at.sum()))
    correction = Linear(Weight.of("correction", dice.integers(-8, 8, E).astype(np.float32) / 32.0)) if corrected else None
    results = []
    for be in (Backend("float32"), EmulatedBackend("float32")):
        with np.errstate(all="ignore"):
            rows = [
                be.route(be.asarray(h_MD), be.prepare(Gate(gate, correction)), router) for h_MD, gate in asked(logits_ME)
            ]
        results.append([np.concatenate([be.to_numpy(row[i]) for row in rows]) for i in range(2)])
    (index, weight), (got_index, got_weight) = results
    np.testing.assert_array_equal(got_index, index)
    np.testing.assert_allclose(got_weight, weight, rtol=2e-6, atol=1e-30)
