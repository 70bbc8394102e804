"""Attention over keys that are stored as bfloat16, against the same numbers stored as float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

from npllm.arrays import Array
from npllm.backends.cupy_gpu.backend import CupyBackend
from npllm.blocks.dtypes import round_to_bfloat16, widen_bfloat16
from npllm.cache import Keys
from npllm.testing.conformance import conformity, trials
from tests.gpu.emulator import EmulatedBackend, checked, emulated

pytestmark = [emulated, checked]


# Nothing but the order of sums may differ: vectors hold more keys, and so other tiles have room.
CLOSE = 2e-6


class InBoth(CupyBackend):
    """Attends to keys in both types, rounded, and compares, before it does what it is asked for."""

    compared: ClassVar[int] = 0

    def attention(self, *args: Any, **options: Any) -> Array:
        return self._thrice(super().attention, *args, **options)

    def latent_attention(self, *args: Any, **options: Any) -> Array:
        return self._thrice(super().latent_attention, *args, **options)

    def _thrice(self, attend: Callable[..., Array], q: Array, keys: Keys, *args: Any, **options: Any) -> Array:
        if keys.widen:
            return attend(q, keys, *args, **options)
        k, v = (round_to_bfloat16(np, self.to_numpy(x)) for x in (keys.k_BSGK, keys.v_BSGV))
        halved = tuple(map(self.asarray, (k, v)))
        whole = tuple(self.asarray(widen_bfloat16(x, "float32")) for x in (k, v))
        if attend.__name__ == "latent_attention":
            # Values are the first numbers of keys.
            halved, whole = ((x, x[..., : v.shape[-1]]) for x, _ in (halved, whole))
        got = self.to_numpy(attend(q, keys._replace(k_BSGK=halved[0], v_BSGV=halved[1], widen="float32"), *args, **options))
        want = self.to_numpy(attend(q, keys._replace(k_BSGK=whole[0], v_BSGV=whole[1]), *args, **options))
        np.testing.assert_allclose(got, want, rtol=5 * CLOSE, atol=CLOSE * np.abs(want).max(initial=1.0))
        InBoth.compared += 1
        return attend(q, keys, *args, **options)


class Twice(InBoth, EmulatedBackend):
    """On the emulated device."""


def attended(backend: type[InBoth], operation: str, dtype: str, every: int = 1) -> None:
    """One of so many cases of the kit."""
    found = trials(backend, [operation], storages=["bf16"], dtypes=[dtype])[::every]
    before = InBoth.compared
    for trial in found:
        conformity(backend, trial, 120.0).raise_on_failure()
    assert InBoth.compared - before >= len(found)


@pytest.mark.parametrize(
    ("operation", "dtype"), [("attention", "float32"), ("attention", "bfloat16"), ("latent_attention", "stored")]
)
def test_some(operation: str, dtype: str) -> None:
    attended(Twice, operation, dtype, 61)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "stored"])
@pytest.mark.parametrize("operation", ["attention", "latent_attention"])
def test_all(operation: str, dtype: str) -> None:
    attended(Twice, operation, dtype)
