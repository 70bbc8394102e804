"""What products are computed in, and how activations are prepared for it."""

from __future__ import annotations

from npllm.backends.numba_cpu.integers import quantise
from npllm.backends.numba_cpu.jit import PATH, inline
from npllm.backends.numba_cpu.memory import f32
from npllm.backends.numba_cpu.source import PAIRS, round_row, rounded
from npllm.backends.numba_cpu.team import called

# Arithmetic: float32 products and sums; products of bf16, float32 sums; of q8 and q4, products of integers
# (npllm.backends.numba_cpu.integers), or, with many tokens on a CPU that multiplies no bytes, those of `panelled`.
FLOAT32, BFLOAT16, INT8 = range(3)

# The twin of the widest path multiplies bytes by what any CPU has.
INTEGERS = bool(PATH.int8) or PATH.twin


@inline
def panelled(arithmetic):
    """The arithmetic of many tokens: without products of bytes, panels hold no 8-bit activations."""
    if arithmetic == INT8 and not INTEGERS:
        return BFLOAT16 if PAIRS else FLOAT32
    return arithmetic


@inline
def before_panels(arithmetic):
    """What rows are prepared for of which panels are made: groups are quantised in panels."""
    return FLOAT32 if panelled(arithmetic) == INT8 else panelled(arithmetic)


@called
def prepare_row(team, place, width, arithmetic):
    """Round float32 numbers in place as the arithmetic asks."""
    if arithmetic == INT8:
        quantise(place, width)
    elif arithmetic == BFLOAT16:
        if PAIRS:
            round_row(place, width, place)
        else:
            x = f32(place, width)
            for k in range(width):
                x[k] = rounded(x[k])
