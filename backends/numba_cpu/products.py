"""The operations that multiply with stored matrices: `linear`, `project_heads`."""

from __future__ import annotations

from collections.abc import Sequence

from npllm.arrays import Array
from npllm.backend import Norm, accelerates, split_heads
from npllm.backends.numba_cpu.arithmetic import FLOAT32
from npllm.backends.numba_cpu.base import Base, at
from npllm.backends.numba_cpu.linear import multiply_few, multiply_packed
from npllm.backends.numba_cpu.matrix import WIDEST, Matrix
from npllm.backends.numba_cpu.panels import pack, panel_bytes
from npllm.backends.numba_cpu.tape import entry
from npllm.weights import QKV, Linear

# Tokens up to which a feed-forward layer has each meet the rows of the weights by itself, and a product some at once.
FEW, SOME = 3, 8


def unprepared(be: Base, *matrices: Linear) -> str | None:
    """Why kernels cannot multiply with these."""
    if be.dtype == "float64":
        return "kernels compute in float32 and bfloat16"
    if not all(isinstance(each.weight, Matrix) for each in matrices):
        return "a weight was not prepared by this backend"
    return too_wide(*(each.weight for each in matrices))


def too_wide(*matrices: Matrix) -> str | None:
    return f"rows have more than {WIDEST} numbers" if any(each.shape[1] > WIDEST for each in matrices) else None


class Products(Base):
    """Products with stored matrices."""

    def shared(self, matrices: Sequence[Linear]) -> int:
        """The arithmetic of matrices that read the same input: their own where it is the same, else float32."""
        kinds = {self.arithmetic(each.weight) for each in matrices}
        return kinds.pop() if len(kinds) == 1 else FLOAT32

    def optional(self, x: Array | None) -> Array | None:
        """`plain(x)`, for whoever calls a kernel to hold on to: kernels know an array by its address alone."""
        return None if x is None else self.plain(x)

    def multiply(
        self, x_MD: Array, matrices: Sequence[Linear], norm: Norm | None = None, residual_MF: Array | None = None,
        arithmetic: int | None = None,
    ) -> list[Array]:  # fmt: skip
        """`norm(x) W^T + b` for some matrices -> one y_MF each, in their own arithmetic or that which is given."""
        kinds = [self.arithmetic(each.weight) if arithmetic is None else arithmetic for each in matrices]
        x_MD = self.plain(x_MD)
        products: dict[int, Array] = {}
        for kind in dict.fromkeys(kinds):
            chosen = [i for i, other in enumerate(kinds) if other == kind]
            made = self._multiplied(x_MD, [matrices[i] for i in chosen], norm, residual_MF, kind)
            products.update(zip(chosen, made, strict=True))
        return [products[i] for i in range(len(matrices))]

    def _multiplied(
        self, x_MD: Array, matrices: Sequence[Linear], norm: Norm | None, residual_MF: Array | None, arithmetic: int
    ) -> list[Array]:
        M = len(x_MD)
        if M > SOME:
            panels = self.room(panel_bytes(*x_MD.shape))
            self.run(entry(pack, *self.source(x_MD, norm), at(panels), arithmetic))
            return self.multiply_panels(panels, M, matrices, residual_MF, arithmetic)
        residual_MF = self.optional(residual_MF)
        products, outputs = self._outputs(M, matrices, residual_MF)
        if M:
            self.run(entry(multiply_few, *self.source(x_MD, norm), arithmetic, len(matrices), rest=outputs))
        return products

    def multiply_panels(
        self, panels: Array, M: int, matrices: Sequence[Linear], residual_MF: Array | None, arithmetic: int
    ) -> list[Array]:
        """The same of tokens that are packed."""
        residual_MF = self.optional(residual_MF)
        products, outputs = self._outputs(M, matrices, residual_MF)
        self.run(entry(multiply_packed, at(panels), M, arithmetic, len(matrices), rest=outputs))
        return products

    def _outputs(self, M: int, matrices: Sequence[Linear], residual_MF: Array | None) -> tuple[list[Array], list[int]]:
        """Arrays for products, and the list by which kernels know them."""
        products = [self.empty(M, len(each.weight)) for each in matrices]
        outputs: list[int] = []
        for each, y_MF in zip(matrices, products, strict=True):
            outputs += each.weight.address, at(y_MF), y_MF.strides[0], at(each.bias), at(residual_MF), y_MF.strides[0]
        return products, outputs

    @accelerates(lambda self, x_MD, w, residual_MF=None: unprepared(self, w))
    def linear(self, x_MD: Array, w: Linear, /, residual_MF: Array | None = None) -> Array:
        return self.multiply(x_MD, [w], residual_MF=residual_MF)[0]

    @accelerates(lambda self, x_MD, w, head_dim, norm=None: unprepared(self, *w))
    def project_heads(
        self, x_MD: Array, w: QKV, /, head_dim: int, *, norm: Norm | None = None
    ) -> tuple[Array, Array, Array]:
        q_MF, k_MF, v_MF = self.multiply(x_MD, w, norm)
        return split_heads(q_MF, head_dim), split_heads(k_MF, head_dim), split_heads(v_MF, head_dim)
