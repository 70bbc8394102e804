"""The operations that multiply with stored matrices: `linear`, `project_heads`, `gated_ffn`, `mlp`."""

from __future__ import annotations

from collections.abc import Sequence

from npllm.arrays import Array
from npllm.backend import Norm, accelerates, split_heads
from npllm.backends.numba_cpu.base import Base, at
from npllm.backends.numba_cpu.linear import multiply_few, multiply_packed, pack, panel_bytes
from npllm.backends.numba_cpu.matrix import Matrix
from npllm.backends.numba_cpu.tape import entry
from npllm.weights import QKV, Linear

# Tokens up to which each meets the rows of the weights by itself.
FEW = 3


def _unprepared(be: Base, *matrices: Linear) -> str | None:
    """Why kernels cannot multiply with these."""
    if be.dtype == "float64":
        return "kernels compute in float32 and bfloat16"
    if not all(isinstance(each.weight, Matrix) for each in matrices):
        return "a weight was not prepared by this backend"
    return None


class Products(Base):
    """Products with stored matrices."""

    def multiply(
        self, x_MD: Array, matrices: Sequence[Linear], norm: Norm | None = None, residual_MF: Array | None = None
    ) -> list[Array]:
        """`norm(x) W^T + b` for matrices of one arithmetic -> one y_MF each; the residual is added to the first."""
        x_MD, M = self.plain(x_MD), len(x_MD)
        products = [self.empty(M, len(each.weight)) for each in matrices]
        outputs: list[int] = []
        for each, y_MF in zip(matrices, products, strict=True):
            outputs += each.weight.address, at(y_MF), y_MF.strides[0], at(each.bias), at(residual_MF), y_MF.strides[0]
        arithmetic, count = self.arithmetic(matrices[0].weight), len(matrices)
        if M <= FEW:
            self.run(entry(multiply_few, *self.source(x_MD, norm), arithmetic, count, rest=outputs))
        else:
            panels = self.room(panel_bytes(*x_MD.shape))
            packed = entry(pack, *self.source(x_MD, norm), at(panels), arithmetic)
            self.run(packed, entry(multiply_packed, at(panels), M, arithmetic, count, rest=outputs))
        return products

    @accelerates(lambda self, x_MD, w, residual_MF=None: _unprepared(self, w))
    def linear(self, x_MD: Array, w: Linear, /, residual_MF: Array | None = None) -> Array:
        if residual_MF is not None:
            residual_MF = self.plain(residual_MF)
        return self.multiply(x_MD, [w], residual_MF=residual_MF)[0]

    @accelerates(lambda self, x_MD, w, head_dim, norm=None: _unprepared(self, *w))
    def project_heads(
        self, x_MD: Array, w: QKV, /, head_dim: int, *, norm: Norm | None = None
    ) -> tuple[Array, Array, Array]:
        q_MF, k_MF, v_MF = self.multiply(x_MD, w, norm)
        return split_heads(q_MF, head_dim), split_heads(k_MF, head_dim), split_heads(v_MF, head_dim)
