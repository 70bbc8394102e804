"""An architecture with its configuration and prepared weights: what a backend's `step` runs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.cache import Cache, Rows
from npllm.errors import MemoryLimitError
from npllm.handles import Handle
from npllm.machine import available_for, available_memory, gibibytes
from npllm.models import Architecture
from npllm.weights import Spec, Tensor, count_parameters

log = logging.getLogger("npllm")


@dataclass(frozen=True)
class Model:
    """An architecture with its configuration and prepared weights."""

    architecture: Architecture
    config: Any
    weights: Any
    spec: Spec

    def run(self, be: Backend, tokens_M: Array, rows: Rows, cache: Cache) -> Array:
        """One forward pass -> logits_WN; the rows' lengths in `cache` grow only when it has succeeded."""
        # A damaged weight is reported by name of what it spoils (NumericsError), not by a warning of NumPy's.
        with be.limited(len(tokens_M), self.parameters), np.errstate(over="ignore", invalid="ignore"):
            logits_WN = self.architecture.forward(be, self.config, self.weights, tokens_M, rows, cache)
        cache.advance(rows)
        return logits_WN

    @functools.cached_property
    def parameters(self) -> int:
        """Parameters of the model; a tied head counts once."""
        return count_parameters(self.spec)

    def new_cache(self, be: Backend, max_context: int, kv_dtype: str | None) -> Cache:
        return be.new_cache(self.architecture.cache_spec(self.config), max_context, kv_dtype)


def check_memory(be: Backend, tensors: Collection[Tensor | Handle], name: str, *, demanded: bool = True) -> bool:
    """Whether the prepared weights fit into the memory that is free; asked before anything is allocated.

    If they do not: MemoryLimitError when they must (`demanded`, or the backend reads none from disk), else a warning that
    they stay there.
    """
    pinned = be.pinned_bytes(tensors)
    if pinned > (left := available_for(pinned, available_memory)):
        raise MemoryLimitError(
            f"{name}: tables that stay in the host's memory need {gibibytes(pinned)} that cannot be swapped, "
            f"{gibibytes(left)} is available: free some, or use backend='numba', which reads them from disk"
        )
    needed = be.bytes_needed(tensors)
    available = available_for(needed, be.available_memory)
    if needed <= available:
        return True
    if not be.on_disk:
        raise MemoryLimitError(
            f"{name}: the weights need {gibibytes(needed)}, {gibibytes(available)} of memory is free "
            f"where the {be.name} backend keeps them: free some, take a smaller model, quantize it ('q8' or 'q4'), "
            "or use backend='numba'"
        )
    problem = f"the weights need {gibibytes(needed)} as {be.array_dtype}, {gibibytes(available)} of memory is available"
    if demanded:
        narrower = "" if be.array_dtype == "float32" else ", or float32"
        raise MemoryLimitError(f"{name}: {problem}: free some, take a smaller model{narrower}, or use weights='disk'")
    log.warning("%s: %s: they stay on disk, and every step reads what it uses", name, problem)
    return False
