"""How many seeded faults the kit detects, and how many correct kernels it refuses.

A fault is detected in a format if the operation's corpus, with fresh seeds, fails on at least one case. A false alarm is a
case that a correct kernel fails. Correct kernels: the canon in float64 and in float32, rounded once; the backend "numpy";
for attention a tiled one with an online softmax, and PyTorch's own where torch is installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from bench.canon import about
from npllm.backend import Backend
from npllm.numpy_backend import NumpyBackend
from npllm.testing import Operation, Rounding, cases, check, operations
from npllm.testing.rounding import format_of
from npllm.testing.seeding import Kernel, faults, reference

FORMATS = ("f32", "bf16", "f16")

# Checks of a correct kernel in one format, at least.
CHECKS = 400


def run(only: str = "", seed: int = 0) -> dict[str, Any]:
    """All figures of one run, by operation; `only` names one."""
    chosen = [op for op in operations() if only in ("", op.name)]
    return {"schema": "npllm.bench.detection/1", **about(), "operations": {op.name: figures(op, seed) for op in chosen}}


def figures(op: Operation, seed: int) -> dict[str, Any]:
    """What is detected and what is refused, and how long the suite takes on a correct kernel."""
    began = time.perf_counter()
    suite(op, reference(op, to=format_of("bf16")), Rounding("bf16"), seed)
    seconds = time.perf_counter() - began
    found: dict[str, dict[str, str]] = {}
    for inputs in FORMATS:
        for fault in faults(op, format_of(inputs)):
            found.setdefault(fault.name, {})[inputs] = detected(op, fault.kernel, inputs, seed)
    honest = {name: alarms(op, make, seed) for name, make in correct(op).items()}
    return {"cases": len(cases(op.name)), "suite_s": round(seconds, 2), "faults": found, "correct": honest}


def detected(op: Operation, kernel: Kernel, inputs: str, seed: int) -> str:
    """The id of the first case that fails; "" if none does."""
    reports = (check(op, kernel, case, Rounding(inputs), seed=seed, explain=False) for case in cases(op.name))
    return next((report.case for report in reports if not report.ok), "")


def suite(op: Operation, kernel: Kernel, policy: Rounding, seed: int) -> list[str]:
    """The ids of the cases that fail."""
    return [case.id for case in cases(op.name) if not check(op, kernel, case, policy, seed=seed, explain=False).ok]


def alarms(op: Operation, make: Callable[[Rounding], Kernel], seed: int) -> dict[str, int]:
    """How many checks of a correct kernel were made, and how many failed, in all formats."""
    runs = failed = 0
    for inputs in FORMATS:
        policy = Rounding(inputs)
        kernel, corpus = make(policy), len(cases(op.name))
        for again in range(-(-CHECKS // corpus)):
            failed += len(suite(op, kernel, policy, seed + 1000 + again))
            runs += corpus
    return {"checks": runs, "alarms": failed}


def correct(op: Operation) -> dict[str, Callable[[Rounding], Kernel]]:
    """Correct kernels of an operation, each made for a policy."""
    found: dict[str, Callable[[Rounding], Kernel]] = {
        "canon in float64": lambda policy: reference(op, to=policy.format("output")),
        "canon in float32": lambda policy: reference(op, Backend("float32"), to=policy.format("output")),
    }
    if op.backends:
        found["backend numpy"] = lambda policy: reference(op, NumpyBackend("float32"), to=policy.format("output"))
    return found | dict(attentions() if op.name == "attention" else ())


def attentions() -> Iterator[tuple[str, Callable[[Rounding], Kernel]]]:
    """Further kernels of attention."""
    from functools import partial

    from npllm.testing.kernels import flash

    for block in (16, 64):
        yield f"tiled, {block} keys a tile", lambda policy, block=block: partial(flash, rounding=policy, block=block)


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    head = ["operation", "cases", "suite, s", "faults", *FORMATS, "correct kernels", "checks", "false alarms"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, each in figures["operations"].items():
        seen = (sum(bool(where[one]) for where in each["faults"].values()) for one in FORMATS)
        checks, alarms = (sum(kind[key] for kind in each["correct"].values()) for key in ("checks", "alarms"))
        cells = [name, each["cases"], each["suite_s"], len(each["faults"]), *seen, len(each["correct"]), checks, alarms]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
