"""What a case of one operation is: inputs, and outputs in float32 and in float64. See `tests/truth/README.md`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..float64 import float64

SEED = 0

Tensors = dict[str, Tensor]
Parameters = dict[str, Any]
Cases = dict[str, tuple[Parameters, Tensors]]
"""By name: the parameters of a case, and its tensors."""


@torch.no_grad()
def both(outputs: Callable[..., Tensors], inputs: Tensors) -> Tensors:
    """inputs, outputs(**inputs), and the same in float64 under names that end in `_f64`."""
    with float64():
        exact = outputs(**{name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})
    return inputs | outputs(**inputs) | {f"{name}_f64": value for name, value in exact.items()}


def normal(dice: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=dice)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def fill(module: nn.Module, weights: Tensors) -> nn.Module:
    module.load_state_dict(weights)
    return module


def drawn(module: nn.Module, dice: torch.Generator, *, columns_first: bool = False) -> Tensors:
    """Weights for `module` that leave nothing neutral: gains about 1, biases not 0, matrices that keep the scale.

    columns_first: stacks of matrices [E, in, out] instead of [E, out, in].
    """
    weights = {}
    for name, weight in module.state_dict().items():
        noise = normal(dice, *weight.shape)
        if weight.ndim == 1:
            weights[name] = 0.3 * noise + (0.0 if "bias" in name else 1.0)
        else:
            weights[name] = 1.6 * weight.shape[-2 if columns_first and weight.ndim == 3 else -1] ** -0.5 * noise
    return weights
