"""The protocol of a contestant: a line of JSON on stdin for each task, a line of JSON on stdout for each answer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def serve(start: Callable[[], Any]) -> None:
    """Answer tasks until stdin ends. `start()` makes the contestant; its first answer is what `about()` says.

    A task is {"do": the name of a method, ...its arguments}; an answer {"value": what it returned} or {"error": why not}.
    Whatever libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(work: Callable[[], Any]) -> bool:
        try:
            found = {"value": work()}
        except Exception as bad:
            found = {"error": f"{type(bad).__name__}: {bad}"}
        answers.write(json.dumps(found) + "\n")
        answers.flush()
        return "value" in found

    made: list[Any] = []

    def begin() -> Any:
        made.append(start())
        return made[0].about()

    if answer(begin):
        for line in sys.stdin:
            task = json.loads(line)
            answer(lambda: getattr(made[0], task.pop("do"))(**task))  # noqa: B023 (called at once)


def prompt_ids(tokens: int, vocabulary: int) -> list[int]:
    """The same ids for everybody, from a linear congruential generator: no library's random numbers."""
    state, ids = 1, []
    for _ in range(tokens):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append((state >> 33) % vocabulary)
    return ids
