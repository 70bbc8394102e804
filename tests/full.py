"""What `pytest -m full` leaves behind: a summary of what was checked, by path, arithmetic and operation."""

import json
import platform
from datetime import date
from pathlib import Path

import pytest

# The property of a test that says what it has checked.
CHECKED = "npllm_checked"

RESULTS = Path(__file__).parent.parent / "bench" / "results"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write bench/results/full-DATE.json if all tests marked full were asked for, and not some of them."""
    some = (
        config.getoption("keyword")
        or config.option.collectonly
        or config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    )
    if config.getoption("markexpr") != "full" or some:
        return
    stats = terminalreporter.stats
    tests = [test for kind in ("passed", "failed") for test in stats.get(kind, ())]
    suites = [value for test in tests for name, value in test.user_properties if name == CHECKED]
    cases = sum(sum(suite["cases"].values()) for suite in suites)
    summary = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "tests": {kind: len(stats.get(kind, ())) for kind in ("passed", "failed", "error")},
        "failed": [test.nodeid for kind in ("failed", "error") for test in stats.get(kind, ())],
        "cases": cases,
        "suites": sorted(suites, key=lambda suite: [suite.get(name, "") for name in ("path", "dtype", "storage", "guard")]),
    }
    file = RESULTS / f"full-{summary['date']}.json"
    file.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    terminalreporter.write_line(f"{cases} cases of conformance; summary in {file}")


def machine() -> dict[str, str]:
    """Versions, and the paths of CPU features that were checked."""
    import llvmlite
    import numba
    import numpy

    from npllm.backends.numba_cpu.features import runnable

    versions = {module.__name__: module.__version__ for module in (numpy, numba, llvmlite)}
    paths = " ".join(path.name for path in runnable())
    return versions | {"python": platform.python_version(), "architecture": platform.machine(), "paths": paths}
