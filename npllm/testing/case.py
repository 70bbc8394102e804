"""Cases: named inputs that an operation must get right, each the home of a feature or of a mistake.

An id, `attention/window-edge`, stays the same from release to release: what a case is does not change, new ones are added.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.config import nearest
from npllm.errors import ArgumentError
from npllm.testing.rounding import Format

# Draws the inputs of a case: (random numbers, scale) -> arrays by name. float64 arrays will be rounded to the input type
# that a kernel declares; arrays of any other type stay as they are.
Draw = Callable[[np.random.Generator, float], dict[str, Array]]


@dataclass(frozen=True)
class Case:
    """One case of an operation.

    settings   what a kernel is given by keyword beside the arrays; a setting that a case does not need is absent.
    tags       features it shows; `cases` selects by them.
    scales     a case runs once at each, since inputs decide what shows: a soft cap needs large scores, a scale small ones.
    """

    operation: str
    name: str
    draw: Draw = field(repr=False, compare=False)
    settings: Mapping[str, Any] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    scales: tuple[float, ...] = (1.0,)

    @property
    def id(self) -> str:
        return f"{self.operation}/{self.name}"

    def inputs(self, seed: int, scale: float, of: Format) -> dict[str, Array]:
        """The arrays of the case, real ones rounded to the format `of` and in its NumPy type; equal for equal arguments."""
        generator = np.random.default_rng([seed, zlib.crc32(self.id.encode()), round(scale * 4096)])
        drawn = self.draw(generator, scale)
        return {name: of.round(x).astype(of.dtype) if x.dtype == np.float64 else x for name, x in drawn.items()}

    def __str__(self) -> str:
        return self.id


def cases(operation: str, tags: Iterable[str] = (), without: Iterable[str] = ()) -> list[Case]:
    """The corpus of an operation: cases that have all `tags` and none of `without`; ArgumentError for an unknown tag.

    Cases tagged `hostile` ask for more than most kernels promise, and come only where that tag is wanted.
    """
    from npllm.testing.operation import operation as find

    wanted, unwanted = _words(tags), _words(without)
    corpus = find(operation).cases
    known = frozenset[str]().union(*(case.tags for case in corpus))
    for tag in wanted | unwanted:
        if tag not in known:
            raise ArgumentError(f"{operation} has no cases tagged {tag!r}; tags: {nearest(tag, known)}")
    unwanted |= {"hostile"} - wanted
    return [case for case in corpus if wanted <= case.tags and not unwanted & case.tags]


def find_case(operation: str, case: str | Case) -> Case:
    """The case of that id or name; ArgumentError lists the nearest."""
    if isinstance(case, Case):
        return case
    from npllm.testing.operation import operation as find

    corpus = {each.name: each for each in find(operation).cases}
    name = case.removeprefix(f"{operation}/")
    if name not in corpus:
        raise ArgumentError(f"{operation} has no case {name!r}; nearest: {', '.join(nearest(name, corpus).split(', ')[:5])}")
    return corpus[name]


def _words(tags: Iterable[str]) -> frozenset[str]:
    return frozenset(tags.split(",") if isinstance(tags, str) else tags) - {""}
