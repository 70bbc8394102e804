"""The coarse operations made of linear layers: q, k and v of a layer, the gated FFN, and the MLP of GPT-2."""

from __future__ import annotations

from typing import Any

import numpy as np

from npllm import blocks
from npllm.arrays import Array
from npllm.backend import RMS, Backend, split_heads
from npllm.testing.case import Case, Draw
from npllm.testing.estimate import Estimate, applied, exact, factor, linear, rms_norm, stored, times
from npllm.testing.operation import Arrays, Operation, Settings
from npllm.testing.ops import factors, feed
from npllm.testing.ops import linear as linear_cases
from npllm.testing.ops.ffn_mistakes import GATED_MISTAKES, MLP_MISTAKES, PROJECT_MISTAKES
from npllm.testing.rounding import Rounding
from npllm.weights import MLP, QKV, GatedFFN, Linear


def module(inputs: Arrays, weight: str, bias: str) -> Linear:
    """Handles on a matrix and on its bias, None where the case has none."""
    return Linear(feed.handle(weight, inputs[weight]), feed.handle(bias, inputs[bias]) if bias in inputs else None)


def prepared(be: Backend, kind: type[Any], *modules: Linear) -> Any:
    """A prepared bundle of the backend's."""
    return kind(*(Linear(*each) for each in be.prepare(kind(*modules))))


def norm_of(be: Backend, inputs: Arrays, settings: Settings) -> RMS | None:
    return RMS(feed.linear(be, inputs, "norm"), settings["eps"]) if "norm" in inputs else None


def residual_of(be: Backend, inputs: Arrays) -> Array | None:
    return feed.activation(be, inputs["residual"]) if "residual" in inputs else None


