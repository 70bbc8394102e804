"""Mixtures of experts: each token's chosen experts, weighted and summed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.handles import Stack
from npllm.testing.case import Case, Draw
from npllm.testing.estimate import Estimate, exact, factor, growth, linear, quantised, stored, summation, times
from npllm.testing.operation import Arrays, Operation, Settings
from npllm.testing.ops import factors, feed
from npllm.testing.ops import quantised as storage
from npllm.testing.ops.ffn import activated, in_the_tail, wide_range
from npllm.testing.ops.linear import Q4, Q8, grouped, widened, with_moved
from npllm.testing.ops.moe_mistakes import MISTAKES
from npllm.testing.rounding import Format, Rounding
from npllm.weights import Experts, Linear


def run(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    parts = (Linear(stack(name, inputs, settings)) for name in ("gate", "up", "down"))
    prepared: Any = be.prepare(Experts(*parts))
    x, index, weight = (feed.activation(be, inputs[name]) for name in ("x", "index", "weight"))
    return (be.moe(x, prepared, index, weight, settings["act"], weigh=settings.get("weigh", "output")),)


def stack(name: str, inputs: Arrays, settings: Settings) -> Stack:
    matrices = (storage.handle(matrix(name, e, inputs), settings) for e in range(len(inputs[name])))
    return Stack(name, tuple(replace(each, name=f"{name}.{e}") for e, each in enumerate(matrices)))


def matrix(name: str, e: int, inputs: Arrays) -> Arrays:
    """The arrays of an expert's matrix under the names that npllm.testing.ops.quantised knows."""
    scales = f"{name}_scales"
    return {"weight": inputs[name][e]} | ({"scales": inputs[scales][e]} if scales in inputs else {})


# -- the budget -------------------------------------------------------------------------------------------------------


