"""What the kernels of this backend round to fewer bits, as `npllm verify` judges them by."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from npllm.backends.numba_cpu.base import Base
from npllm.backends.numba_cpu.source import PAIRS

# Operations that multiply with stored matrices, and those that attend, in pairs of bf16 where the CPU has them; some do
# both. Routers stay in float32: a choice that rounding turns is no small error.
BOTH = ("latent_attention", "step")
PRODUCTS = ("linear", "project_heads", "gated_ffn", "mlp", "moe", "latent_project", "latent_expand", *BOTH)
ATTENTION = ("attention", *BOTH)

NOTHING: Mapping[str, str] = MappingProxyType({})
HALVED = {"factors": "bf16", "hidden": "bf16", "weights": "bf16"}
INT8 = {"activations": "int8"}


class Declared(Base):
    """The rounding points of each operation."""

    def rounding(self, operation: str, storage: str) -> Mapping[str, str]:
        if self.dtype not in ("bfloat16", "stored"):
            return NOTHING
        if operation in ATTENTION:
            rounds = PAIRS or (self.dtype == "bfloat16" and operation in PRODUCTS)
            return HALVED | {"probs": "bf16"} if rounds else NOTHING
        if operation not in PRODUCTS:
            return NOTHING
        if self.dtype == "bfloat16" or (PAIRS and storage in ("bf16", "f8_e4m3")):
            return HALVED
        return INT8 if storage in ("q8", "q4") else NOTHING
