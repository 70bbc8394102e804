"""What the kernels of this backend round to fewer bits, as `npllm verify` judges them by."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from npllm.backends.cupy_gpu.base import Base
from npllm.backends.cupy_gpu.products import IN_BFLOAT16

# Operations that multiply with stored matrices, and those that attend; some do both. Routers stay in float32: a choice that
# rounding turns is no small error.
BOTH = ("latent_attention", "step")
PRODUCTS = ("linear", "project_heads", "gated_ffn", "mlp", "moe", "latent_project", "latent_expand", *BOTH)
ATTENTION = ("attention", *BOTH)

NOTHING: Mapping[str, str] = MappingProxyType({})
HALVED = {"factors": "bf16", "hidden": "bf16", "weights": "bf16"}


class Declared(Base):
    """The rounding points of each operation."""

    def rounding(self, operation: str, storage: str) -> Mapping[str, str]:
        if self.dtype not in ("bfloat16", "stored"):
            return NOTHING
        if operation in ATTENTION:
            return HALVED | {"probs": "bf16"}
        return HALVED if operation in PRODUCTS and (self.dtype == "bfloat16" or storage in IN_BFLOAT16) else NOTHING
