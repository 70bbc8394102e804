"""Hypothesis' profile, fixtures that several test modules use, and what `pytest -m full` leaves behind."""

from collections.abc import Iterator

import hypothesis
import pytest

from tests.full import pytest_terminal_summary  # noqa: F401 (a hook)
from tests.shapecheck import shapes_checked

# Derandomised: the same few examples every time. `pytest --hypothesis-profile=search` looks for new ones, and many.
COMMON = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("ci", max_examples=8, derandomize=True, database=None, **COMMON)
hypothesis.settings.register_profile("search", max_examples=500, **COMMON)
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="module")
def checked_shapes() -> Iterator[None]:
    """While the module's tests run, array names are checked against shapes (tests.shapecheck)."""
    with shapes_checked():
        yield
