"""`npllm verify`: is a kernel what its operation asks, is a backend what npllm asks.

A kernel is `package.module:name` or `./file.py:name`, checked case by case in a process of its own: a crash or a call that
hangs costs one case. Failures go to stdout in full, then a table of the operations and a verdict; or with `--json` one
document:

    schema       "npllm.verify/1"
    ok           bool: every case passed
    cases        int: how many were run
    failed       int: how many of them failed
    seconds      float: what they took
    properties   {name: str}: versions, the machine's type, policy, seed, what was checked; why a backend was not
    reports      [{ok: bool, operation, case: its id, rounding: the policy in full, problem: "" or one of
                 npllm.testing.report.PROBLEMS, message: what is wrong and where, error: float (rms, output roundings),
                 spread, limit, share: float (see npllm.testing.judge), scale: float, seed: int, explanation: the known
                 mistake that fits best or "", explained: float (0 to 1), seconds: float}]; of a backend also backend,
                 dtype (its arithmetic) and declined: [str]; numbers that are not finite are text

`--audit` says which seeded faults a test notices; `--list` has the operations, with their arguments and cases.

Exit status: 0 all passed, 1 a case failed or a fault was missed, 2 wrong usage: nothing could be checked.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npllm.cli import options, output
from npllm.errors import ArgumentError, BackendError

if TYPE_CHECKING:
    from npllm.testing.case import Case
    from npllm.testing.isolate import Trial, Work
    from npllm.testing.report import Report, Suite
    from npllm.testing.rounding import Rounding

HELP = "check a kernel, or a backend, against the canon's error budget"
OPERANDS = "[KERNEL]"

EXAMPLES = """\
examples:
  npllm verify --list --op attention
  npllm verify mypkg.kernels:attn --op attention --dtype bf16 --without window,chunk
  npllm verify ./norm.py:rms_norm --op rms_norm --policy inputs=bf16,normed=bf16 --junit norm.xml
  npllm verify --backend all --op attention,moe
  npllm verify --audit mypkg.tests:agrees --op attention
