"""Linear layers in every storage format: `residual + x W^T + bias`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.testing.case import Case, Draw
from npllm.testing.estimate import Estimate, exact, factor, linear, quantised, stored
from npllm.testing.operation import Arrays, Operation, Settings
from npllm.testing.ops import factors, feed
from npllm.testing.ops import quantised as storage
from npllm.testing.ops.linear_mistakes import MISTAKES
from npllm.testing.rounding import Format, Rounding
from npllm.weights import Linear


def run_linear(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    bias = feed.handle("bias", inputs["bias"]) if "bias" in inputs else None
    prepared: Any = be.prepare(Linear(storage.handle(inputs, settings), bias))
    residual = feed.activation(be, inputs["residual"]) if "residual" in inputs else None
    return (be.linear(feed.activation(be, inputs["x"]), Linear(*prepared), residual),)


@factors.known("x", "weight")
def estimate_linear(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    at = rounding.format("accumulate")
    x, weight, to = inputs["x"], storage.values(inputs, settings), rounding.format("factors")
    known = exact(weight)
    added = [exact(inputs[name]) for name in ("bias", "residual") if name in inputs]
    multiplied = known if "storage" in settings else factor(weight, to)
    out = linear(factor(x, to), multiplied, at, added, rounding.format("partial"))
    if "storage" in settings:
        moved = widened(weight, rounding.format("weights"))
        out = with_moved(out, exact(x), known, exact(x), moved)
    if rounding.activations is not None:
        out = with_moved(out, exact(x), known, quantised(exact(x), rounding.activations), known)
    return (stored(out, at, rounding.format("output")),)


def widened(weight: Array, to: Format) -> Estimate:
    """A quantised weight in the type `to`: the value after it, the square of the change, and the bound of the change."""
    rounded = to.round(weight)
    return Estimate(rounded, (rounded - weight) ** 2, 0.5 * to.spacing(weight))


def with_moved(out: Estimate, x: Estimate, weight: Estimate, other_x: Estimate, other_weight: Estimate) -> Estimate:
    """The budget `out` of `x W^T` for a kernel that first rounds x, or W, to fewer bits: `other_x`, `other_weight`.

    Either the change that rounding to nearest makes, which is known since inputs are, or that of independent errors,
    whichever is larger: numbers of a group may all be moved alike, but a kernel may also have chosen its scales otherwise
    (powers of two).
    """
    known = (other_x.value @ other_weight.value.T - x.value @ weight.value.T) ** 2
    independent = other_x.variance @ weight.value.T**2 + x.value**2 @ other_weight.variance.T
    bound = other_x.bound @ np.abs(weight.value.T) + np.abs(x.value) @ other_weight.bound.T
    return Estimate(out.value, out.variance + np.maximum(known, independent), out.bound + bound)


# -- inputs -----------------------------------------------------------------------------------------------------------


def product(
    M: int, D: int, F: int, *, bias: float = 0.0, residual: float = 0.0, offset: float = 0.0, skewed: bool = False
) -> Draw:
    """x [M, D] and a weight [F, D] that keeps its scale; bias and residual of the sizes given, absent where 0.

    offset   is added to all of x.
    skewed   rows of x and of the weight differ in size by powers of two, up to 2^6.
    """

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        x, weight = offset + dice.standard_normal((M, D)), dice.standard_normal((F, D)) / np.sqrt(max(D, 1))
        if skewed:
            x, weight = (rows * 2.0 ** dice.integers(-3, 4, (len(rows), 1)) for rows in (x, weight))
        inputs = {"x": scale * x, "weight": weight}
        if bias:
            inputs["bias"] = bias * scale * dice.standard_normal(F)
        if residual:
            inputs["residual"] = residual * scale * dice.standard_normal((M, F))
        return inputs

    return draw


def cancelling(drawn: Draw, settings: Settings) -> Draw:
    """The same, but with rows of x moved to where the products cancel: outputs are as small as what rounds x leaves."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        inputs = drawn(dice, scale)
        weight = storage.values(inputs, settings)
        size = np.max(np.abs(weight), axis=1, keepdims=True)
        weight = weight / np.where(size > 0.0, size, 1.0)
        return inputs | {"x": inputs["x"] - inputs["x"] @ np.linalg.pinv(weight) @ weight}

    return draw


