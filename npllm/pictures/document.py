"""Pictures as files of their own: one SVG with its style sheet, its title and a description for those who cannot see it."""

from __future__ import annotations

from npllm.pictures import theme
from npllm.pictures.drawing import Drawing
from npllm.pictures.svg import Element, element, number, rect, render


def svg(drawing: Drawing, title: str, description: str, *, alone: bool = True, name: str = "picture") -> Element:
    """The drawing as an <svg> element: `alone` with all it needs, else as a part of a page that has the style sheet.

    `name` begins the ids of its title and description.
    """
    width, height = number(drawing.width), number(drawing.height)
    style = [element("style", theme.styles())] if alone else []
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", description, id=f"{name}-desc"),
        *style,
        rect(0, 0, drawing.width, drawing.height, "paper"),
        *drawing.elements,
        xmlns="http://www.w3.org/2000/svg" if alone else None,
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        # On a page that is narrower, a picture shrinks as far as its words can be read.
        style=None if alone else f"min-width: {number(0.8 * drawing.width)}px",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )


def text(drawing: Drawing, title: str, description: str) -> str:
    """The text of an SVG file."""
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{render(svg(drawing, title, description))}\n'