"""

# What can be done, and the options that go with it.
SELECTION = {"op", "tag", "without"}
RESULTS = {"json", "junit"}
MODES = {
    "kernel": {*SELECTION, *RESULTS, "case", "dtype", "policy", "framework", "device", "seed", "seeds", "limit"},
    "backend": {*SELECTION, *RESULTS, "case", "dtype", "seed", "seeds", "limit"},
    "export": {*SELECTION, "case", "dtype", "policy", "seed"},
    "judge": RESULTS,
    "audit": {"op"},
    "list": SELECTION,
}

# Failures that are told in full; of the others, the first line.
IN_FULL = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    name = options.filled
    parser.add_argument("kernel", nargs="?", metavar="KERNEL", type=name, help="package.module:name or ./file.py:name")
    parser.add_argument("--backend", metavar="NAME", type=name, help="check a backend, or all that are installed")
    parser.add_argument("--export", metavar="DIR", type=Path, help="write cases as files, for kernels in any language")
    parser.add_argument("--judge", metavar=("DIR", "RESULTS"), type=Path, nargs=2, help="judge what was computed from them")
    parser.add_argument("--audit", metavar="TEST", type=name, help="try a test of yours on seeded faults")
    parser.add_argument("--list", action="store_true", help="operations with arguments and cases; with --op, one in full")
    add_selection(parser)
    group = parser.add_argument_group("how")
    group.add_argument("--dtype", help="the type of the inputs: f32 (default), bf16, f16, f64; of a backend, its storage")
    group.add_argument("--policy", metavar="POINTS", help="where it rounds: inputs=bf16,probs=f32,... (default: by --dtype)")
    group.add_argument("--framework", help="numpy, torch, jax or cupy (default: what the kernel's file imports)")
    group.add_argument("--device", help="where its arrays shall lie, such as cuda")
    group.add_argument("--seed", type=_whole, metavar="N", help="of the inputs (default: 0)")
    group.add_argument("--seeds", type=_positive, metavar="N", help="N seeds that nobody has seen, in place of one")
    group.add_argument("--limit", type=_seconds, metavar="SECONDS", help="that one call may take (default: 60)")
    group.add_argument("--json", action="store_true", help="one JSON document (python -m pydoc npllm.cli.verify)")
    group.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML as well")


def add_selection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which cases")
    words: dict[str, Any] = {"action": "extend", "type": _words, "default": []}
    group.add_argument("--op", **words, metavar="NAME", help="operation (of a backend: several, as a,b)")
    group.add_argument("--tag", **words, metavar="TAGS", help="only those that have all of these tags, as a,b")
    group.add_argument("--without", **words, metavar="TAGS", help="none that has any of these tags")
    group.add_argument("--case", action="extend", nargs="+", default=[], metavar="ID", help="these, by id or name")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _whole(text: str) -> int:
    return int(_number(text, "a whole number", text.isdecimal()))


def _positive(text: str) -> int:
    return int(_number(text, "a whole number above 0", text.isdecimal() and int(text) > 0))


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 < float(text) < 1e6:
            return float(text)
    return float(_number(text, "a number of seconds above 0", False))


def _number(text: str, want: str, right: bool) -> str:
    if not right:
        raise argparse.ArgumentTypeError(f"{text!r} is not {want}")
    return text


def run(args: argparse.Namespace) -> int:
    return RUNS[mode_of(args)](args)


def mode_of(args: argparse.Namespace) -> str:
    """What the options ask for; UsageError if that is nothing, or more than one thing, or has options of another."""
    wanted = [mode for mode in MODES if getattr(args, mode)]
    if not wanted:
        raise options.UsageError("say what to check: KERNEL --op NAME, or --backend NAME; --list has the operations")
    if len(wanted) > 1:
        raise options.UsageError(f"{' and '.join(map(spelled, wanted))} contradict each other: give one")
    for name in sorted(set().union(*MODES.values()) - MODES[wanted[0]]):
        if getattr(args, name) not in (None, False, []):
            raise options.UsageError(f"--{name} does not go with {spelled(wanted[0])}")
    for one, other in (("seed", "seeds"), ("case", "tag"), ("case", "without")):
        if getattr(args, one, None) not in (None, []) and getattr(args, other) not in (None, []):
            raise options.UsageError(f"--{one} and --{other} contradict each other: give one")
    if args.junit is not None and not args.junit.absolute().parent.is_dir():
        raise options.UsageError(f"--junit {args.junit}: there is no such folder")
    return wanted[0]


def spelled(mode: str) -> str:
    return "a kernel" if mode == "kernel" else f"--{mode}"


@contextlib.contextmanager
def as_usage() -> Iterator[None]:
    """What is wrong with names, targets and formats, as UsageError: the kernel itself has not failed."""
    try:
        yield
    except (ArgumentError, BackendError) as wrong:
        raise options.UsageError(str(wrong)) from wrong


def one_operation(args: argparse.Namespace) -> str:
    """The operation that --op names; UsageError lists what there is."""
    from npllm.testing.operation import PLACES, operation

    if len(args.op) != 1:
        raise options.UsageError(f"name one operation with --op: {', '.join(sorted(PLACES))}")
    with as_usage():
        return operation(args.op[0]).name


# -- kernels ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelWork:
    """For npllm.testing.isolate: the trials of a kernel by its place."""

    target: str
    framework: str | None = None
    device: str | None = None
    limit_s: float = 60.0

    def __str__(self) -> str:
        return self.target

    def load(self) -> Callable[[Trial], Report]:
        from npllm.testing.checking import check
        from npllm.testing.isolate import find_target

        kernel = find_target(self.target)

        def checked(trial: Trial) -> Report:
            return check(
                trial.operation, kernel, trial.case, trial.rounding,
                framework=self.framework, device=self.device, seed=trial.seed, limit_s=self.limit_s,
            )  # fmt: skip

        return checked


def verify_kernel(args: argparse.Namespace) -> int:
    from npllm.testing.isolate import Trial
    from npllm.testing.report import Suite, surroundings

    operation = one_operation(args)
    rounding, seeds = rounding_of(args), seeds_of(args)
    with as_usage():
        found = chosen(args, operation)
    trials = [Trial(operation, case.id, rounding, seed) for seed in seeds for case in found]
    work = KernelWork(args.kernel, args.framework, args.device, args.limit or 60.0)
    reports = followed(work, trials, quiet=args.json)
    about = {"kernel": args.kernel, "policy": str(rounding), "seed": ", ".join(map(str, seeds))}
    about |= {name: value for name in ("framework", "device") if (value := getattr(args, name))}
    suite = Suite(reports, surroundings(args.framework or "numpy") | {"framework": "as the kernel imports"} | about)
    return told(args, suite, [suite.table(), verdict(suite, f"{args.kernel} as {operation}")])


def chosen(args: argparse.Namespace, operation: str) -> list[Case]:
    """The cases that the options select; ArgumentError if a name is unknown, or if there are none."""
    from npllm.testing.case import cases, find_case

    if args.case:
        return [find_case(operation, case) for case in args.case]
    found = cases(operation, args.tag, args.without)
    if not found:
        raise ArgumentError(f"{operation} has no case with tags {', '.join(args.tag)}{' without ' * bool(args.without)}"
                            f"{', '.join(args.without)}: see npllm verify --list --op {operation}")  # fmt: skip
    return found


def rounding_of(args: argparse.Namespace) -> Rounding:
    """The policy that --dtype and --policy declare."""
    from npllm.config import nearest
    from npllm.testing.rounding import Rounding

    known = [each.name for each in fields(Rounding)]
    declared = {"inputs": args.dtype} if args.dtype else {}
    for part in _words(args.policy or ""):
        name, _, at = part.rpartition("=")
        name = name or "inputs"
        if name not in known:
            raise options.UsageError(f"--policy: rounding point {name!r} is unknown; known: {nearest(name, known)}")
        if declared.get(name, at) != at:
            raise options.UsageError(f"{name} is declared twice: {declared[name]} and {at}")
        declared[name] = at
    with as_usage():
        return Rounding(**declared)


def seeds_of(args: argparse.Namespace) -> list[int]:
    """One seed, or as many fresh ones as were asked for."""
    return [args.seed or 0] if args.seeds is None else [secrets.randbelow(1 << 31) for _ in range(args.seeds)]


# -- backends -----------------------------------------------------------------------------------------------------------


def verify_backends(args: argparse.Namespace) -> int:
    from npllm.registry import available_backends
    from npllm.testing.conformance import BackendWork
    from npllm.testing.report import Suite, surroundings

    names = {args.backend: ""} if args.backend != "all" else available_backends()
    about, sections = surroundings(), list[str]()
    reports: tuple[Report, ...] = ()
    for name, reason in names.items():
        if reason:
            about[f"not checked: {name}"] = reason
            sections.append(f"backend {name}: not checked: {reason}")
            continue
        found = followed(BackendWork(name, args.limit or 60.0), backend_trials(args, name), quiet=args.json)
        suite = Suite(found)
        sections += [suite.table(), *declines(found), verdict(suite, f"backend {name}")]
        reports += found
    return told(args, Suite(reports, about | {"backend": args.backend}), sections)


def backend_trials(args: argparse.Namespace, name: str) -> list[Trial]:
    """What is checked of a backend: as conformance has it, less what the options leave out."""
    from npllm.registry import get_backend
    from npllm.testing.conformance import STORAGES, trials

    with as_usage():
        made, storages = functools.partial(get_backend, name), [args.dtype] if args.dtype else STORAGES
        seeds, only = seeds_of(args), args.op or None
        found = [each for seed in seeds for each in trials(made, only, tags=args.tag, storages=storages, seed=seed)]
        return selected(args, found)


def selected(args: argparse.Namespace, trials: list[Trial]) -> list[Trial]:
    """The trials of the cases that --case names, or of those that have no tag of --without."""
    from npllm.config import nearest
    from npllm.testing.operation import operations

    names = {name for trial in trials for name in names_of(trial)}
    for case in args.case:
        if case not in names:
            raise ArgumentError(f"no case {case!r}; nearest: {', '.join(nearest(case, names).split(', ')[:5])}")
    known = {tag for op in operations() for case in op.cases for tag in case.tags}
    for tag in [*args.tag, *args.without]:
        if tag not in known:
            raise ArgumentError(f"no case is tagged {tag!r}; tags: {nearest(tag, known)}")
    wanted, unwanted = set(args.case), set(args.without)
    return [each for each in trials if (not wanted or wanted & names_of(each)) and not unwanted & tags_of(each)]


def names_of(trial: Trial) -> set[str]:
    return {trial.case, trial.case.partition("/")[2]}


@functools.cache
def tags_of(trial: Trial) -> frozenset[str]:
    """The tags of a trial's case; whole models have none."""
    from npllm.testing.case import find_case
    from npllm.testing.conformance import MODEL

    return frozenset() if trial.operation == MODEL else find_case(trial.operation, trial.case).tags


