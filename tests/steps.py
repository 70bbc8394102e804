"""Driving a model step by step through a cache, as generation does but with every token's logits."""

from collections.abc import Sequence

import numpy as np

from npllm import LLM
from npllm.arrays import Array
from npllm.cache import Cache


def step(llm: LLM, cache: Cache, slots: Sequence[int], pieces: Sequence[Array]) -> list[Array]:
    """Logits [t, N] of each row's new tokens `pieces[r]`, which go to the cache."""
    counts = [len(piece) for piece in pieces]
    rows = cache.plan(slots, counts)
    tokens_M = llm.backend.asarray(np.concatenate(pieces))
    logits_MN = llm.backend.to_numpy(llm.model.run(llm.backend, tokens_M, rows, cache))
    return np.split(logits_MN, np.cumsum(counts)[:-1])


def in_pieces(llm: LLM, tokens_T: Array, cuts: Sequence[int]) -> Array:
    """Logits [T, N] of one row that a cache receives cut at `cuts`."""
    cache = llm.new_cache()
    slot = cache.add()
    return np.concatenate([step(llm, cache, [slot], [piece])[0] for piece in np.split(tokens_T, cuts)])
