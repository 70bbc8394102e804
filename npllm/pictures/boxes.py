"""Parts as boxes: how tall the words of one make it, and the box itself, with what differs made plain without colour."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from npllm.pictures import glyphs, metrics
from npllm.pictures.parts import Part
from npllm.pictures.svg import Element, group, rect, text

TITLE, SIZE = 12.5, 11.5
LINE, BAR = 15.0, 18.0
PAD = 9.0
SLIM, SWATCH = 22.0, 10.0
BETWEEN = "   "

# Widths of what stands in a box beside the words.
MARGIN, GLYPH_GAP, GLYPH_TOP = 10.0, 8.0, 26.0


class Line(NamedTuple):
    """A line of a box: facts side by side, or one bar."""

    facts: tuple[str, ...]
    bar: bool = False


def lines(part: Part, width: float) -> list[Line]:
    """What stands in the part's box, from below to above as it is computed: bars in their order, below them the numbers."""
    room = width - 2 * MARGIN - _beside(part)
    bars = [Line((inside,), bar=True) for inside in reversed(part.inside)]
    facts = list(part.facts)
    return bars + [Line(tuple(facts[i] for i in row)) for row in metrics.wrapped(facts, SIZE, room, BETWEEN)]


def _beside(part: Part) -> float:
    return len(part.glyphs) * (glyphs.SIDE + GLYPH_GAP)


def height(part: Part, width: float) -> float:
    """Of the part's box; a part that is a title alone is a bar."""
    told = lines(part, width)
    if not told:
        return SLIM
    words = 16.0 + sum(BAR + 2 if line.bar else LINE for line in told) + 2 * PAD - 4
    return max(words, GLYPH_TOP + glyphs.SIDE + PAD) if part.glyphs else words


def draw(part: Part, x: float, y: float, width: float, differs: bool, bold: Callable[[str], bool]) -> Element:
    """The part's box with its top left corner at (x, y); `differs` gives it the thick frame, `bold` says which facts,
    and what of the inside, are set in bold on a tint.
    """
    tall = height(part, width)
    told = lines(part, width)
    if not told:
        radius = tall / 2 if part.role == "norm" else 5
        title = _line(x + width / 2, y + tall / 2 + 4, part.title, width - 14, bold=differs)
        return group([_frame(part, x, y, width, tall, differs, radius), title], "box")
    frame = _frame(part, x, y, width, tall, differs, 5)
    return group([frame, *_words(part, told, x, y, width, bold), *_glyphs(part, x, y, width, tall)], "box")


def slim(part: Part, x: float, y: float, width: float, differs: bool, swatch: Callable[[float, float], Element]) -> Element:
    """A bar for a part that is told elsewhere: its title, and the swatch (of SWATCH, given its corner) of where that is."""
    words = metrics.fitted(f"{part.title}, as in", SIZE, width - 20 - SWATCH, bold=differs)
    left = x + (width - metrics.width(words, SIZE, bold=differs) - SWATCH - 6) / 2
    end = left + metrics.width(words, SIZE, bold=differs)
    title = text(left, y + SLIM / 2 + 4, words, SIZE, bold=differs)
    return group([_frame(part, x, y, width, SLIM, differs, 5), title, swatch(end + 6, y + (SLIM - SWATCH) / 2)], "box")


def _frame(part: Part, x: float, y: float, width: float, tall: float, differs: bool, radius: float) -> Element:
    return rect(x, y, width, tall, f"{part.role} {'differs' if differs else 'edge'}", radius)


def _line(x: float, y: float, content: str, most: float, *, bold: bool) -> Element:
    return text(x, y, metrics.fitted(content, SIZE, most, bold=bold), SIZE, bold=bold, anchor="middle")


def _words(part: Part, told: list[Line], x: float, y: float, width: float, bold: Callable[[str], bool]) -> Iterator[Element]:
    left, room = x + MARGIN, width - 2 * MARGIN - _beside(part)
    top = y + PAD
    yield text(left, top + 10, metrics.fitted(part.title, TITLE, width - 2 * MARGIN, bold=True), TITLE, bold=True)
    top += 16
    for line in told:
        if line.bar:
            strong = bold(line.facts[0])
            bar = rect(left, top + 1, room, BAR - 1, f"{'mark' if strong else 'norm'} edge", 8.5)
            yield group([bar, _line(left + room / 2, top + 13, line.facts[0], room - 12, bold=strong)], "box")
            top += BAR + 2
            continue
        yield from _facts(line.facts, left, top, room, bold)
        top += LINE


def _facts(facts: tuple[str, ...], x: float, y: float, room: float, bold: Callable[[str], bool]) -> Iterator[Element]:
    for fact in facts:
        strong = bold(fact)
        shown = metrics.fitted(fact, SIZE, room, bold=True)
        wide = metrics.width(shown, SIZE, bold=strong)
        if strong:
            yield rect(x - 2.5, y + 0.5, wide + 5, LINE - 1.5, "mark", 2)
        yield text(x, y + 11, shown, SIZE, bold=strong)
        x += metrics.width(shown, SIZE, bold=True) + metrics.width(BETWEEN, SIZE)


def _glyphs(part: Part, x: float, y: float, width: float, tall: float) -> Iterator[Element]:
    """Below the title at the right, in the middle of what is left."""
    at = x + width - MARGIN - _beside(part) + GLYPH_GAP
    for glyph in part.glyphs:
        yield glyphs.draw(glyph, at, y + GLYPH_TOP + (tall - GLYPH_TOP - PAD - glyphs.SIDE) / 2)
        at += glyphs.SIDE + GLYPH_GAP