def declines(reports: Iterable[Report]) -> list[str]:
    """What a backend left to the canon, and in how many cases."""
    counts = Counter(each for report in reports for each in getattr(report, "declined", ()))
    return [f"declined: {what} ({count} case{'s' * (count > 1)})" for what, count in counts.items()]


# -- what else can be asked ---------------------------------------------------------------------------------------------


def export_bundle(args: argparse.Namespace) -> int:
    from npllm.testing.bundle import export
    from npllm.testing.operation import PLACES

    rounding = rounding_of(args)
    with as_usage():
        manifest = export(
            args.export, args.op or list(PLACES), tags=args.tag, without=args.without, cases=args.case, policy=rounding,
            seed=args.seed or 0,
        )  # fmt: skip
    output.write(f"{manifest}\n")
    return 0


def judge_bundle(args: argparse.Namespace) -> int:
    from npllm.testing.bundle import judge_results

    folder, results = args.judge
    with as_usage():
        suite = judge_results(folder, results)
    if not args.json:
        for number, report in enumerate(suite.failures, 1):
            output.write(failure(report, number))
    return told(args, suite, [suite.table(), verdict(suite, str(results))])


def audit_test(args: argparse.Namespace) -> int:
    from npllm.testing.auditing import audit
    from npllm.testing.isolate import find_target

    operation = one_operation(args)
    with as_usage(), contextlib.redirect_stdout(sys.stderr):
        found = audit(find_target(args.audit), operation, show=None)
    output.write(f"{found}\n")
    return 0 if found.rate == 1.0 else 1


