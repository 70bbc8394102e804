"""Block diagrams of models side by side, from below to above: embedding, a frame per kind of layer, norm, head.

Rows are shared: what stands at the same place of two models stands at the same height, and a place that a model leaves
empty (a norm that it has not) stays empty. Of two models with different numbers of kinds, the most alike share a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import combinations
from typing import NamedTuple

from npllm.describing.kinds import ranges
from npllm.pictures import boxes, metrics
from npllm.pictures.parts import Branch, Differences, Kind, Part, Sheet
from npllm.pictures.svg import Element, element, group, path, rect, text
from npllm.pictures.wording import many

MARGIN, GAP = 30.0, 40.0
STRIP = 30.0
FRAME, LEFT, BOX = 372.0, 16.0, 312.0
BESIDE, BETWEEN = 76.0, 10.0
MIDDLE, BYPASS = LEFT + BOX / 2, LEFT + BOX + 24.0
COLUMN = STRIP + FRAME
BAND, STEP, LEAD, PLUS = 24.0, 13.0, 8.0, 8.0


class Row(NamedTuple):
    """How tall each place of a row of frames is: of what comes first and last, and of each branch before, main and after;
    and how much those frames need that show differences alone.
    """

    first: float
    branches: tuple[tuple[float, float, float], ...]
    last: float
    bare: float

    @property
    def height(self) -> float:
        """Of the frame."""
        inner = sum(_stretch(*branch) for branch in self.branches)
        whole = inner + sum(each + STEP for each in (self.first, self.last) if each) + 4 if self.branches else 0.0
        return BAND + max(whole, self.bare)


def _stretch(before: float, main: float, after: float) -> float:
    """Height of a branch from its fork to above its plus."""
    norms = sum(each + STEP for each in (before, after) if each)
    return LEAD + STEP + norms + main + STEP + 2 * PLUS + LEAD


def main_width(branch: Branch) -> float:
    return BOX - BESIDE - BETWEEN if branch.beside else BOX


def arranged(sheets: list[Sheet]) -> list[list[Kind | None]]:
    """Rows from below to above, each with one kind of every model, or None where a model has fewer kinds."""
    longest = max(sheets, key=lambda sheet: len(sheet.kinds)).kinds
    placed = []
    for sheet in sheets:
        places = max(
            combinations(range(len(longest)), len(sheet.kinds)),
            key=lambda chosen: (
                sum(alike(longest[i], kind) for i, kind in zip(chosen, sheet.kinds, strict=True)) - gaps(chosen)
            ),
        )
        column: list[Kind | None] = [None] * len(longest)
        for i, kind in zip(places, sheet.kinds, strict=True):
            column[i] = kind
        placed.append(column)
    return [list(row) for row in zip(*placed, strict=True)]


def gaps(chosen: tuple[int, ...]) -> int:
    """Rows that are left out between others."""
    return chosen[-1] - chosen[0] + 1 - len(chosen) if chosen else 0


def alike(one: Kind, other: Kind) -> int:
    """How much two kinds of layers have in common: of parts at the same place title, sight and what is inside."""
    ours, theirs = dict(one.parts()), dict(other.parts())
    forms = [(ours[place], theirs[place]) for place in ours.keys() & theirs.keys()]
    same = sum((a.title == b.title) + (a.inside == b.inside) + (a.form[3] == b.form[3]) for a, b in forms)
    return same + 2 * sum(a.role == b.role for a, b in forms)


def measured(kinds: list[Kind | None]) -> Row:
    """The row in which all these kinds have room."""
    bare = max((bare_height(kind) for kind in kinds if kind and kind.model is not None), default=0.0)
    there = [kind for kind in kinds if kind and kind.model is None]
    ends = [max((tall(k, p, BOX) for k in there if (p := getattr(k, end))), default=0.0) for end in ("first", "last")]
    branches = []
    for i in range(max((len(kind.branches) for kind in there), default=0)):
        row = [(kind, kind.branches[i]) for kind in there if i < len(kind.branches)]
        norms = [boxes.SLIM * any(getattr(branch, slot) for _, branch in row) for slot in ("before", "after")]
        main = max(tall(kind, branch.part, main_width(branch)) for kind, branch in row)
        branches.append((norms[0], main, norms[1]))
    return Row(ends[0], tuple(branches), ends[1], bare)


def tall(kind: Kind, part: Part, width: float, room: float = 0) -> float:
    """Height of a part's box in the frame of a kind: what is known is told again where there is `room`."""
    whole = boxes.height(part, width)
    return boxes.SLIM if part in kind.known and whole > room else whole


def bare_height(kind: Kind) -> float:
    """Of what a kind shows that is told against another: its own parts, and the words for all else."""
    return sum(tall(kind, part, BOX) + STEP for _, part in kind.altered) + STEP + boxes.SLIM + STEP


# -- a column ---------------------------------------------------------------------------------------------------------


