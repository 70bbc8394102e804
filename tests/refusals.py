"""What every refusal of npllm looks like: an error of one short, printable line that says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from npllm.errors import NpllmError

LONGEST = 700


def refused(error: type[NpllmError], act: Callable[[], Any], *words: str) -> None:
    """`act` raises `error` with one line of text that holds each of `words`."""
    with pytest.raises(error) as caught:
        act()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < LONGEST
    for word in words:
        assert word in message
