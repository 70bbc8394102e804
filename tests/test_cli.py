"""The command line: results on stdout and nothing else there, one line per error, the right exit status."""

import contextlib
import errno
import io
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import npllm
from npllm import __version__
from npllm.cli import VERBS, bench, build_parser, chat, doctor, generate, main, options, output, score, slice
from npllm.errors import NpllmError
from npllm.promptcache import PromptCache
from npllm.tokenizer import Tokenizer
from tests.export import TRUTH
from tests.models import CHATML, make_checkpoint
from tests.talker import make_talker

PICKLES = Path(__file__).parent / "data" / "pickles"

# Small products gain nothing from threads, and lose much where other programs want the cores.
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "80"}


class Result(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("generate", ..., stdin="...")` in this process."""

    def call(*argv: str | Path, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        status = main([str(each) for each in argv])
        return Result(status, *capsys.readouterr())

    return call


def spawn(*argv: str | Path, stdin: str | None = None, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "npllm", *map(str, argv)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, encoding="utf-8", env=ENVIRONMENT, **options
    )


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers every chat with "<think>hm</think>Yes.", and goes on after "a" with "bc"."""
    return make_talker(tmp_path_factory.mktemp("thinker"), "\n<think>hm</think>Yes.<|im_end|>", "abc<|im_end|>")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says "ababab..." until it is stopped."""
    return make_talker(tmp_path_factory.mktemp("endless"), "\naba", context=1 << 20)


@pytest.fixture(scope="module")
def untemplated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talker(tmp_path_factory.mktemp("untemplated"), "abc<|im_end|>", template=None)


def documented(module: ModuleType) -> list[str]:
    """The fields of a verb's JSON document that its docstring lists."""
    return re.findall(r"^    (\w+) {2,}\S", module.__doc__ or "", flags=re.MULTILINE)


# -- help and usage ---------------------------------------------------------------------------------------------------


def test_help_fits_a_screen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run("--help")
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert all(f"    {verb}" in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_examples_that_parse(run: Run, verb: str) -> None:
    status, out, _ = run(verb, "--help")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 100
    examples = out.partition("examples:\n")[2].splitlines()
    assert examples
    for example in examples:
        words = shlex.split(example.partition(" > ")[0].partition(" < ")[0].rpartition("npllm ")[2])
        assert build_parser().parse_args(words).verb == verb


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"npllm {__version__}\n", "")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["sing"],
        ["generate", "a", "--weights", "cloud"],
        ["generate", "a", "--top-k", "many"],
        ["generate", "a", "--no-such-option"],
        ["generate", "a", "--max-tok", "3"],
        ["generate", "a", "-p", "b"],
        ["generate", "a", "--logprobs", "2"],
        ["generate", "a", "--raw", "--system", "b"],
        ["generate", "a", "--template-arg", "b"],
        ["convert", "a"],
        ["bench", "--shape", "gpt2", "-m", "gpt2"],
        ["bench", "--shape", "gpt2", "--max-context", "8"],
    ],
)
def test_wrong_usage_is_one_line_and_status_2(run: Run, argv: list[str]) -> None:
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"npllm: .+\n", err)


def test_a_terminal_is_not_read_for_a_prompt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "StringIO", FakeTerminal)
    status, _, err = run("generate")
    assert status == 2
    assert "a text is missing" in err


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'tokenizers', 'jinja2', 'huggingface_hub', 'ml_dtypes', 'safetensors', 'tqdm', 'threadpoolctl'}"
    code = f"import sys; from npllm.cli import main; main(['--help']); sys.exit(str({heavy} & {{*sys.modules}} or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stderr) == (1, "\n"), done.stderr


# -- generate ---------------------------------------------------------------------------------------------------------


def test_generate_applies_the_chat_template(run: Run, thinker: Path) -> None:
    assert run("generate", "-m", thinker, "Hello?") == (0, "<think>hm</think>Yes.\n", "")


def test_generate_raw(run: Run, thinker: Path) -> None:
    assert run("generate", "-m", thinker, "--raw", "a") == (0, "bc\n", "")


def test_generate_without_a_template_continues_the_text(run: Run, untemplated: Path) -> None:
    assert run("generate", "-m", untemplated, "-p", "a") == (0, "bc\n", "")


@pytest.mark.parametrize("argv", [["-"], [], ["--prompt", "-"]])
def test_the_prompt_comes_from_a_pipe(run: Run, thinker: Path, argv: list[str]) -> None:
    assert run("generate", "-m", thinker, "--raw", *argv, stdin="aa\n").out == "bc\n"


def test_the_prompt_comes_from_a_file(run: Run, thinker: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("ä a", encoding="utf-8")
    assert run("generate", "-m", thinker, "--raw", "--file", tmp_path / "prompt.txt").out == "bc\n"


def test_a_leading_dash_is_a_prompt_behind_an_equals_sign(run: Run, thinker: Path) -> None:
    assert run("generate", "-m", thinker, "--raw", "--prompt=-a").out == "bc\n"


def test_options_reach_the_model(run: Run, endless: Path) -> None:
    assert run("generate", "-m", endless, "x", "-n", "5").out == "ababa\n"
    assert run("generate", "-m", endless, "x", "-n", "9", "--stop", "bab").out == "a\n"
    assert run("generate", "-m", endless, "x", "-n", "9", "--stop", "y", "--stop", "ba").out == "a\n"


def test_every_sampling_option_is_an_argument(run: Run, thinker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, Any] = {}
    real = npllm.LLM.stream

    def stream(self: Any, ids: list[int], **options: Any) -> npllm.Stream:
        taken.update(options)
        return real(self, ids, max_tokens=1)

    monkeypatch.setattr("npllm.LLM.stream", stream)
    given = {
        "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 4,
        "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3,
    }  # fmt: skip
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    assert run("generate", "-m", thinker, "x", *argv, "--ignore-eos", "--stop", "s").status == 0
    assert taken == given | {"ignore_eos": True, "stop": ["s"]}


def test_system_and_template_arguments(run: Run, thinker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = record_templates(monkeypatch)
    argv = ["--template-arg", "enable_thinking=false", "--template-arg", "mood=calm", "--template-arg", "n=[1]"]
    assert run("generate", "-m", thinker, "x", "--system", "s", *argv).status == 0
    [(messages, arguments)] = seen
    assert messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]
    assert arguments["enable_thinking"] is False
    assert (arguments["mood"], arguments["n"]) == ("calm", [1])


def record_templates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Messages and arguments of every rendering from now on."""
    seen: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []
    original = Tokenizer.apply_chat_template

    def record(self: Tokenizer, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(([dict(message) for message in conversation], kwargs))
        return original(self, conversation, *args, **kwargs)

    monkeypatch.setattr(Tokenizer, "apply_chat_template", record)
    return seen


def test_generate_json(run: Run, thinker: Path) -> None:
    status, out, err = run("generate", "-m", thinker, "--raw", "a", "--json", "--logprobs", "2")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert list(found) == documented(generate)
    assert found["schema"] == "npllm.generate/1"
    assert (found["text"], found["finish_reason"]) == ("bc", "stop")
    assert (found["model"], found["backend"], found["dtype"]) == (str(thinker), "numpy", "float32")
    assert found["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "cached_tokens": 0, "total_tokens": 4}
    assert found["tokens"][-1] == found["stop"]
    first = found["logprobs"][0]
    assert first["text"] == first["alternatives"][0]["text"] == "b"
    assert first["logprob"] == first["alternatives"][0]["logprob"] > first["alternatives"][1]["logprob"]


def test_generate_json_without_logprobs(run: Run, untemplated: Path) -> None:
    found = json.loads(run("generate", "-m", untemplated, "a", "--json", "-n", "1", "--kv-dtype", "bfloat16").out)
    assert (found["text"], found["finish_reason"], found["stop"], found["logprobs"]) == ("b", "length", None, None)
    assert found["kv_dtype"] == "bfloat16"


def test_timings_only_on_demand_without_a_terminal(run: Run, thinker: Path) -> None:
    err = run("generate", "-m", thinker, "--raw", "a", "-v").err
    assert re.search(r"^prompt 1 tokens \([\d.,]+ per second\), answer 3 \([\d.,]+ per second\)$", err, re.MULTILINE)


# -- score ------------------------------------------------------------------------------------------------------------


def test_score_table(run: Run, thinker: Path) -> None:
    status, out, err = run("score", "-m", thinker, "abc")
    lines = out.splitlines()
    assert (status, err, len(lines)) == (0, "", 5)
    assert [line.split()[-1] for line in lines[1:4]] == ["'a'", "'b'", "'c'"]
    assert "total of 3 tokens, perplexity" in lines[-1]


def test_score_json(run: Run, thinker: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abc\n")
    found = json.loads(run("score", "-m", thinker, "--file", tmp_path / "text", "--json").out)
    assert list(found) == documented(score)
    assert found["schema"] == "npllm.score/1"
    assert [each["text"] for each in found["tokens"]] == list("abc")
    logprobs = [each["logprob"] for each in found["tokens"]]
    assert logprobs[0] is None
    assert found["total_logprob"] == pytest.approx(sum(logprobs[1:]))
    assert found["perplexity"] == pytest.approx(np.exp(-sum(logprobs[1:]) / 2))


def test_score_of_one_token_has_no_perplexity(run: Run, thinker: Path) -> None:
    found = json.loads(run("score", "-m", thinker, "-", "--json", stdin="a").out)
    assert (found["perplexity"], found["total_logprob"]) == (None, 0)


# -- chat -------------------------------------------------------------------------------------------------------------


def test_chat_from_a_pipe(run: Run, thinker: Path) -> None:
    assert run("chat", "-m", thinker, stdin="One?\n\nTwo?\n") == (0, "Yes.\nYes.\n", "| hm\n| hm\n")


def test_chat_keeps_reasoning_apart_in_its_history(run: Run, thinker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = record_templates(monkeypatch)
    run("chat", "-m", thinker, "--system", "s", "--template-arg", "k=1", stdin="One?\nTwo?\n")
    messages, arguments = seen[-1]
    assert arguments["k"] == 1
    assert messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"},
        {"role": "user", "content": "Two?"},
    ]


def test_chat_commands(run: Run, thinker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = record_templates(monkeypatch)
    lines = "/system Be brief.\nOne?\n/reset\nTwo?\n/system\n/reset\n//help\n/etc/hosts?\n/help\n/nonsense\n/exit\nThree?\n"
    status, out, err = run("chat", "-m", thinker, stdin=lines)
    assert (status, out) == (0, "Yes.\n" * 4)
    system = {"role": "system", "content": "Be brief."}
    said = [messages for messages, _ in seen]
    assert said[0] == [system, {"role": "user", "content": "One?"}]
    assert said[1] == [system, {"role": "user", "content": "Two?"}]
    assert said[2] == [{"role": "user", "content": "/help"}]
    assert said[3][-1] == {"role": "user", "content": "/etc/hosts?"}
    assert "forget the conversation" in err
    assert "/nonsense is no command" in err


def test_chat_reuses_the_cache_of_earlier_turns(run: Run, thinker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    rewind = PromptCache.rewind
    monkeypatch.setattr(PromptCache, "rewind", lambda self, prompt: kept.append(rewind(self, prompt)) or kept[-1])
    run("chat", "-m", thinker, stdin="One?\nTwo?\n")
    first = len("user\nOne?\nassistant\n") + 3
    assert kept == [0, first]


def test_reasoning_that_the_prompt_opens(run: Run, tmp_path: Path) -> None:
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    folder = make_talker(tmp_path, "<think>hm</think>Yes.<|im_end|>", template=template)
    assert run("chat", "-m", folder, stdin="One?\n") == (0, "Yes.\n", "| hm\n")


def test_a_cut_off_answer_says_so(run: Run, endless: Path) -> None:
    status, out, err = run("chat", "-m", endless, "-n", "4", stdin="x\n")
    assert (status, out) == (0, "abab\n")
    assert "cut off at 4 tokens" in err


def test_a_full_context_suggests_reset(run: Run, tmp_path: Path) -> None:
    folder = make_talker(tmp_path, "\naba", context=40)
    status, out, err = run("chat", "-m", folder, stdin="x\nAnd another question?\n")
    assert status == 1
    assert set(out) == {"a", "b", "\n"}
    assert "context of 40 tokens is full; /reset" in err
    assert re.search(r"^npllm: the prompt has \d+ tokens.*/reset starts the conversation anew$", err, re.MULTILINE)


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize("name", ["messages", "tokenize", "conversation", "tools"])
def test_a_template_argument_that_npllm_sets_itself(run: Run, thinker: Path, verb: str, name: str) -> None:
    found = run(verb, "-m", thinker, "--template-arg", f"{name}=1", stdin="x\n")
    assert f"template_args: {name} cannot be set" in failed_in_one_line(found)


def test_chat_needs_a_template(run: Run, untemplated: Path) -> None:
    status, out, err = run("chat", "-m", untemplated, stdin="x\n")
    assert (status, out) == (1, "")
    assert "has no chat template" in err


def conversation(folder: Path, **changes: Any) -> chat.Conversation:
    args = build_parser().parse_args(["chat", "-m", str(folder)])
    return chat.Conversation(options.load_model(args), Namespace(**(vars(args) | changes)), interactive=True)


def test_a_stopped_answer_stays_as_far_as_it_came(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, shown = conversation(endless), []
    show = chat.Screen.show

    def interrupt(self: chat.Screen, parts: list[Any]) -> None:
        show(self, parts)
        shown.append(parts)
        if len(shown) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat.Screen, "show", interrupt)
    talk.turn("x")
    assert talk.messages == [{"role": "user", "content": "x"}, {"role": "assistant", "content": "aba"}]
    assert len(talk.cache.tokens) == talk.cache.cache.lengths[talk.cache.slot] > 3


def test_a_turn_stopped_before_its_answer_is_forgotten(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    talk = conversation(endless)
    monkeypatch.setattr("npllm.llm.Model.run", interrupted)
    talk.turn("x")
    assert talk.messages == []
    monkeypatch.undo()
    talk.sampling["max_tokens"] = 2
    talk.turn("y")
    assert talk.messages[-1] == {"role": "assistant", "content": "ab"}


def test_a_refusing_template_does_not_end_a_conversation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    talk = conversation(make_talker(tmp_path, "\nab<|im_end|>", template=template), system="s")
    talk.turn("x")
    assert "no system" in capsys.readouterr().err
    assert talk.take("/system")
    talk.turn("x")
    assert talk.messages[-1]["content"] == "ab"


class Terminal:
    """A program on a terminal of its own."""

    BOOT = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "from npllm.cli import main; sys.exit(main(sys.argv[1:]))"
    )

    def __init__(self, *argv: str | Path, **environment: str) -> None:
        import fcntl
        import pty
        import termios

        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x18\x00\x50\x00\x00\x00\x00\x00")
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.BOOT, *map(str, argv)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=ENVIRONMENT | environment,
        )
        os.close(theirs)
        self.seen = ""

    def send(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def expect(self, pattern: str, seconds: float = 60) -> str:
        """Read until `pattern` is there -> the text up to its end, which is then forgotten."""
        limit = time.monotonic() + seconds
        while (found := re.search(pattern, self.seen)) is None:
            left = limit - time.monotonic()
            assert left > 0, f"{pattern!r} did not come; last: {self.seen[-300:]!r}"
            if select.select([self.ours], [], [], left)[0]:
                self.seen += self._read()
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def _read(self) -> str:
        try:
            return os.read(self.ours, 1 << 16).decode("utf-8", "replace")
        except OSError:  # how Linux says that the other side is closed
            raise AssertionError(f"the program ended; last: {self.seen[-300:]!r}") from None

    def end(self) -> int:
        status = self.process.wait(timeout=60)
        os.close(self.ours)
        return status

    def leave(self) -> int:
        """Say so until it is heard: a Ctrl-C that is still under way takes the line with it."""
        while self.process.poll() is None:
            self.send("/exit\n")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=3)
        return self.end()


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    with contextlib.ExitStack() as stack:

        def start(*argv: str | Path, **environment: str) -> Terminal:
            started = Terminal(*argv, **environment)
            stack.callback(started.process.wait)
            stack.callback(started.process.kill)
            return started

        yield start


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Callable[..., Terminal], endless: Path) -> None:
    screen = terminal("chat", "-m", endless, "-n", "1000000")
    screen.expect(r"/help lists the commands")
    screen.expect(r"> $")
    screen.send("x\n")
    screen.expect(r"(ab){20}")
    screen.send("\x03")
    screen.expect(r"\(stopped\)")
    screen.expect(r"> $")
    screen.send("half a line")
    screen.expect(r"half a line")
    # Python's readline loses a signal that comes while it still takes in characters.
    time.sleep(0.2)
    screen.send("\x03")
    screen.expect(r"Ctrl-D or /exit leaves")
    screen.expect(r"> $")
    screen.send("\x04")
    assert screen.end() == 0


def test_a_ctrl_c_held_down_does_not_end_the_program(terminal: Callable[..., Terminal], endless: Path) -> None:
    screen = terminal("chat", "-m", endless, "-n", "1000000")
    screen.expect(r"> $")
    screen.send("x\n")
    screen.expect(r"(ab){20}")
    for _ in range(40):
        screen.send("\x03")
        time.sleep(0.005)
    screen.expect(r"\(stopped\)")
    screen.expect(r"> $")
    time.sleep(0.2)
    assert screen.leave() == 0


def test_bytes_that_are_no_text_do_not_end_a_conversation(terminal: Callable[..., Terminal], thinker: Path) -> None:
    screen = terminal("chat", "-m", thinker, PYTHONUTF8="1")
    screen.expect(r"> $")
    os.write(screen.ours, b"\xff\n")
    screen.expect(r"stdin: not utf-8 text")
    screen.expect(r"> $")
    screen.send("/exit\n")
    assert screen.end() == 0


def test_reasoning_on_a_terminal(terminal: Callable[..., Terminal], thinker: Path) -> None:
    screen = terminal("chat", "-m", thinker)
    screen.expect(r"> $")
    screen.send("x\n")
    screen.expect(r"\x1b\[2mhm\x1b\[0m\r\nYes\.\r\n")
    screen.expect(r"prompt \d+ tokens .* answer \d+ ")
    screen.expect(r"> $")
    screen.send("/exit\n")
    assert screen.end() == 0


def test_reasoning_on_a_terminal_without_colours(terminal: Callable[..., Terminal], thinker: Path) -> None:
    screen = terminal("chat", "-m", thinker, NO_COLOR="1")
    assert "\x1b[2m" not in screen.expect(r"> $")
    screen.send("x\n")
    screen.expect(r"\| hm\r\nYes\.\r\n")
    screen.send("/exit\n")
    assert screen.end() == 0


def test_ctrl_c_ends_generate_with_130(terminal: Callable[..., Terminal], endless: Path) -> None:
    screen = terminal("generate", "-m", endless, "x", "-n", "1000000")
    screen.expect(r"(ab){20}")
    screen.send("\x03")
    assert screen.end() == 130


# -- convert, doctor, bench -------------------------------------------------------------------------------------------


def test_convert(run: Run, tmp_path: Path) -> None:
    status, out, err = run("convert", PICKLES / "plain_zip.bin", tmp_path / "made")
    assert (status, out, err) == (0, f"{tmp_path / 'made'}\n", "")
    assert (tmp_path / "made" / "model.safetensors").is_file()
    status, out, err = run("convert", PICKLES / "plain_zip.bin", tmp_path / "made")
    assert (status, out) == (1, "")
    assert "--overwrite" in err
    assert run("convert", PICKLES / "plain_zip.bin", tmp_path / "made", "--overwrite").status == 0


def test_slice(run: Run, tmp_path: Path) -> None:
    """By layers and widths, by preset; the folder's name alone on stdout, or a document with the fields of its docstring."""
    whole, out = TRUTH / "models" / "gemma3n", tmp_path / "out"
    cut = ("--layers", "0-1,4", "--ffn", "18,26,17")
    assert run("slice", whole, out, *cut) == (0, f"{out}\n", "")
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == [18, 26, 17]
    status, text, err = run("slice", whole, tmp_path / "again", "--ffn", "20x2,26x3", "--json")
    document = json.loads(text)
    assert (status, err) == (0, "")
    assert list(document) == documented(slice)
    assert document["schema"] == "npllm.slice/1"
    assert document["ffn"] == [20, 20, 26, 26, 26]
    llm = npllm.load(tmp_path / "again", backend="numpy")
    assert (document["parameters"], document["bytes"]) == (llm.parameters, 4 * llm.parameters)


def test_slice_refuses_in_one_line(run: Run, tmp_path: Path) -> None:
    whole = TRUTH / "models" / "gemma3n"
    (tmp_path / "file").write_text("")
    for out, cut, wanted, words in (
        (tmp_path / "out", [], 2, "say what to cut"),
        (tmp_path / "out", ["--preset", "e2b", "--ffn", "8192"], 2, "say what to cut"),
        (tmp_path / "out", ["--layers", "0-"], 2, "'0-' is neither a layer nor a range"),
        (tmp_path / "out", ["--layers", "0-1,4-3"], 2, "'4-3' is neither a layer nor a range"),
        (tmp_path / "out", ["--layers", "0-9999"], 2, "10000 layers"),
        (tmp_path / "out", ["--ffn", "20x5,24x0"], 2, "'24x0' is no width"),
        (tmp_path / "out", ["--ffn", "wide"], 2, "'wide' is no width"),
        (tmp_path / "out", ["--preset", "e2b"], 1, "no layer 20"),
        (tmp_path / "out", ["--layers", "1-4"], 1, "layer 0 cannot be dropped"),
        (tmp_path, ["--ffn", "20"], 1, "is not an empty folder"),
        ("", ["--ffn", "20"], 2, "the name is empty"),
    ):
        status, text, err = run("slice", whole, out, *cut)
        assert (status, text) == (wanted, "")
        assert words in err
        assert len(err.splitlines()) == 1


def test_convert_names_are_those_of_a_shell(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "weights.bin").write_bytes((PICKLES / "plain_zip.bin").read_bytes())
    assert run("convert", "~/weights.bin", "~/made").out == f"{tmp_path / 'made'}\n"
    for names in (["", "made"], ["weights.bin", ""]):
        status, out, err = run("convert", *names)
        assert (status, out) == (2, "")
        assert "the name is empty" in err


def test_doctor_says_that_the_cache_cannot_be_written(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert json.loads(run("doctor", "--json").out)["cache"]["writable"] is True
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert "free on its disk, not writable\n" in run("doctor").out


def test_doctor_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@example.org")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    status, out, err = run("doctor", "--json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert "secret" not in out
    assert list(found) == documented(doctor)
    assert found["schema"] == "npllm.doctor/1"
    assert found["environment"]["HF_TOKEN"] == found["environment"]["HF_ENDPOINT"] == "set"
    assert found["environment"]["OMP_NUM_THREADS"] == "1"
    assert found["versions"]["npllm"] == __version__
    assert found["versions"]["numpy"] == np.__version__
    assert found["backends"]["numpy"] == {"loads": True, "dtype": "float32", "reason": None, "facts": {}}


def test_doctor_says_why_a_backend_does_not_load(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npllm.registry.available_backends", lambda: {"numpy": "", "quick": "needs a part\nthat is missing"})
    out = run("doctor").out
    assert "numpy: loads, computes in float32\n" in out
    assert "needs a part that is missing\n" in out


def test_bench(run: Run, endless: Path) -> None:
    argv = ["bench", "-m", endless, "--prompt-tokens", "4", "--new-tokens", "2", "--repetitions", "1", "--threads", "1"]
    found = json.loads(run(*argv, "--json").out)
    assert list(found) == documented(bench)
    assert found["schema"] == "npllm.bench/1"
    assert found["threads"] == 1
    assert [each["test"] for each in found["results"]] == ["pp4", "tg2"]
    header, _, *rows = run(*argv).out.splitlines()
    assert header.startswith("| model |")
    assert len(rows) == 2
    assert run(*argv, "--format", "csv").out.startswith("model,")


# -- failures ---------------------------------------------------------------------------------------------------------


def broken(tmp_path: Path, damage: Callable[[Path], Any]) -> Path:
    folder = make_checkpoint(tmp_path / "model")
    damage(folder)
    return folder


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, folder / "model.safetensors")


DAMAGE = {
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "config.json is not JSON": lambda folder: (folder / "config.json").write_text("{\n\n"),
    "unknown model": lambda folder: (folder / "config.json").write_text('{"model_type": "qwen33"}'),
    "truncated weights": truncate,
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "NaN": poison,
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "bad tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "bad template": lambda folder: (folder / "chat_template.jinja").write_text("{% if %}"),
}


def failed_in_one_line(result: Result) -> str:
    assert result.status == 1
    assert result.out == ""
    assert re.fullmatch(r"npllm: [^\n]+\n", result.err)
    return result.err


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_model_fails_in_one_line(run: Run, tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    failed_in_one_line(run("generate", "-m", broken(tmp_path, damage), "x", "--threads", "1"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", ""], "prompt is empty"),
        (["generate"], "prompt is empty"),
        (["generate", "-"], "prompt is empty"),
        (["generate", "--file", "/no/such/file"], "/no/such/file: cannot be read"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--top-p", "7"], "top_p"),
        (["generate", "x", "-n", "0"], "max_tokens"),
        (["generate", "x", "--threads", "0"], "threads"),
        (["generate", "x", "--dtype", "int3"], "int3"),
        (["generate", "x", "--kv-dtype", "int3"], "int3"),
        (["generate", "x", "--quantize", "q5"], "quant"),
        (["generate", "x", "--backend", "abacus"], "abacus"),
        (["generate", "x", "--max-context", "0"], "max_context"),
        (["generate", "x", "--stop", ""], "stop"),
        (["generate", "x", "--json", "--logprobs", "-3"], "logprobs"),
        (["generate", "x" * 5000], "context of 4096"),
        (["score", "x" * 5000], "context of 4096"),
        (["score", ""], "prompt is empty"),
        (["score", "a\udcff"], "character 1 is half of a surrogate pair"),
        (["bench", "--prompt-tokens", "0", "--new-tokens", "0"], "not both 0"),
    ],
)
def test_bad_values_fail_in_one_line(run: Run, thinker: Path, argv: list[str], message: str) -> None:
    assert message in failed_in_one_line(run(*argv, "-m", thinker))


@pytest.mark.parametrize("argv", [["--system", "s"], ["--template-arg", "a=1"]])
def test_template_options_need_a_template(run: Run, untemplated: Path, argv: list[str]) -> None:
    assert "has no chat template" in failed_in_one_line(run("generate", "x", "-m", untemplated, *argv))


def test_a_missing_folder(run: Run, tmp_path: Path) -> None:
    assert "no such folder, nor spelled like a hub id" in failed_in_one_line(
        run("generate", "x", "-m", tmp_path / "missing")
    )


def test_text_that_is_not_utf8(run: Run, thinker: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"abc\xff")
    assert "text: not UTF-8 text (byte 3)" in failed_in_one_line(run("score", "-m", thinker, "-f", tmp_path / "text"))
    with spawn("score", "-m", thinker, "-", errors="surrogateescape") as process:
        out, err = process.communicate("abc\udcff")
    assert failed_in_one_line(Result(process.returncode, out, err)).startswith("npllm: stdin: not utf-8 text (byte 3)")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (PermissionError(13, "Permission denied", "/a/b"), 1, "npllm: /a/b: Permission denied\n"),
        (NpllmError("two\nlines"), 1, "npllm: two lines\n"),
        (MemoryError("Unable to allocate 4 GiB"), 1, "npllm: out of memory (Unable to allocate 4 GiB)"),
        (RuntimeError("oh\x1b[2J"), 1, "npllm: unexpected RuntimeError: oh\ufffd[2J (please report"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_an_error_becomes(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, message: str
) -> None:
    def fail(args: Namespace) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    found = run("doctor")
    assert (found.status, found.out, found.err[: len(message)]) == (status, "", message)
    assert "Traceback" not in found.err
    debugged = run("doctor", "--debug").err
    assert ("Traceback" in debugged) == (status == 1)


def test_warnings_are_one_line_each(run: Run, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, auto_map={"AutoModel": "code.Model"}, odd_key=1)
    status, _, err = run("generate", "-m", folder, "x", "-n", "1", "--threads", "1")
    first, second = err.splitlines()
    assert status == 0
    assert first.startswith("npllm: warning: ")
    assert "auto_map" in first
    assert "odd_key" in second


def test_a_reader_that_goes_away_is_no_error(endless: Path) -> None:
    with spawn("generate", "-m", endless, "x", "-n", "1000000") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10) == "ababababab"
        process.stdout.close()
        assert process.wait(timeout=20) == 141
        assert process.stderr.read() == ""


class FullDisk(io.StringIO):
    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("argv", [["doctor"], ["score", "abc"], ["generate", "x"], ["generate", "x", "--json"]])
def test_a_full_disk_is_no_bug(
    thinker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", FullDisk())
    assert main(argv + ([] if argv == ["doctor"] else ["-m", str(thinker)])) == 1
    assert capsys.readouterr().err == "npllm: stdout: cannot be written (No space left on device)\n"


@pytest.mark.skipif(os.name != "posix", reason="closes streams with a POSIX shell")
@pytest.mark.parametrize(
    ("verb", "closed", "status"),
    [("generate x", "<&-", 0), ("generate", "<&-", 1), ("chat", "<&-", 0), ("score ab", ">&-", 0), ("chat", "2>&-", 0)],
)
def test_streams_that_the_caller_has_closed(thinker: Path, verb: str, closed: str, status: int) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m npllm {verb} -m {shlex.quote(str(thinker))} {closed}"
    found = subprocess.run(command, shell=True, input="x\n", env=ENVIRONMENT, capture_output=True, text=True)
    assert found.returncode == status
    assert found.stderr == ("npllm: the prompt is empty\n" if status else "")


def test_an_interrupt_ends_a_pipe_with_130(endless: Path) -> None:
    with spawn("chat", "-m", endless, "-n", "1000000") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("x\n")
        process.stdin.flush()
        process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")


# -- what goes where --------------------------------------------------------------------------------------------------


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert output.coloured("x", output.DIM, FakeTerminal()) == "\033[2mx\033[0m"
    assert output.coloured("x", output.DIM, io.StringIO()) == "x"
    monkeypatch.setenv("TERM", "dumb")
    assert not output.has_colours(FakeTerminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not output.has_colours(FakeTerminal())


def test_a_model_cannot_steer_the_terminal() -> None:
    assert output.printable("a\x1b[2J\tb\n\x9b", FakeTerminal()) == "a\ufffd[2J\tb\n\ufffd"
    assert output.printable("a\x1b[2J", io.StringIO()) == "a\x1b[2J"


# -- the shipped model ------------------------------------------------------------------------------------------------


def test_the_shipped_model_answers(run: Run) -> None:
    status, out, err = run("generate", "How many experts does DeepSeek V3 activate per token?", "--threads", "1")
    assert (status, err) == (0, "")
    assert "8" in out


def test_the_shipped_model_chats(run: Run) -> None:
    question = "How many experts does DeepSeek V3 activate per token?\n"
    status, out, err = run("chat", "--threads", "1", stdin=question + "/reset\n" + question)
    first, second = out.splitlines()
    assert (status, err) == (0, "(the conversation starts anew)\n")
    assert first == second
