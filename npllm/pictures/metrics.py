"""Widths of text in Helvetica, Arial and the free fonts of the same measure, without any of them.

Advance widths in thousandths of the size. `svg.text` states what is computed here, so that another font is fitted to it.
"""

from __future__ import annotations

import unicodedata

FAMILY = "Helvetica, Arial, 'Liberation Sans', Arimo, sans-serif"

# From space to tilde.
REGULAR = """
278 278 355 556 556 889 667 191 333 333 389 584 278 333 278 278 556 556 556 556 556 556 556 556 556 556 278 278 584 584
584 556 1015 667 667 722 722 667 611 778 722 278 500 667 556 833 722 778 667 778 722 667 611 722 667 944 667 667 611 278
278 278 469 556 333 556 556 500 556 556 278 556 556 222 222 500 222 833 556 556 556 556 333 500 278 556 500 722 500 500
500 334 260 334 584
"""
BOLD = """
278 333 474 556 556 889 722 238 333 333 389 584 278 333 278 278 556 556 556 556 556 556 556 556 556 556 333 333 584 584
584 611 975 722 722 722 722 667 611 778 722 278 556 722 611 833 722 778 667 778 722 667 611 722 667 944 667 667 611 333
278 333 584 556 333 556 611 556 611 556 333 611 611 278 278 556 278 889 611 611 611 611 389 556 333 611 556 778 556 556
500 389 280 389 584
"""
WIDTHS = [dict(zip(map(chr, range(32, 127)), map(int, table.split()), strict=True)) for table in (REGULAR, BOLD)]
OTHERS = {"×": 584, "·": 278, "–": 556, "…": 1000, "√": 549, "θ": 556, "½": 834, "²": 333, "−": 584, "→": 1000}


def width(content: str, size: float, *, bold: bool = False) -> float:
    """Width of a line of text, in the units of `size`."""
    return sum(_advance(character, WIDTHS[bold]) for character in content) * size / 1000


def _advance(character: str, widths: dict[str, int]) -> int:
    known = widths.get(character) or OTHERS.get(character)
    if known is not None:
        return known
    if unicodedata.combining(character):
        return 0
    if unicodedata.east_asian_width(character) in "WF":
        return 1000
    base = unicodedata.normalize("NFD", character)[0]
    return widths.get(base, 667)


def fitted(content: str, size: float, most: float, *, bold: bool = False, tail: bool = False) -> str:
    """`content`, or as much of its beginning (of its `tail`) as is at most `most` wide, with an ellipsis for the rest."""
    if width(content, size, bold=bold) <= most:
        return content
    while content and width(content + "…", size, bold=bold) > most:
        content = content[1:] if tail else content[:-1]
    return f"…{content.lstrip()}" if tail else f"{content.rstrip()}…"


def fitted_name(name: str, size: float, most: float) -> str:
    """A model's name in bold type; of a path the end tells more."""
    return fitted(name, size, most, bold=True, tail="/" in name)


def wrapped(items: list[str], size: float, most: float, separator: str = "  ") -> list[list[int]]:
    """Which items stand on each line when lines are filled in order; an item that is wider stands alone."""
    lines: list[list[int]] = []
    room = 0.0
    for i, item in enumerate(items):
        needed = width(item, size, bold=True)
        if not lines or needed + width(separator, size) > room:
            lines.append([])
            room = most + width(separator, size)
        lines[-1].append(i)
        room -= needed + width(separator, size)
    return lines
