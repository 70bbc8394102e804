"""Products with stored matrices: `linear` and `project_heads`; what the other operations multiply with.

Few tokens meet the rows of a matrix as they lie (gemv.cu), with the norm before and the residual after in the same launch;
these products are in float32, since memory is the limit. Many go in tiles (gemm.cu): on tensor cores where the arithmetic is
bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from npllm.arrays import Array
from npllm.backend import Norm, accelerates, split_heads
from npllm.backends.cupy_gpu import cublaslt
from npllm.backends.cupy_gpu.base import THREADS, Base, groups
from npllm.backends.cupy_gpu.device import Argument, Out, Structure
from npllm.backends.cupy_gpu.matrix import FORMATS, Matrix
from npllm.weights import QKV, Linear

# Tokens that go through gemv.cu at a time.
FEW = 8

# Of bf16, so many go through tensor cores where products may be rounded: on the others, shared memory is what limits them.
LEAST_ON_TENSOR_CORES = 3

# More rows of a warp there, so that what is staged meets more of them, if so many blocks are left to a multiprocessor.
MORE_ROWS, LEAST_BLOCKS = (8, 4), 2

# Fewer of q4, where a vector has most numbers: registers are the limit.
FEW_Q4 = 4

# Rows of a matrix that a warp computes, and warps of a block (gemv.cuh).
ROWS, WARPS = 2, 4

# Bytes of activations that a block stages at a time (STAGED in gemv.cuh).
STAGED_BYTES = 32768

# Tokens and rows of a tile of gemm.cu, and those of one for tensor cores where there are enough of them for all of the GPU.
TILE, WIDE_TILE = 64, 128

# Formats that dtype "stored" multiplies in bfloat16: what they hold has no more bits.
IN_BFLOAT16 = ("bf16", "f8_e4m3", "q8", "q4")

# Numbers of a matrix that are rounded to bf16 at a time, for cuBLASLt.
WIDENED = 1 << 25

# In the place of a matrix that a kernel shall not see.
EMPTY = Structure(bytes(11 * 8), ())


def unprepared(be: Base, *modules: Linear) -> str | None:
    """Why kernels cannot multiply with these weights."""
    if be.dtype == "float64":
        return "kernels compute in float32 and bfloat16"
    if not all(isinstance(each.weight, Matrix) for each in modules):
        return "a weight that was not prepared"
    return None


def tokens_macro(tokens: int) -> int:
    """The number of tokens that a kernel for so many is compiled for."""
    return 1 << max(0, tokens - 1).bit_length()


class Products(Base):
    """Products with stored matrices."""

    @accelerates(lambda self, x_MD, w, residual_MF=None: unprepared(self, w))
    def linear(self, x_MD: Array, w: Linear, /, residual_MF: Array | None = None) -> Array:
        return self.product(x_MD, w, residual_MF=residual_MF)

    @accelerates(lambda self, x_MD, w, head_dim, norm=None: unprepared(self, *w))
    def project_heads(
        self, x_MD: Array, w: QKV, /, head_dim: int, *, norm: Norm | None = None
    ) -> tuple[Array, Array, Array]:
        q_MF, k_MF, v_MF = self.products(x_MD, w, norm)
        return split_heads(q_MF, head_dim), split_heads(k_MF, head_dim), split_heads(v_MF, head_dim)

    def product(self, x_MD: Array, w: Linear, norm: Norm | None = None, residual_MF: Array | None = None) -> Array:
        """`residual + W norm(x) + b`."""
        return self.products(x_MD, (w,), norm, residual_MF)[0]

    def products(
        self, x_MD: Array, w: tuple[Linear, ...], norm: Norm | None = None, residual_MF: Array | None = None
    ) -> list[Array]:
        """The same of up to three matrices that read the same activations; the residual is the first one's."""
        x_MD = self.plain(x_MD)
        if len({each.weight.format for each in w}) > 1:
            first = self.products(x_MD, w[:1], norm, residual_MF)
            return first + [self.product(x_MD, each, norm) for each in w[1:]]
        outs = [self.empty(len(x_MD), len(each.weight)) for each in w]
        residual_MF = None if residual_MF is None else self.plain(residual_MF)
        if self.are_few(x_MD, w[0].weight):
            self._few_products(x_MD, w, norm, residual_MF, outs)
            return outs
        h_MD = self.plain(self.normed(x_MD, norm))
        for module, out_MF in zip(w, outs, strict=True):
            self._many_products(h_MD, module, residual_MF if module is w[0] else None, out_MF)
        return outs

    def _few_products(
        self, x_MD: Array, w: tuple[Linear, ...], norm: Norm | None, residual_MF: Array | None, outs: list[Array], *,
        exact: bool = False,
    ) -> None:  # fmt: skip
        """Rows of matrices of one format times at most FEW tokens; `exact`: in float32."""
        matrices: list[Argument] = []
        for module, out in zip(w, outs, strict=True):
            matrices += [module.weight.structure, self.vector(module, "bias"), Out(out)]
        matrices += [EMPTY, None, None] * (3 - len(w))
        args = (*self.source(x_MD, norm), *matrices, residual_MF)
        self.gemv("gemv", x_MD, w[0].weight, [len(module.weight) for module in w], args, exact=exact)

    def product_in_float32(self, x_MD: Array, w: Linear) -> Array:
        """`W x + b`, whatever the arithmetic is."""
        x_MD, out_MF = self.plain(x_MD), self.empty(len(x_MD), len(w.weight))
        if self.are_few(x_MD, w.weight):
            self._few_products(x_MD, (w,), None, None, [out_MF], exact=True)
        else:
            self._many_products(x_MD, w, None, out_MF, exact=True)
        return out_MF

    def _many_products(
        self, h_MD: Array, w: Linear, residual_MF: Array | None, out_MF: Array, *, exact: bool = False
    ) -> None:
        """A matrix times more than FEW tokens; `exact`: in float32."""
        if not out_MF.size:
            return
        (M, D), (F, _) = h_MD.shape, w.weight.shape
        tensor = not exact and self.on_tensor_cores(w.weight)
        if self._library_products(h_MD, w, residual_MF, out_MF, tensor):
            return
        enough = groups(M, WIDE_TILE) * groups(F, WIDE_TILE) >= self.device.multiprocessors
        tile = WIDE_TILE if tensor and enough else TILE
        defines = {"FORMAT": FORMATS[w.weight.format], "TILE": tile, "TENSOR": int(tensor)}
        arguments = (h_MD, M, D, w.weight.structure, self.vector(w, "bias"), residual_MF, Out(out_MF))
        self.launch("gemm.cu", "gemm", defines, (groups(F, tile), groups(M, tile), 1), 2 * tile, arguments)

    def _library_products(self, h_MD: Array, w: Linear, residual_MF: Array | None, out_MF: Array, tensor: bool) -> bool:
        """The same by cuBLASLt -> whether it is there and has a kernel for it."""
        blas = self.device.blas()
        matrix, (M, D), F = w.weight, h_MD.shape, len(w.weight)
        if blas is None or not D or not (tensor or matrix.format == "f32"):
            return False
        if residual_MF is not None:
            out_MF[...] = residual_MF
        kind, at = "bf16" if tensor else "f32", self.device.address
        x_MD = self._halved(h_MD) if tensor else h_MD
        for begin, count, address, step in self._stored_parts(matrix, kind):
            places = at(x_MD), address, at(out_MF) + 4 * begin
            shape = cublaslt.Shape(M, count, D, kind, step, F, cublaslt.alignment(*places))
            if not blas.multiply(shape, *places, add=residual_MF is not None):
                return False
        if w.bias is not None:
            out_MF += self.plain(w.bias)
        return True

    def _stored_parts(self, matrix: Matrix, kind: str) -> Iterator[tuple[int, int, int, int]]:
        """Rows of a matrix as cuBLASLt reads them -> the first one's number, how many, where they lie, and how many numbers
        apart; those of another format are rounded to bf16, part by part."""
        F, D = matrix.shape
        if matrix.format == kind:
            yield 0, F, matrix.address, matrix.pitch // (2 if kind == "bf16" else 4)
            return
        per = max(1, WIDENED // D)
        for begin in range(0, F, per):
            count = min(per, F - begin)
            part_FD = self.empty(count, D, dtype="uint16")
            blocks = min(groups(part_FD.size, THREADS), 16 * self.device.multiprocessors)
            args = (matrix.structure, begin, count, 1, Out(part_FD))
            self.launch("widen.cu", "widen_matrix", {"FORMAT": FORMATS[matrix.format]}, (blocks, 1, 1), THREADS, args)
            yield begin, count, self.device.address(part_FD), D

    def _halved(self, x_MD: Array) -> Array:
        """bf16 bits."""
        out_MD = self.empty(*x_MD.shape, dtype="uint16")
        blocks = min(groups(x_MD.size, THREADS), 16 * self.device.multiprocessors)
        self.launch("elementwise.cu", "halve", {}, (blocks, 1, 1), THREADS, (x_MD, x_MD.size, Out(out_MD)))
        return out_MD

    def are_few(self, x_MD: Array, matrix: Matrix) -> bool:
        """Whether these tokens meet the rows of a matrix as they lie."""
        return len(x_MD) <= (FEW_Q4 if matrix.format == "q4" else FEW)

    def on_tensor_cores(self, matrix: Matrix) -> bool:
        """Whether products of some tokens with a matrix are of bf16 numbers, with float32 sums."""
        return self.dtype == "bfloat16" or (self.dtype == "stored" and matrix.format in IN_BFLOAT16)

    def gemv(
        self, name: str, x_MD: Array, matrix: Matrix, counts: Sequence[int], args: tuple[Argument, ...], *,
        rows_each: int = 1, exact: bool = False,
    ) -> None:  # fmt: skip
        """Launch a kernel that stands on gemv.cuh for at most FEW tokens; nothing for none.

        counts     results of a token, of each matrix like this one; `rows_each` rows of weights make one.
        exact      in float32.
        """
        if not len(x_MD) or not sum(counts):
            return
        rounds = matrix.format == "bf16" and self.on_tensor_cores(matrix) and not exact
        tensor, rows = rounds and len(x_MD) >= LEAST_ON_TENSOR_CORES, ROWS

        def blocks(rows: int) -> int:
            return sum(groups(count * rows_each, WARPS * rows) for count in counts)

        if tensor:
            rows = next((n for n in MORE_ROWS if blocks(n) >= LEAST_BLOCKS * self.device.multiprocessors), ROWS)
        tokens = FEW if tensor else tokens_macro(len(x_MD))
        defines = {"FORMAT": FORMATS[matrix.format], "TOKENS": tokens, "ROWS": rows, "TENSOR": int(tensor)}
        self.launch(f"{name}.cu", name, defines, (blocks(rows), 1, 1), WARPS * 32, args, STAGED_BYTES)
