"""A whole block diagram: a column per model under its name, one grid for all, and what the marks mean."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from npllm.pictures import boxes, metrics
from npllm.pictures.diagram import (
    BOX,
    COLUMN,
    FRAME,
    GAP,
    LEFT,
    MARGIN,
    MIDDLE,
    STRIP,
    Column,
    Row,
    arranged,
    arrow,
    measured,
    texture,
    textures,
)
from npllm.pictures.drawing import Drawing
from npllm.pictures.parts import Differences, Kind, Sheet
from npllm.pictures.svg import Element, group, path, rect, text

NAME, FACT, FACT_LINE, WORDS = 19.0, 12.0, 17.0, 78.0
BETWEEN_FRAMES, CAPTION, RISE = 22.0, 20.0, 22.0
CELL = 14.0

# For two models, and for more.
LEGEND = {
    False: (
        "Thick frame: the other model has no part of this form in this place.",
        "Bold on a tint: the other model does not have this in such a part.",
    ),
    True: (
        "Thick frame: fewer than half of the other models have a part of this form in this place.",
        "Bold on a tint: fewer than half of the others have this in such a part.",
    ),
}


def figure(sheets: list[Sheet], prefix: str = "kind") -> Drawing:
    """The models side by side; `prefix` begins the ids of the textures, which must be the only ones of a page."""
    rows = arranged(sheets)
    heights = [measured(row) for row in rows]
    facts = [_facts(sheet) for sheet in sheets]
    head = max(boxes.height(sheet.head, BOX) for sheet in sheets)
    embedding = max(boxes.height(sheet.embedding, BOX) for sheet in sheets)
    stack = sum(row.height for row in heights) + BETWEEN_FRAMES * (len(rows) - 1)
    top = MARGIN + NAME + 8 + max(map(len, facts)) * FACT_LINE + 14
    levels = Levels(top, head, stack, embedding)
    columns = [
        group(
            [*_header(sheet, told), *_column(sheet, [row[i] for row in rows], heights, levels, sheets, prefix)],
            "column",
            MARGIN + i * (COLUMN + GAP),
        )
        for i, (sheet, told) in enumerate(zip(sheets, facts, strict=True))
    ]
    width = 2 * MARGIN + len(sheets) * COLUMN + (len(sheets) - 1) * GAP
    legend = list(_legend(levels.bottom + 12, len(sheets) > 2)) if len(sheets) > 1 else []
    return Drawing([textures(prefix), *columns, *legend], width, levels.bottom + 12 + 18 * len(legend) + MARGIN - 12)


class Levels:
    """Heights that all columns share, from the top of the picture: each name is where that part begins."""

    def __init__(self, top: float, head: float, stack: float, embedding: float) -> None:
        self.caption = top
        self.head = top + CAPTION + RISE - 6
        self.norm = self.head + head + RISE - 4
        self.stack = self.norm + boxes.SLIM + RISE
        self.embedding = self.stack + stack + RISE
        self.tokens = self.embedding + embedding + RISE
        self.bottom = self.tokens + CAPTION - 4


def _facts(sheet: Sheet) -> list[tuple[str, str]]:
    """The lines below the name: a word, but for lines that go on, and what there is to say."""
    told = []
    for word, content in sheet.facts:
        words = content.split(" ")
        broken = metrics.wrapped(words, FACT, FRAME - WORDS, " ")
        told += [(word if i == 0 else "", " ".join(words[j] for j in line)) for i, line in enumerate(broken)]
    return told


def _header(sheet: Sheet, told: list[tuple[str, str]]) -> Iterator[Element]:
    yield text(STRIP, MARGIN + NAME - 3, metrics.fitted_name(sheet.name, NAME, FRAME), NAME, bold=True)
    for i, (word, content) in enumerate(told):
        y = MARGIN + NAME + 20 + i * FACT_LINE
        if word:
            yield text(STRIP, y, word, FACT, "soft")
        yield text(STRIP + WORDS, y, metrics.fitted(content, FACT, FRAME - WORDS), FACT)


def _column(
    sheet: Sheet, kinds: list[Kind | None], rows: list[Row], at: Levels, sheets: list[Sheet], prefix: str
) -> Iterator[Element]:
    column = Column(sheet, Differences.of(sheet, sheets), prefix)
    yield group(_spine(sheet, column, kinds, rows, at), x=STRIP)
    yield from _strip(sheet, *_span(kinds, rows, at), prefix)


def _spine(sheet: Sheet, column: Column, kinds: list[Kind | None], rows: list[Row], at: Levels) -> Iterator[Element]:
    """From the tokens at the bottom to the logits at the top."""
    yield text(MIDDLE, at.tokens + 12, "tokens", boxes.SIZE, "soft", anchor="middle")
    yield from arrow(MIDDLE, at.tokens, at.embedding + boxes.height(sheet.embedding, BOX))
    yield column.part("embedding", sheet.embedding, LEFT, at.embedding, BOX)
    below, y = at.embedding, at.embedding - RISE
    number = 0
    for kind, row in zip(kinds, rows, strict=True):
        if kind is not None:
            yield from arrow(MIDDLE, below, y)
            yield column.frame(number, row, y)
            below = y - row.height
            number += 1
        y -= row.height + BETWEEN_FRAMES
    if sheet.norm is not None:
        yield from arrow(MIDDLE, below, at.norm + boxes.SLIM)
        yield column.part("norm", sheet.norm, LEFT, at.norm, BOX)
        below = at.norm
    yield from arrow(MIDDLE, below, at.head + boxes.height(sheet.head, BOX))
    yield column.part("head", sheet.head, LEFT, at.head, BOX)
    yield from arrow(MIDDLE, at.head, at.head - RISE + 8)
    yield text(MIDDLE, at.caption + 10, "logits", boxes.SIZE, "soft", anchor="middle")


def _span(kinds: list[Kind | None], rows: list[Row], at: Levels) -> tuple[float, float]:
    """Where a model's lowest frame begins, and where its highest ends."""
    edges, y = [], at.embedding - RISE
    for kind, row in zip(kinds, rows, strict=True):
        edges += [] if kind is None else [y, y - row.height]
        y -= row.height + BETWEEN_FRAMES
    return max(edges), min(edges)


