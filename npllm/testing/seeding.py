"""A correct kernel of every operation, and the same with one fault in it: what checks are tried on.

The kernel takes and returns arrays of the framework that it is called with. Its faults are the operation's known mistakes,
and accidents that any kernel can have: memory that was not written, a result of another type's precision, a lane off by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.parallel import blas_threads
from npllm.testing import frameworks
from npllm.testing.operation import Operation
from npllm.testing.rounding import FORMATS, SPELLINGS, Format

Kernel = Callable[..., Any]
Accident = Callable[[Array, Format], Array]


@dataclass(frozen=True)
class Fault:
    """`kernel` is a correct kernel but for what `name` says."""

    name: str
    kernel: Kernel


def reference(
    op: Operation, backend: Backend | None = None, accident: Accident | None = None, to: Format = FORMATS["f32"]
) -> Kernel:
    """A kernel of `op`: the canon in float64 (or any other backend), rounded once at the end.

    It takes what any kernel of the operation takes, and gives results of the type of its first real input; of the format
    `to` if it has none.
    """
    be = backend or Backend("float64")

    def kernel(*arrays: Any, **given: Any) -> Any:
        named = dict(zip(op.inputs, arrays, strict=False)) | given
        taken = {name: frameworks.as_numpy(x) for name, x in named.items() if name in op.inputs and x is not None}
        settings = {name: value for name, value in named.items() if name not in op.inputs and value is not None}
        real = (x for name, x in named.items() if name in taken and taken[name].dtype.kind not in "iub")
        like = next(real, np.zeros(0, to.dtype))
        with np.errstate(all="ignore"), blas_threads(1):
            outputs = [np.asarray(be.to_numpy(x)) for x in op.run(be, taken, settings)]
        dtype, home = frameworks.as_numpy(like).dtype, home_of(like)
        results = [home.put(finished(x, dtype, accident)) for x in outputs]
        return results[0] if len(results) == 1 else tuple(results)

    return kernel


def home_of(x: Any) -> frameworks.Framework:
    """The framework of an array, on the array's device."""
    name = next(frameworks.libraries([type(x)]), "numpy")
    return frameworks.FRAMEWORKS[name](str(x.device) if name == "torch" else None)


def finished(x: Array, dtype: np.dtype[Any], accident: Accident | None) -> Array:
    """A real output, after the accident, rounded to `dtype`; integers as they are."""
    if x.dtype.kind in "iub":
        return x
    to = FORMATS[SPELLINGS[dtype.name]]
    x = np.array(x, dtype=np.float64)
    if accident is not None and x.size:
        x = accident(x, to)
    with np.errstate(over="ignore", invalid="ignore"):
        return to.round(x).astype(dtype)


# -- accidents ----------------------------------------------------------------------------------------------------------


def zeros(x: Array, to: Format) -> Array:
    return np.zeros_like(x)


def constant(x: Array, to: Format) -> Array:
    return np.full_like(x, np.mean(x))


def unwritten_end(x: Array, to: Format) -> Array:
    x.reshape(-1)[-1] = np.nan
    return x


def stale_end(x: Array, to: Format) -> Array:
    x.reshape(-1)[-max(1, x.shape[-1] // 8) :] = 0.0
    return x


def one_wrong(x: Array, to: Format) -> Array:
    flat = x.reshape(-1)
    flat[flat.size // 2] += 0.1 * np.max(np.abs(flat)) + 1e-30
    return x


def truncated(x: Array, to: Format) -> Array:
    # One bit of 24 may be lost by honest float32 arithmetic: there, what is cut away is what tensor cores cut.
    step = (to if to.bits < 24 else to._replace(bits=11)).spacing(x)
    return np.trunc(x / step) * step


def fewer_bits(x: Array, to: Format) -> Array:
    fewer = to._replace(bits=to.bits - 1) if to.bits < 24 else FORMATS["bf16"]
    return fewer.round(x)


def neighbour(x: Array, to: Format) -> Array:
    return np.roll(x, 1, axis=-1)


def negative(x: Array, to: Format) -> Array:
    return -x


def half_a_percent(x: Array, to: Format) -> Array:
    return 1.005 * x


def clamped(x: Array, to: Format) -> Array:
    return np.clip(x, -np.quantile(np.abs(x), 0.99), np.quantile(np.abs(x), 0.99))


ACCIDENTS: dict[str, Accident] = {
    "zeros returned": zeros,
    "a constant returned": constant,
    "the last element never written": unwritten_end,
    "the last lanes never written, zero by luck": stale_end,
    "one element wrong": one_wrong,
    "output truncated in place of rounded": truncated,
    "output rounded to a smaller type first": fewer_bits,
    "last axis off by one": neighbour,
    "sign wrong": negative,
    "half a percent too large": half_a_percent,
    "the largest percent clamped": clamped,
}


# Operations that only copy: what rounds their results to the type that these have changes nothing.
EXACT = ("embed",)


def faults(op: Operation, to: Format = FORMATS["f32"]) -> Iterator[Fault]:
    """Every fault that can be seeded into a kernel of `op`; `to` as for `reference`."""
    for mistake in op.mistakes:
        yield Fault(mistake.name, reference(op, mistake.made_by(Backend)("float64"), to=to))
    for name, accident in ACCIDENTS.items():
        if op.name not in EXACT or accident not in (truncated, fewer_bits):
            yield Fault(name, reference(op, accident=accident, to=to))
