"""What of a picture does not fit, by what its file says: widths of text are stated there. Where there is a browser,
tests/browser.py has it measure the same, as painted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple
from xml.etree.ElementTree import Element, fromstring

SVG = "{http://www.w3.org/2000/svg}"
SLACK = 0.6


class Area(NamedTuple):
    """A rectangle with the words it has, and the boxes that it lies in, by their numbers."""

    left: float
    top: float
    right: float
    bottom: float
    words: str
    inside: tuple[int, ...]

    def within(self, other: Area) -> bool:
        return (
            self.left >= other.left - SLACK
            and self.top >= other.top - SLACK
            and self.right <= other.right + SLACK
            and self.bottom <= other.bottom + SLACK
        )

    def meets(self, other: Area) -> bool:
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return across > SLACK and down > SLACK


def faults(svg: str) -> list[str]:
    """Text outside its box or the picture, text on text, boxes on boxes or outside the boxes they belong to."""
    root = fromstring(svg.encode("utf-8"))
    whole = Area(0, 0, float(root.get("width", 0)), float(root.get("height", 0)), "", ())
    boxes: list[Area] = []
    texts = list(_texts(root, 0.0, 0.0, (), boxes))
    found = [f"outside the picture: {each.words}" for each in (*texts, *boxes) if not each.within(whole)]
    found += [f"outside its box: {t.words}" for t in (*texts, *boxes) if t.inside and not t.within(boxes[t.inside[-1]])]
    found += [f"text on text: {one.words} / {other.words}" for one, other in combinations(texts, 2) if one.meets(other)]
    for (i, one), (j, other) in combinations(enumerate(boxes), 2):
        if i not in other.inside and j not in one.inside and one.meets(other):
            found.append(f"box on box: {one.words} / {other.words}")
    found += [
        f"text on a box: {t.words}" for t in texts for i, box in enumerate(boxes) if i not in t.inside and t.meets(box)
    ]
    return found


def _texts(node: Element, x: float, y: float, inside: tuple[int, ...], boxes: list[Area]) -> Iterator[Area]:
    """All texts below a node whose origin is (x, y); the boxes are added to `boxes`."""
    moved = re.fullmatch(r"translate\((\S+) (\S+)\)", node.get("transform", "translate(0 0)"))
    assert moved, node.get("transform")
    x, y = x + float(moved[1]), y + float(moved[2])
    if node.get("class") == "box":
        left, top, width, height = (float(node[0].get(name, 0)) for name in ("x", "y", "width", "height"))
        words = next((each.text or "" for each in node.iter(f"{SVG}text")), "")
        boxes.append(Area(x + left, y + top, x + left + width, y + top + height, words, inside))
        inside = (*inside, len(boxes) - 1)
    for child in node:
        if child.tag == f"{SVG}text":
            yield _area(child, x, y, inside)
        elif child.tag == f"{SVG}g":
            yield from _texts(child, x, y, inside, boxes)


def _area(node: Element, x: float, y: float, inside: tuple[int, ...]) -> Area:
    """Of a text, from the top of its capitals to what hangs below the baseline."""
    width, size = float(node.get("textLength", 0)), float(node.get("font-size", 0))
    left = x + float(node.get("x", 0)) - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[node.get("text-anchor", "start")]
    base = y + float(node.get("y", 0))
    return Area(left, base - 0.73 * size, left + width, base + 0.2 * size, node.text or "", inside)
