"""An array module that offers only what NumPy and CuPy share: what runs on it has no excuse not to run on a GPU's arrays.

New memory is poisoned: an entry of `empty` that is never written shows as NaN (or a huge integer) in the result.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend

SHARED = """abs add all any arange argmax argmin argsort array asarray broadcast_to ceil clip concatenate copyto cos
    cumsum divide equal exp expand_dims flip floor floor_divide full full_like greater greater_equal isfinite isinf
    isnan less less_equal log log1p logical_and logical_not logical_or matmul maximum minimum moveaxis multiply
    negative nonzero not_equal ones ones_like power repeat reshape round searchsorted sign sin split sqrt square
    squeeze stack subtract swapaxes take take_along_axis tanh tile transpose tril triu where zeros zeros_like""".split()

# CuPy's reductions know neither `initial` nor `where`.
REDUCTIONS = ("max", "mean", "min", "prod", "sum")


def reduction(name: str) -> Any:
    def reduce(a: Array, axis: Any = None, *, keepdims: bool = False) -> Any:
        return getattr(np, name)(a, axis=axis, keepdims=keepdims)

    return reduce


def poisoned(array: Array) -> Array:
    array.fill(np.nan if array.dtype.kind == "f" else np.iinfo(array.dtype).max)
    return array


STRICT = SimpleNamespace(
    **{name: getattr(np, name) for name in SHARED},
    **{name: reduction(name) for name in REDUCTIONS},
    empty=lambda shape, dtype: poisoned(np.empty(shape, dtype)),
    empty_like=lambda x: poisoned(np.empty_like(x)),
)


class StrictBackend(Backend):
    """The canon on the strict module."""

    name = "strict"
    xp = STRICT
