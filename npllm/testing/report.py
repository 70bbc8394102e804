"""What a check found, for a person and for a machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any
from xml.etree import ElementTree

import numpy as np

import npllm
from npllm.errors import NpllmError

# The schema of JSON reports; the number changes when a field goes or changes its meaning.
SCHEMA = "npllm.verify/1"


class CheckError(NpllmError, AssertionError):
    """A kernel is not what its operation asks; the text is the report."""


@dataclass(frozen=True)
class Report:
    """The outcome of one case.

    problem      "" for a pass, else one of PROBLEMS.
    message      what happened, where and how far, in a few lines.
    error        root mean square of the error in output roundings of the truth; `spread` and `limit`, `share`: see `judge`.
    scale, seed  with which the worst inputs were drawn.
    explanation  the known mistake that explains the error best ("" if none does), and `explained`, how much of it (0 to 1).
    """

    operation: str
    case: str
    rounding: str
    problem: str = ""
    message: str = ""
    error: float = 0.0
    spread: float = 0.0
    limit: float = 0.0
    share: float = 0.0
    scale: float = 1.0
    seed: int = 0
    explanation: str = ""
    explained: float = 0.0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problem

    def raise_on_failure(self) -> None:
        """CheckError, an AssertionError whose text is this report, unless the case passed."""
        __tracebackhide__ = True
        if not self.ok:
            raise CheckError(str(self))

    @property
    def excess(self) -> float:
        """How far the worst came to its limits: 1 is the limit."""
        return max(self.share, self.spread / self.limit if self.limit else 0.0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite as text, since JSON has none."""
        return {"ok": self.ok} | {name: _finite(value) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        return f"PASS {self.case}" if self.ok else f"FAIL {self.case}: {self.message}"


# What can be wrong. The first eight are told before any number is looked at.
PROBLEMS = {
    "signature": "the callable cannot be called with the operation's arguments",
    "raised": "it raised an exception",
    "hangs": "it did not return within the time limit",
    "crashed": "its process ended",
    "returned": "it returned something other than the operation's arrays",
    "shape": "an output has another shape",
    "dtype": "an output has another type",
    "view": "an output shares memory with an input",
    "modified": "an input was changed",
    "non-finite": "NaN or infinity where the truth is finite, or the other way round",
    "constant": "every element is the same",
    "bound": "an element is further from the truth than any correct kernel's",
    "spread": "errors are larger than rounding explains",
}


@dataclass(frozen=True)
class Suite:
    """The reports of many cases, as text, JSON and JUnit XML.

    properties  what they were made with, each a name and a text: `surroundings` has the versions; device, policy and seed.
    """

    reports: tuple[Report, ...]
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[Report, ...]:
        return tuple(report for report in self.reports if not report.ok)

    @property
    def ok(self) -> bool:
        """Whether every case passed; a suite without cases proves nothing, and did not."""
        return bool(self.reports) and not self.failures

    @property
    def seconds(self) -> float:
        return sum(report.seconds for report in self.reports)

    def raise_on_failure(self) -> None:
        """CheckError, an AssertionError whose text is this suite's, unless every case passed."""
        __tracebackhide__ = True
        if not self.ok:
            raise CheckError(str(self))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite as text, since JSON has none."""
        counts = {"cases": len(self.reports), "failed": len(self.failures), "seconds": round(self.seconds, 3)}
        reports = [report.as_dict() for report in self.reports]
        return {"schema": SCHEMA, "ok": self.ok} | counts | {"properties": dict(self.properties), "reports": reports}

    def json(self) -> str:
        return json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"

    def junit(self) -> str:
        """JUnit XML: a test suite for each operation, a test case for each case."""
        root = ElementTree.Element("testsuites", _counts(self.reports) | {"name": "npllm verify"})
        for operation, reports in self.by_operation().items():
            suite = ElementTree.SubElement(root, "testsuite", _counts(reports) | {"name": operation})
            properties = ElementTree.SubElement(suite, "properties")
            for name, value in self.properties.items():
                ElementTree.SubElement(properties, "property", {"name": name, "value": _xml(value)})
            for report in reports:
                _junit_case(suite, report)
        ElementTree.indent(root, " ")
        return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"

    def by_operation(self) -> dict[str, list[Report]]:
        found: dict[str, list[Report]] = {}
        for report in self.reports:
            found.setdefault(report.operation, []).append(report)
        return found

    def table(self) -> str:
        """A line for each operation: cases, failures, and how near the worst passing case came to its limits."""
        rows = [["operation", "cases", "failed", "nearest to a limit", "seconds"]]
        for operation, reports in self.by_operation().items():
            failed = sum(not report.ok for report in reports)
            near = max((report.excess for report in reports if report.ok), default=0.0)
            seconds = sum(report.seconds for report in reports)
            rows.append([operation, f"{len(reports)}", f"{failed}", f"{100.0 * near:.0f} %", f"{seconds:.1f}"])
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join(_aligned(row, widths) for row in rows)

    def __str__(self) -> str:
        """The failures in full, then the table."""
        verdict = "no case was run" if not self.reports else f"{len(self.failures)} of {len(self.reports)} cases failed"
        return "\n\n".join([*map(str, self.failures), self.table(), verdict])


def surroundings(framework: str = "numpy", **others: str) -> dict[str, str]:
    """Properties of a suite: versions of npllm, Python, NumPy and the framework, the machine's type, and `others`."""
    versions = {"npllm": npllm.__version__, "python": platform.python_version(), "numpy": np.__version__}
    if framework != "numpy":
        versions[framework] = str(getattr(import_module(framework), "__version__", "unknown"))
    return versions | {"machine": f"{platform.system()} {platform.machine()}", "framework": framework} | others


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _counts(reports: Iterable[Report]) -> dict[str, str]:
    reports = list(reports)
    failed, seconds = sum(not report.ok for report in reports), sum(report.seconds for report in reports)
    return {"tests": str(len(reports)), "failures": str(failed), "errors": "0", "time": f"{seconds:.3f}"}


def _junit_case(suite: ElementTree.Element, report: Report) -> None:
    named = {"classname": f"npllm.{report.operation}", "name": f"{report.case} [{report.rounding}]"}
    case = ElementTree.SubElement(suite, "testcase", named | {"time": f"{report.seconds:.3f}"})
    if not report.ok:
        told = {"type": report.problem, "message": _xml(report.message.splitlines()[0])}
        ElementTree.SubElement(case, "failure", told).text = _xml(str(report))


def _xml(text: str) -> str:
    """Without the characters that XML has no way to write."""
    return "".join(c if c in "\t\n" or (c >= " " and not "\ud800" <= c <= "\udfff" and c < "\ufffe") else "?" for c in text)


def _aligned(row: list[str], widths: list[int]) -> str:
    figures = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *figures])
