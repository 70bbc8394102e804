"""What the tests of linear and ffn share: the budget of a case against any way of computing it."""

import os
from collections.abc import Iterator

import numpy as np

from npllm.backend import Backend
from npllm.numpy_backend import NumpyBackend
from npllm.testing.case import Case
from npllm.testing.checking import truth, verdicts_on, widened
from npllm.testing.estimate import Estimate
from npllm.testing.judge import Verdict, judge
from npllm.testing.operation import Operation, operation
from npllm.testing.rounding import FORMATS, Rounding
from npllm.testing.seeding import Kernel, faults, reference

DTYPES = ("f32", "bf16", "f16")


def fresh() -> int:
    """A seed that no run has had."""
    return int.from_bytes(os.urandom(3), "big")


def trials(op: Operation, seed: int, dtype: str, tags: str = "") -> Iterator[tuple[Case, dict[str, np.ndarray]]]:
    for case in op.cases:
        for scale in case.scales if set(tags.split()) <= case.tags else ():
            yield case, case.inputs(seed, scale, FORMATS[dtype])


def verdicts(op: Operation, case: Case, inputs: dict, policy: Rounding, results: tuple) -> list[Verdict]:
    wide = {name: np.asarray(x).astype(np.float64) for name, x in zip(op.outputs, results, strict=True)}
    return [verdict for verdict, _ in verdicts_on(op, case, inputs, policy, wide).values()]


def assert_value_is_the_truth(name: str) -> None:
    op = operation(name)
    for dtype in DTYPES:
        for case, inputs in trials(op, fresh(), dtype):
            estimates = op.estimate(widened(inputs), case.settings, Rounding(dtype), None)
            for true, estimate in zip(truth(op, case, inputs).values(), estimates, strict=True):
                size = np.abs(estimate.value) + 1e-3 * np.max(np.abs(estimate.value), initial=0.0)
                assert true.shape == estimate.value.shape == estimate.variance.shape == estimate.bound.shape
                assert (np.abs(true - estimate.value) <= 1e-10 * size).all(), case


def assert_faults_show(name: str, dtype: str) -> None:
    """Each known mistake, and each accident that any kernel can have, fails on a case."""
    op, seed, policy = operation(name), fresh(), Rounding(dtype)
    corpus = [
        (case, inputs, op.estimate(widened(inputs), case.settings, policy, None)) for case, inputs in trials(op, seed, dtype)
    ]
    for fault in faults(op):
        seen = any(fails(case, inputs, estimates, policy, fault.kernel) for case, inputs, estimates in corpus)
        assert seen, f"{fault.name} passes in {dtype}, seed {seed}"


def fails(case: Case, inputs: dict, estimates: tuple[Estimate, ...], policy: Rounding, kernel: Kernel) -> bool:
    results = kernel(**inputs, **case.settings)
    results = results if isinstance(results, tuple) else (results,)
    pairs = zip(results, estimates, strict=True)
    return any(judge(x.astype(np.float64), estimate, policy.format("output")).problem for x, estimate in pairs)


def assert_half_inputs_show(name: str, dtype: str, tags: str = "") -> None:
    """A correct kernel whose inputs of `dtype` went through float16 fails on a case (of `tags`)."""
    op, seed, policy, kernel = operation(name), fresh(), Rounding(dtype), reference(operation(name))
    seen = False
    for case, inputs in trials(op, seed, dtype, tags):
        if seen:
            break
        with np.errstate(over="ignore"):
            halves = {
                key: x.astype(np.float16).astype(x.dtype) if x.dtype == FORMATS[dtype].dtype else x
                for key, x in inputs.items()
            }
        results = kernel(**halves, **case.settings)
        results = dict(zip(op.outputs, results if isinstance(results, tuple) else (results,), strict=True))
        wide = op.comparable({key: x.astype(np.float64) for key, x in results.items()})
        seen = any(verdict.problem for verdict, _ in verdicts_on(op, case, inputs, policy, wide).values())
    assert seen, f"inputs through float16 pass {name} {tags} in {dtype}, seed {seed}"


def assert_backends_pass(name: str, dtype: str) -> None:
    op, seed = operation(name), fresh()
    policy = Rounding(dtype, output="f32", hidden="f32")
    for kind in (Backend, NumpyBackend):
        for case, inputs in trials(op, seed, dtype):
            results = tuple(truth(op, case, inputs, kind("float32")).values())
            for verdict in verdicts(op, case, inputs, policy, results):
                assert not verdict.problem, (kind, case, seed, verdict[:5])


def spreads(op: Operation, policy: Rounding, kernel: Kernel, tags: str = "", rounds: int = 1) -> list[float]:
    """The spread of every output of a kernel that must pass each case (of `tags`), with fresh seeds."""
    found = []
    for _ in range(rounds):
        seed = fresh()
        for case, inputs in trials(op, seed, policy.inputs, tags):
            results = kernel(**inputs, **case.settings)
            results = results if isinstance(results, tuple) else (results,)
            for verdict in verdicts(op, case, inputs, policy, results):
                assert not verdict.problem, (case, seed, verdict[:5])
                found.append(verdict.spread)
    return found
