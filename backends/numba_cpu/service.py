"""What the Numba backend tells about itself, and what it does before it is needed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from npllm.backend import log_once
from npllm.backends.numba_cpu.ahead import compile_ahead
from npllm.backends.numba_cpu.base import Base
from npllm.backends.numba_cpu.features import runnable
from npllm.backends.numba_cpu.jit import PATH, Compiled, store
from npllm.backends.numba_cpu.matrix import FORMATS
from npllm.backends.numba_cpu.team import team

if TYPE_CHECKING:
    from npllm.model import Model


class Service(Base):
    """Facts for `npllm doctor`, compiling ahead for `npllm warmup`, no more threads than cores."""

    def __init__(self, dtype: str | None = None, **options: Any) -> None:
        super().__init__(dtype, **options)
        if self.threads and self.threads > team().size:
            log_once(f"{self.threads} threads were asked for, there are {team().size} cores", logging.WARNING)
            self.threads = team().size

    def facts(self) -> dict[str, Any]:
        return {
            "path": PATH.name,
            "paths": [path.name for path in runnable()],
            "vector_bits": 32 * PATH.lanes,
            "bf16_instructions": PATH.bf16 and not PATH.twin,
            "int8_instructions": PATH.int8 or None,
            "threads": self.team_size,
            "dtypes": list(self.dtypes),
            "quantizations": list(self.quantizations),
            "arithmetic": {storage: self._computes_in(storage) for storage in FORMATS},
            "kernels": {
                "folder": None if store().folder is None else str(store().folder),
                "bytes": store().nbytes(),
                "compiled": len(store().names() & Compiled.known.keys()),
                "all": len(Compiled.known),
            },
        }

    def _computes_in(self, storage: str) -> str:
        """What a product with a matrix that is stored in a format is computed in, where it is widened least."""
        points = self.rounding("linear", storage)
        if "activations" in points:
            return f"{points['activations']} activations"
        return "bfloat16" if "factors" in points else self.array_dtype

    def warm_up(self, progress: Callable[[int, int], None], model: Model | None = None) -> int:
        return compile_ahead(self.team_size, progress, () if model is None else self._idle(model))

    def _idle(self, model: Model) -> set[str]:
        """The modules of kernels that a model has no use for."""
        mixture = any(tensor.part == "experts" for tensor in model.spec.values())
        latent = any(spec.latent for spec in model.architecture.cache_spec(model.config))
        used = {"moe": mixture, "route": mixture, "latent": latent, "quantise": self.quantize is not None}
        return {module for module, needed in used.items() if not needed}
