"""Builds the questions of the shipped model out of the fact tables, and splits them into training and held-out ones.

Held-out questions are of three kinds, reported apart:
  "seen elsewhere"  the phrasing is trained on with other subjects, never with this one;
  "unseen phrasing" the phrasing is never trained on, for any subject;
  "unseen question" a hand-written question of a single fact that is never trained on.
Everything here is deterministic. Random variation of the training text is in `vary`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from concepts import DEFINITION, TERMS, UNKNOWN_MODEL_ANSWER, UNKNOWN_MODELS
from facts import MODELS, SIZED, Attribute, Model
from families import FAMILIES, FAMILY_NAMES, GENERAL, TRAITS

SINGLE_FACTS = Path(__file__).with_name("single_facts.txt")
QUESTIONS_PER_UNKNOWN_MODEL = 12
HELD_OUT_PER_UNKNOWN_MODEL = 2
PREFIXES = (
    "Please tell me: ",
    "Hi, ",
    "Hello! ",
    "Quick question: ",
    "I have a question. ",
    "Tell me, ",
    "ok, ",
    "And ",
)


@dataclass(frozen=True)
class Question:
    """`split` is "train" or one of the held-out kinds; `topic` is the attribute or the kind of small talk."""

    text: str
    answer: str
    topic: str
    split: str


def _spread(attribute: Attribute, names: tuple[str, ...], answer: str, turn: int) -> Iterator[Question]:
    """All phrasings of one fact. `turn` chooses which two known phrasings this fact holds out."""
    count = len(attribute.asked)
    held = {turn % count, (turn + count // 2) % count}
    others = names[1:] or names
    for index, phrasing in enumerate(attribute.asked):
        alias = others[(index + turn) % len(others)]
        if index in held:
            yield Question(phrasing.format(m=names[0]), answer, attribute.name, "seen elsewhere")
            continue
        for name in dict.fromkeys((names[0], alias)):
            yield Question(phrasing.format(m=name), answer, attribute.name, "train")
    for index, phrasing in enumerate(attribute.unseen):
        name = names[0] if (index + turn) % 2 == 0 else others[turn % len(others)]
        yield Question(phrasing.format(m=name), answer, attribute.name, "unseen phrasing")


def spellings(model: Model) -> tuple[str, ...]:
    """The ways a model's name is written in questions, the canonical one first."""
    dashed = model.name.replace(" ", "-")
    return tuple(dict.fromkeys((model.name, dashed, model.name.lower(), dashed.lower(), *model.aliases)))


def _sized() -> Iterator[Question]:
    for attribute, answer_of in SIZED:
        for turn, model in enumerate(MODELS):
            yield from _spread(attribute, spellings(model), answer_of(model), turn)


def _traits() -> Iterator[Question]:
    for attribute in TRAITS:
        for turn, (family, answer) in enumerate(attribute.answers.items()):
            names = FAMILIES.get(family, (family,))
            if attribute.name in GENERAL:
                names = FAMILY_NAMES.get(family, names[:4])
            yield from _spread(attribute, names, answer.format(m=family), turn)


def _definitions() -> Iterator[Question]:
    for turn, (names, answer) in enumerate(TERMS):
        yield from _spread(DEFINITION, names, answer, turn)


def _single() -> Iterator[Question]:
    """Reads SINGLE_FACTS: '## topic', '> answer', then one question a line, '~ ' before a held-out one."""
    topic = answer = ""
    for line in SINGLE_FACTS.read_text().splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "##":
            topic = rest
        elif mark == ">":
            answer = rest
        elif mark == "~":
            yield Question(rest, answer, topic, "unseen question")
        elif line and mark != "#":
            yield Question(line, answer, topic, "train")


def _unknown_models() -> Iterator[Question]:
    phrasings = [text for attribute, _ in SIZED for text in attribute.asked]
    draw = random.Random(7)
    for name in UNKNOWN_MODELS:
        chosen = draw.sample(phrasings, QUESTIONS_PER_UNKNOWN_MODEL)
        for index, text in enumerate(chosen):
            split = "train" if index < QUESTIONS_PER_UNKNOWN_MODEL - HELD_OUT_PER_UNKNOWN_MODEL else "seen elsewhere"
            yield Question(text.format(m=name), UNKNOWN_MODEL_ANSWER, "unknown model", split)


def _bare(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def build() -> list[Question]:
    """Every question once. A held-out question that differs from a trained one only in case or punctuation is dropped.

    Raises ValueError if one text asks for two different answers.
    """
    questions = list(dict.fromkeys(_all()))
    answers: dict[str, str] = {}
    for question in questions:
        if answers.setdefault(_bare(question.text), question.answer) != question.answer:
            raise ValueError(f"two answers to {question.text!r}: {question.answer!r}, {answers[_bare(question.text)]!r}")
    trained = {_bare(question.text) for question in questions if question.split == "train"}
    return [question for question in questions if question.split == "train" or _bare(question.text) not in trained]


def _all() -> Iterator[Question]:
    yield from _sized()
    yield from _traits()
    yield from _definitions()
    yield from _single()
    yield from _unknown_models()


def _misspell(text: str, draw: random.Random) -> str:
    """One slip in a plain word; names with digits are left alone, since a digit decides the answer."""
    words = list(re.finditer(r"\b[A-Za-z]{5,}\b", text))
    if not words:
        return text
    word = draw.choice(words)
    at = draw.randrange(word.start() + 1, word.end() - 1)
    slip = draw.choice((text[at + 1] + text[at], text[at + 1], text[at] * 2 + text[at + 1]))
    return text[:at] + slip + text[at + 2 :]


def vary(text: str, draw: random.Random) -> str:
    """A training question as people type it: sometimes lower case, without its mark, with a slip or an opening."""
    if draw.random() < 0.06:
        text = _misspell(text, draw)
    if draw.random() < 0.06:
        text = draw.choice(PREFIXES) + text
    if draw.random() < 0.15:
        text = text.rstrip("?.!") or text
    if draw.random() < 0.15:
        text = text.lower()
    return text
