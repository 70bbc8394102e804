"""Reasoning apart from answers: `<think>...</think>` at the beginning of what a model says.

Only a block that opens the text counts, so an answer may speak of `<think>` without losing a part. Some templates (those
of DeepSeek R1 and QwQ) already open the block in the prompt; the model then writes only its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from npllm.tokenizer import StopStrings

OPEN, CLOSE = "<think>", "</think>"

Kind = Literal["reasoning", "answer"]


class Part(NamedTuple):
    """A stretch of text, and what it belongs to."""

    kind: Kind
    text: str


def opens_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt ends within a block, so that the model goes on with its reasoning."""
    return prompt.rstrip().endswith(OPEN)


class ReasoningSplitter:
    """Splits a stream of text: what was pushed so far has come out as parts, but for the beginning of a possible tag.

    Blank space at both ends of the reasoning, and the line breaks between it and the answer, belong to neither.
    `inside`: the prompt has opened the block (`opens_reasoning`).
    """

    def __init__(self, inside: bool = False) -> None:
        self.kind: Kind | None = "reasoning" if inside else None
        self.close = StopStrings([CLOSE])
        self.held = ""
        # The next character is the first of its part, and what goes before it is dropped.
        self.fresh = inside

    def push(self, piece: str) -> list[Part]:
        """The parts that `piece` completes; often one, sometimes none."""
        if self.kind is None:
            return self._begin(piece)
        return self._reason(piece) if self.kind == "reasoning" else self._answer(piece)

    def finish(self) -> list[Part]:
        """What was held back, once no more text comes."""
        if self.kind == "reasoning":
            return self._reasoned(self.close.push("", final=True), ended=True)
        self.kind, rest, self.held = "answer", self.held, ""
        return self._answer(rest)

    def _begin(self, piece: str) -> list[Part]:
        text, self.held = self.held + piece, ""
        start = text.lstrip()
        if start.startswith(OPEN):
            self.kind, self.fresh = "reasoning", True
            return self._reason(start.removeprefix(OPEN))
        if OPEN.startswith(start):
            self.held = text
            return []
        self.kind = "answer"
        return self._answer(text)

    def _reason(self, piece: str) -> list[Part]:
        text = self.close.held + piece
        safe = self.close.push(piece)
        if self.close.found is None:
            return self._reasoned(safe)
        parts = self._reasoned(safe, ended=True)
        self.kind, self.fresh = "answer", True
        return parts + self._answer(text[len(safe) + len(CLOSE) :])

    def _reasoned(self, text: str, ended: bool = False) -> list[Part]:
        text, self.held = self.held + text, ""
        if self.fresh:
            text = text.lstrip()
        body = text.rstrip()
        self.held = "" if ended else text[len(body) :]
        self.fresh = self.fresh and not body
        return [Part("reasoning", body)] if body else []

    def _answer(self, text: str) -> list[Part]:
        if self.fresh:
            text = text.lstrip("\r\n")
            self.fresh = not text
        return [Part("answer", text)] if text else []


def split_reasoning(text: str, inside: bool = False) -> tuple[str, str]:
    """A whole text -> (reasoning, answer); either may be empty."""
    splitter = ReasoningSplitter(inside)
    return join_parts(splitter.push(text) + splitter.finish())


def join_parts(parts: Iterable[Part]) -> tuple[str, str]:
    """The texts of parts -> (reasoning, answer)."""
    texts = {"reasoning": "", "answer": ""}
    for part in parts:
        texts[part.kind] += part.text
    return texts["reasoning"], texts["answer"]
