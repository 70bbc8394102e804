"""The conformance of a backend as a suite of pytest: a test for each case, storage format and arithmetic.

    pytest --pyargs npllm.testing.conformance_suite --npllm-backend=mine -n auto

`-k "attention and bf16"` selects by id, as in `mine-attention/decode-bf16-float32`: storage format, then arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest

from npllm.registry import get_backend
from npllm.testing.conformance import conformity, trials
from npllm.testing.isolate import Trial
from npllm.testing.plugin import DECLINED, passed


class Checked(NamedTuple):
    """What a test checks: a trial of the backend of that name."""

    backend: str
    trial: Trial

    def __str__(self) -> str:
        return f"{self.backend}-{self.trial.case}-{self.trial.rounding.inputs}-{self.trial.dtype}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = dict.fromkeys(metafunc.config.getoption("npllm_backend") or ["numpy"])
    seed = metafunc.config.getoption("npllm_seed")
    found = [Checked(name, each) for name in names for each in trials(functools.partial(get_backend, name), seed=seed)]
    metafunc.parametrize("checked", found, ids=map(str, found))


def test_conformance(checked: Checked, record_property: Callable[[str, object], None]) -> None:
    report = conformity(functools.partial(get_backend, checked.backend), checked.trial)
    for declined in report.declined:
        record_property(DECLINED, f"{checked.backend}.{declined}")
    passed(report)
