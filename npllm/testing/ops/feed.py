"""Inputs of a case as a backend takes them: activations in its dtype, weights as handles that it prepares."""

from __future__ import annotations

from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.handles import Weight
from npllm.testing.operation import Arrays
from npllm.weights import Linear

# Storage formats of handles by NumPy's name of the type.
STORED = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def activation(be: Backend, x: Array) -> Array:
    """A real array in the backend's dtype, an array of integers as it is."""
    return be.asarray(x if x.dtype.kind in "iub" else x.astype(be.array_dtype))


def handle(name: str, x: Array) -> Weight:
    """A handle on a drawn array, in the format in which it was drawn."""
    data = np.ascontiguousarray(x).view(np.uint16) if x.dtype.name == "bfloat16" else x
    return Weight(name, tuple(x.shape), STORED[x.dtype.name], data, "a case")


def linear(be: Backend, inputs: Arrays, weight: str, bias: str | None = None) -> Linear:
    """A prepared Linear of the inputs of these names; a bias that the case does not have is None."""
    extra = handle(bias, inputs[bias]) if bias is not None and bias in inputs else None
    prepared: Any = be.prepare(Linear(handle(weight, inputs[weight]), extra))
    return Linear(*prepared)