def arrow(x: float, start: float, end: float) -> Iterator[Element]:
    """Upwards, with its tip at `end`."""
    yield path([(x, start), (x, end + 4)], "flow")
    yield tip(x, end, 0, 1)


def tip(x: float, y: float, dx: int, dy: int) -> Element:
    """An arrow's tip at (x, y), come from the direction (dx, dy) along an axis."""
    long, half = 6.5, 3.4
    sides = [(x + long * dx + turn * half * dy, y + long * dy + turn * half * dx) for turn in (-1, 1)]
    return path([(x, y), *sides], "tip", closed=True)


def plus(x: float, y: float) -> Element:
    """A sum, centred on (x, y)."""
    ring = element("circle", cx=x, cy=y, r=PLUS, class_="paper edge")
    cross = [path([(x - 4.5, y), (x + 4.5, y)], "flow"), path([(x, y - 4.5), (x, y + 4.5)], "flow")]
    return group([ring, *cross], "plus")


class Column:
    """One model's column; x is measured from the left edge of its frames."""

    def __init__(self, sheet: Sheet, differences: Differences, prefix: str) -> None:
        self.sheet, self.differences, self.prefix = sheet, differences, prefix

    def part(
        self,
        place: str,
        part: Part,
        x: float,
        y: float,
        width: float,
        tall: float = 0,
        known: Mapping[Part, int] | None = None,
    ) -> Element:
        """A part's box, or the bar that stands for it where it is known and `tall` leaves it no room."""
        differ = self.differences
        if known and part in known and tall < boxes.height(part, width):
            return boxes.slim(part, x, y, width, differ.form(place, part), partial(self.swatch, known[part]))
        return boxes.draw(part, x, y, width, differ.form(place, part), lambda fact: differ.fact(place, fact))

    def swatch(self, kind: int, x: float, y: float, side: float = boxes.SWATCH) -> Element:
        return texture(self.prefix, kind, x, y, side, side)

    def frame(self, number: int, row: Row, bottom: float) -> Element:
        """The frame of the model's kind of that number, with all that is in it."""
        kind = self.sheet.kinds[number]
        top = bottom - row.height
        alone = many(self.sheet.depth, "layer") if len(self.sheet.kinds) == 1 else None
        title = metrics.fitted(alone or f"{len(kind.layers):,} × {kind.name}", 12.5, FRAME - 130, bold=True)
        band = [
            rect(0, top, FRAME, row.height, "frame edge", 8),
            element("path", d=f"M0.5 {top + BAND}V{top + 8}Q0.5 {top + 0.5} 8 {top + 0.5}H{FRAME - 8}"
                    f"Q{FRAME - 0.5} {top + 0.5} {FRAME - 0.5} {top + 8}V{top + BAND}Z", class_="band"),
            path([(0, top + BAND), (FRAME, top + BAND)], "rule"),
            self.swatch(number, 12, top + 6, 13),
            text(34, top + 16.5, title, 12.5, bold=True),
            text(FRAME - 12, top + 16.5, metrics.fitted(ranges(kind.layers), 10.5, 90), 10.5, "soft", anchor="end"),
        ]  # fmt: skip
        inner = self._inner(kind, row, bottom) if kind.model is None else self._bare(kind, top + BAND, bottom)
        return group([*band, *inner], "box")

    def _bare(self, kind: Kind, top: float, bottom: float) -> Iterator[Element]:
        """Parts that differ from those of the kind that this one is told against, one after the other, between the edges."""
        assert kind.model is not None
        spare = (bottom - top - bare_height(kind)) / 2
        start, y = bottom, bottom - STEP - spare
        for place, part in kind.altered:
            high = tall(kind, part, BOX)
            yield from arrow(MIDDLE, start, y)
            yield self.part(place, part, LEFT, y - high, BOX, high, kind.known)
            start = y - high
            y = start - STEP
        rest = Part("plain", "All else" if kind.altered else "All that is drawn")
        yield from arrow(MIDDLE, start, y)
        yield boxes.slim(rest, LEFT, y - boxes.SLIM, BOX, False, partial(self.swatch, kind.model))
        yield path([(MIDDLE, y - boxes.SLIM), (MIDDLE, top)], "flow")

    def _inner(self, kind: Kind, row: Row, y: float) -> Iterator[Element]:
        """What happens in a layer, from the frame's lower edge `y` to its band."""
        start = y
        if row.first:
            y -= STEP
            if kind.first:
                high = tall(kind, kind.first, BOX, row.first)
                top = y - (row.first + high) / 2
                yield from arrow(MIDDLE, start, top + high)
                yield self.part("first", kind.first, LEFT, top, BOX, high, kind.known)
                start = top
            y -= row.first
        for branch, heights in zip(kind.branches, row.branches, strict=False):
            yield from self._branch(kind, branch, heights, start, y)
            y -= _stretch(*heights)
            start = y
        if kind.last:
            high = tall(kind, kind.last, BOX, row.last)
            top = y - STEP - (row.last + high) / 2
            yield from arrow(MIDDLE, start, top + high)
            yield self.part("last", kind.last, LEFT, top, BOX, high, kind.known)
            start = top
        yield path([(MIDDLE, start), (MIDDLE, y - (row.last + STEP if row.last else 0) - 4)], "flow")

    def _branch(
        self, kind: Kind, branch: Branch, heights: tuple[float, float, float], start: float, y: float
    ) -> Iterator[Element]:
        """A branch in the stretch above `y`, reached from `start`: what it passes, the stream beside it, their sum."""
        role = "ffn" if branch.part.role == "moe" else branch.part.role
        width = main_width(branch)
        fork, at = y - LEAD, y - LEAD - STEP
        yield path([(MIDDLE, start), (MIDDLE, fork)], "flow")
        below, beside = fork, at
        slots = ("before", branch.before), ("main", branch.part), ("after", branch.after)
        for (place, slot), room in zip(slots, heights, strict=True):
            if slot is not None:
                wide = BOX if place == "before" else width
                high = tall(kind, slot, wide, room)
                top = at - (room + high) / 2
                yield from arrow(LEFT + wide / 2, below, top + high)
                yield self.part(f"{place} {role}", slot, LEFT, top, wide, high, kind.known)
                if place == "main":
                    beside = below
                below = top
            at -= room + STEP if room else 0
        centre = at - PLUS
        yield from self._around(fork, centre)
        if branch.beside:
            yield from self._beside(branch.beside, f"beside {role}", beside, at)
        yield from self._joined(LEFT + width / 2 if branch.beside else MIDDLE, below, centre)

    def _beside(self, part: Part, place: str, below: float, top: float) -> Iterator[Element]:
        """What runs at the side of the main part, from the same input, and its way to the sum, whose lower end is `top`."""
        x, high = LEFT + BOX - BESIDE, boxes.height(part, BESIDE)
        middle, turn = x + BESIDE / 2, top + STEP / 2
        yield from arrow(middle, below, below - STEP)
        yield self.part(place, part, x, below - STEP - high, BESIDE)
        yield path([(middle, below - STEP - high), (middle, turn), (MIDDLE, turn), (MIDDLE, top)], "flow")

    def _around(self, fork: float, centre: float) -> Iterator[Element]:
        """The residual stream past the branch."""
        yield path([(MIDDLE, fork), (BYPASS, fork), (BYPASS, centre), (MIDDLE + PLUS + 5, centre)], "flow")
        yield tip(MIDDLE + PLUS + 1, centre, 1, 0)
        yield element("circle", cx=MIDDLE, cy=fork, r=2.2, class_="tip")

    def _joined(self, x: float, below: float, centre: float) -> Iterator[Element]:
        """The branch's end, from `below` at `x`, into the sum."""
        if x == MIDDLE:
            yield from arrow(MIDDLE, below, centre + PLUS)
        else:
            yield path([(x, below), (x, centre), (MIDDLE - PLUS - 5, centre)], "flow")
            yield tip(MIDDLE - PLUS - 1, centre, -1, 0)
        yield plus(MIDDLE, centre)
        yield path([(MIDDLE, centre - PLUS), (MIDDLE, centre - PLUS - LEAD)], "flow")


