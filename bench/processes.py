"""Contestants as processes: each loads once and waits, and only one computes at a time."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

# Seconds that one task may take, and that a contestant's threads have to come to rest after each.
PATIENCE, REST = 1800, 0.2


class ContestantError(Exception):
    """A contestant does not start, or fails at a task: in one line, why."""


class Contestant:
    """A process that serves a module of bench/contestants. ContestantError if it does not start."""

    def __init__(self, module: str, arguments: dict[str, Any], python: str, threads: int, log: Path) -> None:
        command = [python, "-m", f"bench.contestants.{module}", json.dumps(arguments)]
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(threads), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        try:
            self.about: dict[str, Any] = self._answer()
        except ContestantError:
            self.close()
            raise

    def ask(self, task: str, **arguments: Any) -> Any:
        """What a method of the contestant returns; ContestantError says why it does not."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": task, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise ContestantError(self._last_words()) from None
        value = self._answer()
        time.sleep(REST)
        return value

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            raise ContestantError(f"no answer in {PATIENCE} s")
        line = self.process.stdout.readline()
        if not line:
            raise ContestantError(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise ContestantError(answer["error"].splitlines()[0])
        return answer["value"]

    def _last_words(self) -> str:
        status = self.process.wait()
        last = collections.deque(self.log.read_text(errors="replace").split("\n"), 3)
        return f"ended with status {status}: {' '.join(last).strip()}"

    def close(self) -> None:
        """End the process: it does when nothing more can come on its stdin."""
        with self.process:
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()


@contextlib.contextmanager
def contestant(module: str, arguments: dict[str, Any], threads: int, log: Path) -> Iterator[Contestant]:
    """One in this Python, for a block."""
    one = Contestant(module, arguments, sys.executable, threads, log)
    try:
        yield one
    finally:
        one.close()


def environment(threads: int, **further: str) -> dict[str, str]:
    """This process's variables, with so many threads for every library that asks them."""
    count = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {**os.environ, **count, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", **further}


def note(text: str) -> None:
    """What is going on, on stderr."""
    print(text, file=sys.stderr, flush=True)


def attempt(what: str, work: Callable[[], Any], failures: dict[str, str]) -> Any:
    """What `work` gives; None, and the reason kept under `what`, where a contestant fails."""
    try:
        return work()
    except ContestantError as bad:
        failures[what] = str(bad)
        note(f"{what}: {bad}")
        return None
