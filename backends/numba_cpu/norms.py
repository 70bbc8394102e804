"""`rms_norm` and `layer_norm` over the last axis, whatever is before it; `embed`, which reads rows of a table instead."""

from __future__ import annotations

from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import LN, RMS, Norm, accelerates
from npllm.backends.numba_cpu.base import PORTION, Base, at
from npllm.backends.numba_cpu.jit import kernel
from npllm.backends.numba_cpu.matrix import COLUMNS, ROWS, Matrix
from npllm.backends.numba_cpu.memory import i64, word
from npllm.backends.numba_cpu.rows import fill_rows
from npllm.backends.numba_cpu.source import COUNT, FORM, SOURCE_WORDS, WIDTH, read_row
from npllm.backends.numba_cpu.tape import entry
from npllm.backends.numba_cpu.team import next_chunk
from npllm.handles import Weight
from npllm.weights import Linear


@kernel(FORM + "q")
def norm_rows(args, team, thread, threads):
    """The rows of a source. Arguments: the source; where they go, without gaps."""
    out, tokens, width = word(args, SOURCE_WORDS), word(args, COUNT), word(args, WIDTH)
    per = max(1, PORTION // width)
    while True:
        begin = next_chunk(team) * per
        if begin >= tokens:
            break
        for m in range(begin, min(tokens, begin + per)):
            read_row(team, args, m, out + m * width * 4)


@kernel("4q")
def look_up(args, team, thread, threads):
    """Rows of a matrix by number. Arguments: the matrix; the numbers, int64, and how many; where the rows go.

    A number beyond the rows gives the first or the last one.
    """
    matrix, numbers, out = word(args, 0), i64(word(args, 1), word(args, 2)), word(args, 3)
    width, rows = word(matrix, COLUMNS), word(matrix, ROWS)
    per = max(1, PORTION // width)
    while True:
        begin = next_chunk(team) * per
        if begin >= numbers.size:
            break
        for m in range(begin, min(numbers.size, begin + per)):
            n = min(max(numbers[m], 0), rows - 1)
            fill_rows(team, matrix, n, n + 1, 0, width, False, out + m * width * 4, 0)


def not_plain(be: Base, *vectors: Any) -> str | None:
    """Why kernels cannot compute with these prepared vectors."""
    if be.dtype == "float64":
        return "kernels compute in float32 and bfloat16"
    if any(isinstance(each, Weight) for each in vectors):
        return "a weight was not prepared by this backend"
    return None


def not_a_table(be: Base, w: Linear) -> str | None:
    """Why kernels cannot read rows of this; a table that stays on disk is read by the canon, which is as it should be."""
    if isinstance(w.weight, Weight | Matrix):
        return not_plain(be)
    return "the table was not prepared by this backend"


class Norms(Base):
    """Norms and embeddings."""

    @accelerates(lambda self, x_D, w, eps, offset=0.0: not_plain(self, w and w.weight))
    def rms_norm(self, x_D: Array, w: Linear | None, /, eps: float, offset: float = 0.0) -> Array:
        return self._norm(x_D, RMS(w, eps, offset))

    @accelerates(lambda self, x_D, w, eps: not_plain(self, *w))
    def layer_norm(self, x_D: Array, w: Linear, /, eps: float) -> Array:
        return self._norm(x_D, LN(w, eps))

    def _norm(self, x_D: Array, norm: Norm) -> Array:
        x_D = self.plain(x_D)
        y_D = self.empty(*x_D.shape)
        if x_D.size:
            x_MD = x_D.reshape(-1, x_D.shape[-1])
            self.run(entry(norm_rows, *self.source(x_MD, norm), at(y_D)), numbers=x_D.size)
        return y_D

    @accelerates(lambda self, tokens_M, w: not_a_table(self, w))
    def embed(self, tokens_M: Array, w: Linear, /) -> Array:
        if isinstance(w.weight, Weight):
            return self.called(lambda tokens_M: super(Norms, self).embed(tokens_M, w), tokens_M)
        numbers_M = self.numbers(tokens_M)
        self.within(numbers_M, len(w.weight), "a token")
        y_MD = self.empty(len(tokens_M), w.weight.shape[1])
        if y_MD.size:
            self.run(entry(look_up, w.weight.address, at(numbers_M), len(numbers_M), at(y_MD)), numbers=y_MD.size)
        return y_MD

    def numbers(self, x: Array) -> Array:
        """Integers as kernels take them: int64, contiguous; itself where it is."""
        return x if x.dtype == np.int64 and x.flags.c_contiguous else x.astype(np.int64, order="C")

    def within(self, x: Array, limit: int, what: str) -> None:
        """IndexError if an index is not in 0..limit; kernels do no harm then, and a recorded step is not looked into."""
        if self.recorder is None and x.size and not 0 <= x.min() <= x.max() < limit:
            raise IndexError(f"{what} is not in 0..{limit - 1}")
