"""`npllm chat`: a conversation in the terminal, or with every line of a pipe as a turn.

On a terminal, Ctrl-C stops the answer and keeps what came of it; Ctrl-D leaves. Reasoning (`<think>` blocks) is shown
dimmed; where stdout is no terminal it goes to stderr, each line behind a bar, so stdout has the answers alone. The key/value
cache of a turn serves the next one.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from npllm.cli import options, output
from npllm.errors import ArgumentError, ContextError, TemplateError

if TYPE_CHECKING:
    from npllm.llm import LLM
    from npllm.reasoning import Part

HELP = "talk with a model"
OPERANDS = ""

EXAMPLES = """\
examples:
  npllm chat
  npllm chat -m Qwen/Qwen3-0.6B --system "You answer in rhymes." --temperature 0.7 --seed 1
  npllm chat -m Qwen/Qwen3-0.6B --template-arg enable_thinking=false < questions.txt
"""

COMMANDS = """\
/reset          forget the conversation; the system prompt stays
/system TEXT    set the system prompt; without TEXT, remove it
/help           this list
/exit           leave, as Ctrl-D does
Ctrl-C stops an answer. A line that begins with // is sent with one slash."""

PROMPT = "> "

# An answer's length when neither the options nor the model give one: reasoning needs more than npllm.llm.MAX_TOKENS.
MAX_TOKENS = 4096

# Stands before each line of reasoning where it cannot be dimmed.
BAR = "| "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_template(parser)
    options.add_sampling(parser)
    options.add_model(parser)


def run(args: argparse.Namespace) -> int:
    llm = options.load_model(args)
    if llm.tokenizer.chat_template is None:
        raise ArgumentError(f"{llm.name}: has no chat template, so it cannot chat; use npllm generate --raw")
    interactive = output.is_terminal(sys.stdin)
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() edits lines and remembers them once it is imported)
        output.note(f"{llm.name}: {llm.parameters:,} parameters, context {llm.max_context}. /help lists the commands.")
    conversation = Conversation(llm, args, interactive)
    with Interrupts(interactive) as interrupts:
        for line in lines(interactive, interrupts):
            interrupts.arm()
            if not conversation.take(line):
                break
    return 0


class Interrupts:
    """Ctrl-C as KeyboardInterrupt, once after each `arm()`: a key held down ends the answer and not the program."""

    def __init__(self, wanted: bool) -> None:
        # Python lets only the main thread handle signals.
        self.wanted = wanted and threading.current_thread() is threading.main_thread()
        self.armed = True

    def __enter__(self) -> Interrupts:
        if self.wanted:
            self.before = signal.signal(signal.SIGINT, self._strike)
        return self

    def __exit__(self, *error: object) -> None:
        if self.wanted:
            signal.signal(signal.SIGINT, self.before)

    def arm(self) -> None:
        self.armed = True

    def _strike(self, number: int, frame: FrameType | None) -> None:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt


def lines(interactive: bool, interrupts: Interrupts) -> Iterator[str]:
    """What the user enters, without blank lines; Ctrl-C at the prompt only drops the line."""
    while True:
        try:
            interrupts.arm()
            line = _ask() if interactive else options.read_line()
        except EOFError:
            if interactive:
                output.note("")
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            output.note("\n(Ctrl-D or /exit leaves)")
            continue
        except ArgumentError as bad:
            if not interactive:
                raise
            output.complain(str(bad))
            continue
        if line.strip():
            yield line


def _ask() -> str:
    if output.is_terminal(sys.stdout):
        with options.decoding_stdin():
            return input(PROMPT)
    # input() would write its prompt into the result.
    sys.stderr.write(PROMPT)
    sys.stderr.flush()
    return options.read_line()


