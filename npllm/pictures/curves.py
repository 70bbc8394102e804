"""Curves on two logarithmic axes, each told apart by dashes and markers and named where it ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from npllm.describing.description import Description
from npllm.describing.units import binary
from npllm.pictures import metrics, theme
from npllm.pictures.drawing import Drawing
from npllm.pictures.svg import Element, element, group, number, path, rect, text

SIZE, SMALL = 12.0, 11.0
MARGIN, GAP, WIDTH, HEIGHT = 24.0, 28.0, 430.0, 350.0
LEFT, RIGHT, ABOVE, BELOW = 66.0, 14.0, 46.0, 44.0
CLEAR = 3.0

Point = tuple[float, float]


class Curve(NamedTuple):
    """A named curve through (x, y), both above zero, in the order of x."""

    name: str
    points: tuple[Point, ...]


class Axis(NamedTuple):
    """A logarithmic axis: its ends, and the values that are marked, with their labels ("" for a mark without)."""

    least: float
    most: float
    marks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        return math.log(value / self.least) / math.log(self.most / self.least)


class Box(NamedTuple):
    """A rectangle that something takes up."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom


def tokens_axis(least: float, most: float) -> Axis:
    """Powers of two from `least` on, so many of them labelled (1k is 1,024) as have room."""
    first, last = math.floor(math.log2(least)), math.ceil(math.log2(most))
    step = max(1, math.ceil((last - first) / 6))
    marks = tuple((2.0**i, _tokens(2**i) if (i - first) % step == 0 else "") for i in range(first, max(last, first + 1) + 1))
    return Axis(marks[0][0], marks[-1][0], marks)


def _tokens(value: int) -> str:
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if value >= size:
            return f"{value // size:,}{unit}"
    return str(value)


BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
COUNTS = ("", "k", "M", "G", "T", "P", "E")


