"""The likeliest token of each row of logits, and whether they are finite: all that greedy decoding asks of a vocabulary."""

from __future__ import annotations

import numpy as np

from npllm.arrays import Array
from npllm.backends.numba_cpu.base import Base, at
from npllm.backends.numba_cpu.conversions import from_bits
from npllm.backends.numba_cpu.jit import inline, kernel
from npllm.backends.numba_cpu.memory import f32, i64, u32, word
from npllm.backends.numba_cpu.tape import entry
from npllm.backends.numba_cpu.team import next_chunk
from npllm.sampling import not_finite

# Logits that a thread takes at a time.
PART = 1 << 14


@kernel("6q")
def find_tops(args, team, thread, threads):
    """Of each part of each row, the largest logit and its first place; -1 if one is not finite.

    Arguments: logits [W, N]; W, N, the parts of a row; where the logits go, float32 [W, parts], and the places, int64.
    """
    rows, width, parts = word(args, 1), word(args, 2), word(args, 3)
    values, places = f32(word(args, 4), rows * parts), i64(word(args, 5), rows * parts)
    while True:
        chunk = next_chunk(team)
        if chunk >= rows * parts:
            break
        begin = chunk % parts * PART
        at, count = word(args, 0) + (chunk // parts * width + begin) * 4, min(PART, width - begin)
        top, finite = _largest(u32(at, count))
        x = f32(at, count)
        place = 0
        while finite and x[place] != top:
            place += 1
        values[chunk], places[chunk] = top, begin + place if finite else -1


@inline
def _largest(bits):
    """The largest of some numbers, and whether all are finite, from their bits: comparing integers needs no care for NaN."""
    top, size = np.int32(-0x80000000), np.int32(0)
    for i in range(bits.size):
        signed = np.int32(bits[i])
        size = max(size, np.int32(signed & np.int32(0x7FFFFFFF)))
        # Of negative numbers, the larger bits are the smaller number.
        top = max(top, np.int32(signed ^ ((signed >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    return from_bits(np.uint32(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF)))), size < 0x7F800000


class Tops(Base):
    """Tokens that nothing but their logits decides."""

    def likeliest(self, logits_WN: Array) -> list[int]:
        """The first of the likeliest tokens of each row; NumericsError where logits are not finite."""
        W, N = logits_WN.shape
        parts = -(-N // PART)
        values_WP, places_WP = np.empty((W, parts), np.float32), np.empty((W, parts), np.int64)
        tops = at(logits_WN), W, N, parts, at(values_WP), at(places_WP)
        self.run(entry(find_tops, *tops), numbers=logits_WN.size)
        if places_WP.min() < 0:
            raise not_finite()
        return [int(places_P[values_P.argmax()]) for values_P, places_P in zip(values_WP, places_WP, strict=True)]