class Conversation:
    """The messages so far, and the cache that holds them."""

    def __init__(self, llm: LLM, args: argparse.Namespace, interactive: bool) -> None:
        self.llm, self.interactive, self.verbose = llm, interactive, args.verbose
        self.template_args = dict(args.template_arg)
        self.sampling = {"max_tokens": llm.defaults.max_tokens or MAX_TOKENS} | options.sampling(args)
        self.cache = llm.prompt_cache()
        self.system: str | None = args.system
        self.messages: list[dict[str, Any]] = []

    def take(self, line: str) -> bool:
        """Act on a line: a command or a turn -> whether to go on."""
        word, _, rest = line.strip().partition(" ")
        if line.startswith("//"):
            self.turn(line[1:])
        elif word == "/exit":
            return False
        elif word.startswith("/") and word.count("/") == 1:
            self._command(word, rest.strip())
        else:
            self.turn(line)
        return True

    def _command(self, word: str, rest: str) -> None:
        if word == "/reset":
            self.messages.clear()
            output.note("(the conversation starts anew)")
        elif word == "/system":
            self.system = rest or None
            output.note("(system prompt set)" if rest else "(no system prompt)")
        elif word == "/help":
            output.note(COMMANDS)
        else:
            output.note(f"({word} is no command; /help lists them, // at the beginning sends a slash)")

    def turn(self, text: str) -> None:
        """Answer `text`; the turn stays in the conversation as far as it came."""
        self.messages.append({"role": "user", "content": text})
        answer = Answer()
        try:
            self._answer(answer)
        except (ContextError, TemplateError) as error:
            advice = "; /reset starts the conversation anew" if isinstance(error, ContextError) else ""
            if not self.interactive:
                raise ArgumentError(f"{error}{advice}") from error
            output.complain(f"{error}{advice}")
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            output.note("(stopped)")
        finally:
            if answer.parts:
                self.messages.append(answer.message())
            else:
                self.messages.pop()

    def _answer(self, answer: Answer) -> None:
        from npllm.reasoning import ReasoningSplitter, opens_reasoning

        prompt = self._render()
        ids = self.llm.tokenizer.encode(prompt, add_special_tokens=False)
        splitter = ReasoningSplitter(opens_reasoning(prompt))
        with self.llm.stream(ids, cache=self.cache, **self.sampling) as pieces, Screen() as screen:
            for piece in pieces:
                screen.show(answer.add(splitter.push(piece.text)))
            screen.show(answer.add(splitter.finish()))
        self._remark(pieces.finish_reason, pieces.usage.total_tokens)
        if self.interactive or self.verbose:
            output.timings(output.speed(pieces), self.verbose)

    def _render(self) -> str:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.llm.chat_prompt(system + self.messages, template_args=self.template_args)

    def _remark(self, finish_reason: str | None, tokens: int) -> None:
        """Say why an answer is cut off."""
        if finish_reason != "length":
            return
        if tokens >= self.llm.max_context:
            output.note(f"(the context of {self.llm.max_context} tokens is full; /reset starts the conversation anew)")
        else:
            output.note(f"(cut off at {self.sampling['max_tokens']} tokens; --max-tokens allows more)")


class Answer:
    """The parts of an answer that have come."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def add(self, parts: list[Part]) -> list[Part]:
        self.parts += parts
        return parts

    def message(self) -> dict[str, Any]:
        """The assistant's message for the history: reasoning apart, so that the template decides what becomes of it."""
        from npllm.reasoning import join_parts

        reasoning, content = join_parts(self.parts)
        return {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if reasoning else {})


class Screen:
    """Writes the parts of one answer; reasoning apart from the answer. A context manager that ends the last line."""

    def __init__(self) -> None:
        self.stream = sys.stdout if output.is_terminal(sys.stdout) else sys.stderr
        self.dims = output.has_colours(self.stream)
        self.kind: str | None = None

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *error: object) -> None:
        if self.kind == "reasoning":
            self._reason("", last=True)
        elif self.kind == "answer":
            output.write("\n")

    def show(self, parts: list[Part]) -> None:
        for kind, text in parts:
            if self.kind == "reasoning" and kind == "answer":
                self._reason("", last=True)
            if kind == "reasoning":
                self._reason(text, first=self.kind is None)
            else:
                output.write(text)
            self.kind = kind

    def _reason(self, text: str, first: bool = False, last: bool = False) -> None:
        text = output.printable(text, self.stream)
        if self.dims:
            text = (output.DIM if first else "") + text + (output.RESET if last else "")
        else:
            text = (BAR if first else "") + text.replace("\n", "\n" + BAR)
        self.stream.write(text + ("\n" if last else ""))
        self.stream.flush()