def opposite(drawn: Draw) -> Draw:
    """The same with a residual that all but cancels the product."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        inputs = drawn(dice, scale)
        product = inputs["x"] @ inputs["weight"].T
        return inputs | {"residual": 0.02 * scale * dice.standard_normal(product.shape) - product}

    return draw


def wide_range(drawn: Draw, **weights: float) -> Draw:
    """The same with columns of x smaller by 2^-15 to 2^-19; those of `weights` larger by that, divided by the number given.

    f16 holds such numbers with few bits only: bf16 inputs that are taken through it lose some. Those of f16 have lost them.
    """

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        inputs = drawn(dice, scale)
        factors = 2.0 ** dice.integers(15, 20, inputs["x"].shape[1])
        larger = {name: inputs[name] * (factors / less) for name, less in weights.items()}
        return inputs | larger | {"x": inputs["x"] / factors}

    return draw


def blocks(M: int, D: int, F: int, *, codes: str = "normal", low: float = 0.5, high: float = 2.0, bias: float = 0.0) -> Draw:
    """x and an FP8 weight; the factors of its blocks of 128 x 128 lie between `low` and `high`, evenly over their logarithm.

    codes   normal: numbers of about 1; edge: zeros of both signs, subnormal numbers, the smallest normal ones, +-448.
    """

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        grid = (-(-F // 128), -(-D // 128))
        factors = np.exp(dice.uniform(np.log(low), np.log(high), grid)) / np.sqrt(max(D, 1))
        inputs = {"x": scale * dice.standard_normal((M, D)), "weight": CODES[codes](dice, (F, D))}
        inputs["scales"] = factors.astype(np.float32)
        return inputs | ({"bias": bias * dice.standard_normal(F)} if bias else {})

    return draw


def normal_codes(dice: np.random.Generator, shape: tuple[int, int]) -> Array:
    """e4m3 codes of numbers between 1/8 and 4, of either sign."""
    return (dice.integers(4 << 3, 9 << 3, shape) | dice.integers(0, 2, shape) << 7).astype(np.uint8)


def edge_codes(dice: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Rows of small numbers (0, subnormal, the first normal ones) and rows that hold +-448 among all the others."""
    small, large = dice.integers(0, 16, shape), dice.integers(0, 127, shape)
    large = np.where(dice.random(shape) < 0.2, 126, large)
    chosen = np.where(np.arange(shape[0])[:, np.newaxis] % 2, large, small)
    return (chosen | dice.integers(0, 2, shape) << 7).astype(np.uint8)


CODES: dict[str, Callable[[np.random.Generator, tuple[int, int]], Array]] = {"normal": normal_codes, "edge": edge_codes}


