"""Compiling ahead, in several processes: Numba lets one thread of a process compile at a time.

`python -m npllm.backends.numba_cpu.ahead` is such a process: it compiles the functions that stdin names, a line each, and
answers each with an empty line, or with what is wrong.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor

from npllm.backends.numba_cpu.jit import Compiled, store
from npllm.backends.numba_cpu.store import VARIABLE, reason
from npllm.errors import BackendError

Progress = Callable[[int, int], None]


def compile_ahead(processes: int, progress: Progress, without: Collection[str] = ()) -> int:
    """Compile and keep every function that is not kept, but for modules `without` -> how many those were.

    BackendError: nothing can be kept, or something cannot be compiled.
    """
    wanted = [name for name in Compiled.known if name.partition(".")[0] not in without]
    missing = [name for name in wanted if store().read(name) is None]
    if missing:
        _check_folder()
        todo: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in missing:
            todo.put(name)
        with ThreadPoolExecutor(processes) as pool:
            parts = [pool.submit(_compile, todo, lambda: progress(len(missing) - todo.qsize(), len(missing)))]
            parts += [pool.submit(_compile, todo, lambda: None) for _ in range(1, min(processes, len(missing)))]
            for part in parts:
                part.result()
    return len(missing)


def _check_folder() -> None:
    try:
        store().make()
    except OSError as error:
        where = store().folder or "the cache"
        raise BackendError(f"{where}: compiled kernels cannot be kept ({reason(error)}); set {VARIABLE}") from None


def _compile(todo: queue.SimpleQueue[str], progress: Callable[[], None]) -> None:
    """Have a process of its own compile what is still to do."""
    with subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        for name in _taken(todo):
            progress()
            try:
                print(name, file=process.stdin, flush=True)
                answer = process.stdout.readline()
            except OSError:
                answer = ""
            if answer != "\n":
                raise BackendError(f"kernel {name} cannot be compiled: {answer.strip() or 'the compiler ended'}")


def _taken(todo: queue.SimpleQueue[str]) -> Iterator[str]:
    while True:
        try:
            yield todo.get_nowait()
        except queue.Empty:
            return


def main() -> None:
    import npllm.backends.numba_cpu.backend  # noqa: F401 (makes all functions known)

    for line in sys.stdin:
        problem = ""
        try:
            Compiled.known[line.strip()].address  # noqa: B018 (compiled when it is asked for)
        except Exception as error:
            problem = " ".join(str(error).split())
        print(problem, flush=True)


if __name__ == "__main__":
    main()
