"""`angles` and `rope`: npllm.blocks.angles, rotate_halves and rotate_interleaved."""

from __future__ import annotations

from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import accelerates
from npllm.backends.cupy_gpu.base import THREADS, Base, groups
from npllm.backends.cupy_gpu.device import Fixed, Out
from npllm.backends.cupy_gpu.norms import not_plain
from npllm.blocks.rope import Angles, Rope, frequencies


class Ropes(Base):
    """Rotary embeddings."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._frequencies: dict[Rope, tuple[Array, float]] = {}

    @accelerates(not_plain)
    def angles(self, rope: Rope, positions_M: Array, /) -> Angles:
        if rope not in self._frequencies:
            inverse, factor = frequencies(rope, "float32")
            self._frequencies[rope] = self.device.upload(np.ascontiguousarray(inverse, np.float32)), float(factor)
        inverse_J, factor = self._frequencies[rope]
        M, J = len(positions_M), len(inverse_J)
        cos_MJ, sin_MJ = self.empty(M, J), self.empty(M, J)
        if cos_MJ.size:
            positions_M = self.integers(positions_M)
            arguments = (positions_M, M, Fixed(inverse_J), J, factor, Out(cos_MJ), Out(sin_MJ))
            self.launch("rope.cu", "angles", {}, (groups(M * J, THREADS), 1, 1), THREADS, arguments)
        return Angles(cos_MJ, sin_MJ)

    @accelerates(not_plain)
    def rope(self, x_MHK: Array, angles: Angles, /, interleaved: bool = False) -> Array:
        # The rotated part of wider heads is read where it lies.
        if x_MHK.dtype != np.float32 or x_MHK.strides[2] != 4:
            x_MHK = self.plain(x_MHK)
        out_MHK = self.empty(*x_MHK.shape)
        if out_MHK.size:
            steps = (x_MHK.strides[0] // 4, x_MHK.strides[1] // 4)
            cos_MJ, sin_MJ = self.plain(angles.cos_MJ), self.plain(angles.sin_MJ)
            arguments = (
                x_MHK, *steps, *x_MHK.shape, cos_MJ, sin_MJ, cos_MJ.shape[1], int(interleaved), Out(out_MHK),
            )  # fmt: skip
            self.launch("rope.cu", "rotate", {}, (groups(out_MHK.size, THREADS), 1, 1), THREADS, arguments)
        return out_MHK
