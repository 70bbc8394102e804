"""An operation as the kit sees it: what a kernel of that kind takes and gives, its budget, its cases, its known mistakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.config import nearest
from npllm.errors import ArgumentError
from npllm.testing.case import Case
from npllm.testing.estimate import Estimate
from npllm.testing.mistakes import Mistake
from npllm.testing.rounding import Rounding

Arrays = Mapping[str, Array]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Operation:
    """One hot operation.

    name       the Backend's method (or `sample`, which is the host's: only its mistakes are backends with such a method).
    inputs     arrays by argument name -> their axes in words (("token", "head", "width"), ...); all that any case has.
    outputs    the same of the results, in the order in which a kernel returns them.
    derived    inputs that follow from others (cosines from positions): passed to kernels whose signature names them only.
    run        (backend, inputs as drawn, settings) -> outputs: the operation by a backend's methods (ops/feed.py helps).
    estimate   (inputs as float64 or integers, settings, rounding, got) -> an Estimate for each output. `got` holds the
               kernel's outputs (float64) or None: an operation that chooses (experts, tokens) may follow a choice that its
               budget cannot tell from the true one, and must ignore `got` otherwise.
    cases      the corpus, in a fixed order.
    mistakes   what kernels of that kind are known to get wrong.
    chooses    whether its outputs depend on a choice, so that an estimate needs `got`.
    backends   whether Backend has this operation, so that a backend's own is checked with the same cases.
    comparable brings outputs that may stand in any order into one order: what is judged; shapes and types stay.
    """

    name: str
    about: str
    inputs: Mapping[str, tuple[str, ...]]
    outputs: Mapping[str, tuple[str, ...]]
    run: Callable[[Backend, Arrays, Settings], tuple[Array, ...]]
    estimate: Callable[[Arrays, Settings, Rounding, Arrays | None], tuple[Estimate, ...]]
    cases: tuple[Case, ...]
    mistakes: tuple[Mistake, ...]
    derived: frozenset[str] = field(default=frozenset())
    chooses: bool = False
    backends: bool = True
    comparable: Callable[[Arrays], dict[str, Array]] = dict


# Where each operation is defined; a module has a constant OPERATIONS with one or several.
PLACES = {
    "linear": "linear", "project_heads": "ffn", "gated_ffn": "ffn", "mlp": "ffn",
    "rms_norm": "norms",
    "route": "routing", "moe": "moe", "sample": "sampling",
    "attention": "attention",
    "layer_norm": "norms",
    "rope": "rope",
    "angles": "rope",
    "embed": "embedding",
    "latent_project": "latent",
    "latent_expand": "latent",
    "latent_attention": "latent",
}  # fmt: skip


def operation(name: str | Operation) -> Operation:
    """The operation of that name; ArgumentError lists the nearest names."""
    if isinstance(name, Operation):
        return name
    if name not in PLACES:
        raise ArgumentError(f"operation {name!r} is unknown; known: {nearest(str(name), PLACES)}")
    module = import_module(f"npllm.testing.ops.{PLACES[name]}")
    return next(each for each in module.OPERATIONS if each.name == name)


def operations() -> list[Operation]:
    """Every operation of the kit."""
    return [operation(name) for name in PLACES]
