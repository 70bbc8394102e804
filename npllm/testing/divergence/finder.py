"""`npllm.testing.diff`: the canon fed with a dump, the first name that leaves the budget, and the convention behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.errors import ContextError
from npllm.llm import LLM
from npllm.testing.divergence.book import Book, Point, Reached, Tie, modules_of
from npllm.testing.divergence.conventions import Convention, conventions
from npllm.testing.divergence.dump import Dump, read_dump
from npllm.testing.divergence.probe import Probe, membership, turning
from npllm.testing.rounding import Format, format_of

# Disturbed copies of the tokens whose scatter is the budget.
COPIES = 8

# A convention that takes away less of the error is no explanation: of any two dozen, one halves it by chance.
ENOUGH = 0.8

# Conventions whose shares of the error differ by less cannot be told apart where they are looked at; so many are named.
SAME, NAMED = 1e-9, 3


@dataclass(frozen=True)
class Divergence:
    """What `diff` found.

    model, dump   where they came from.
    format        the format whose rounding is allowed for (bf16, f16, f32, f64).
    points        every comparison, in the order in which the model computes.
    first         the first that leaves the budget; None: no divergence.
    convention    what explains it best ("" if nothing does), and `explained`, which part of its squared error (0 to 1);
                  those that come to the same there are named with "or" between.
    ties          tokens whose experts differ from the canon's by less than the budget.
    unused        names of the dump that nothing was compared with.
    """

    model: str
    dump: str
    format: str
    points: tuple[Point, ...]
    first: Point | None
    convention: str
    explained: float
    ties: tuple[Tie, ...]
    unused: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no divergence."""
        return self.first is None

    @property
    def worst(self) -> list[Point]:
        """Of each layer, and of what lies outside of them, the point with the largest error against its budget."""
        worst: dict[int | None, Point] = {}
        for point in self.points:
            if point.layer not in worst or point.excess > worst[point.layer].excess:
                worst[point.layer] = point
        return list(worst.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": self.ok, "model": self.model, "dump": self.dump, "format": self.format,
            "first": None if self.first is None else self.first._asdict(),
            "convention": self.convention, "explained": self.explained,
            "points": [point._asdict() for point in self.points],
            "ties": [tie._asdict() for tie in self.ties], "unused": list(self.unused),
        }  # fmt: skip

    def __str__(self) -> str:
        ties = f"; {len(self.ties)} experts' choices are ties" if self.ties else ""
        if self.first is None:
            largest = max((point.excess for point in self.points), default=0.0)
            figures = f"{len(self.points)} names compared in {self.format}, largest error {largest:.2g} of the budget"
            return f"no divergence: {figures}{ties}"
        where = "" if self.first.layer is None else f" in layer {self.first.layer}"
        size = f"{self.first.excess:.3g} times the budget ({self.first.error:.3g} roundings of {self.format})"
        if self.first.problem == "choice":
            size = f"other experts for {self.first.error:.0f} tokens"
        if self.first.problem == "non-finite":
            size = "NaN or infinity where the truth is finite"
        if self.first.problem == "constant":
            size = "one number everywhere, where the truth varies"
        known = f"; {self.convention or 'no known convention'} explains "
        known += f"{self.explained:.1%}" if self.convention else "it"
        return f"first divergence: {self.first.operation}{where}, at {self.first.name}: {size}{known}{ties}"


def diff(
    model: LLM | str | Path, dump: str | Path | Mapping[str, Any], tokens: Any = None, *, dtype: str | None = None,
    explain: bool = True,
) -> Divergence:  # fmt: skip
    """Compare a dump of activations with the canon, each operation fed with the dump's own inputs.

    model    an LLM, or what `npllm.load` takes.
    dump     a safetensors file, or arrays by name (npllm.testing.divergence.dump tells of the names).
    tokens   ids [T] or [B, T]; None: the dump's own `tokens`.
    dtype    the format that the engine computed in; None: the narrowest that holds what it dumped.
    explain  look for the convention that explains the first divergence.

    ArgumentError, in one line: no tokens or none of this vocabulary, shapes of another model, names that match nothing.
    """
    if not isinstance(model, LLM):
        from npllm.loading import load

        model = load(model, backend="numpy")
    return compare(model, read_dump(dump), tokens, format_of(dtype) if dtype else None, explain)


