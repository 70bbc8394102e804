"""The step after a step, launched before the host knows its tokens: the device goes on while the host reads them.

A captured step leaves the tokens that it draws where the next one reads its own. So all that the next one needs is known
before they are: positions go on by one, and chance comes from the samplers, which can tell what it will be. `step` launches
a step, then the one after it, and only then waits for the first one's tokens.

Whoever asks for the next step gets it if it is the one foreseen: the same rows, one token further, each bringing the token
that it was given, drawing by the same numbers, and nothing done to the cache meanwhile. If not (a row has ended, another has
joined, a token was put in a drawn one's place), what was launched is left to itself. It has stored one key too many in each
row, which lies behind the row's end and is overwritten before it can be seen, and it has spent no random number.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.backends.cupy_gpu.device import Turn
from npllm.cache import Ints, Rows

if TYPE_CHECKING:
    from npllm.backends.cupy_gpu.steps import Step
    from npllm.generation import State
    from npllm.sampling import Sampler


class Ahead(NamedTuple):
    """A step that is under way before anybody asked for it, and what it is the answer to."""

    step: Step
    slots: Ints
    starts: Ints
    settings_WS: Array
    samplers: Sequence[Sampler]
    logprobs: bool
    turn: Turn
    tokens: Sequence[int] = ()

    def is_for(self, step: Step, rows: Rows, tokens: Sequence[int], settings_WS: Array, state: State) -> bool:
        """Whether this is the step of these rows, tokens and draws, with the logits where they are asked for."""
        mine = self.slots, self.starts, self.tokens, self.logprobs
        same = self.step is step and mine == (rows.slots, rows.starts, tokens, state.logprobs)
        # What a sampler has seen is in no setting.
        known = len(self.samplers) == len(state.samplers) and all(map(operator.is_, self.samplers, state.samplers))
        return same and known and np.array_equal(self.settings_WS, settings_WS)
