"""Text to token ids and back, through the `tokenizers` package, and the text of a stream of tokens."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from npllm import tekken
from npllm.config import printable, read_json, shown
from npllm.errors import TokenizerError

log = logging.getLogger("npllm")

# Where a tokenizer may be; the first that is there counts.
FILES = ("tokenizer.json", "tekken.json")

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# What a decoder prints for bytes that are not (or not yet) UTF-8.
REPLACEMENT = "\ufffd"

# Characters that the bytes of an unfinished character may show as; a run of byte tokens (Llama 2) may show as one per byte
# and still become text, so shorter waits hold back all of them.
LONGEST_PARTIAL = 3
LONGEST_WAIT = 64

# Tokens that decoding goes back by after such a wait: more than enough for UTF-8 to fall into step.
OVERLAP = 16


class Tokenizer:
    """The tokenizer of a model folder: `tokenizer.json` or Mistral's `tekken.json`, with what `tokenizer_config.json` adds.

    `special_tokens` maps names such as `bos_token` to their text. `chat_template` is the template's source, or None;
    tekken.json brings the form of its version, which the folder's own template replaces.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = next((path for name in FILES if (path := folder / name).is_file()), folder / FILES[0])
        self.own_roles: dict[str, str] = {}
        self.own_template: str | None = None
        self.backend = self._load()
        path = folder / "tokenizer_config.json"
        self.settings = read_json(path, TokenizerError) if path.is_file() else {}
        self.special_tokens = self._special_tokens()
        self.chat_templates = self._chat_templates()

    def _load(self) -> Any:
        if not self.path.is_file():
            raise TokenizerError(f"{self.path}: no such file; text needs a tokenizer, token ids do not")
        if self.path.name == "tekken.json":
            parts = tekken.read(self.path)
            self.own_roles, self.own_template = parts.roles, parts.chat_template
            with _translated(f"{self.path}: not a tokenizer"):
                backend = tekken.build(parts)
        else:
            backend = _read_backend(self.path)
        backend.no_truncation()
        backend.no_padding()
        return backend

    def _special_tokens(self) -> dict[str, str]:
        path = self.folder / "special_tokens_map.json"
        stored = self.own_roles | (read_json(path, TokenizerError) if path.is_file() else {}) | self.settings
        found = {}
        for name in SPECIAL:
            value = stored.get(name)
            if isinstance(value, Mapping):
                value = value.get("content")
            if isinstance(value, str):
                found[name] = value
        return found

    def _chat_templates(self) -> dict[str, str]:
        single = self.folder / "chat_template.jinja"
        if single.is_file():
            try:
                return {"default": single.read_text(encoding="utf-8")}
            except (OSError, UnicodeDecodeError) as bad:
                raise TokenizerError(f"{single}: cannot be read ({bad})") from None
        value = self.settings.get("chat_template")
        if value is None and (self.folder / "chat_template.json").is_file():
            value = read_json(self.folder / "chat_template.json", TokenizerError).get("chat_template")
        if value is None:
            value = self.own_template
        if isinstance(value, str):
            return {"default": value}
        if value is None:
            return {}
        named = value if isinstance(value, list) else []
        if not named or not all(isinstance(each, dict) and {"name", "template"} <= each.keys() for each in named):
            raise TokenizerError(
                f"{self.folder}: chat_template = {shown(value)} is neither a string nor a list of named templates"
            )
        return {str(each["name"]): str(each["template"]) for each in named}

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written `text`, or None."""
        with _translated("the text cannot be encoded"):
            found: int | None = self.backend.token_to_id(text)
        return found

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the tokens that tokenizer.json puts around it (BOS, EOS) unless told otherwise.

        As in transformers 5, `add_bos_token` and `add_eos_token` of tokenizer_config.json have no effect beside a
        tokenizer.json. Unlike there, a text that begins with BOS gets no second one.
        """
        with _translated("the text cannot be encoded"):
            if lone := re.search(r"[\ud800-\udfff]", text):
                raise ValueError(f"character {lone.start()} is half of a surrogate pair: were its bytes not UTF-8?")
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        bos = self._special_id("bos_token") if add_special_tokens else None
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.token_id(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 come out as U+FFFD, ids that stand for no token as nothing."""
        with _translated("the token ids cannot be decoded"):
            return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **template_args: Any,
    ) -> list[int] | str:
        """The conversation as the model was trained to read it -> token ids, or text when `tokenize` is false.

        Arguments are those of transformers. The template writes BOS itself, so none is added. `chat_template` is a
        template's source or the name of one of the model's.
        """
        from npllm.chat_template import render

        text = render(
            self._template(chat_template, tools),
            conversation,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            special_tokens=self.special_tokens,
            **template_args,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _template(self, given: str | None, tools: Sequence[Any] | None) -> str:
        if given is not None:
            return self.chat_templates.get(given, given)
        if tools and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if self.chat_template is None:
            raise TokenizerError(f"{self.folder}: this model has no chat template; use generate, or pass chat_template")
        return self.chat_template


def _read_backend(path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    with _translated(f"{path}: not a tokenizer"):
        backend = Backend.from_file(str(path))
        if tekken.correct_split(backend):
            log.info("%s: its vocabulary is Mistral's, its split Llama 3's by mistake; text is split as Mistral does", path)
    return backend


@contextlib.contextmanager
def _translated(problem: str) -> Iterator[None]:
    """What goes wrong in the tokenizers package as TokenizerError.

    It raises bare Exceptions, and a panic of its Rust code arrives as a BaseException that has no public name.
    """
    try:
        yield
    except BaseException as bad:
        if not isinstance(bad, Exception) and type(bad).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{problem} ({printable(str(bad))})") from None


class TextStream:
    """The text of tokens that come one by one: each piece is whole, and the pieces joined are the text of all.

    A character of several bytes may be spread over tokens; what may still be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self.ids: list[int] = []
        # Decoding starts at `anchor`, one piece back: a decoder may treat its first token unlike the others.
        self.anchor = self.read = self.given = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; often a word, sometimes nothing."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids[self.anchor :], self.skip)
        held = len(text) - len(text.rstrip(REPLACEMENT))
        waited = len(self.ids) - self.read > LONGEST_WAIT
        if waited:
            held = min(held, LONGEST_PARTIAL)
        sure = text[: len(text) - held]
        piece = sure[self.given :]
        self.given = max(self.given, len(sure))
        if piece and not held:
            self._move_on(self.read, len(self.ids), held)
        elif waited:
            self._move_on(len(self.ids) - OVERLAP, len(self.ids) - OVERLAP, held)
        return piece

    def _move_on(self, anchor: int, read: int, held: int) -> None:
        self.anchor, self.read = anchor, read
        self.given = len(self.tokenizer.decode(self.ids[anchor:], self.skip)) - held

    def finish(self) -> str:
        """What was held back: bytes that no further token will complete."""
        return self.tokenizer.decode(self.ids[self.anchor :], self.skip)[self.given :]


class StopStrings:
    """Cuts a stream of text at the first stop string, and never lets out a part of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""
        self.found: str | None = None

    def push(self, piece: str, final: bool = False) -> str:
        """The text that is safe to give out; after `found` is set, nothing more comes. `final` lets out the rest."""
        if self.found is not None:
            return ""
        text = self.held + piece
        # The stop that is complete first wins, however the text was cut into pieces; of two, the longer.
        ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self.stops if stop in text]
        if ends:
            end, length, self.found = min(ends)
            self.held = ""
            return text[: end + length]
        keep = 0 if final else max((self._overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """The longest end of `text` that is a beginning of `stop`."""
        for size in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:size]):
                return size
        return 0