def _strip(sheet: Sheet, base: float, top: float, prefix: str) -> Iterator[Element]:
    """Every layer as a cell in the texture of its kind, the first at the bottom, beside the frames."""
    cell = min(CELL, (base - top - 12) / sheet.depth)
    owner = {layer: number for number, kind in enumerate(sheet.kinds) for layer in kind.layers}
    layers = [(number, list(run)) for number, run in groupby(range(sheet.depth), owner.__getitem__)]
    for number, run in layers:
        yield texture(prefix, number, 0, base - (run[-1] + 1) * cell, 12, len(run) * cell)
        if cell >= 3.5:
            yield from (path([(0, base - i * cell), (12, base - i * cell)], "thin") for i in run[1:])
    yield text(6, base + 12, "0", 10, "soft", anchor="middle")
    if sheet.depth > 1:
        last = f"{sheet.depth - 1:,}"
        yield text(6, base - sheet.depth * cell - 5, last, 10, "soft", anchor="middle")


def _legend(y: float, several: bool) -> Iterator[Element]:
    """What the marks mean, from `y` on."""
    frame, bold = LEGEND[several]
    yield group([rect(MARGIN + STRIP, y, 16, 11, "plain differs", 3), text(MARGIN + STRIP + 26, y + 10, frame, 11, "soft")])
    sample = [rect(MARGIN + STRIP - 2, y + 17, 20, 13, "mark", 2), text(MARGIN + STRIP, y + 28, "64", 11, bold=True)]
    yield group([*sample, text(MARGIN + STRIP + 26, y + 28, bold, 11, "soft")])
