"""`rope`: pairs of each head turned by the angles of their token, npllm.blocks.rotate_halves and rotate_interleaved."""

from __future__ import annotations

from npllm.arrays import Array
from npllm.backend import accelerates
from npllm.backends.numba_cpu.base import PORTION, Base, at
from npllm.backends.numba_cpu.jit import inline, kernel
from npllm.backends.numba_cpu.memory import f32, word
from npllm.backends.numba_cpu.norms import not_plain
from npllm.backends.numba_cpu.tape import entry
from npllm.backends.numba_cpu.team import next_chunk
from npllm.blocks.rope import Angles


@kernel("11q")
def rotate(args, team, thread, threads):
    """Arguments: x [M, H, K] with the bytes between its tokens and between its heads; M, H, K; cosines and sines [M, J], J;
    where the result goes, without gaps; whether pairs are interleaved.
    """
    x, token_step, head_step, tokens, heads, width = (
        word(args, 0), word(args, 1), word(args, 2), word(args, 3), word(args, 4), word(args, 5),
    )  # fmt: skip
    cosines, sines, count, out = word(args, 6), word(args, 7), word(args, 8), word(args, 9)
    per = max(1, PORTION // (heads * width))
    while True:
        begin = next_chunk(team) * per
        if begin >= tokens:
            break
        for m in range(begin, min(tokens, begin + per)):
            cos, sin = f32(cosines + m * count * 4, count), f32(sines + m * count * 4, count)
            for h in range(heads):
                head = f32(x + m * token_step + h * head_step, width)
                turned = f32(out + (m * heads + h) * width * 4, width)
                if word(args, 10):
                    _turn_interleaved(head, cos, sin, turned)
                else:
                    _turn_halves(head, cos, sin, turned)
                for k in range(2 * count, width):
                    turned[k] = head[k]


@inline
def _turn_halves(x, cos, sin, y):
    half = cos.size
    for j in range(half):
        y[j] = x[j] * cos[j] - x[j + half] * sin[j]
        y[j + half] = x[j + half] * cos[j] + x[j] * sin[j]


@inline
def _turn_interleaved(x, cos, sin, y):
    for j in range(cos.size):
        even, odd = x[2 * j], x[2 * j + 1]
        y[2 * j] = even * cos[j] - odd * sin[j]
        y[2 * j + 1] = odd * cos[j] + even * sin[j]


class Ropes(Base):
    """Rotary embeddings."""

    @accelerates(lambda self, x_MHK, angles, interleaved=False: not_plain(self))
    def rope(self, x_MHK: Array, angles: Angles, /, interleaved: bool = False) -> Array:
        # The rotated part of wider heads is read where it lies.
        if x_MHK.dtype != "float32" or x_MHK.strides[2] != 4 or not x_MHK.flags.aligned:
            x_MHK = self.plain(x_MHK)
        cos_MJ, sin_MJ = self.plain(angles.cos_MJ), self.plain(angles.sin_MJ)
        out_MHK = self.empty(*x_MHK.shape)
        if out_MHK.size:
            steps, J = x_MHK.strides[:2], cos_MJ.shape[1]
            turned = (at(x_MHK), *steps, *x_MHK.shape, at(cos_MJ), at(sin_MJ), J, at(out_MHK), int(interleaved))
            self.run(entry(rotate, *turned), numbers=out_MHK.size)
        return out_MHK
