"""The command line: `npllm VERB ...`. One file per verb; each has `HELP`, `OPERANDS`, `EXAMPLES`,
`add_arguments(parser)` and `run(args)`.

stdout gets the result and nothing else; progress, timings, warnings and errors go to stderr. Exit status: 0 done, 1 failed
(with one line that says why), 2 wrong usage, 130 stopped by Ctrl-C, 141 the reader of the output went away.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence

from npllm import __version__
from npllm.cli import (
    bench,
    chat,
    compare,
    convert,
    diff,
    doctor,
    explain,
    generate,
    inspect,
    output,
    quantize,
    score,
    slice,
    verify,
    warmup,
)
from npllm.cli.options import Parser, UsageError, add_general
from npllm.errors import NpllmError

VERBS = {
    "generate": generate,
    "chat": chat,
    "score": score,
    "inspect": inspect,
    "compare": compare,
    "explain": explain,
    "bench": bench,
    "convert": convert,
    "slice": slice,
    "quantize": quantize,
    "verify": verify,
    "diff": diff,
    "warmup": warmup,
    "doctor": doctor,
}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="npllm",
        usage="npllm VERB [options]",
        description='Runs open LLMs from plain NumPy. Its own answers: npllm generate "What is MLA?"',
    )
    parser.add_argument("--version", action="version", version=f"npllm {__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True, prog="npllm")
    for name, module in VERBS.items():
        verb = verbs.add_parser(
            name,
            usage=f"npllm {name} [options] {module.OPERANDS}".rstrip(),
            help=module.HELP,
            description=_sentence(module.HELP),
            epilog=module.EXAMPLES,
        )
        module.add_arguments(verb)
        add_general(verb)
        verb.set_defaults(run=module.run)
    return parser


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) -> exit status."""
    _set_up_streams()
    debug = False
    try:
        args = build_parser().parse_args(argv)
        debug = args.debug
        with output.logging_to_stderr(args.verbose):
            status: int = args.run(args)
        sys.stdout.flush()
        return status
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _abandon_stdout()
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> int:
    if isinstance(error, UsageError):
        output.complain(str(error))
        return 2
    if isinstance(error, NpllmError):
        output.complain(str(error))
    elif isinstance(error, OSError) and error.filename is not None:
        output.complain(f"{error.filename}: {error.strerror}")
    elif isinstance(error, MemoryError):
        output.complain(f"out of memory ({error}): free some, or take a smaller model or context")
    else:
        output.complain(f"unexpected {type(error).__name__}: {error} (please report it with the output of --debug)")
    return 1


def _set_up_streams() -> None:
    """Characters that the output's encoding lacks become question marks; bytes that are no text are an error at once.

    A stream that the caller has closed is an empty input, or an output that nobody reads.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (lives as long as the process)
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors=errors)  # type: ignore[union-attr]


def _abandon_stdout() -> None:
    """Let the interpreter flush stdout at its end without a second complaint."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
