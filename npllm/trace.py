"""Recording and replacing the named intermediates of a forward pass.

A model names its intermediates with `be.mark(name, x)`, relative to a layer: `layers.3.attention.q`. `attention.output`
and `output` are the residual stream after attention and after the layer; what is added to it has names of its own
(`moe.routed`, `moe.shared`, `laurel.branch`). On a plain backend `mark` returns `x`. A `Tracer` is a backend that records,
and runs the canonical body of every coarse operation, so that their inner steps have names too; fine operations stay those
of the backend being traced.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping

from npllm.arrays import Array
from npllm.backend import FINE, SERVICES, Backend
from npllm.errors import ArgumentError

Patch = Callable[[Array], Array]


class Trace(Mapping[str, Array]):
    """Intermediates by name, as NumPy arrays; the M axis packs the new tokens of all rows.

    A name that several forward passes computed (prefill, then decode) holds the last; `every(name)` gives all, in order.
    """

    def __init__(self) -> None:
        self.records: dict[str, list[Array]] = {}
        self.patches: dict[str, Patch] = {}

    def __getitem__(self, name: str) -> Array:
        return self.every(name)[-1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def every(self, name: str) -> list[Array]:
        if name not in self.records:
            close = difflib.get_close_matches(name, self.records, n=3) or list(self.records)[:3]
            raise ArgumentError(f"no intermediate is named {name!r}" + (f"; nearest: {', '.join(close)}" if close else ""))
        return self.records[name]

    def patch(self, name: str, value: Array | Patch) -> None:
        """Put `value`, or `value(x)` if it can be called, in the place of the intermediate in passes that follow."""
        self.patches[name] = value if callable(value) else lambda _: value


class Tracer(Backend):
    """A backend that records into `trace` what passes through `mark`; `inner` computes the fine operations."""

    def __init__(self, inner: Backend, trace: Trace, scope: str = "") -> None:
        super().__init__(strict=inner.strict, threads=inner.threads)
        self.inner, self.trace, self.scope = inner, trace, scope
        self.dtype = inner.dtype
        self.xp = inner.xp  # type: ignore[misc]
        for name in SERVICES + FINE:
            setattr(self, name, getattr(inner, name))

    def layer(self, index: int) -> Backend:
        return Tracer(self.inner, self.trace, f"{self.scope}layers.{index}.")

    def mark(self, name: str, x: Array) -> Array:
        name = self.scope + name
        if name in self.trace.patches:
            x = self._patched(name, x)
        self.trace.records.setdefault(name, []).append(self.inner.to_numpy(x).copy())
        return x

    def _patched(self, name: str, x: Array) -> Array:
        value = self.trace.patches[name](x)
        try:
            patched = self.inner.asarray(value, dtype=x.dtype)
        except (TypeError, ValueError, OverflowError) as bad:
            raise ArgumentError(f"the patch of {name} is no array of {x.dtype} ({bad})") from None
        if patched.shape != x.shape:
            raise ArgumentError(f"the patch of {name} has shape {list(patched.shape)}, the intermediate {list(x.shape)}")
        return patched


def tracing(backend: Backend, trace: Trace | None) -> Backend:
    """`backend`, or a Tracer around it when there is a trace."""
    return backend if trace is None else Tracer(backend, trace)
