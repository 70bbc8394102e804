"""`check`: one kernel, one case, one verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.errors import ArgumentError
from npllm.parallel import blas_threads
from npllm.testing.call import Form, KernelError, called
from npllm.testing.case import Case, find_case
from npllm.testing.estimate import Estimate
from npllm.testing.explain import explained
from npllm.testing.judge import Verdict, judge
from npllm.testing.operation import Arrays, Operation
from npllm.testing.operation import operation as find
from npllm.testing.report import Report
from npllm.testing.rounding import Rounding
from npllm.testing.wording import describe, reproduce, words_of

Kernel = Callable[..., Any]


def check(
    operation: str | Operation,
    kernel: Kernel,
    case: str | Case,
    policy: Rounding | str | None = None,
    *,
    framework: str | None = None,
    device: str | None = None,
    seed: int = 0,
    limit_s: float = 60.0,
    explain: bool = True,
) -> Report:
    """Run `kernel` on a case, at each of its scales, and judge what it returns; the worst counts.

    operation   a name of `operations()`: the names and axes of its arrays are what the kernel takes, by keyword or in order.
    policy      the declared rounding points, or only the inputs' format ("bf16"); None: float32 throughout.
    framework   numpy, torch, jax or cupy: what the kernel takes; None: what the file that it comes from imports.
    device      where its arrays shall lie ("cuda"); None: the framework's default.
    limit_s     seconds that one call may take. A kernel that hangs without letting go of the interpreter's lock is stopped
                by `npllm verify` only, which runs kernels in processes of their own.
    explain     look for the known mistake that explains a failure best: the canon runs once with each.

    What is wrong with the kernel is in the report; ArgumentError is for what is wrong with the other arguments.
    """
    op = find(operation)
    if not callable(kernel):
        raise ArgumentError(f"the kernel is of type {type(kernel).__name__}, which cannot be called")
    one, rounding = find_case(op.name, case), policy if isinstance(policy, Rounding) else Rounding(policy or "f32")
    began = time.perf_counter()
    worst = Finding(Report(op.name, one.id, str(rounding), scale=one.scales[0], seed=seed))
    for scale in one.scales:
        found = trial(op, kernel, one, rounding, replace(worst.report, scale=scale), framework, device, limit_s)
        worst = max(worst, found, key=lambda each: (not each.report.ok, each.report.excess))
        if found.verdict is None:
            worst = found
            break
    return replace(told(op, one, rounding, worst, explain), seconds=time.perf_counter() - began)


class Finding(NamedTuple):
    """What one scale showed: its report, and what a message needs; no verdict if the call itself failed."""

    report: Report
    output: str = ""
    verdict: Verdict | None = None
    estimate: Estimate | None = None
    inputs: Arrays | None = None
    results: Arrays | None = None

    @classmethod
    def of(cls, here: Report, verdicts: Mapping[str, tuple[Verdict, Estimate]], inputs: Arrays, results: Arrays) -> Finding:
        """What the verdicts on the outputs show; the worst counts."""
        worst = max(verdicts, key=lambda name: (bool(verdicts[name][0].problem), verdicts[name][0].excess))
        verdict, estimate = verdicts[worst]
        figures = {name: getattr(verdict, name) for name in ("problem", "error", "spread", "limit", "share")}
        return cls(replace(here, **figures), worst, verdict, estimate, inputs, results)


def trial(
    op: Operation, kernel: Kernel, case: Case, rounding: Rounding, here: Report, framework: str | None, device: str | None,
    limit_s: float,
) -> Finding:  # fmt: skip
    """The case at the scale and seed of the report `here`; the worst output counts."""
    inputs = case.inputs(here.seed, here.scale, rounding.format("inputs"))
    try:
        forms = forms_of(op, case, inputs, rounding)
        results = op.comparable(called(op, kernel, case, inputs, forms, framework, device, limit_s))
    except KernelError as failure:
        message = f"{failure}\n  {reproduce(case, rounding, here)}"
        return Finding(replace(here, problem=failure.problem, message=message))
    verdicts = verdicts_on(op, case, inputs, rounding, results)
    return Finding.of(here, verdicts, inputs, results)


def told(op: Operation, case: Case, rounding: Rounding, found: Finding, explain: bool) -> Report:
    """The report of a finding, with its message if the numbers are wrong."""
    report, output, verdict, estimate, inputs, results = found
    if report.ok or verdict is None or estimate is None or inputs is None or results is None:
        return report
    if explain and verdict.problem != "constant":
        name, part = explained(op, case, rounding, inputs, results, estimate, output)
        report = replace(report, explanation=name, explained=part)
    return replace(report, message=describe(op, case, rounding, output, report, verdict, results[output], estimate))


# What outputs look like, by operation, settings and the inputs' shapes: the canon need not run again to tell.
_SHAPES: dict[tuple[object, ...], dict[str, tuple[tuple[int, ...], bool]]] = {}


def forms_of(op: Operation, case: Case, inputs: Arrays, rounding: Rounding) -> dict[str, Form]:
    """The form of each output of a case."""
    shapes = tuple((name, x.shape) for name, x in inputs.items())
    key = (op.name, op.run, repr(sorted(case.settings.items())), shapes)
    if key not in _SHAPES:
        _SHAPES[key] = {name: (x.shape, x.dtype.kind in "iub") for name, x in truth(op, case, inputs).items()}
    output = rounding.format("output")
    return {
        name: Form(words_of(op.outputs[name], len(shape)), shape, None if whole else output)
        for name, (shape, whole) in _SHAPES[key].items()
    }


def verdicts_on(
    op: Operation, case: Case, inputs: Arrays, rounding: Rounding, results: Arrays
) -> dict[str, tuple[Verdict, Estimate]]:
    """The verdict on each output, and the estimate that it was judged by."""
    wide = widened(inputs)
    with np.errstate(all="ignore"), blas_threads(1):
        estimates = op.estimate(wide, case.settings, rounding, results)
        output = rounding.format("output")
        pairs = zip(results, results.values(), estimates, strict=True)
        return {name: (judge(got, estimate, output), estimate) for name, got, estimate in pairs}


def widened(inputs: Arrays) -> dict[str, Array]:
    """Real arrays as float64, others as they are."""
    return {name: x if x.dtype.kind in "iub" else x.astype(np.float64) for name, x in inputs.items()}


def truth(op: Operation, case: Case, inputs: Arrays, backend: Backend | None = None) -> dict[str, Array]:
    """The canon's float64 outputs for these inputs, or those of another backend."""
    be = backend or Backend("float64")
    with np.errstate(all="ignore"), blas_threads(1):
        outputs = op.run(be, inputs, case.settings)
    return op.comparable({name: np.asarray(be.to_numpy(x)) for name, x in zip(op.outputs, outputs, strict=True)})
