"""What a block diagram shows, before it has a place: parts with what is said in them, branches, kinds of layers, models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Glyph(NamedTuple):
    """A small drawing beside the words of a part: `kind` names a function of npllm.pictures.glyphs, `values` are its own."""

    kind: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Part:
    """A box of a diagram.

    role    what it is for (attention, ffn, moe, norm, ends, plain): its tint, and what it is compared with.
    title   what it is; a part with another title is another part.
    facts   its numbers, one string each.
    inside  what happens within it, in the order of computation: norms of q and k, RoPE, a router.
    """

    role: str
    title: str
    facts: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    glyphs: tuple[Glyph, ...] = ()

    @property
    def form(self) -> tuple[Any, ...]:
        """What makes two parts the same but for their numbers."""
        sights = tuple(glyph.values if glyph.kind == "mask" else () for glyph in self.glyphs)
        return self.role, self.title, self.inside, sights


@dataclass(frozen=True)
class Branch:
    """A way beside the residual stream: norms, a part, norms, and what runs beside these from the same input."""

    before: Part | None
    part: Part
    after: Part | None
    beside: Part | None = None

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Each part with its place: a norm before attention is not the same as one after it."""
        for place, part in (("before", self.before), ("main", self.part), ("after", self.after), ("beside", self.beside)):
            if part is not None:
                yield f"{place} {'ffn' if self.part.role == 'moe' else self.part.role}", part


@dataclass(frozen=True)
class Kind:
    """Layers that are alike: their name, their indices, the branches of one, and what comes before and after these.

    known    parts that another kind of the model tells, by its place among them: they need no second telling.
    model    the kind that this one is told against; None: it is told whole.
    altered  what it has in other forms or with other numbers than `model`, with the places.
    """

    name: str
    layers: tuple[int, ...]
    branches: tuple[Branch, ...]
    first: Part | None = None
    last: Part | None = None
    known: Mapping[Part, int] = field(default_factory=dict)
    model: int | None = None
    altered: tuple[tuple[str, Part], ...] = ()

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Each part with its place, in the order of computation."""
        if self.first is not None:
            yield "first", self.first
        for branch in self.branches:
            yield from branch.parts()
        if self.last is not None:
            yield "last", self.last


@dataclass(frozen=True)
class Sheet:
    """A model as its column shows it: name, what stands below the name, its kinds of layers by first layer, both ends.

    facts   pairs of a word and what there is to say.
    depth   the number of layers.
    """

    name: str
    facts: tuple[tuple[str, str], ...]
    depth: int
    embedding: Part
    kinds: tuple[Kind, ...]
    norm: Part | None
    head: Part

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Every part with its place."""
        yield "embedding", self.embedding
        for kind in self.kinds:
            yield from kind.parts()
        if self.norm is not None:
            yield "norm", self.norm
        yield "head", self.head


@dataclass(frozen=True)
class Differences:
    """What a model has that fewer than half of the others have: forms of parts, facts and what is inside, by place."""

    others: tuple[frozenset[Any], ...]
    known: tuple[frozenset[Any], ...]

    @classmethod
    def of(cls, sheet: Sheet, sheets: list[Sheet]) -> Differences:
        rest = [each for each in sheets if each is not sheet]
        forms = tuple(frozenset((place, part.form) for place, part in each.parts()) for each in rest)
        facts = tuple(
            frozenset((place, fact) for place, part in each.parts() for fact in (*part.facts, *part.inside)) for each in rest
        )
        return cls(forms, facts)

    def form(self, place: str, part: Part) -> bool:
        """Whether a part of this form there is unlike the others."""
        return _rare((place, part.form), self.others)

    def fact(self, place: str, fact: str) -> bool:
        """Whether a fact, or something inside a part, is."""
        return _rare((place, fact), self.known)


def _rare(item: Any, others: tuple[frozenset[Any], ...]) -> bool:
    return 2 * sum(item in each for each in others) < len(others)
