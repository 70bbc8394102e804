"""RMSNorm in all its kinds, and LayerNorm."""

from __future__ import annotations

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.testing import estimate
from npllm.testing.estimate import Estimate, exact, rounded
from npllm.testing.operation import Arrays, Operation, Settings
from npllm.testing.ops import feed
from npllm.testing.ops.norms_cases import LAYER_NORM_CASES, RMS_NORM_CASES
from npllm.testing.ops.norms_mistakes import LAYER_NORM_MISTAKES, RMS_NORM_MISTAKES
from npllm.testing.rounding import Rounding


def run_rms_norm(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    gain = feed.linear(be, inputs, "weight") if "weight" in inputs else None
    return (be.rms_norm(feed.activation(be, inputs["x"]), gain, settings["eps"], settings.get("offset", 0.0)),)


def run_layer_norm(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    return (be.layer_norm(feed.activation(be, inputs["x"]), feed.linear(be, inputs, "weight", "bias"), settings["eps"]),)


def estimate_rms_norm(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    at, normed = rounding.format("accumulate"), rounding.format("normed")
    x, weight, offset = exact(inputs["x"]), inputs.get("weight"), settings.get("offset", 0.0)
    return (rounded(estimate.rms_norm(x, weight, settings["eps"], offset, normed, at), rounding.format("output")),)


def estimate_layer_norm(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    at, x = rounding.format("accumulate"), exact(inputs["x"])
    out = estimate.layer_norm(x, inputs["weight"], inputs["bias"], settings["eps"], at)
    return (rounded(out, rounding.format("output")),)


OPERATIONS = (
    Operation(
        name="rms_norm",
        about="root-mean-square norm of the last axis, times a gain",
        inputs={"x": ("row", "feature"), "weight": ("feature",)},
        outputs={"y": ("row", "feature")},
        run=run_rms_norm,
        estimate=estimate_rms_norm,
        cases=RMS_NORM_CASES,
        mistakes=RMS_NORM_MISTAKES,
    ),
    Operation(
        name="layer_norm",
        about="mean taken off and divided by the standard deviation along the last axis, times a gain, plus a bias",
        inputs={"x": ("row", "feature"), "weight": ("feature",), "bias": ("feature",)},
        outputs={"y": ("row", "feature")},
        run=run_layer_norm,
        estimate=estimate_layer_norm,
        cases=LAYER_NORM_CASES,
        mistakes=LAYER_NORM_MISTAKES,
    ),
)
