"""One HTML page for a comparison: pictures, the table of differences, curves. It needs no network and runs no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

from npllm.pictures import theme
from npllm.pictures.metrics import FAMILY
from npllm.pictures.svg import Element, legal, render

STYLE = f"""
body {{ margin: 0 auto; padding: 24px 16px 64px; max-width: 1400px; font: 15px/1.45 {FAMILY};
  color: {theme.COLOURS["ink"][0]}; color: var(--ink); background: {theme.COLOURS["paper"][0]}; background: var(--paper); }}
h1 {{ font-size: 24px; margin: 8px 0 4px; overflow-wrap: anywhere; }}
h2 {{ font-size: 18px; margin: 40px 0 12px; break-after: avoid; }}
p, caption {{ color: {theme.COLOURS["soft"][0]}; color: var(--soft); }}
figure {{ margin: 0; overflow-x: auto; }}
figure svg {{ max-width: 100%; height: auto; display: block; margin: 0 auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; padding-bottom: 8px; }}
th, td {{ text-align: left; vertical-align: top; padding: 4px 20px 4px 6px;
  min-width: 9em; overflow-wrap: anywhere;
  border-bottom: 1px solid {theme.COLOURS["hair"][0]}; border-bottom-color: var(--hair); }}
tbody th {{ font-weight: normal; color: {theme.COLOURS["soft"][0]}; color: var(--soft); white-space: nowrap; }}
thead th, thead td {{ border-bottom: 2px solid {theme.COLOURS["line"][0]}; border-bottom-color: var(--line); }}
tbody th.section {{ font-weight: bold; color: {theme.COLOURS["ink"][0]}; color: var(--ink); padding-top: 18px; }}
tr.different td {{ font-weight: bold; }}
tr.different th::before {{ content: "\\2260\\00a0"; }}
tr.same th::before {{ content: "=\\00a0"; }}
tr.same td {{ color: {theme.COLOURS["soft"][0]}; color: var(--soft); }}
@media print {{ body {{ max-width: none; padding: 0; }} figure {{ overflow: visible; break-inside: avoid; }} }}
"""


class Row(NamedTuple):
    """A line of the table of differences: what it is about, a cell for each model, and the heading that it stands under."""

    what: str
    cells: tuple[str, ...]
    section: str = ""

    @property
    def differs(self) -> bool:
        return len(set(self.cells)) > 1


class Figure(NamedTuple):
    """An <svg> element (npllm.pictures.document.svg) under a heading."""

    heading: str
    picture: Element


def page(title: str, names: Sequence[str], figures: Sequence[Figure], rows: Sequence[Row], note: str) -> str:
    """The page's text: the first figure, the table over the models of these names, the other figures."""
    first, *rest = [_figure(each) for each in figures]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # Says in the page's own words that it asks for nothing from elsewhere, and holds a browser to it.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{_text(title)}</title>",
            f"<style>\n{theme.styles()}{STYLE}</style>",
            "</head>",
            "<body>",
            f"<h1>{_text(title)}</h1>",
            first,
            "<h2>Differences</h2>",
            *_table(names, rows),
            *rest,
            f"<p>{_text(note)}</p>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _text(content: str) -> str:
    return escape(legal(content), quote=False)


def _figure(figure: Figure) -> str:
    heading = f"<h2>{_text(figure.heading)}</h2>\n" if figure.heading else ""
    return f"{heading}<figure>\n{render(figure.picture)}\n</figure>"


def _line(row: Row) -> str:
    cells = "".join(f"<td>{_text(cell)}</td>" for cell in row.cells)
    return f'<tr class="{"different" if row.differs else "same"}"><th scope="row">{_text(row.what)}</th>{cells}</tr>'


def _table(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in names)
    lines = []
    for section, under in groupby(rows, lambda row: row.section):
        if section:
            lines.append(f'<tr><th class="section" colspan="{len(names) + 1}" scope="colgroup">{_text(section)}</th></tr>')
        lines += map(_line, under)
    return [
        '<div class="wide"><table>',
        "<caption>≠ before a row, and bold type: not the same in every model.</caption>",
        f"<thead><tr><td></td>{head}</tr></thead>",
        "<tbody>",
        *lines,
        "</tbody></table></div>",
    ]