# -- the whole --------------------------------------------------------------------------------------------------------

TEXTURES = 8


def textures(prefix: str) -> Element:
    """Patterns that tell kinds of layers apart, as `{prefix}0` to `{prefix}7`: the first is blank, the second solid."""

    def pattern(i: int, side: float, *marks: Element, turn: int = 0) -> Element:
        return element(
            "pattern",
            rect(0, 0, side, side, "paper"),
            *marks,
            id=f"{prefix}{i}",
            width=side,
            height=side,
            pattern_units="userSpaceOnUse",
            pattern_transform=f"rotate({turn})" if turn else None,
        )

    dot = element("circle", cx=2, cy=2, r=1.1, class_="ink")
    return element(
        "defs",
        pattern(0, 4),
        pattern(1, 4, rect(0, 0, 4, 4, "ink")),
        pattern(2, 4, rect(0, 0, 1.6, 4, "ink"), turn=45),
        pattern(3, 4, dot),
        pattern(4, 4, rect(0, 0, 4, 1.4, "ink")),
        pattern(5, 4, rect(0, 0, 1.6, 4, "ink"), turn=-45),
        pattern(6, 4, rect(0, 0, 1.2, 4, "ink"), rect(0, 0, 4, 1.2, "ink")),
        pattern(7, 4, rect(0, 0, 4, 4, "soft")),
    )


def texture(prefix: str, i: int, x: float, y: float, width: float, height: float) -> Element:
    """A rectangle in the i-th texture."""
    return element("rect", x=x, y=y, width=width, height=height, fill=f"url(#{prefix}{i % TEXTURES})", class_="edge")
