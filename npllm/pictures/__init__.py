"""Pictures of architectures, drawn from descriptions alone: block diagrams side by side, curves, a page with both.

They are SVG and HTML that need nothing else: no network, no script, no font. Light and dark follow the reader's setting.
"""

from __future__ import annotations

from collections.abc import Sequence

from npllm.config import printable
from npllm.describing.description import Description
from npllm.pictures import curves, document, figure, memory, page, sheets
from npllm.pictures.drawing import Drawing
from npllm.pictures.page import Row

__all__ = ["Row", "curves_svg", "diagram_svg", "memory_svg", "page_html"]

NOTE = (
    "Drawn by npllm from the configurations alone, layers from below to above. Parameters are of the text part; in the "
    "pictures keys and values are bfloat16. FLOPs are those of matrix products, two to a multiply-add."
)


def diagram_svg(descriptions: Sequence[Description]) -> str:
    """An SVG file: the block diagrams of the models side by side."""
    names = [shown(d) for d in descriptions]
    return document.text(_diagram(descriptions), _title(names), _spoken(descriptions))


def curves_svg(descriptions: Sequence[Description]) -> str:
    """An SVG file: keys and values in memory, and FLOPs per token, over the context."""
    names = [shown(d) for d in descriptions]
    return document.text(curves.drawing(descriptions, names), f"Memory and work over context: {_listed(names)}", CURVES)


def page_html(descriptions: Sequence[Description], rows: Sequence[Row]) -> str:
    """An HTML file: the diagrams, the table of differences (`rows`: a cell for each model), the curves."""
    names = [shown(d) for d in descriptions]
    figures = [
        page.Figure(
            "", document.svg(_diagram(descriptions), _title(names), _spoken(descriptions), alone=False, name="blocks")
        ),
        page.Figure(
            "Memory and work over context",
            document.svg(
                curves.drawing(descriptions, names), "Memory and work over context", CURVES, alone=False, name="curves"
            ),
        ),
    ]
    return page.page(_title(names), names, figures, rows, NOTE)


CURVES = (
    "Four charts over the tokens of context: bytes of keys and values of one sequence, bytes read for one decoded token, "
    "FLOPs of one decoded token, FLOPs of a prompt."
)


def shown(d: Description) -> str:
    """A model's name on one line, without what would steer a terminal or turn the text around."""
    return printable(d.name, 1000).removesuffix("/config.json") or d.name


def _diagram(descriptions: Sequence[Description]) -> Drawing:
    return figure.figure([sheets.sheet(d, shown(d)) for d in descriptions])


def _title(names: Sequence[str]) -> str:
    return f"{_listed(names)}, block by block"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _spoken(descriptions: Sequence[Description]) -> str:
    """What the picture shows, for those who cannot see it."""
    return " ".join(sheets.spoken(sheets.sheet(d, shown(d))) for d in descriptions)


def memory_svg(model: Description, descriptions: Sequence[Description]) -> str:
    """An SVG file: what the cache keeps of a token with the heads of `model`, of latent attention, as MHA, GQA, MQA and MLA,
    and what it keeps with each of `descriptions`.
    """
    title = "MHA, GQA, MQA and MLA: the KV cache of a token"
    spoken = [f"{way.name}: {way.bytes:,} bytes" for way in memory.ways(model)]
    spoken += [f"{bar.name}: {bar.whole:,} bytes, {bar.growing:,} with windows full" for bar in memory.bars(descriptions)]
    return document.text(memory.drawing(model, descriptions), title, ". ".join(spoken))
