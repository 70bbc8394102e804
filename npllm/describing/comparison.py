"""Several descriptions side by side: rows of facts, of which those that differ stand out."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from npllm.describing.description import Description
from npllm.describing.facts import NONE, facts_of
from npllm.describing.limits import Machine
from npllm.describing.report import CONVENTIONS, WIDTH

LABEL, LEAST, GAP = 27, 18, 2

# Marks a row that differs, where there are no colours.
MARK = "*"


class Row(NamedTuple):
    """One fact of all models; `values` are numbers where it is one."""

    section: str
    name: str
    cells: tuple[str, ...]
    values: tuple[int | float | None, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.cells)) > 1


def rows_of(
    descriptions: Sequence[Description],
    context: int,
    kv_dtype: str = "bfloat16",
    weights: str | None = None,
    machine: Machine | None = None,
) -> list[Row]:
    """Facts that any of the models has, in the order of the models that have them."""
    columns = [facts_of(each, context, kv_dtype, weights, machine) for each in descriptions]
    keys: list[tuple[str, str]] = []
    for facts in columns:
        at = 0
        for fact in facts:
            key = (fact.section, fact.name)
            if key not in keys:
                keys.insert(at, key)
            at = keys.index(key) + 1
    found = [{(fact.section, fact.name): fact for fact in facts} for facts in columns]
    rows = []
    for section, name in keys:
        of_each = [facts.get((section, name)) for facts in found]
        cells, values = (fact.text if fact else NONE for fact in of_each), (fact and fact.value for fact in of_each)
        rows.append(Row(section, name, tuple(cells), tuple(values)))
    return [row for row in rows if set(row.cells) != {NONE}]


def text(names: Sequence[str], rows: Sequence[Row], bold: str = "", dim: str = "", reset: str = "") -> str:
    """A table for a terminal; `bold`, `dim` and `reset` are what its colours take. What all share is told once, dim."""
    width = max(LEAST, (WIDTH - LABEL) // len(names) - GAP)
    lines = _lines("", names, width)
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            lines += ["", section]
        cells = row.cells if row.differs else (row.cells[0], *["="] * (len(names) - 1))
        style = bold if row.differs else dim
        lines += [f"{style}{line}{reset}" for line in _lines(f"{MARK if row.differs else ' '} {row.name}", cells, width)]
    legend = f"{MARK} differs; = the same as in the first column. {CONVENTIONS}"
    return "\n".join([*lines, "", *textwrap.wrap(legend, WIDTH)]) + "\n"


def _lines(label: str, cells: Sequence[str], width: int) -> list[str]:
    """One row of cells, each wrapped to `width`."""
    wrapped = [textwrap.wrap(label, LABEL - GAP, subsequent_indent="  ") or [""]]
    wrapped += [textwrap.wrap(cell, width, break_on_hyphens=False) or [""] for cell in cells]
    height = max(map(len, wrapped))
    widths = [LABEL - GAP, *[width] * len(cells)]
    padded = [part + [""] * (height - len(part)) for part in wrapped]
    lines = zip(*padded, strict=True)
    return [(" " * GAP).join(f"{cell:<{room}}" for cell, room in zip(line, widths, strict=True)).rstrip() for line in lines]


def markdown(names: Sequence[str], rows: Sequence[Row]) -> str:
    """The same as a table in Markdown, cells that differ in bold."""
    return "\n".join(_markdown(names, rows)) + "\n"


def _markdown(names: Sequence[str], rows: Sequence[Row]) -> Iterator[str]:
    yield f"| | {' | '.join(map(_escaped, names))} |"
    yield "|---" * (len(names) + 1) + "|"
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            yield f"| **{_escaped(section)}** |" + " |" * len(names)
        cells = [f"**{_escaped(cell)}**" if row.differs else _escaped(cell) for cell in row.cells]
        yield f"| {_escaped(row.name)} | {' | '.join(cells)} |"


def _escaped(cell: str) -> str:
    return "".join(f"\\{letter}" if letter in r"\|*_`<[" else letter for letter in cell)
