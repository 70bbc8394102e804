"""Norms."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from .case import Cases, Tensors, both, fill, normal, seeded


def scaled_rows(dice: torch.Generator, width: int) -> Tensor:
    """[7, width]: rows from so small that eps rules to large, one that is constant, one of zeros."""
    x_TD = normal(dice, 7, width) * torch.tensor([1.0, 1e-4, 1e-3, 3e-3, 1e4, 1.0, 0.0])[:, None]
    x_TD[5] = 0.7
    return x_TD


def rms_norm_cases() -> Cases:
    dice = seeded()
    cases: Cases = {}
    for eps in (1e-6, 1e-5, 1e-3):
        inputs = {"x": scaled_rows(dice, 37), "weight": 1 + 0.3 * normal(dice, 37)}
        cases[f"rows-eps{eps:g}"] = ({"eps": eps}, both(lambda x, weight, eps=eps: llama_norm(x, weight, eps), inputs))
    heads = {"x": normal(dice, 5, 6, 10), "weight": 1 + 0.3 * normal(dice, 10)}
    cases["heads"] = ({"eps": 1e-6}, both(lambda x, weight: llama_norm(x, weight, 1e-6), heads))
    return cases


def llama_norm(x: Tensor, weight: Tensor, eps: float) -> Tensors:
    return {"y": fill(LlamaRMSNorm(weight.shape[0], eps), {"weight": weight})(x)}


def layer_norm_cases() -> Cases:
    dice = seeded()
    cases: Cases = {}
    for eps in (1e-5, 1e-3):
        inputs = {"x": 0.4 + scaled_rows(dice, 30), "weight": 1 + 0.3 * normal(dice, 30), "bias": normal(dice, 30)}
        cases[f"rows-eps{eps:g}"] = (
            {"eps": eps},
            both(lambda x, weight, bias, eps=eps: {"y": F.layer_norm(x, x.shape[-1:], weight, bias, eps)}, inputs),
        )
    return cases


class Kind(NamedTuple):
    """One RMS norm of transformers: how it is made from (width, eps), the shape of its input, what is added to its gain.

    `gain`: whether it has one. A width is that of the last axis: where that holds several heads, the mean runs over all.
    """

    make: Callable[[int, float], nn.Module]
    shape: tuple[int, ...]
    offset: float = 0.0
    gain: bool = True


KINDS = {
    "gemma2": Kind(Gemma2RMSNorm, (7, 22), offset=1.0),
    "gemma3-heads": Kind(Gemma3RMSNorm, (5, 6, 10), offset=1.0),
    "gemma3n": Kind(Gemma3nRMSNorm, (7, 22)),
    "gemma3n-unit-heads": Kind(lambda width, eps: Gemma3nRMSNorm(width, eps, with_scale=False), (5, 3, 10), gain=False),
    "llama4-unit-heads": Kind(lambda _, eps: Llama4TextL2Norm(eps), (5, 6, 10), gain=False),
    "olmo2-full-width": Kind(Olmo2RMSNorm, (7, 6 * 10)),
}


def rms_norm_kind_cases() -> Cases:
    """Gains stored as an offset from 1, gains of none, means over the full width of a projection."""
    dice = seeded()
    cases: Cases = {}
    for name, kind in KINDS.items():
        for eps in (1e-6, 1e-3):
            width = kind.shape[-1]
            inputs = {"x": scaled_rows(dice, width) if len(kind.shape) == 2 else normal(dice, *kind.shape)}
            if kind.gain:
                inputs["weight"] = (1.0 - kind.offset) + 0.3 * normal(dice, width)

            def outputs(x: Tensor, kind: Kind = kind, eps: float = eps, **weights: Tensor) -> Tensors:
                return {"y": fill(kind.make(x.shape[-1], eps), weights)(x)}

            cases[f"{name}-eps{eps:g}"] = ({"eps": eps, "offset": kind.offset}, both(outputs, inputs))
    return cases
