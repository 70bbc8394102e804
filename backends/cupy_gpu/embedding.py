"""`embed`: rows of a table in the GPU's memory, or of one that stays in the host's, by token ids on the device."""

from __future__ import annotations

from npllm.arrays import Array
from npllm.backend import accelerates
from npllm.backends.cupy_gpu.base import THREADS, Base, groups
from npllm.backends.cupy_gpu.device import Out
from npllm.backends.cupy_gpu.matrix import FORMATS, PER_VECTOR
from npllm.backends.cupy_gpu.products import unprepared
from npllm.weights import Linear


class Embeddings(Base):
    """Rows of tables."""

    @accelerates(lambda self, tokens_M, w: unprepared(self, w))
    def embed(self, tokens_M: Array, w: Linear, /) -> Array:
        M, D = len(tokens_M), w.weight.shape[1]
        out_MD = self.empty(M, D)
        if out_MD.size:
            tokens_M = self.integers(tokens_M)
            threads = M * groups(D, PER_VECTOR[w.weight.format])
            defines = {"FORMAT": FORMATS[w.weight.format]}
            arguments = (tokens_M, M, w.weight.structure, Out(out_MD))
            self.launch("embed.cu", "embed", defines, (groups(threads, THREADS), 1, 1), THREADS, arguments)
        return out_MD
