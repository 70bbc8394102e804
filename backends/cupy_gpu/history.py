"""What penalties and biases go by, on the device: the tokens that rows have seen and said.

A row's entries are told once. From then on the device adds those that it draws, each behind the ones that it was drawn by;
how many these are is known before any token is. So a step that was launched ahead reads what the one before it drew, and one
that nobody asks for has left an entry behind the end, as it has a key, which the next one overwrites.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.backends.cupy_gpu.device import Device
from npllm.sampling import Sampler


class Counts(NamedTuple):
    """Of a row, how many entries are biases, tokens of the prompt and of the answer; whether those drawn are added."""

    biased: int
    prompted: int
    said: int
    recalls: bool


def counts_of(sampler: Sampler) -> Counts:
    """Only what the sampler's settings ask for: tokens of the prompt matter to one of the penalties, those said to all."""
    s = sampler.sampling
    repeats = s.repetition_penalty != 1.0
    recalls = repeats or bool(s.presence_penalty or s.frequency_penalty)
    return Counts(len(s.logit_bias), len(sampler.prompted) if repeats else 0, len(sampler.said) if recalls else 0, recalls)


def entries_of(sampler: Sampler) -> Array:
    """Entry of history.cuh, int32 [T, 2]."""
    biased, prompted, said, _ = counts_of(sampler)
    bias = sampler.sampling.logit_bias
    tokens = [*bias, *(sampler.prompted if prompted else ()), *sampler.said[:said]]
    entries_T2 = np.zeros((len(tokens), 2), np.int32)
    entries_T2[:, 0] = tokens
    entries_T2[:biased, 1] = np.fromiter(bias.values(), np.float32).view(np.int32)
    return entries_T2


class History:
    """The entries of so many rows of samplers, with room for `more` tokens of each than there are now."""

    def __init__(self, device: Device, samplers: Sequence[Sampler], rows: int, more: int) -> None:
        self.device = device
        self.room = more + max(sum(counts_of(sampler)[:3]) for sampler in samplers)
        self.entries_WT2 = device.empty((rows, self.room, 2), "int32")
        # By rows, whose entries are there, and how many tokens it had said then.
        self.told: list[tuple[Sampler, int] | None] = [None] * rows

    def holds(self, samplers: Sequence[Sampler], more: int) -> bool:
        """Whether there is room for these rows, and so many tokens of each to come."""
        return all(sum(counts_of(sampler)[:3]) + more <= self.room for sampler in samplers)

    def tell(self, samplers: Sequence[Sampler]) -> None:
        """Bring the entries of those rows to the device that it does not have."""
        for r, sampler in enumerate(samplers):
            if not self._knows(r, sampler):
                entries_T2 = entries_of(sampler)
                self.device.write(self.entries_WT2[r, : len(entries_T2)], entries_T2)
        self.agree(samplers)

    def agree(self, samplers: Sequence[Sampler]) -> None:
        """The device has the entries of these rows: it was told, or has drawn the token that they took last."""
        for r, sampler in enumerate(samplers):
            self.told[r] = sampler, len(sampler.said)

    def _knows(self, r: int, sampler: Sampler) -> bool:
        told = self.told[r]
        return told is not None and told[0] is sampler and told[1] == len(sampler.said)
