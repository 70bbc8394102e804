"""`audit`: does a test notice a wrong kernel?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from npllm.errors import ArgumentError
from npllm.testing.operation import Operation
from npllm.testing.operation import operation as find
from npllm.testing.seeding import Kernel, faults, reference

# A test: it takes a kernel, and raises or returns False when it finds it wrong.
Test = Callable[[Kernel], Any]


@dataclass(frozen=True)
class Audit:
    """Which seeded faults a test noticed, by name, and whether it passes the same kernel without a fault."""

    operation: str
    accepts_correct: bool
    complaint: str
    noticed: dict[str, bool]

    @property
    def rate(self) -> float:
        """The part of the faults that was noticed; 0 for a test that refuses a correct kernel: it tells nothing apart."""
        return sum(self.noticed.values()) / len(self.noticed) if self.accepts_correct else 0.0

    def __str__(self) -> str:
        lines = [f"{'noticed' if seen else 'MISSED ':7}  {name}" for name, seen in self.noticed.items()]
        if not self.accepts_correct:
            lines.append(f"REFUSED  a correct kernel ({self.complaint}): the test says nothing about faults")
        count = f"{sum(self.noticed.values())} of {len(self.noticed)} faults noticed"
        return "\n".join([*lines, f"{self.operation}: {count}, detection rate {self.rate:.0%}"])


def audit(test: Test, operation: str | Operation, *, show: Callable[[str], Any] | None = print) -> Audit:
    """Run `test` on a correct kernel of `operation` and on that kernel with each known fault; -> what it noticed.

    The kernel takes the operation's arrays and settings as any kernel that `check` takes, from NumPy, torch, JAX or CuPy,
    and returns arrays of the same library, of the type and device of its first real input. `test(kernel)` shall raise, or
    return False, when the kernel is wrong. The outcome is printed (`show=None`: it is not).
    """
    if not callable(test):
        raise ArgumentError(f"audit takes a test, a function of a kernel, not {type(test).__name__}")
    op = find(operation)
    complaint = objection(test, reference(op))
    noticed = {fault.name: bool(objection(test, fault.kernel)) for fault in faults(op)}
    found = Audit(op.name, not complaint, complaint, noticed)
    if show is not None:
        show(str(found))
    return found


def objection(test: Test, kernel: Kernel) -> str:
    """What the test says against the kernel; "" if nothing."""
    try:
        return "it returned False" if test(kernel) is False else ""
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__