def bytes_axis(least: float, most: float) -> Axis:
    """Powers of two in binary units, and what lies halfway between them where these are few."""
    first, last = math.floor(math.log2(least)), math.ceil(math.log2(most))
    octaves = max(last - first, 1)
    step = math.ceil(octaves / 7)
    exponents = range(first, first + step * math.ceil(octaves / step) + 1, step)
    marks = [(2.0**i, _scaled(i // 10, 2 ** (i % 10), BYTES)) for i in exponents]
    if octaves <= 3 and first >= 10:
        marks += [(1.5 * 2**i, binary(1.5 * 2**i)) for i in exponents[:-1]]
    return Axis(min(marks)[0], max(marks)[0], tuple(sorted(marks)))


def counts_axis(least: float, most: float) -> Axis:
    """Powers of ten, and 2 and 5 times these, the latter without a label where there are many."""
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
    last = max(last, first + 1)
    candidates = [(10.0**i * part, part, i) for i in range(first, last + 1) for part in (1, 2, 5)]
    below = max(value for value, _, _ in candidates if value <= least * (1 + 1e-9))
    above = min(value for value, _, _ in candidates if value >= most * (1 - 1e-9) and value > below)
    shown = [each for each in candidates if below <= each[0] <= above]
    labelled = (1, 2, 5) if len(shown) <= 8 else (1,)
    marks = tuple(
        (value, _scaled(i // 3, 10 ** (i % 3) * part, COUNTS) if part in labelled else "") for value, part, i in shown
    )
    return Axis(below, above, marks)


def _scaled(thousands: int, value: int, units: tuple[str, ...]) -> str:
    unit = units[min(max(thousands, 0), len(units) - 1)]
    return f"{value} {unit}".rstrip()


def chart(title: str, subtitle: str, curves: list[Curve], scale: Callable[[float, float], Axis]) -> Element:
    """The curves over the number of tokens, in a field of WIDTH x HEIGHT, its top left corner at (0, 0)."""
    ys = [y for curve in curves for _, y in curve.points]
    xs = [x for curve in curves for x, _ in curve.points]
    horizontal, vertical = tokens_axis(min(xs), max(xs)), scale(min(ys), max(ys))
    plot = Box(LEFT, ABOVE, WIDTH - RIGHT, HEIGHT - BELOW)

    def place(point: Point) -> Point:
        x, y = horizontal.share(point[0]), vertical.share(point[1])
        return plot.left + x * (plot.right - plot.left), plot.bottom - y * (plot.bottom - plot.top)

    lines = [[place(point) for point in curve.points] for curve in curves]
    return group(
        [
            text(0, 14, title, 13, bold=True),
            text(0, 31, subtitle, SMALL, "soft"),
            *_grid(horizontal, vertical, plot),
            *_drawn(lines),
            *_labels([curve.name for curve in curves], lines, plot),
        ],
        class_="chart",
    )


def _grid(horizontal: Axis, vertical: Axis, plot: Box) -> Iterator[Element]:
    for value, label in horizontal.marks:
        x = plot.left + horizontal.share(value) * (plot.right - plot.left)
        yield path([(x, plot.top), (x, plot.bottom)], "rule")
        if label:
            yield text(x, plot.bottom + 16, label, SMALL, "soft", anchor="middle")
    for value, label in vertical.marks:
        y = plot.bottom - vertical.share(value) * (plot.bottom - plot.top)
        yield path([(plot.left, y), (plot.right, y)], "rule")
        if label:
            yield text(plot.left - 8, y + 4, label, SMALL, "soft", anchor="end")
    yield path([(plot.left, plot.top), (plot.left, plot.bottom), (plot.right, plot.bottom)], "thin")
    yield text((plot.left + plot.right) / 2, plot.bottom + 36, "tokens of context", SMALL, "soft", anchor="middle")


def _drawn(lines: list[list[Point]]) -> Iterator[Element]:
    for i, points in enumerate(lines):
        yield path(points, f"curve{i % theme.CURVES}")
    for i, points in enumerate(lines):
        for x, y in marked(points, 30.0 + 15 * (i % 3)):
            yield marker(i % theme.CURVES, x, y)


def marked(points: list[Point], first: float) -> list[Point]:
    """A few points of a line, its ends among them, on which its marker stands: at least 60 units apart, from the end `first`
    (which tells lines apart that lie on each other).
    """
    chosen = [points[-1]]
    for point in reversed(points[:-1]):
        if math.dist(point, chosen[-1]) >= (first if len(chosen) == 1 else 60):
            chosen.append(point)
    return chosen if chosen[-1] == points[0] or math.dist(points[0], chosen[-1]) < 25 else [*chosen, points[0]]


def marker(i: int, x: float, y: float, size: float = 4.2) -> Element:
    """The i-th shape, centred on (x, y)."""
    if i == 0:
        return element("circle", cx=x, cy=y, r=size, class_="dot0 halo")
    corners: list[list[Point]] = [
        [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
        [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        [(0, 1.2), (1.1, -0.8), (-1.1, -0.8)],
        [(-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4), (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4),
         (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)],
    ]  # fmt: skip
    steps = " ".join(f"{number(x + size * dx)} {number(y + size * dy)}" for dx, dy in corners[(i - 1) % len(corners)])
    return element("path", d=f"M{steps}Z", class_=f"dot{i} halo")


# -- names beside their curves ----------------------------------------------------------------------------------------


TALL, KEY, NAME = SIZE + 4, 30.0, 150.0


def _labels(names: list[str], lines: list[list[Point]], plot: Box) -> Iterator[Element]:
    """Each name with its curve's marker, where it covers no curve and no other name, as near to the curve's end as there is
    room; from farther away, a line leads to the curve.
    """
    taken: list[Box] = []
    for i in sorted(range(len(lines)), key=lambda i: (-lines[i][-1][0], lines[i][-1][1])):
        name = metrics.fitted_name(names[i], SIZE, NAME)
        wide = metrics.width(name, SIZE, bold=True) + KEY + 2 * CLEAR
        box, anchor = _free(lines, i, wide, taken, plot)
        taken.append(box)
        if anchor is not None:
            end = (min(max(anchor[0], box.left), box.right), box.bottom if anchor[1] > box.bottom else box.top)
            yield path([anchor, end], "thin")
        yield rect(box.left, box.top, box.right - box.left, TALL, "paper", 2)
        key = box.top + TALL / 2
        yield path([(box.left + CLEAR, key), (box.left + CLEAR + KEY - 6, key)], f"curve{i % theme.CURVES}")
        yield marker(i % theme.CURVES, box.left + CLEAR + (KEY - 6) / 2, key)
        yield text(box.left + CLEAR + KEY, box.bottom - 4.5, name, SIZE, bold=True)


def _free(lines: list[list[Point]], own: int, wide: float, taken: list[Box], plot: Box) -> tuple[Box, Point | None]:
    """The first free place for a name, and the point of the curve that a line leads to where the place is not beside it."""
    for away in (8.0, 14.0, 22.0, 34.0, 50.0, 75.0, 110.0, 150.0):
        for x, y in reversed(_spread(lines[own])):
            for left, top in _places(x, y, wide, away):
                box = Box(left, top, left + wide, top + TALL)
                if _inside(box, plot) and not any(map(box.meets, taken)) and not any(_crosses(box, line) for line in lines):
                    return box, (x, y) if away > 22 else None
    box = Box(plot.left + 4, plot.top + 4, plot.left + 4 + wide, plot.top + 4 + TALL)
    while any(map(box.meets, taken)):
        box = Box(box.left, box.top + TALL, box.right, box.bottom + TALL)
    return box, lines[own][-1]


def _places(x: float, y: float, wide: float, away: float) -> Iterator[Point]:
    """Corners of boxes around a point: above to the left, above, to the right, below, and the other corners."""
    above, below, level = y - away - TALL, y + away, y - TALL / 2
    left, middle, right = x - wide, x - wide / 2, x + away
    yield from ((left, above), (middle, above), (right, level), (right, below), (middle, below), (left, below))
    yield from ((right, above), (left - away, level))


def _spread(points: list[Point]) -> list[Point]:
    """Points of a line at most 12 units apart."""
    found = [points[0]]
    for (x0, y0), (x1, y1) in pairwise(points):
        steps = max(1, math.ceil(math.dist((x0, y0), (x1, y1)) / 12))
        found += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(1, steps + 1)]
    return found


def _inside(box: Box, plot: Box) -> bool:
    return (
        box.left >= plot.left + 2
        and box.right <= plot.right + RIGHT
        and box.top >= plot.top
        and box.bottom <= plot.bottom - 2
    )


def _crosses(box: Box, points: list[Point]) -> bool:
    """Whether a line with its markers comes into the box."""
    pad = 5.0
    wider = Box(box.left - pad, box.top - pad, box.right + pad, box.bottom + pad)
    return any(wider.left < x < wider.right and wider.top < y < wider.bottom for x, y in _spread(points))


# -- what is drawn of models ------------------------------------------------------------------------------------------

SHORTEST = 1024


def contexts(d: Description) -> list[int]:
    """From 1k, or less where the model has not so much, to the model's most: four to an octave.

    With chunks, one: at powers of two they are full, in between the work goes up and down.
    """
    first = min(SHORTEST, d.context)
    finest = 1 if any(layer.attention.mask.chunk for layer in d.layers) else 4
    steps = math.ceil(finest * math.log2(d.context / first))
    return sorted({min(d.context, round(first * 2 ** (i / finest))) for i in range(steps + 1)} | {d.context})


class Quantity(NamedTuple):
    """What a chart shows of a model at a context."""

    title: str
    subtitle: str
    of: Callable[[Description, int], float]
    scale: Callable[[float, float], Axis]


def _read(d: Description, context: int) -> int:
    return d.decode_bytes(context, "bf16")


QUANTITIES = (
    Quantity("KV cache", "bytes of one sequence, bfloat16", Description.kv_bytes, bytes_axis),
    Quantity("Decoding: what is read", "bytes per token, weights and cache in bfloat16", _read, bytes_axis),
    Quantity("Decoding: arithmetic", "FLOPs per token", Description.decode_flops, counts_axis),
    Quantity("Prompt: arithmetic", "FLOPs of all its tokens", Description.prefill_flops, counts_axis),
)


def drawing(descriptions: Sequence[Description], names: Sequence[str]) -> Drawing:
    """A chart for each quantity, two in a row; each model's curve goes up to the context that it was made for."""
    placed = []
    for i, quantity in enumerate(QUANTITIES):
        told = [
            Curve(name, tuple((at, quantity.of(d, at)) for at in contexts(d)))
            for d, name in zip(descriptions, names, strict=True)
        ]
        made = chart(quantity.title, quantity.subtitle, told, quantity.scale)
        placed.append(group([made], x=MARGIN + i % 2 * (WIDTH + GAP), y=MARGIN + i // 2 * (HEIGHT + GAP)))
    rows = -(-len(QUANTITIES) // 2)
    return Drawing(placed, 2 * MARGIN + 2 * WIDTH + GAP, 2 * MARGIN + rows * HEIGHT + (rows - 1) * GAP)