def groups(M: int, D: int, F: int, bits: int, *, edge: bool = False, bias: float = 0.0) -> Draw:
    """x and a weight of 8 or 4 bits (`grouped`)."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        weight, scales = grouped(dice, F, D, bits, edge=edge)
        inputs = {"x": scale * dice.standard_normal((M, D)), "weight": weight, "scales": scales}
        return inputs | ({"bias": bias * dice.standard_normal(F)} if bias else {})

    return draw


def grouped(dice: np.random.Generator, F: int, D: int, bits: int, *, edge: bool = False) -> tuple[Array, Array]:
    """A weight of 8 or 4 bits in groups of 32 and its factors, over a decade; `edge`: extreme codes only, factors of 0."""
    first, last = (-128, 127) if bits == 8 else (0, 15)
    codes = dice.choice([first, last], (F, D)) if edge else dice.integers(first, last + 1, (F, D))
    factors = np.exp(dice.uniform(-1.2, 1.2, (F, D // 32))) / (2.0 ** (bits - 2) * np.sqrt(max(D, 1)))
    if edge:
        factors *= dice.random(factors.shape) < 0.7
    return (codes.astype(np.int8) if bits == 8 else storage.packed(codes)), factors.astype(np.float16)


# -- cases ------------------------------------------------------------------------------------------------------------

FP8: Settings = {"storage": "fp8", "block": (128, 128)}
Q8: Settings = {"storage": "q8", "group": 32}
Q4: Settings = {"storage": "q4", "group": 32}


def case(name: str, draw: Draw, tags: str, settings: Settings | None = None, scales: tuple[float, ...] = (1.0,)) -> Case:
    return Case("linear", name, draw, settings or {}, frozenset(tags.split()), scales)


CASES = (
    case("square-m64-d96", product(64, 96, 96), "basic prefill", scales=(1.0, 2.0**-8)),
    case("m64-d127-f129-bias", product(64, 127, 129, bias=1.0), "odd prefill bias"),
    case("m64-d128-f127", product(64, 128, 127), "odd prefill"),
    case("m64-d129-f65-bias-residual", product(64, 129, 65, bias=1.0, residual=1.0), "odd prefill bias residual"),
    case("m0-d8-f8", product(0, 8, 8, bias=1.0), "odd empty bias"),
    case("m1-d1-f1", product(1, 1, 1), "odd decode"),
    case("m2-d3-f5", product(2, 3, 5, bias=1.0, residual=1.0), "odd decode bias residual"),
    case("m64-d1-f67", product(64, 1, 67), "odd prefill"),
    case("m1-d128-f4096", product(1, 128, 4096, bias=0.5), "decode bias"),
    case("m5-d61-f1021", product(5, 61, 1021), "odd decode"),
    case("m64-d4096-f16", product(64, 4096, 16), "prefill long"),
    case("m256-d512-f16-cancelling", cancelling(product(256, 512, 16), {}), "prefill cancelling"),
    case("m64-d256-f64-offset", product(64, 256, 64, offset=100.0), "prefill offset"),
    case("m64-d96-f96-large-residual", product(64, 96, 96, residual=1000.0), "prefill residual"),
    case("m64-d1-f64-large-residual", product(64, 1, 64, residual=1000.0), "odd prefill residual"),
    case("m64-d96-f96-opposite-residual", opposite(product(64, 96, 96, bias=0.01)), "prefill bias residual cancelling"),
    case("m64-d96-f96-large-bias", product(64, 96, 96, bias=100.0), "prefill bias"),
    case("m64-d100-f100-skewed", product(64, 100, 100, skewed=True, residual=0.1), "prefill residual skewed"),
    case("m64-d100-f100-wide-range", wide_range(product(64, 100, 100), weight=32.0), "prefill wide-range"),
    case("fp8-m64-d256-f256", blocks(64, 256, 256), "fp8 prefill", FP8),
    case("fp8-m40-d300-f200", blocks(40, 300, 200), "fp8 odd prefill", FP8),
    case("fp8-m64-d129-f129-bias", blocks(64, 129, 129, bias=1.0), "fp8 odd prefill bias", FP8),
    case("fp8-m1-d127-f1025", blocks(1, 127, 1025), "fp8 odd decode", FP8),
    case("fp8-m1-d1-f1", blocks(1, 1, 1), "fp8 odd decode", FP8),
    case("fp8-m64-d256-f256-scales", blocks(64, 256, 256, low=1e-4, high=1e2), "fp8 prefill scales", FP8),
    case("fp8-m64-d256-f64-wide-range", blocks(64, 256, 64, low=4e3, high=8e3), "fp8 prefill wide-range", FP8, (2.0**-17,)),
    case("fp8-m64-d200-f130-edge", blocks(64, 200, 130, codes="edge", low=0.01, high=0.1), "fp8 prefill edge", FP8),
    case("fp8-m256-d512-f16-cancelling", cancelling(blocks(256, 512, 16), FP8), "fp8 prefill cancelling", FP8),
    case("q8-m64-d256-f96", groups(64, 256, 96, 8), "q8 prefill", Q8),
    case("q8-m1-d32-f1031-bias", groups(1, 32, 1031, 8, bias=1.0), "q8 odd decode bias", Q8),
    case("q8-m64-d96-f64-edge", groups(64, 96, 64, 8, edge=True), "q8 prefill edge", Q8),
    case("q8-m256-d512-f16-cancelling", cancelling(groups(256, 512, 16, 8), Q8), "q8 prefill cancelling", Q8),
    case("q4-m64-d256-f96", groups(64, 256, 96, 4), "q4 prefill", Q4),
    case("q4-m1-d32-f1031-bias", groups(1, 32, 1031, 4, bias=1.0), "q4 odd decode bias", Q4),
    case("q4-m64-d96-f64-edge", groups(64, 96, 64, 4, edge=True), "q4 prefill edge", Q4),
    case("q4-m256-d512-f16-cancelling", cancelling(groups(256, 512, 16, 4), Q4), "q4 prefill cancelling", Q4),
)

OPERATIONS = (
    Operation(
        name="linear",
        about="x W^T, plus a bias and a residual; the weight real, or quantised in blocks (fp8) or groups (q8, q4)",
        inputs={
            "x": ("token", "column"), "weight": ("feature", "column"), "scales": ("row block", "column block"),
            "bias": ("feature",), "residual": ("token", "feature"),
        },
        outputs={"y": ("token", "feature")},
        run=run_linear,
        estimate=estimate_linear,
        cases=CASES,
        mistakes=MISTAKES,
    ),
)  # fmt: skip
