"""Checks in a process of their own: a kernel that ends its process, or hangs where no thread can stop it, costs one case.

The child reports case by case over a pipe and says that it is alive in between; when it falls silent, holding the
interpreter's lock, or ends, the case at hand is reported as "hangs" or "crashed", and another child takes the next one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Protocol

from npllm.config import nearest
from npllm.errors import ArgumentError, NpllmError
from npllm.testing.report import Report
from npllm.testing.rounding import Rounding

# Seconds between two signs of life; seconds of silence that are allowed beyond a call's limit, and while modules load.
BEAT, GRACE, LOADING = 0.25, 3.0, 120.0

ALIVE = b""

# How faulthandler writes a frame.
FRAME = re.compile(r'  File "(.+)", line (\d+) in (\S+)')


class Trial(NamedTuple):
    """One thing to check: a case of an operation by its id, with which rounding points, drawn from which seed.

    dtype   of a backend: the arithmetic that it is made with.
    """

    operation: str
    case: str
    rounding: Rounding
    seed: int = 0
    dtype: str = ""

    def report(self, problem: str, message: str) -> Report:
        """The report of a trial that ended without one."""
        return Report(self.operation, self.case, str(self.rounding), problem, message, seed=self.seed)


class Work(Protocol):
    """What a child does: it can be pickled, and its text is what errors call it. `load` runs in the child only, and gives
    the check of one trial."""

    @property
    def limit_s(self) -> float: ...

    def load(self) -> Callable[[Trial], Report]: ...


def reports(work: Work, trials: Sequence[Trial]) -> Iterator[Report]:
    """The report of each trial, in order. ArgumentError if the work cannot be loaded."""
    left = list(trials)
    while left:
        with Child(work, left) as child:
            for trial in list(left):
                report = child.report(trial)
                left.remove(trial)
                yield report
                if report.problem in ("hangs", "crashed"):
                    break  # a call that hangs may still run there


class Child:
    """A process that checks trials one after another; a context, at whose end it is gone."""

    def __init__(self, work: Work, trials: Sequence[Trial]) -> None:
        self.work = work
        descriptor, self.trace = tempfile.mkstemp(prefix="npllm-")
        os.close(descriptor)
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe(duplex=False)
        self.process = spawn.Process(target=serve, args=(theirs, self.trace, work, list(trials)), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> Child:
        with contextlib.ExitStack() as undo:
            undo.callback(self._end)
            try:
                self._next(LOADING)
            except TimeoutError:
                raise ArgumentError(f"{self.work} did not load within {LOADING:g} s") from None
            except EOFError:
                raise ArgumentError(f"{self.work} ended the process while it loaded: {self._how_it_ended()}") from None
            undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def report(self, trial: Trial) -> Report:
        """The child's report on `trial`, which is the next, or what became of the child."""
        try:
            report = self._next(self.work.limit_s + GRACE)
        except TimeoutError:
            what = f"it did not return within {self.work.limit_s:g} s, and no other thread could run meanwhile"
            return trial.report("hangs", what)
        except EOFError:
            return trial.report("crashed", f"its process ended: {self._how_it_ended()}")
        assert isinstance(report, Report)
        return report

    def _next(self, silence_s: float) -> Any:
        """What the child has to say, beyond that it is alive, or the error that it met.

        TimeoutError after so long a silence, EOFError at its end.
        """
        while self.pipe.poll(silence_s):
            try:
                answer = self.pipe.recv()
            except ConnectionResetError:
                raise EOFError from None
            if isinstance(answer, Exception):
                raise answer
            if answer != ALIVE:
                return answer
        raise TimeoutError

    def _how_it_ended(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        named = {-each.value: each.name for each in signal.Signals}
        found = FRAME.search(Path(self.trace).read_text(encoding="utf-8", errors="replace").partition("Current thread")[2])
        place = f" at {Path(found[1]).name}:{found[2]} in {found[3]}" if found else ""
        return named.get(code, f"exit status {code}") + place

    def _end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()
        with contextlib.suppress(OSError):
            os.unlink(self.trace)


def serve(pipe: Connection, trace: str, work: Work, trials: Sequence[Trial]) -> None:
    """What a child runs. It says None when the work is loaded, then a report for each trial, or an error and no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    os.dup2(2, 1)  # what a kernel prints must not stand among the results
    speech = threading.Lock()
    with open(trace, "w", encoding="utf-8") as file:
        faulthandler.enable(file)
        threading.Thread(target=beat, args=(pipe, speech), daemon=True).start()
        try:
            check = work.load()
            say(pipe, speech, None)
            for trial in trials:
                say(pipe, speech, check(trial))
        except Exception as error:
            say(pipe, speech, portable(error))


def portable(error: Exception) -> Exception:
    """An error that can be pickled, whatever it was."""
    return ArgumentError(str(error)) if isinstance(error, NpllmError) else RuntimeError(f"{type(error).__name__}: {error}")


def say(pipe: Connection, speech: threading.Lock, what: Any) -> None:
    """Only one thread may write to a pipe at a time."""
    with speech:
        pipe.send(what)


def beat(pipe: Connection, speech: threading.Lock) -> None:
    """Say "alive" until nobody listens: then the process has no purpose."""
    pause = threading.Event()
    while not pause.wait(BEAT):
        try:
            say(pipe, speech, ALIVE)
        except OSError:
            os._exit(1)


# -- finding somebody's kernel ----------------------------------------------------------------------------------------


def find_target(target: str) -> Callable[..., Any]:
    """The callable at `package.module:name` or `./file.py:name`; ArgumentError tells what the module has instead."""
    place, colon, name = target.rpartition(":")
    if not (place and colon and name):
        raise ArgumentError(f"{target}: is not of the form package.module:name or ./file.py:name")
    module = file_module(Path(place)) if place.endswith(".py") or "/" in place else named_module(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            own = [each for each, value in vars(found).items() if callable(value) and not each.startswith("_")]
            raise ArgumentError(f"{place} has no {part!r}; it has: {nearest(part, own) or 'nothing that can be called'}")
        found = getattr(found, part)
    if not callable(found):
        raise ArgumentError(f"{target}: is of type {type(found).__name__}, which cannot be called")
    return found


def named_module(name: str) -> ModuleType:
    """The module `name`, also from the working directory, as with `python -m`."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    with telling_why(name):
        return importlib.import_module(name)


def file_module(path: Path) -> ModuleType:
    """The module in a file; its neighbours can be imported by it."""
    if not path.is_file():
        raise ArgumentError(f"{path}: there is no such file")
    name = f"{path.stem}_py" if path.stem in sys.modules else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ArgumentError(f"{path}: is no Python file")
    sys.path.insert(0, str(path.parent.resolve()))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with telling_why(str(path)):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def telling_why(what: str) -> Iterator[None]:
    """Whatever keeps a module from being imported, as an ArgumentError."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ArgumentError(f"{what} cannot be imported ({type(error).__name__}: {error})") from None
