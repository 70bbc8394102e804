"""FP8 by torch's own types: every code that is a number, and codes with the factors of their blocks."""

import torch
from torch import Tensor

from ..fp8 import spread
from .case import Cases, Parameters, Tensors, both, normal, seeded

DECLARED: dict[str, Parameters] = {
    "ragged": {"shape": [45, 37], "block": [16, 8]},
    "whole": {"shape": [32, 24], "block": [8, 12]},
    "last-row": {"shape": [17, 33], "block": [16, 32]},
    "rows": {"shape": [21, 19], "block": [1, 20]},
    "stacked": {"shape": [3, 20, 27], "block": [16, 8]},
}
"""Shapes [..., M, N], and rows and columns of a block; `whole` alone has no partial ones."""


def fp8_cases() -> Cases:
    dice = seeded()
    codes = torch.arange(255, dtype=torch.uint8)
    numbers = codes[codes != 127]
    cases: Cases = {
        "e4m3": ({}, {"codes": numbers, "y": numbers.view(torch.float8_e4m3fn).float()}),
        "e8m0": ({}, {"codes": codes, "y": codes.view(torch.float8_e8m0fnu).float()}),
    }
    for name, given in DECLARED.items():
        *stack, rows, columns = given["shape"]
        grid = [-(-size // per) for size, per in zip((rows, columns), given["block"], strict=True)]
        drawn = (100 * normal(dice, *stack, rows, columns)).clamp(-448, 448).to(torch.float8_e4m3fn)
        factors = {"factors": 0.01 + 0.02 * normal(dice, *stack, *grid).abs()}
        widened = both(lambda factors, drawn=drawn, given=given: widen(drawn, factors, given["block"]), factors)
        cases[name] = (given, {"codes": drawn.view(torch.uint8)} | widened)
    return cases


def widen(codes: Tensor, factors: Tensor, block: tuple[int, int]) -> Tensors:
    """DeepSeek's definition: each code's number times the factor of its block."""
    return {"y": codes.to(factors.dtype) * spread(factors, block, codes)}
