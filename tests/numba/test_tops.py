"""The likeliest tokens, of vocabularies of several parts: as np.argmax finds them, unless a logit is not finite."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")

from hypothesis import given
from hypothesis import strategies as st

from npllm.backends.numba_cpu.backend import NumbaBackend
from npllm.backends.numba_cpu.sampling import PART
from npllm.errors import NumericsError

WIDTHS = (1, 2, 7, PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 5)


@given(st.integers(1, 4), st.sampled_from(WIDTHS), st.sampled_from([0.0, -3.0, 1e30, -1e30]), st.integers(1, 5), st.data())
def test_the_first_of_the_likeliest(rows: int, width: int, shift: float, levels: int, data: st.DataObject) -> None:
    """Few levels make ties, also between parts; zeros come with either sign."""
    dice = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits_WN = np.float32(shift) + dice.integers(0, levels, (rows, width)).astype(np.float32)
    logits_WN[dice.random((rows, width)) < 0.1] *= np.float32(-1)
    be = NumbaBackend("float32")
    assert be.likeliest(logits_WN) == np.argmax(logits_WN, axis=1).tolist()
    row, place = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, width - 1))
    logits_WN[row, place] = data.draw(st.sampled_from([np.nan, -np.nan, np.inf, -np.inf]))
    with pytest.raises(NumericsError):
        be.likeliest(logits_WN)
