"""The options that several verbs share, and what they mean to `npllm.load` and `LLM.generate`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from npllm.cli import output
from npllm.errors import ArgumentError, ContextError

if TYPE_CHECKING:
    from npllm.llm import LLM

# Names of arguments of `LLM.generate` that are options of the same name.
SAMPLING = (
    "max_tokens temperature top_p top_k min_p seed repetition_penalty presence_penalty frequency_penalty stop ignore_eos"
).split()


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help of at most 100 columns, its examples as they are written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=29, width=min(100, shutil.get_terminal_size().columns))


class Parser(argparse.ArgumentParser):
    """A parser whose usage errors are one line, like all other errors."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs |= {"formatter_class": Formatter, "allow_abbrev": False}
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        output.complain(f"{message} (see {self.prog} --help)")
        self.exit(2)


class UsageError(Exception):
    """Options that parse and contradict each other; exit status 2."""


def add_general(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("general")
    group.add_argument("-v", "--verbose", action="store_true", help="timings and what is worth knowing, on stderr")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("-m", "--model", help="folder or hub id (default: the small model that ships with npllm)")
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--backend", default="auto", help="numpy, numba, another that is installed, or auto (default)")
    group.add_argument("--dtype", help="arithmetic: float32, float64, bfloat16 or stored (default: the backend's choice)")
    group.add_argument("--kv-dtype", help="cached keys and values: float32, float64, bfloat16")
    group.add_argument("--quantize", help="weights in fewer bits: q8 or q4, where the backend can")
    group.add_argument("--weights", default="auto", choices=("auto", "memory", "disk"), help="where they are kept")
    group.add_argument("--threads", type=int, metavar="N", help="of the backend and of BLAS")
    group.add_argument("--max-context", type=int, metavar="N", help="at most so many tokens (default: as trained)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (default: the model's generation_config.json, else greedy)")
    group.add_argument("-n", "--max-tokens", type=int, metavar="N", help="length of the answer")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    group.add_argument("--repetition-penalty", type=float, metavar="X")
    group.add_argument("--presence-penalty", type=float, metavar="X")
    group.add_argument("--frequency-penalty", type=float, metavar="X")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text (may be repeated)")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on at the model's own end")


def add_template(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("chat template")
    group.add_argument("--system", metavar="TEXT", help="system prompt")
    group.add_argument(
        "--template-arg", action="append", default=[], type=_pair, metavar="K=V", help="such as enable_thinking=false"
    )


def add_text(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    """The text to work on: a positional, -p, or a file; `-` is stdin."""
    parser.add_argument("text", nargs="?", metavar=name, help=f"{what}; - reads it from stdin")
    parser.add_argument("-p", "--prompt", metavar=name, help="the same, as an option")
    parser.add_argument("-f", "--file", type=Path, help="the same, from a file")


def filled(text: str) -> str:
    """The type of an argument that must not be empty."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def _pair(text: str) -> tuple[str, Any]:
    """key=value; the value is read as JSON where it is that (false, 3, "x"), and is a string otherwise."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def read_text(args: argparse.Namespace) -> str:
    """The text that the options name; from a pipe when they name none. Its last line break does not count.

    UsageError: none, or more than one. ContextError: it is empty. ArgumentError: the file cannot be read.
    """
    given = [each for each in (args.text, args.prompt, args.file) if each is not None]
    if len(given) > 1:
        raise UsageError("give one text: as an argument, with --prompt or with --file")
    if not given and output.is_terminal(sys.stdin):
        raise UsageError("a text is missing: give it as an argument, or - to read it from stdin")
    if args.file is not None:
        text = _strip(_read_file(args.file))
    else:
        text = _strip(read_stdin()) if not given or given == ["-"] else str(given[0])
    if not text:
        raise ContextError("the prompt is empty")
    return text


def read_stdin() -> str:
    with decoding_stdin():
        return sys.stdin.read()


def read_line() -> str:
    """The next line of stdin, without its line break; EOFError at the end."""
    with decoding_stdin():
        line = sys.stdin.readline()
    if not line:
        raise EOFError
    return _strip(line)


@contextlib.contextmanager
def decoding_stdin() -> Iterator[None]:
    """ArgumentError in place of UnicodeDecodeError."""
    try:
        yield
    except UnicodeDecodeError as bad:
        raise ArgumentError(f"stdin: not {bad.encoding} text (byte {bad.start})") from None


def _read_file(path: Path) -> str:
    try:
        return Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except UnicodeDecodeError as bad:
        raise ArgumentError(f"{path}: not UTF-8 text (byte {bad.start})") from None
    except OSError as bad:
        raise ArgumentError(f"{path}: cannot be read ({bad.strerror})") from None


def _strip(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


def load_model(args: argparse.Namespace) -> LLM:
    """The model that the options describe."""
    from npllm import load

    return load(
        args.model,
        backend=args.backend,
        dtype=args.dtype,
        quantize=args.quantize,
        kv_dtype=args.kv_dtype,
        weights=args.weights,
        threads=args.threads,
        revision=args.revision,
        max_context=args.max_context,
    )


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given, as arguments of `LLM.generate`."""
    return {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}


def about(llm: LLM) -> dict[str, Any]:
    """The fields that say what ran: model, backend, chosen (why that), dtype (arithmetic), kv_dtype; all str."""
    be = llm.backend
    kv_dtype = llm.kv_dtype or be.array_dtype
    return {"model": llm.name, "backend": be.name, "chosen": be.why, "dtype": be.dtype, "kv_dtype": kv_dtype}


def token_text(llm: LLM, token: int) -> str:
    """The text of one token by itself; U+FFFD where it is only a part of a character."""
    return llm.tokenizer.decode([token], skip_special_tokens=False)
