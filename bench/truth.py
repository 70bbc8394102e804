"""How far the logits are from those of transformers, over the reference checkpoints of tests/truth.

float32   the worst ||got - want|| / ||want|| of an architecture's cases, both in float32, on the backend "numpy";
float64   the same of a case's first row, both in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from safetensors.numpy import load_file

import npllm
from bench.canon import about
from npllm.arrays import Array
from npllm.testing.compare import norm, ratio
from tests.export import CASES, TRUTH


def run() -> dict[str, Any]:
    """All figures of one run, by the `model_type` of the cases."""
    worst: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        figures = worst.setdefault(case.model, {"cases": 0, "float32": 0.0, "float64": 0.0})
        figures["cases"] += 1
        for dtype, error in errors(name).items():
            figures[dtype] = max(figures[dtype], error)
    return {"schema": "npllm.bench.truth/1", **about(), "architectures": worst}


def errors(name: str) -> dict[str, float]:
    """The relative errors of one case by the dtype of the arithmetic."""
    folder = TRUTH / "models" / name
    want = load_file(folder / "trace.safetensors")
    single, double = (npllm.load(folder, backend="numpy", dtype=dtype) for dtype in ("float32", "float64"))
    return {
        "float32": relative(single.forward(want["tokens"]), want["logits"]),
        "float64": relative(double.forward(want["tokens"][:1])[0], want["logits_f64"]),
    }


def relative(got: Array, want: Array) -> float:
    wide = want.astype(np.float64)
    return ratio(norm(got - wide), norm(wide))


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = ["| model_type | cases | worst in float32 | worst in float64 |", "|---|---|---|---|"]
    for name, each in figures["architectures"].items():
        lines.append(f"| {name} | {each['cases']} | {each['float32']:.1e} | {each['float64']:.1e} |")
    return "\n".join(lines)