def run_project_heads(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    w = prepared(be, QKV, *(module(inputs, name, f"{name}_bias") for name in "qkv"))
    x_MD = feed.activation(be, inputs["x"])
    return be.project_heads(x_MD, w, settings["head_dim"], norm=norm_of(be, inputs, settings))


def run_gated_ffn(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    w = prepared(be, GatedFFN, *(module(inputs, name, "") for name in ("gate", "up", "down")))
    norm, residual_MD = norm_of(be, inputs, settings), residual_of(be, inputs)
    return (be.gated_ffn(feed.activation(be, inputs["x"]), w, settings["act"], norm=norm, residual_MD=residual_MD),)


def run_mlp(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    w = prepared(be, MLP, *(module(inputs, name, f"{name}_bias") for name in ("up", "down")))
    return (be.mlp(feed.activation(be, inputs["x"]), w, settings["act"]),)


# -- budgets ----------------------------------------------------------------------------------------------------------


def entering(inputs: Arrays, settings: Settings, rounding: Rounding) -> Estimate:
    """What the first products take: x, or its norm as it is handed to them."""
    if "norm" not in inputs:
        return multiplied(inputs, "x", rounding)
    x_MD, at = exact(inputs["x"]), rounding.format("accumulate")
    normed = rms_norm(x_MD, inputs["norm"], settings["eps"], 0.0, rounding.format("normed"), at)
    return stored(normed, at, rounding.format("hidden"))


def multiplied(inputs: Arrays, name: str, rounding: Rounding) -> Estimate:
    """An input as a factor of a product."""
    return factor(inputs[name], rounding.format("factors"))


def last_layer(hidden_MF: Estimate, inputs: Arrays, added: str, rounding: Rounding) -> Estimate:
    """The product with `down` of activated features, as the output has it.

    Where `hidden` is coarser than that, rounding a feature may be the largest error of all, which a token's outputs share;
    it is known but for the smaller errors of the feature, and counts as it is where that is more.
    """
    at, to, output = (rounding.format(point) for point in ("accumulate", "hidden", "output"))
    out = stored(layer(stored(hidden_MF, at, to), inputs, "down", rounding, added), at, output)
    if to.bits >= output.bits:
        return out
    moved = (to.round(hidden_MF.value) - hidden_MF.value) @ inputs["down"].T
    return out._replace(variance=np.maximum(out.variance, moved**2))


def layer(x_MD: Estimate, inputs: Arrays, name: str, rounding: Rounding, added: str = "") -> Estimate:
    """A linear layer of the weight `name` and, where the case has it, what is `added`, not yet rounded to anything."""
    more = [exact(inputs[added])] if added in inputs else []
    weight_FD = multiplied(inputs, name, rounding)
    return linear(x_MD, weight_FD, rounding.format("accumulate"), more, rounding.format("partial"))


# Units of the argument that an activation leaves where it is `0.5 x (1 + y)` and y is all but -1. A library's erf is off by
# some 3 units in the last place of 1 (polynomials for float32: Abramowitz and Stegun 7.1.26), and always to the same side.
# SiLU has one as well, since `0.5 x (1 + tanh(x / 2))` is a way to compute it; ReLU selects.
CANCELS = {"gelu": 6.0, "relu": 0.0}


def activated(x: Estimate, act: str, rounding: Rounding) -> Estimate:
    """The activation, of what `features` has rounded."""
    at, features = rounding.format("accumulate"), rounding.format("features")
    x, roundings = stored(x, at, features), 0.0 if act == "relu" else 4.0
    return applied(lambda value: blocks.ACTIVATIONS[act](np, value), x, at, roundings, CANCELS.get(act, 1.0))


@factors.known("x", "q", "k", "v")
def estimate_project_heads(
    inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None
) -> tuple[Estimate, ...]:
    h_MD, at = entering(inputs, settings, rounding), rounding.format("accumulate")
    outputs = (layer(h_MD, inputs, name, rounding, f"{name}_bias") for name in "qkv")
    flat = (stored(out, at, rounding.format("output")) for out in outputs)
    return tuple(each.map(lambda x_MF: split_heads(x_MF, settings["head_dim"])) for each in flat)


@factors.known("x", "gate", "up", "down")
def estimate_gated_ffn(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    h_MD, at, features = entering(inputs, settings, rounding), rounding.format("accumulate"), rounding.format("features")
    gate_MF = stored(activated(layer(h_MD, inputs, "gate", rounding), settings["act"], rounding), at, features)
    up_MF = stored(layer(h_MD, inputs, "up", rounding), at, features)
    return (last_layer(times(gate_MF, up_MF, at), inputs, "residual", rounding),)


@factors.known("x", "up", "down")
def estimate_mlp(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    up_MF = layer(multiplied(inputs, "x", rounding), inputs, "up", rounding, "up_bias")
    return (last_layer(activated(up_MF, settings["act"], rounding), inputs, "down_bias", rounding),)


# -- inputs -----------------------------------------------------------------------------------------------------------

# The column of x that carries a constant, so that a weight's first column is a bias; a power of two, exact in any type.
CONSTANT = 4.0


def matrix(dice: np.random.Generator, F: int, D: int) -> Array:
    """A matrix [F, D] that keeps the scale of what it multiplies."""
    return dice.standard_normal((F, D)) / np.sqrt(max(D, 1))


def with_norm(dice: np.random.Generator, inputs: dict[str, Array]) -> dict[str, Array]:
    gain = 1.0 + 0.3 * dice.standard_normal(inputs["x"].shape[1:])
    return inputs | {"norm": gain}


def projections(M: int, D: int, width: int, heads: int, kv_heads: int, *, biases: bool = False, norm: bool = False) -> Draw:
    """x [M, D] and the three matrices; biases of about 1 and a gain around 1 where they are wanted."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        inputs = {"x": scale * dice.standard_normal((M, D))}
        for name, count in zip("qkv", (heads, kv_heads, kv_heads), strict=True):
            inputs[name] = matrix(dice, count * width, D)
            if biases:
                inputs[f"{name}_bias"] = dice.standard_normal(count * width)
        return with_norm(dice, inputs) if norm else inputs

    return draw


def gated(
    M: int, D: int, F: int, *, residual: float = 0.0, norm: bool = False, at: float | None = None, cancel: bool = False
) -> Draw:
    """x, gate, up, down.

    residual  its size; absent where 0.
    at        gates lie around this value, by the constant in the first column of x.
    cancel    down is turned to where its products cancel: what is left is the hidden features' error.
    """

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        x, gate, up = scale * dice.standard_normal((M, D)), matrix(dice, F, D), matrix(dice, F, D)
        if at is not None:
            x[:, 0] = CONSTANT
            gate *= 0.2
            gate[:, 0] = at / CONSTANT
        down = matrix(dice, D, F)
        if cancel:
            hidden = blocks.silu(np, x @ gate.T) * (x @ up.T)
            down = down - down @ np.linalg.pinv(hidden) @ hidden
        inputs = {"x": x, "gate": gate, "up": up, "down": down}
        if residual:
            inputs["residual"] = residual * dice.standard_normal((M, D))
        return with_norm(dice, inputs) if norm else inputs

    return draw


def opposite(M: int, D: int, F: int) -> Draw:
    """Gates around 3 and ups around 2, so that all hidden features are positive; a row of down has one sign.

    What rounds hidden features averages out in the product. The residual leaves a tenth to a quarter of that: what rounds
    the output is larger yet than the error of the hidden features, which a token shares, and far smaller than what would
    round the product.
    """

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        inputs = gated(M, D, F, at=3.0)(dice, scale)
        inputs["up"] *= 0.2
        inputs["up"][:, 0] = 2.0 / CONSTANT
        inputs["down"] = np.abs(inputs["down"]) * dice.choice([-1.0, 1.0], (D, 1))
        x = inputs["x"]
        product = (blocks.silu(np, x @ inputs["gate"].T) * (x @ inputs["up"].T)) @ inputs["down"].T
        return inputs | {"residual": (dice.uniform(0.1, 0.25, (M, D)) - 1.0) * product}

    return draw


# Where gates lie that have next to nothing left of them.
TAIL = (-16.0, -8.0)


def in_the_tail(drawn: Draw) -> Draw:
    """The same with gates in TAIL; ups are larger the less is left of their gate, so that each matters as much."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        inputs = drawn(dice, scale)
        x, gate, at = inputs["x"], 0.2 * inputs["gate"], dice.uniform(*TAIL, inputs["gate"].shape[:-1])
        x[:, 0], gate[..., 0] = CONSTANT, at / CONSTANT
        return inputs | {"x": x, "gate": gate, "up": inputs["up"] * np.exp(TAIL[1] - at)[..., np.newaxis]}

    return draw


def wide_range(drawn: Draw) -> Draw:
    """`linear.wide_range` of gate and up, with a larger down."""
    apart = linear_cases.wide_range(drawn, gate=8.0, up=8.0)

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        inputs = apart(dice, scale)
        return inputs | {"down": 32.0 * inputs["down"]}

    return draw


def biased(M: int, D: int, F: int, *, at: float | None = None, bias: float = 1.0) -> Draw:
    """x, up, down and their biases; activations' arguments lie around `at` where it is given."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        up, up_bias = matrix(dice, F, D), dice.standard_normal(F)
        if at is not None:
            up, up_bias = 0.2 * up, at + 0.1 * up_bias
        inputs = {"x": scale * dice.standard_normal((M, D)), "up": up, "up_bias": up_bias, "down": matrix(dice, D, F)}
        return inputs | {"down_bias": bias * dice.standard_normal(D)}

    return draw


# -- cases ------------------------------------------------------------------------------------------------------------

# Scales at which eps shows beside the mean square: 1, where it must not, and 2e-3, where it is a quarter of it.
EPS_SHOWS = (1.0, 2.0**-9)


def of(operation: str, name: str, draw: Draw, tags: str, scales: tuple[float, ...] = (1.0,), **settings: Any) -> Case:
    return Case(operation, name, draw, settings, frozenset(tags.split()), scales)


PROJECT_CASES = (
    of("project_heads", "m64-h4-kv2-k32", projections(64, 96, 32, 4, 2), "basic gqa prefill", head_dim=32),
    of("project_heads", "m64-h8-kv1-biases", projections(64, 80, 16, 8, 1, biases=True), "mqa prefill bias", head_dim=16),
    of(
        "project_heads", "m64-h3-kv3-k64-norm", projections(64, 128, 64, 3, 3, norm=True), "norm prefill", EPS_SHOWS,
        head_dim=64, eps=1e-6,
    ),
    of(
        "project_heads", "m33-h5-kv5-k24-norm-biases", projections(33, 61, 24, 5, 5, biases=True, norm=True),
        "norm odd prefill bias", head_dim=24, eps=1e-5,
    ),
    of("project_heads", "m64-d1-h2-kv2-k32", projections(64, 1, 32, 2, 2), "odd prefill", head_dim=32),
    of("project_heads", "m1-h32-kv8-k128", projections(1, 128, 128, 32, 8), "gqa decode", head_dim=128),
    of("project_heads", "m0-h4-kv2-k8", projections(0, 16, 8, 4, 2, norm=True), "empty norm", head_dim=8, eps=1e-6),
)  # fmt: skip

# Hidden features are 500 or more wherever outputs are many: a product of two normal numbers is large in few places, and all
# outputs of a token share the errors of those; with fewer, a correct token could look wrong by chance.
GATED_CASES = (
    of("gated_ffn", "silu-m64-d96-f512", gated(64, 96, 512), "basic silu prefill", (1.0, 2.0**-6), act="silu"),
    of("gated_ffn", "silu-m5-d61-f521", gated(5, 61, 521, residual=1.0), "silu odd prefill residual", act="silu"),
    of("gated_ffn", "silu-m1-d128-f2048", gated(1, 128, 2048), "silu decode large", act="silu"),
    of("gated_ffn", "silu-m64-d64-f1024", gated(64, 64, 1024), "silu prefill large", act="silu"),
    of("gated_ffn", "silu-m0-d16-f24", gated(0, 16, 24, norm=True), "silu empty norm", act="silu", eps=1e-6),
    of("gated_ffn", "silu-m64-d64-f512-saturated", gated(64, 64, 512), "silu prefill", (30.0,), act="silu"),
    of("gated_ffn", "silu-tail-m64-d64-f512", in_the_tail(gated(64, 64, 512)), "silu prefill tail", act="silu"),
    of("gated_ffn", "silu-m64-d64-f512-wide-range", wide_range(gated(64, 64, 512)), "silu prefill wide-range", act="silu"),
    of(
        "gated_ffn", "silu-m32-d64-f2048-opposite-residual", opposite(32, 64, 2048), "silu prefill residual cancelling",
        act="silu",
    ),
    of("gated_ffn", "silu-m16-d384-f384-square", gated(16, 384, 384), "silu prefill", act="silu"),
    of("gated_ffn", "silu-m32-f768-cancelling", gated(32, 128, 768, cancel=True), "silu prefill cancelling", act="silu"),
    of("gated_ffn", "silu-m64-d64-f1-residual", gated(64, 64, 1, residual=1000.0), "silu odd prefill residual", act="silu"),
    of(
        "gated_ffn", "silu-m64-d96-f512-norm-residual", gated(64, 96, 512, norm=True, residual=0.5),
        "silu prefill norm residual", EPS_SHOWS, act="silu", eps=1e-6,
    ),
    of("gated_ffn", "gelu-tanh-m64-d96-f512", gated(64, 96, 512), "gelu prefill", act="gelu_pytorch_tanh"),
    of("gated_ffn", "gelu-tanh-m64-f512-tail", gated(64, 64, 512, at=-2.5), "gelu prefill tail", act="gelu_pytorch_tanh"),
    of(
        "gated_ffn", "gelu-tanh-m64-d96-f512-norm-residual", gated(64, 96, 512, norm=True, residual=0.5),
        "gelu prefill norm residual", act="gelu_pytorch_tanh", eps=1e-6,
    ),
    of("gated_ffn", "gelu-m64-d96-f512", gated(64, 96, 512), "gelu prefill", act="gelu"),
    of("gated_ffn", "gelu-m64-d64-f512-tail", gated(64, 64, 512, at=-2.5), "gelu prefill tail", act="gelu"),
    of("gated_ffn", "relu-m64-d96-f512", gated(64, 96, 512), "relu prefill", act="relu"),
    of("gated_ffn", "relu-m33-d65-f513-norm", gated(33, 65, 513, norm=True), "relu odd prefill norm", act="relu", eps=1e-5),
)  # fmt: skip

MLP_CASES = (
    of("mlp", "gelu-new-m64-d96-f512", biased(64, 96, 512), "basic gelu prefill", act="gelu_new"),
    of("mlp", "gelu-new-m64-d64-f512-tail", biased(64, 64, 512, at=-2.5, bias=0.01), "gelu prefill tail", act="gelu_new"),
    of("mlp", "gelu-new-m5-d61-f1021", biased(5, 61, 1021), "gelu odd prefill", act="gelu_new"),
    of("mlp", "gelu-new-m32-d64-f4096", biased(32, 64, 4096, bias=0.1), "gelu prefill large", act="gelu_new"),
    of("mlp", "gelu-new-m1-d256-f1024", biased(1, 256, 1024), "gelu decode", act="gelu_new"),
    of("mlp", "gelu-new-m0-d16-f24", biased(0, 16, 24), "gelu empty", act="gelu_new"),
    of("mlp", "gelu-new-m64-d64-f1-large-bias", biased(64, 64, 1, bias=1000.0), "gelu odd prefill", act="gelu_new"),
    of("mlp", "gelu-m64-d96-f512", biased(64, 96, 512, bias=0.1), "gelu prefill", (1.0, 10.0), act="gelu"),
    of("mlp", "gelu-m64-d64-f512-tail", biased(64, 64, 512, at=-2.5, bias=0.01), "gelu prefill tail", act="gelu"),
    of("mlp", "relu-m16-d384-f384-square", biased(16, 384, 384, bias=0.1), "relu prefill", act="relu"),
    of("mlp", "silu-m64-d96-f512", biased(64, 96, 512, bias=0.1), "silu prefill", act="silu"),
)

OPERATIONS = (
    Operation(
        name="project_heads",
        about="q, k and v of a layer: a norm where there is one, three linear layers, split into heads",
        inputs={
            "x": ("token", "column"), "q": ("feature", "column"), "k": ("feature", "column"), "v": ("feature", "column"),
            "q_bias": ("feature",), "k_bias": ("feature",), "v_bias": ("feature",), "norm": ("column",),
        },
        outputs={
            "q": ("token", "head", "width"), "k": ("token", "kv head", "width"), "v": ("token", "kv head", "width"),
        },
        run=run_project_heads,
        estimate=estimate_project_heads,
        cases=PROJECT_CASES,
        mistakes=PROJECT_MISTAKES,
    ),
    Operation(
        name="gated_ffn",
        about="down(act(gate h) * up h), h being x or its norm; plus a residual",
        inputs={
            "x": ("token", "column"), "gate": ("feature", "column"), "up": ("feature", "column"),
            "down": ("column", "feature"), "residual": ("token", "column"), "norm": ("column",),
        },
        outputs={"y": ("token", "column")},
        run=run_gated_ffn,
        estimate=estimate_gated_ffn,
        cases=GATED_CASES,
        mistakes=GATED_MISTAKES,
    ),
    Operation(
        name="mlp",
        about="down(act(up x)), both with biases",
        inputs={
            "x": ("token", "column"), "up": ("feature", "column"), "up_bias": ("feature",),
            "down": ("column", "feature"), "down_bias": ("column",),
        },
        outputs={"y": ("token", "column")},
        run=run_mlp,
        estimate=estimate_mlp,
        cases=MLP_CASES,
        mistakes=MLP_MISTAKES,
    ),
)  # fmt: skip
