"""Small drawings that tell what words tell beside them: who shares keys, what a query sees, how many experts run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from npllm.pictures.parts import Glyph
from npllm.pictures.svg import Element, group, path, rect

SIDE = 32.0


def draw(glyph: Glyph, x: float, y: float) -> Element:
    """The glyph in a square of SIDE, its top left corner at (x, y)."""
    return group(DRAWN[glyph.kind](*glyph.values), "glyph", x, y)


def heads(queries: int, keys: int) -> Iterator[Element]:
    """Query heads above, key/value heads below, a line from each to the one that it reads; at most eight are drawn."""
    shared = max(1, queries // max(keys, 1))
    groups = 1 if keys == 1 else 2 if shared > 1 else 4
    each = 1 if shared == 1 else min(shared, 8 // groups)
    step = SIDE / (groups * each)
    for g in range(groups):
        middle = (g + 0.5) * each * step
        for i in range(each):
            x = (g * each + i + 0.5) * step
            yield path([(x, 8), (middle, 23)], "thin")
            yield rect(x - 1.6, 2, 3.2, 7, "ink")
        yield rect(middle - 2.6, 22, 5.2, 8, "paper edge")


def latent() -> Iterator[Element]:
    """Query heads above, one latent vector below that all of them read."""
    for i in range(4):
        x = (i + 0.5) * SIDE / 4
        yield path([(x, 8), (x, 23)], "thin")
        yield rect(x - 1.6, 2, 3.2, 7, "ink")
    yield rect(2, 22, SIDE - 4, 8, "paper edge", 4)


CELLS = 7


def mask(kind: str) -> Iterator[Element]:
    """Queries downwards, keys to the right: dark where a query sees a key. `kind` is causal, window or chunk."""
    cell = (SIDE - 4) / CELLS
    yield rect(1.5, 1.5, SIDE - 3, SIDE - 3, "paper edge")
    first = [{"causal": 0, "window": max(0, i - 2), "chunk": i // 3 * 3}[kind] for i in range(CELLS)]
    left = [(2 + first[i] * cell, 2 + (i + end) * cell) for i in range(CELLS) for end in (0, 1)]
    right = [(2 + (i + 1) * cell, 2 + (i + end) * cell) for i in range(CELLS) for end in (0, 1)]
    yield path([*left, *reversed(right)], "ink", closed=True)


def experts(chosen: int, routed: int, shared: int) -> Iterator[Element]:
    """A field of routed experts, as many of them dark as run for a token (at most 16 are drawn), shared ones below."""
    shown = min(routed, 16)
    dark = min(chosen if routed <= 16 else max(1, min(round(16 * chosen / routed), 15)), shown)
    side, columns = 6.0, 4
    top = 0.0 if shared else 4.0
    for i in range(shown):
        x, y = 2.5 + i % columns * 7.2, top + i // columns * 6.6
        yield rect(x, y, side - 0.8, side - 0.8, "ink edge" if i < dark else "paper edge")
    if shared:
        yield rect(2.5, 27.2, 26.6, 4.6, "ink edge", 1.5)


DRAWN: dict[str, Callable[..., Iterator[Element]]] = {"heads": heads, "latent": latent, "mask": mask, "experts": experts}
