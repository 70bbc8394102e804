"""What the verbs print: the result to stdout, everything else to stderr, colours and progress only for people."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from npllm.errors import ArgumentError

if TYPE_CHECKING:
    from npllm.generation import Stream

# Control characters that text from a model or a file must not send to a terminal; line breaks and tabs may pass.
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")

DIM, YELLOW, RED, RESET = "\033[2m", "\033[33m", "\033[31m", "\033[0m"


def is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def has_colours(stream: TextIO) -> bool:
    """Whether to colour: a terminal that can, and a user who has not set NO_COLOR."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str, colour: str, stream: TextIO) -> str:
    return f"{colour}{text}{RESET}" if has_colours(stream) else text


def printable(text: str, stream: TextIO) -> str:
    """`text` as it may go to `stream`: on a terminal without control characters, elsewhere as it is."""
    return text.translate(CONTROLS) if is_terminal(stream) else text


def write(text: str) -> None:
    """A piece of the result, at once. ArgumentError if stdout takes no more; BrokenPipeError if nobody reads it."""
    try:
        sys.stdout.write(printable(text, sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as bad:
        raise ArgumentError(f"stdout: cannot be written ({bad.strerror})") from None


def note(text: str, colour: str = DIM) -> None:
    """A line for people, to stderr."""
    sys.stdout.flush()
    print(coloured(printable(text, sys.stderr), colour, sys.stderr), file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """`text`, parts of which a file may have chosen, without line breaks and control characters."""
    return " ".join(text.split()).translate(CONTROLS)


def complain(text: str) -> None:
    """The one line of an error."""
    print(f"{coloured('npllm:', RED, sys.stderr)} {one_line(text)}", file=sys.stderr, flush=True)


def write_json(document: dict[str, Any]) -> None:
    """One JSON document; numbers that JSON does not know (NaN, infinities) become null."""
    write(json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def timings(text: str, verbose: bool) -> None:
    """A line of timings: for people at a terminal, and for those who ask."""
    if verbose or is_terminal(sys.stderr):
        note(text)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = coloured(f"{record.levelname.lower()}:", YELLOW, sys.stderr)
        return f"npllm: {level} {one_line(record.getMessage())}"


@contextlib.contextmanager
def logging_to_stderr(verbose: bool) -> Iterator[None]:
    """Messages of the logger "npllm" as one line each on stderr: warnings, and when `verbose` what is worth knowing."""
    logger, handler = logging.getLogger("npllm"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def speed(stream: Stream) -> str:
    """The line of timings of an answer. Its first token comes with the prompt, so it does not count in its rate."""
    usage, timings = stream.usage, stream.timings

    def rate(per_second: float) -> str:
        return f" ({per_second:,.1f} per second)" if per_second else ""

    computed = usage.prompt_tokens - usage.cached_tokens
    prompt = f"prompt {computed} tokens{rate(timings.prompt_per_second)}"
    return f"{prompt}, answer {usage.completion_tokens}{rate(timings.generation_per_second)}"


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar headed `what`, moved by (bytes done, bytes in all), on a terminal; else None."""
    if not is_terminal(sys.stderr):
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc=what, delay=0.5, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
