"""Activations of the feed-forward layers. The layers themselves (SwiGLU, GeGLU, MLP) are wired in `npllm.backend`."""

from __future__ import annotations

import math
from collections.abc import Callable

from npllm.arrays import Array, Namespace
from npllm.blocks.dtypes import widened

# exp(LARGEST) is finite, and 1 / (1 + exp(LARGEST)) is zero for every purpose.
LARGEST = {4: 88.0, 8: 709.0}


@widened
def silu(xp: Namespace, x: Array) -> Array:
    """`x * sigmoid(x) = x / (1 + exp(-x))` (Ramachandran et al. 2017, arXiv 1710.05941); elementwise, any shape."""
    denominator = xp.minimum(-x, x.dtype.type(LARGEST[x.dtype.itemsize]))
    xp.exp(denominator, out=denominator)
    denominator += 1.0
    return x / denominator


@widened
def gelu_tanh(xp: Namespace, x: Array) -> Array:
    """The tanh form of GELU, `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))` (Hendrycks and Gimpel, arXiv 1606.08415)."""
    inner = xp.square(x)
    inner *= 0.044715
    inner += 1.0
    inner *= x
    inner *= math.sqrt(2.0 / math.pi)
    xp.tanh(inner, out=inner)
    inner += 1.0
    inner *= x
    inner *= 0.5
    return inner


Activation = Callable[[Namespace, Array], Array]

# Names that `hidden_act`, `hidden_activation` and `activation_function` of a config.json may hold.
ACTIVATIONS: dict[str, Activation] = {
    "silu": silu,
    "swish": silu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}
