"""A plug-in of pytest: tests of whole models with guards around their arrays (`pytest -p tests.numba.guarded`)."""

import os

from tests.numba import guards

# The side on which the guards lie flush against arrays.
VARIABLE = "NPLLM_TEST_GUARDS"


def pytest_configure() -> None:
    guards.install(os.environ[VARIABLE])
