"""`rms_norm` and `layer_norm` of rows, and `normed`."""

from __future__ import annotations

import math
from typing import Any

from npllm.arrays import Array
from npllm.backend import LN, RMS, Norm, accelerates
from npllm.backends.cupy_gpu.base import Base, groups
from npllm.backends.cupy_gpu.device import Out
from npllm.weights import Linear

# Numbers of a row that a warp treats; wider rows have a block each.
WARP_WIDTH = 1024

# Threads of a block of either kind (norms.cu).
THREADS, WIDE_THREADS = 128, 512


def not_plain(be: Base, *args: Any, **kwargs: Any) -> str | None:
    """Kernels compute in float32, whatever the products of matrices are computed in."""
    return "kernels compute in float32" if be.dtype == "float64" else None


class Norms(Base):
    """Norms over the last axis."""

    @accelerates(not_plain)
    def rms_norm(self, x_D: Array, w: Linear | None, /, eps: float, offset: float = 0.0) -> Array:
        return self._norm(x_D, RMS(w, eps, offset))

    @accelerates(not_plain)
    def layer_norm(self, x_D: Array, w: Linear, /, eps: float) -> Array:
        return self._norm(x_D, LN(w, eps))

    @accelerates(not_plain)
    def add_normed(self, x_MD: Array, y_MD: Array, norm: Norm, /) -> Array:
        return self._norm(y_MD, norm, self.plain(x_MD))

    def _norm(self, x_D: Array, norm: Norm, residual_D: Array | None = None) -> Array:
        """`residual + norm(x)`."""
        x_D = self.plain(x_D)
        out_D = self.empty(*x_D.shape)
        if not out_D.size:
            return out_D
        width = x_D.shape[-1]
        rows, wide = math.prod(x_D.shape[:-1]), width > WARP_WIDTH
        arguments = (*self.source(x_D.reshape(rows, width), norm), residual_D, Out(out_D))
        blocks = rows if wide else groups(rows, THREADS // 32)
        self.launch(
            "norms.cu", "norm_rows", {"WIDE": int(wide)}, (blocks, 1, 1), WIDE_THREADS if wide else THREADS, arguments
        )
        return out_D
