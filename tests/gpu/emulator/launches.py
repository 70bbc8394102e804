"""The launches of a step, and what a GPU would hold against them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from npllm.arrays import Array
from npllm.backends.cupy_gpu.device import Fixed, InOut, Kernel, Out, Structure
from tests.gpu.emulator.arrays import DeviceArray, plain


class Span(NamedTuple):
    """Bytes [begin, end) that a launch uses, and how: "reads", "writes", "both" or "fixed"."""

    begin: int
    end: int
    role: str

    def meets(self, other: Span) -> bool:
        return self.begin < other.end and other.begin < self.end


def span(array: Array, role: str) -> Span:
    import numpy as np

    low, high = np.lib.array_utils.byte_bounds(plain(array))
    return Span(low, high, role)


class Launch(NamedTuple):
    kernel: Kernel
    grid: tuple[int, int, int]
    block: int
    shared: int
    args: tuple[Any, ...]

    @property
    def spans(self) -> list[Span]:
        found = []
        for each in self.args:
            if isinstance(each, Structure):
                found += [span(array, "fixed") for array in each.arrays]
            elif isinstance(each, Out):
                found.append(span(each.array, "writes"))
            elif isinstance(each, InOut):
                found.append(span(each.array, "both"))
            elif isinstance(each, Fixed):
                found.append(span(each.array, "fixed"))
            elif isinstance(each, DeviceArray):
                found.append(span(each, "reads"))
        return [each for each in found if each.begin < each.end]

    def __str__(self) -> str:
        return f"{self.kernel.file}:{self.kernel.name}"


class Moved(NamedTuple):
    """A small copy from the host into an array ("writes"), or of an array to the host ("reads")."""

    array: Array
    role: str

    @property
    def spans(self) -> list[Span]:
        return [span(self.array, self.role)]

    def __str__(self) -> str:
        return "from the host" if self.role == "writes" else "to the host"


@dataclass
class Launches:
    """All launches since it was emptied, and the small copies between them, in the order in which they were done."""

    done: list[Launch | Moved] = field(default_factory=list)

    def add(self, launch: Launch | Moved) -> None:
        self.done.append(launch)

    @property
    def all(self) -> list[Launch]:
        return [each for each in self.done if isinstance(each, Launch)]

    def uses(self, array: Array) -> list[tuple[str, str]]:
        """What used any of an array's bytes, and how, one after the other."""
        wanted = span(array, "")
        return [(str(each), mine.role) for each in self.done for mine in each.spans if mine.meets(wanted)]

    def hazards(self) -> list[str]:
        """Launches that write what they read themselves by another name, or what anybody may have fetched early."""
        fixed = [(str(launch), each) for launch in self.all for each in launch.spans if each.role == "fixed"]
        found = []
        for launch in self.all:
            spans = launch.spans
            written = [each for each in spans if each.role in ("writes", "both")]
            for mine in written:
                found += [f"{launch} writes what it reads" for each in spans if each.role == "reads" and mine.meets(each)]
                found += [f"{launch} writes what {other} takes as fixed" for other, each in fixed if mine.meets(each)]
        return found