def compare(llm: LLM, dump: Dump, tokens: Any, format: Format | None, explain: bool) -> Divergence:
    tokens_BT = dump.tokens(tokens, llm.config.vocab_size)
    if tokens_BT.shape[1] > llm.config.max_position_embeddings:
        raise ContextError(f"{dump.source}: {tokens_BT.shape[1]} tokens do not fit into the model's context")
    dump.rename(getattr(llm.model.architecture, "RENAMED", {}))
    B, T = tokens_BT.shape
    book = Book(dump, format or dump.computed_in(), B, T, modules_of(llm.model), COPIES)
    run(llm, book, tokens_BT, Probe, llm.config)
    if not book.points:
        dump.refuse_strange(book.asked)
    first = next((point for point in book.points if point.problem), None)
    name, part = "", 0.0
    if first is not None and explain and first.problem != "non-finite":
        name, part = explained(llm, book, tokens_BT, first)
    points, ties = tuple(book.points), tuple(book.ties)
    return Divergence(llm.name, dump.source, book.format.name, points, first, name, part, ties, tuple(dump.unused))


def run(llm: LLM, book: Book, tokens_BT: Array, kind: type[Probe], config: Any) -> None:
    """One pass of the canon through the book."""
    be = kind(llm.backend, book)
    cache = llm.model.architecture.cache_spec(config)
    rows = book.rows * (book.copies + 1)
    memory = be.new_cache(cache, book.length)
    plan = memory.plan([memory.add() for _ in range(rows)], [book.length] * rows)
    with np.errstate(all="ignore"):
        tokens_M = np.tile(tokens_BT.reshape(-1), book.copies + 1)
        replace(llm.model, config=config).run(be, tokens_M, plan, memory)


def explained(llm: LLM, book: Book, tokens_BT: Array, first: Point) -> tuple[str, float]:
    """The convention that comes nearest to the dump at the first divergence, and how much of the error it takes away."""
    name = next(own for own, spelled in book.dump.spelled.items() if spelled == first.name and own in book.dump.used)
    true = value_at(llm, book, tokens_BT, name, None)
    if true is None:
        return "", 0.0
    theirs = wanted_at(book, name, true)
    error = error_of(theirs, true)
    best, names = ENOUGH, list[str]()
    for each in conventions(llm.config, first.operation):
        value = value_at(llm, book, tokens_BT, name, each)
        if value is None or not np.isfinite(value).all():
            continue
        part = 1.0 - error_of(theirs, value) / error if error else 0.0
        if part > best + SAME:
            best, names = part, []
        if part > best - SAME:
            names.append(each.name)
    return (" or ".join(names[:NAMED]), best) if names else ("", 0.0)


def value_at(llm: LLM, book: Book, tokens_BT: Array, name: str, convention: Convention | None) -> Array | None:
    """What the canon, with a convention in it, has at a name of the dump; None where the convention makes no sense."""
    again = Book(book.dump, book.format, book.rows, book.length, book.modules, 0, stop=name)
    kind, config = (Probe, llm.config) if convention is None else (convention.made_by(Probe), convention.config)
    try:
        run(llm, again, tokens_BT, kind, config)
    except Reached as reached:
        return reached.value
    except (ValueError, IndexError, TypeError, ArithmeticError, AttributeError):
        return None
    return None


def wanted_at(book: Book, name: str, like: Array) -> Array:
    """The dump's tensor in the shape of the canon's."""
    value = book.dump.values[name]
    if like.dtype == bool:
        return membership(value.reshape(len(like), -1), like.shape[1])
    fitted = turning(book, name, like) if name.startswith("rotary_emb") else book.fitted(name, like, False)
    return like if fitted is None else fitted


def error_of(x: Array, y: Array) -> float:
    return float(np.sum((x.astype(np.float64) - y.astype(np.float64)) ** 2))
