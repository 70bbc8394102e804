"""What the tests of all families take."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pitfalls.case import Case


@pytest.fixture
def case(tmp_path: Path) -> Callable[[str], Case]:
    """A truth case by name, to be changed; each takes the place of the one before."""
    return lambda name: Case(tmp_path, name)
