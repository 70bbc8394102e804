"""`altup_predict`: CuPy's own batched product would call cuBLAS, which refuses to be captured."""

from __future__ import annotations

from npllm.arrays import Array
from npllm.backend import accelerates
from npllm.backends.cupy_gpu.base import THREADS, Base, groups
from npllm.backends.cupy_gpu.device import Out
from npllm.backends.cupy_gpu.norms import not_plain


class Streams(Base):
    """Alternating updates of several residual streams."""

    @accelerates(not_plain)
    def altup_predict(self, x_MAD: Array, mixing_MAA: Array, /) -> Array:
        x_MAD, out_MAD = self.plain(x_MAD), self.empty(*x_MAD.shape)
        if out_MAD.size:
            blocks = min(groups(out_MAD.size, THREADS), 16 * self.device.multiprocessors)
            arguments = (x_MAD, self.plain(mixing_MAA), *x_MAD.shape, Out(out_MAD))
            self.launch("elementwise.cu", "mix_streams", {}, (blocks, 1, 1), THREADS, arguments)
        return out_MAD
