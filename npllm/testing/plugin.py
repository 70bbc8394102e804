"""npllm for pytest: the cases of an operation as the cases of a test.

    @pytest.mark.npllm("attention", without="window,chunk,softcap,sinks,ragged,paged,padded", dtype="bf16")
    def test_my_attention(npllm_check):
        npllm_check(my_attention)

runs once for each case, `-k decode` selects among them by id, and a failure shows the kit's report. `pytest --fixtures`
lists what else there is. pytest loads this module wherever npllm is installed, so it imports nothing until a test asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from npllm.arrays import Array
    from npllm.testing.case import Case
    from npllm.testing.checking import Kernel
    from npllm.testing.report import Report
    from npllm.testing.rounding import Rounding

MARKER = (
    'npllm(op, tags="", without="", dtype="f32", policy=None): check a kernel on the cases of an operation that have all '
    "tags and none of without; dtype is the type of its arrays, policy a Rounding that says more."
)

# The property of a test that tells what a backend left to the canon.
DECLINED = "npllm_declined"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("npllm", "npllm's verification kit")
    told = "backend that npllm.testing.conformance_suite checks; can be given several times (default: numpy)"
    group.addoption("--npllm-backend", action="append", metavar="NAME", help=told)
    group.addoption("--npllm-seed", type=int, default=0, metavar="N", help="seed of the inputs of cases (default: 0)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)
    if config.getoption("npllm_seed") < 0:
        raise pytest.UsageError("--npllm-seed must not be negative")
    for name in config.getoption("npllm_backend") or ():
        _or_usage_error(name)


def _or_usage_error(name: str) -> None:
    """The backend of that name loads."""
    from npllm.errors import BackendError
    from npllm.registry import get_backend

    try:
        get_backend(name)
    except BackendError as error:
        raise pytest.UsageError(f"--npllm-backend: {error}") from None


# -- the marker -------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What a marker asks for."""

    op: str
    tags: Iterable[str]
    without: Iterable[str]
    rounding: Rounding


def asked(op: str, tags: Iterable[str] = "", without: Iterable[str] = "", dtype: str = "", policy: Any = None) -> Asked:
    """The arguments of the marker, which has this signature."""
    from npllm.errors import ArgumentError
    from npllm.testing.rounding import Rounding

    if dtype and policy is not None:
        raise ArgumentError("dtype and policy contradict each other; Rounding(inputs, ...) says both")
    return Asked(op, tags, without, policy if isinstance(policy, Rounding) else Rounding(policy or dtype or "f32"))


def marked(node: pytest.Item | pytest.Function) -> Asked | None:
    """What a test's marker asks for; None if it has no marker."""
    from npllm.errors import ArgumentError

    marker = node.get_closest_marker("npllm")
    if marker is None:
        return None
    try:
        return asked(*marker.args, **marker.kwargs)
    except (TypeError, ArgumentError) as error:
        raise refusal(node.nodeid, f"pytest.mark.npllm: {str(error).removeprefix('asked() ')}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    node = metafunc.definition
    if "npllm_case" not in metafunc.fixturenames:
        # A marker of the class or the module may be there for other tests.
        if any(marker.name == "npllm" for marker in node.own_markers):
            raise refusal(node.nodeid, "is marked npllm, but takes neither npllm_check nor npllm_case, so it checks no case")
        return
    wanted = marked(node)
    if wanted is None:
        raise refusal(node.nodeid, 'takes npllm_case or npllm_check, so mark it with an operation: npllm("attention")')
    found = chosen(node.nodeid, wanted)
    metafunc.parametrize("npllm_case", found, ids=map(str, found), indirect=True)


def chosen(nodeid: str, wanted: Asked) -> list[Case]:
    """The cases that a marker asks for; an error if there are none, since a test of nothing passes."""
    from npllm.errors import ArgumentError
    from npllm.testing.case import cases

    try:
        found = cases(wanted.op, wanted.tags, wanted.without)
    except ArgumentError as error:
        raise refusal(nodeid, str(error)) from None
    if not found:
        raise refusal(nodeid, f"no case of {wanted.op} has tags {wanted.tags!r} without {wanted.without!r}")
    return found


def refusal(nodeid: str, why: str) -> Exception:
    """An error that pytest shows as this text alone."""
    return pytest.Collector.CollectError(f"{nodeid}: {why}")


# -- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def npllm_case(request: pytest.FixtureRequest) -> Case:
    """One case of the operation that the test is marked with (npllm.testing.Case): the test runs once for each."""
    if not hasattr(request, "param"):
        pytest.fail("npllm_case was asked for while the test ran: make it an argument of the test", pytrace=False)
    case: Case = request.param
    return case


@pytest.fixture
def npllm_rounding(request: pytest.FixtureRequest) -> Rounding:
    """The rounding points of the marker (npllm.testing.Rounding); float32 throughout if there is none."""
    from npllm.testing.rounding import Rounding

    wanted = marked(request.node)
    return wanted.rounding if wanted else Rounding()


@pytest.fixture
def npllm_check(npllm_case: Case, npllm_rounding: Rounding, request: pytest.FixtureRequest) -> Callable[..., Report]:
    """A function (kernel, case=None, **options) that fails the test unless the kernel is right on the case.

    case      another than the test's, by name; options: those of npllm.testing.checking (policy, framework, device, ...).
    It returns the report of a pass.
    """
    seed: int = request.config.getoption("npllm_seed")

    def checked(kernel: Kernel, case: str | Case | None = None, **options: Any) -> Report:
        __tracebackhide__ = True
        from npllm.testing.checking import check

        given: dict[str, Any] = {"policy": npllm_rounding, "seed": seed} | options
        return passed(check(npllm_case.operation, kernel, case or npllm_case, **given))

    return checked


@pytest.fixture
def npllm_oracle(npllm_rounding: Rounding, request: pytest.FixtureRequest) -> Callable[..., dict[str, Array]]:
    """A function (op, case, inputs=None) that gives the true outputs of a case, float64 arrays by name.

    inputs   arrays by name; None: those of the case at its first scale, as
             `case.inputs(seed, case.scales[0], npllm_rounding.format("inputs"))` gives them with the seed of --npllm-seed.
    """
    seed: int = request.config.getoption("npllm_seed")

    def truth_of(op: str, case: str | Case, inputs: Mapping[str, Array] | None = None) -> dict[str, Array]:
        from npllm.testing.case import find_case
        from npllm.testing.checking import truth
        from npllm.testing.operation import operation

        one = find_case(op, case)
        given = one.inputs(seed, one.scales[0], npllm_rounding.format("inputs")) if inputs is None else inputs
        return truth(operation(op), one, given)

    return truth_of


def passed(report: Report) -> Report:
    """The report of a pass; of a failure, CheckError without the frames in between, which tell a reader nothing."""
    __tracebackhide__ = True
    if report.ok:
        return report
    from npllm.testing.report import CheckError

    raise CheckError(str(report))


# -- backends ---------------------------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What backends left to the canon, and in how many cases."""
    tests = [test for kind in ("passed", "failed") for test in terminalreporter.stats.get(kind, ())]
    declined = Counter(value for test in tests for name, value in test.user_properties if name == DECLINED)
    if declined:
        terminalreporter.section("left to npllm's canon")
        for what, count in sorted(declined.items()):
            terminalreporter.line(f"{what} ({count} cases)")
