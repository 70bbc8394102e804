"""Prepared matrices of one shape that lie apart: the experts of a layer, as kernels find them by number."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from npllm.backends.numba_cpu.matrix import Matrix


class Matrices(list[Matrix]):
    """Matrices [F, D], E of them; `address` is that of a table of their descriptions' addresses.

    `alike` says whether all are stored in one format.
    """

    def __init__(self, matrices: Iterable[Matrix]) -> None:
        super().__init__(matrices)
        self._table = np.array([each.address for each in self], np.int64)
        self.alike = len({each.format for each in self}) == 1
        self.address: int = self._table.ctypes.data


def stacked(prepared: list[Any]) -> list[Any]:
    """Prepared experts: Matrices, if all of them are matrices."""
    return Matrices(prepared) if all(isinstance(each, Matrix) for each in prepared) else prepared
