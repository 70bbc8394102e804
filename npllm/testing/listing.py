"""The operations of the kit in words: what a kernel takes and returns, which cases there are, which mistakes are known."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable

from npllm.testing.case import Case
from npllm.testing.operation import Operation
from npllm.testing.rounding import FORMATS

WIDTH = 100


def overview(op: Operation) -> str:
    """An operation in a paragraph, its cases by name."""
    names = [case.name for case in op.cases]
    return "\n".join([*head(op), *entry(f"{len(names)} cases", names), *entry("tags", tags_of(op.cases))]) + "\n"


def in_full(op: Operation, cases: Iterable[Case]) -> str:
    """An operation with `cases` in a line each: settings, shapes, scales and tags; and the mistakes that are known."""
    rows = [row for case in cases for row in case_lines(case)]
    mistakes = [f"    {mistake.name}" for mistake in op.mistakes]
    lines = [*head(op), *entry("tags", tags_of(op.cases)), "  cases", *rows, "  known mistakes", *mistakes]
    return "\n".join(lines) + "\n"


def head(op: Operation) -> list[str]:
    """Name and purpose, the signature of a kernel, and the axes of its arrays."""
    arrays, settings = needs(op)
    shared = [name for name in op.inputs if name not in op.derived]
    signature = [optional(name, arrays, op) for name in shared] + ["*"] * bool(settings)
    signature += [optional(name, settings, op) for name in settings]
    lines = [f"{op.name}: {op.about}", *wrapped(f"  def {op.name}(", [*signature[:-1], f"{signature[-1]})"])]
    lines += entry("takes", [f"{name} [{', '.join(axes)}]" for name, axes in op.inputs.items() if name in shared])
    if op.derived:
        lines += entry("if named", [f"{name} [{', '.join(op.inputs[name])}]" for name in op.inputs if name in op.derived])
    return lines + entry("returns", [f"{name} [{', '.join(axes)}]" for name, axes in op.outputs.items()])


def needs(op: Operation) -> tuple[Counter[str], Counter[str]]:
    """How many cases have each array, and each setting."""
    arrays, settings = Counter[str](), Counter[str]()
    for case in op.cases:
        arrays.update(list(case.inputs(0, case.scales[0], FORMATS["f32"])))
        settings.update(list(case.settings))
    return arrays, settings


def optional(name: str, counts: Counter[str], op: Operation) -> str:
    """A parameter; `=None` where not every case has it."""
    return name if counts[name] == len(op.cases) else f"{name}=None"


def tags_of(cases: Iterable[Case]) -> list[str]:
    return sorted(frozenset[str]().union(*(case.tags for case in cases)))


def case_lines(case: Case) -> list[str]:
    """What a case is, its id in a line of its own."""
    drawn = case.inputs(0, case.scales[0], FORMATS["f32"])
    shapes = [f"{name} {list(x.shape)}" for name, x in drawn.items()]
    settings = [f"{name}={value!r}" for name, value in case.settings.items()]
    scales = f"scales {' '.join(f'{scale:g}' for scale in case.scales)}"
    return [f"    {case.id}", *wrapped("        ", [*shapes, *settings, scales, f"tags {' '.join(sorted(case.tags))}"])]


def entry(name: str, words: Iterable[str]) -> list[str]:
    return wrapped(f"  {name:<10}", words)


def wrapped(start: str, words: Iterable[str]) -> list[str]:
    """The words with commas between, in lines that begin below each other; a word is not parted."""
    text = ", ".join(word.replace(" ", "\0") for word in words)
    lines = textwrap.wrap(text, WIDTH - len(start), break_long_words=False, break_on_hyphens=False)
    return [f"{start if i == 0 else ' ' * len(start)}{line}".replace("\0", " ") for i, line in enumerate(lines)]
