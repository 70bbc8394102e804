"""Conformance of the backend "numba" in a process of its own: on a given path of CPU features, with guards or without."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from npllm.backend import Backend
from npllm.testing.conformance import MODEL, Conformity, Maker, conformity, policy, trials
from npllm.testing.isolate import Trial, reports
from npllm.testing.operation import operation
from npllm.testing.report import Report, Suite


@dataclass(frozen=True)
class OnPath:
    """For npllm.testing.isolate: trials of the backend.

    path    of CPU features, as NPLLM_CPU_FEATURES names them.
    guard   a side of tests.numba.guards, or "".
    threads as of the backend.
    """

    path: str
    guard: str = ""
    threads: int | None = None
    limit_s: float = 120.0

    def __str__(self) -> str:
        return f"backend 'numba' on {self.path}" + f", guarded {self.guard}" * bool(self.guard)

    def load(self) -> Callable[[Trial], Report]:
        os.environ["NPLLM_CPU_FEATURES"] = self.path
        from npllm.backends.numba_cpu.backend import NumbaBackend
        from tests.numba import guards

        if self.guard:
            guards.install(self.guard)

        def check(trial: Trial) -> Report:
            made = functools.partial(NumbaBackend, threads=self.threads)
            report = conformity(made, declared(made(trial.dtype), trial), self.limit_s)
            if guards.overwritten():
                return replace(report, problem="crashed", message="wrote behind the end of an array")
            return report

        return check


def declared(be: Backend, trial: Trial) -> Trial:
    """The trial with the rounding points that the backend has here, and not where the trial was made."""
    drawn = {} if trial.operation == MODEL else {case.id: case for case in operation(trial.operation).cases}
    return trial._replace(rounding=policy(be, trial.rounding.inputs, trial.operation, drawn.get(trial.case)))


def conformance_on(
    path: str, dtype: str, storages: Iterable[str], ops: Iterable[str] | None = None, *, guard: str = "", seed: int = 0,
    every: int = 1, threads: int | None = None,
) -> Suite:  # fmt: skip
    """The kit's suite on a path, in children of this process; only one trial of `every` so many."""
    from npllm.backends.numba_cpu.backend import NumbaBackend

    made: Maker = NumbaBackend
    found = trials(made, ops, storages=storages, dtypes=[dtype], seed=seed)[::every]
    return Suite(tuple(reports(OnPath(path, guard, threads), found)))


def declined(suite: Suite) -> set[str]:
    """What was left to the canon: "operation: why"."""
    return {what for report in suite.reports if isinstance(report, Conformity) for what in report.declined}
