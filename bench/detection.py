"""How many seeded faults the kit detects, and how many correct kernels it refuses.

A fault is detected in a format if the operation's corpus, with fresh seeds, fails on at least one case. A false alarm is a
case that a correct kernel fails. Correct kernels: the canon in float64 and in float32, rounded once; the backend "numpy";
for attention a tiled one with an online softmax, and PyTorch's own where torch is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import secrets
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from bench.canon import about
from bench.sdpa import WITHOUT, sdpa
from npllm.backend import Backend
from npllm.numpy_backend import NumpyBackend
from npllm.testing import Operation, Rounding, cases, check, operations
from npllm.testing.kernels import flash
from npllm.testing.rounding import format_of
from npllm.testing.seeding import Kernel, faults, reference

FORMATS = ("f32", "bf16", "f16")

# Checks of a correct kernel in one format, at least.
CHECKS = 400


class Correct(NamedTuple):
    """A correct kernel: made for a policy, on the cases that have none of the tags `without`."""

    make: Callable[[Rounding], Kernel]
    without: str = ""


def run(only: str = "", seed: int | None = None) -> dict[str, Any]:
    """All figures of one run, by operation; `only` names one. Without a seed: one that nobody has seen."""
    seed = secrets.randbelow(1 << 31) if seed is None else seed
    chosen = [op for op in operations() if only in ("", op.name)]
    found = {op.name: figures(op, seed) for op in chosen}
    return {"schema": "npllm.bench.detection/1", **about(), "seed": seed, "operations": found}


def figures(op: Operation, seed: int) -> dict[str, Any]:
    """What is detected and what is refused, and how long the suite takes on a correct kernel."""
    began = time.perf_counter()
    suite(op, reference(op, to=format_of("bf16")), Rounding("bf16"), seed)
    seconds = time.perf_counter() - began
    found: dict[str, dict[str, str]] = {}
    for inputs in FORMATS:
        for fault in faults(op, format_of(inputs)):
            found.setdefault(fault.name, {})[inputs] = detected(op, fault.kernel, inputs, seed)
    honest = {name: alarms(op, each, seed) for name, each in correct(op).items()}
    return {"cases": len(cases(op.name)), "suite_s": round(seconds, 2), "faults": found, "correct": honest}


def detected(op: Operation, kernel: Kernel, inputs: str, seed: int) -> str:
    """The id of the first case that fails; "" if none does."""
    reports = (check(op, kernel, case, Rounding(inputs), seed=seed, explain=False) for case in cases(op.name))
    return next((report.case for report in reports if not report.ok), "")


def suite(op: Operation, kernel: Kernel, policy: Rounding, seed: int, without: str = "") -> list[bool]:
    """Whether each case of the corpus passes."""
    corpus = cases(op.name, without=without)
    return [check(op, kernel, case, policy, seed=seed, explain=False).ok for case in corpus]


def alarms(op: Operation, each: Correct, seed: int) -> dict[str, int]:
    """How many checks of a correct kernel were made, and how many failed, in all formats."""
    passed: list[bool] = []
    for inputs in FORMATS:
        policy, before = Rounding(inputs), len(passed)
        while len(passed) < before + CHECKS:
            seed += 1
            passed += suite(op, each.make(policy), policy, seed, each.without)
    return {"checks": len(passed), "alarms": passed.count(False)}


def correct(op: Operation) -> dict[str, Correct]:
    """Correct kernels of an operation."""

    def canon(backend: Backend) -> Correct:
        return Correct(lambda policy: reference(op, backend, to=policy.format("output")))

    found = {"canon in float64": canon(Backend("float64")), "canon in float32": canon(Backend("float32"))}
    if op.backends:
        found["backend numpy"] = canon(NumpyBackend("float32"))
    return found | attentions() if op.name == "attention" else found


def attentions() -> dict[str, Correct]:
    """Further kernels of attention."""

    def tiled(block: int) -> Correct:
        return Correct(lambda policy: functools.partial(flash, rounding=policy, block=block))

    found = {f"tiled, {block} keys at a time": tiled(block) for block in (16, 64)}
    if importlib.util.find_spec("torch"):
        found["PyTorch"] = Correct(lambda policy: sdpa, WITHOUT)
    return found


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