def list_operations(args: argparse.Namespace) -> int:
    from npllm.testing.listing import in_full, overview
    from npllm.testing.operation import operation, operations

    if not args.op:
        if args.tag or args.without:
            raise options.UsageError("tags are those of an operation: name it with --op")
        output.write("\n".join(map(overview, operations())))
        return 0
    with as_usage():
        chosen_by = bool(args.tag or args.without)
        found = [(op, chosen(args, op.name) if chosen_by else op.cases) for op in map(operation, args.op)]
    output.write("\n".join(in_full(op, cases) for op, cases in found))
    return 0


# -- what is told -------------------------------------------------------------------------------------------------------


def followed(work: Work, trials: Sequence[Trial], *, quiet: bool) -> tuple[Report, ...]:
    """The reports of the trials. On stdout each failure at once, unless `quiet`; on a terminal's stderr the case at hand."""
    found: list[Report] = []
    failed = 0
    if not trials:
        return ()
    status(f"{work}: loading")
    try:
        for report in reports_of(work, trials):
            found.append(report)
            failed += not report.ok
            if not report.ok and not quiet:
                status("")
                output.write(failure(report, failed))
            if len(found) < len(trials):
                status(f"{len(found)} of {len(trials)} done, {failed} failed; now {trials[len(found)].case}")
    finally:
        status("")
    return tuple(found)


def reports_of(work: Work, trials: Sequence[Trial]) -> Iterator[Report]:
    from npllm.testing.isolate import reports

    with as_usage():
        yield from reports(work, trials)


def status(text: str) -> None:
    """The line at the end of a terminal, in place of the one before; "" takes it away."""
    if output.is_terminal(sys.stderr):
        print(f"\r\033[K{output.one_line(text)}", end="", file=sys.stderr, flush=True)


def failure(report: Report, number: int) -> str:
    """A failure in full; in a line, if `number` have been told before."""
    text = str(report) if number <= IN_FULL else str(report).splitlines()[0]
    return f"{text}\n\n" if number <= IN_FULL else f"{text}\n"


def verdict(suite: Suite, what: str) -> str:
    """How many cases failed, and the mistake that explains most of them."""
    total, failed = len(suite.reports), len(suite.failures)
    if not total:
        return f"{what}: no case was run"
    if not failed:
        return f"{what}: {'the only case' if total == 1 else f'all {total} cases'} passed"
    text = f"{what}: {failed} of {total} case{'s' * (total > 1)} failed"
    known = Counter(report.explanation for report in suite.failures if report.explanation)
    if not known:
        return text
    name, count = known.most_common(1)[0]
    return f"{text}; closest known mistake in {count} of these: {name}"


def told(args: argparse.Namespace, suite: Suite, sections: Iterable[str]) -> int:
    """Write what was asked for -> the exit status."""
    if args.junit is not None:
        args.junit.write_text(suite.junit(), encoding="utf-8")
    output.write(suite.json() if args.json else "\n".join(sections) + "\n")
    return 0 if suite.ok else 1


RUNS: dict[str, Callable[[argparse.Namespace], int]] = {
    "kernel": verify_kernel,
    "backend": verify_backends,
    "export": export_bundle,
    "judge": judge_bundle,
    "audit": audit_test,
    "list": list_operations,
}
