"""SVG as a tree of elements: what is written is well-formed whatever the content, and refers to nothing outside itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from npllm.pictures import metrics

# What XML 1.0 has no place for, in any form.
ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Element:
    """An element with its attributes and children; a string among these is text, written escaped."""

    tag: str
    attributes: tuple[tuple[str, str], ...]
    children: tuple[Element | str, ...] = ()


def element(tag: str, *children: Element | str, **attributes: str | float | None) -> Element:
    """An element; `font_size` becomes font-size, `class_` class, numbers lose what nobody sees, None leaves it out."""
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    return Element(tag, tuple((_cased(name), number(value)) for name, value in named.items()), children)


# Attributes that SVG spells in camel case.
_CASED = {name.lower(): name for name in ("viewBox", "textLength", "lengthAdjust", "patternUnits", "patternTransform")}


def _cased(name: str) -> str:
    return _CASED.get(name.replace("-", ""), name)


def number(value: str | float) -> str:
    """A number in hundredths of a unit, the shortest way; text as it is."""
    return value if isinstance(value, str) else f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")


def group(children: Iterable[Element], class_: str | None = None, x: float = 0, y: float = 0) -> Element:
    """Elements that belong together, moved by (x, y)."""
    return element("g", *children, class_=class_, transform=f"translate({number(x)} {number(y)})" if x or y else None)


def text(x: float, y: float, content: str, size: float, class_: str = "ink", *, bold: bool = False, anchor: str = "start"
         ) -> Element:  # fmt: skip
    """One line of text on the baseline y.

    Its width is stated, not only expected: a renderer without the font that it was measured for fits its own into it.
    """
    return element(
        "text",
        content,
        class_=f"{class_} bold" if bold else class_,
        x=x,
        y=y,
        font_size=size,
        text_anchor=anchor if anchor != "start" else None,
        text_length=metrics.width(content, size, bold=bold),
        length_adjust="spacingAndGlyphs",
    )


def rect(x: float, y: float, width: float, height: float, class_: str, radius: float = 0) -> Element:
    return element("rect", x=x, y=y, width=width, height=height, rx=radius or None, class_=class_)


def path(points: Iterable[tuple[float, float]], class_: str, closed: bool = False) -> Element:
    """A line through the points."""
    steps = " ".join(f"{number(x)} {number(y)}" for x, y in points)
    return element("path", d=f"M{steps}{'Z' if closed else ''}", class_=class_)


def legal(content: str) -> str:
    """`content` with a question mark for each character that XML cannot hold."""
    return ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", content)


def render(root: Element, indent: int = 0) -> str:
    """The text of the element: one line each, leaves whole."""
    space = "  " * indent
    attributes = "".join(f' {name}="{escape(legal(value))}"' for name, value in root.attributes)
    if not root.children:
        return f"{space}<{root.tag}{attributes}/>"
    if all(isinstance(child, str) for child in root.children):
        inner = "".join(escape(legal(str(child)), quote=False) for child in root.children)
        return f"{space}<{root.tag}{attributes}>{inner}</{root.tag}>"
    lines = [render(child, indent + 1) if isinstance(child, Element) else escape(legal(child)) for child in root.children]
    return "\n".join([f"{space}<{root.tag}{attributes}>", *lines, f"{space}</{root.tag}>"])
