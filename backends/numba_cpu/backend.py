"""The backend "numba": the operations of this package over the canon."""

from __future__ import annotations

from npllm.backends.numba_cpu.products import Products


class NumbaBackend(Products):
    """Models on CPUs at the machine's limit: kernels compiled by Numba, threads of our own, weights where they lie."""