@factors.known("x", "gate", "up", "down")
def estimate(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    index, weight = inputs["index"], inputs["weight"]
    on_input = settings.get("weigh", "output") == "input"
    y = by_expert(inputs, on_input, settings, rounding)
    weights = np.ones_like(weight) if on_input else weight
    total = weighted_sum(y, index, weights, rounding)
    return (stored(total, rounding.format("partial"), rounding.format("output")),)


def by_expert(inputs: Arrays, on_input: bool, settings: Settings, rounding: Rounding) -> Estimate:
    """What each chosen expert says, before weights on the output [M, C, D]."""
    at, to = rounding.format("accumulate"), rounding.format("factors")
    (M, C), D = inputs["index"].shape, inputs["x"].shape[1]
    out = Estimate(*(np.zeros((M, C, D)) for _ in range(3)))
    for e in np.unique(inputs["index"]):
        token, choice = np.nonzero(inputs["index"] == e)
        x = factor(inputs["x"][token], to)
        if on_input:
            x = stored(
                times(exact(x.value), exact(inputs["weight"][token, choice][:, None]), at), at, rounding.format("hidden")
            )
        y = expert(x, {name: matrix(name, e, inputs) for name in ("gate", "up", "down")}, settings, rounding)
        for whole, part in zip(out, y, strict=True):
            whole[token, choice] = part
    return out


def expert(x_TD: Estimate, matrices: Mapping[str, Arrays], settings: Settings, rounding: Rounding) -> Estimate:
    """`down(act(gate x) * up x)`, as an expert hands it on."""
    at, features = rounding.format("accumulate"), rounding.format("features")
    gate_TF, up_TF = (multiplied(x_TD, matrices[name], settings, rounding) for name in ("gate", "up"))
    active_TF, up_TF = (stored(part, at, features) for part in (activated(gate_TF, settings["act"], rounding), up_TF))
    hidden_TF = stored(times(active_TF, up_TF, at), at, rounding.format("hidden"))
    return stored(multiplied(hidden_TF, matrices["down"], settings, rounding), at, rounding.format("partial"))


def multiplied(x_TD: Estimate, of: Arrays, settings: Settings, rounding: Rounding) -> Estimate:
    """`x W^T`. Of a matrix in codes, it is known what rounding its numbers, or x, to fewer bits changes."""
    at = rounding.format("accumulate")
    if "storage" not in settings:
        return linear(x_TD, factor(of["weight"], rounding.format("factors")), at)
    weight, x = storage.values(of, settings), exact(x_TD.value)
    known = exact(weight)
    out = with_moved(linear(x_TD, known, at), x, known, x, widened(weight, rounding.format("weights")))
    return out if rounding.activations is None else with_moved(out, x, known, quantised(x, rounding.activations), known)


def weighted_sum(y_MCD: Estimate, index_MC: Array, weight_MC: Array, rounding: Rounding) -> Estimate:
    """`sum over c of weight_c y_c`. An expert chosen twice makes the same error twice: its weights add before squares do."""
    at, partial = rounding.format("accumulate"), rounding.format("partial")
    same_MCC = index_MC[:, :, None] == index_MC[:, None, :]
    shared_MC = np.einsum("mcd,md->mc", same_MCC, weight_MC) * weight_MC
    w_MC1, C = weight_MC[:, :, None], index_MC.shape[1]
    terms = y_MCD.value * w_MC1
    total, squares = terms.sum(axis=1), (terms**2).sum(axis=1)
    variance = (y_MCD.variance * shared_MC[:, :, None]).sum(axis=1) + (at.spacing(terms) ** 2 / 12.0).sum(axis=1)
    bound = (y_MCD.bound * np.abs(w_MC1)).sum(axis=1)
    grown = growth(C + 1, at) * (np.abs(terms).sum(axis=1) + bound) + C * 2.0 ** (at.least - at.bits)
    out = Estimate(total, variance + summation(total, squares, C, at), bound + grown)
    return out if partial == at else rounded_on_the_way(out, terms, index_MC, partial)


def rounded_on_the_way(total: Estimate, terms_MCD: Array, index_MC: Array, to: Format) -> Estimate:
    """The sum of the terms where each of them, and what it makes of the sum, is rounded to a format.

    Experts are added in the order in which a token chose them, or by number: what varies more.
    """
    orders = (np.broadcast_to(np.arange(index_MC.shape[1]), index_MC.shape), np.argsort(index_MC, axis=1, kind="stable"))
    sums = (np.cumsum(np.take_along_axis(terms_MCD, order[:, :, None], axis=1), axis=1)[:, 1:] for order in orders)
    first, second = (np.sum(to.spacing(part) ** 2, axis=1) / 12.0 for part in sums)
    variance = total.variance + np.sum(to.spacing(terms_MCD) ** 2, axis=1) / 12.0 + np.maximum(first, second)
    largest = np.sum(np.abs(terms_MCD), axis=1) + total.bound
    return Estimate(total.value, variance, total.bound + index_MC.shape[1] * growing(largest, to))


def growing(largest: Array, to: Format) -> Array:
    """What rounding a term, and the sum with it, adds at most where neither is larger than that."""
    return 1.1 * to.spacing(1.1 * largest)


# -- cases ------------------------------------------------------------------------------------------------------------


def uniform(dice: np.random.Generator, M: int, E: int, C: int) -> Array:
    """Distinct experts, any equally likely."""
    return dice.permuted(np.tile(np.arange(E), (M, 1)), axis=1)[:, :C]


def skewed(dice: np.random.Generator, M: int, E: int, C: int) -> Array:
    """Low numbers are chosen far more often, and in most draws some experts by nobody."""
    keys = dice.gumbel(size=(M, E)) - 0.5 * np.arange(E)
    return np.argsort(-keys, axis=1)[:, :C]


def crowded(dice: np.random.Generator, M: int, E: int, C: int) -> Array:
    """All tokens go to the same experts, the last ones."""
    return np.tile(np.arange(E - C, E), (M, 1))


def twice(dice: np.random.Generator, M: int, E: int, C: int) -> Array:
    """The first expert of a token is its last one too."""
    index = uniform(dice, M, E, C)
    index[:, -1] = index[:, 0]
    return index


def normalised(dice: np.random.Generator, M: int, C: int) -> Array:
    odds = dice.uniform(0.3, 1.0, (M, C))
    return odds / odds.sum(axis=1, keepdims=True)


def cancelling(dice: np.random.Generator, M: int, C: int) -> Array:
    """Of both signs, with sum 0."""
    weight = dice.uniform(0.5, 1.5, (M, C))
    return np.asarray(weight - weight.mean(axis=1, keepdims=True))


def tiny(dice: np.random.Generator, M: int, C: int) -> Array:
    """All but the first are small."""
    return np.where(np.arange(C) == 0, 0.75, 2.0**-10 * dice.uniform(0.5, 1.0, (M, C)))


def mixture(M: int, D: int, F: int, E: int, C: int, index: Any = uniform, weight: Any = normalised) -> Draw:
    """M tokens, D wide, to C of E experts, F wide."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        gate, up = (dice.standard_normal((E, F, D)) / np.sqrt(D) for _ in range(2))
        return {
            "x": scale * dice.standard_normal((M, D)),
            "gate": gate,
            "up": up,
            "down": dice.standard_normal((E, D, F)) / np.sqrt(F),
            "index": index(dice, M, E, C).astype(np.int32),
            "weight": weight(dice, M, C),
        }

    return draw


def coded(M: int, D: int, F: int, E: int, C: int, bits: int) -> Draw:
    """The same with experts of 8 or 4 bits, in groups of 32."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        inputs = mixture(M, D, F, E, C)(dice, scale)
        for name in ("gate", "up", "down"):
            _, rows, columns = inputs[name].shape
            codes, scales = zip(*(grouped(dice, rows, columns, bits) for _ in range(E)), strict=True)
            inputs |= {name: np.stack(codes), f"{name}_scales": np.stack(scales)}
        return inputs

    return draw


def case(name: str, draw: Draw, tags: str, scales: tuple[float, ...] = (1.0,), /, **settings: Any) -> Case:
    return Case("moe", name, draw, {"act": "silu"} | settings, frozenset(tags.split()), scales)


# Experts of few choices are some 200 features wide: all outputs of a token share the errors of a large feature, and with
# fewer a correct token could look wrong by chance.
CASES = (
    case("mixtral", mixture(96, 64, 256, 8, 2), "prefill", (1.0, 3.0)),
    case("many-experts", mixture(96, 48, 32, 64, 8), "prefill large", (1.0,)),
    case("eight-of-sixteen", mixture(96, 64, 48, 16, 8), "prefill", (1.0,)),
    case("skewed", mixture(128, 48, 192, 16, 4, skewed), "prefill skewed empty-expert"),
    case("crowded", mixture(80, 64, 192, 16, 4, crowded), "prefill skewed empty-expert"),
    case("one-choice", mixture(128, 48, 256, 8, 1), "prefill one-choice"),
    case("every-expert", mixture(96, 48, 48, 8, 8), "prefill"),
    case("weighted-input", mixture(96, 48, 256, 16, 1), "prefill weighted-input one-choice", (1.0, 3.0), weigh="input"),
    case("weighted-inputs", mixture(96, 48, 256, 8, 3), "prefill weighted-input", (1.0,), weigh="input"),
    case("gelu", mixture(96, 48, 256, 8, 2), "prefill gelu", (1.0,), act="gelu_pytorch_tanh"),
    case("exact-gelu", mixture(96, 48, 256, 8, 2), "prefill gelu", (1.0,), act="gelu"),
    case("same-expert-twice", mixture(96, 48, 256, 8, 3, twice), "prefill duplicate"),
    case("same-expert-twice-input", mixture(96, 48, 256, 8, 3, twice), "duplicate weighted-input", (1.0,), weigh="input"),
    case("cancelling-weights", mixture(96, 48, 256, 8, 4, uniform, cancelling), "prefill cancelling"),
    case("tiny-weights", mixture(96, 48, 256, 8, 4, uniform, tiny), "prefill tiny"),
    case("silu-tail", in_the_tail(mixture(96, 48, 256, 8, 2)), "prefill tail"),
    case("wide-range", wide_range(mixture(96, 48, 256, 8, 2)), "prefill wide-range"),
    case("prime-sizes", mixture(67, 71, 211, 13, 3), "prefill odd"),
    case("decode", mixture(1, 128, 96, 16, 4), "decode"),
    case("decode-batch", mixture(5, 96, 64, 32, 8), "decode empty-expert"),
    case("decode-weighted-input", mixture(1, 96, 256, 16, 1), "decode weighted-input one-choice", weigh="input"),
    case("decode-weighted-inputs", mixture(5, 96, 256, 8, 3), "decode weighted-input", (1.0, 3.0), weigh="input"),
    case("q8-decode", coded(5, 96, 256, 8, 3, 8), "decode q8", **Q8),
    case("q8-prefill", coded(96, 64, 256, 8, 2, 8), "prefill q8", **Q8),
    case("q4-decode-weighted-input", coded(3, 64, 256, 8, 2, 4), "decode q4 weighted-input", weigh="input", **Q4),
    case("q4-prefill", coded(96, 64, 256, 8, 2, 4), "prefill q4", **Q4),
    case("width-one", mixture(40, 1, 1, 4, 2), "odd"),
    case("no-tokens", mixture(0, 32, 16, 8, 2), "empty"),
)  # fmt: skip

OPERATIONS = (
    Operation(
        name="moe",
        about="the weighted sum of the chosen experts' gated feed-forward layers",
        inputs={
            "x": ("token", "feature"),
            "gate": ("expert", "hidden", "feature"),
            "up": ("expert", "hidden", "feature"),
            "down": ("expert", "feature", "hidden"),
            "gate_scales": ("expert", "hidden", "group"),
            "up_scales": ("expert", "hidden", "group"),
            "down_scales": ("expert", "feature", "group"),
            "index": ("token", "choice"),
            "weight": ("token", "choice"),
        },
        outputs={"y": ("token", "feature")},
        run=run,
        estimate=estimate,
        cases=CASES,
        mistakes=MISTAKES,
    ),
)
