"""The truth files of norms, rotations, feed-forward layers and FP8 weights, on the kernels; attention, latents and mixtures
run on them in tests.test_exported, tests.test_mla and tests.test_moe."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")

from npllm import blocks
from npllm.backends.numba_cpu.backend import NumbaBackend
from npllm.weights import Linear
from tests.compare import agree
from tests.exported import FILES, cases_of, fed_forward, feed_forward, lookup, prepared
from tests.test_blocks import rope_of
from tests.test_fp8 import BLOCKED, weight

BE = NumbaBackend("float32")


@cases_of("rms_norm", "rms_norm_kinds", "layer_norm")
def test_norms(file: str, case: str) -> None:
    given, t, limit = lookup(file, case, "float32")
    if file == "layer_norm":
        y = BE.layer_norm(t["x"], prepared(BE, Linear(t["weight"], t["bias"])), given["eps"])
        agree(y, t["y"], "layer_norm")
        return
    gain = prepared(BE, Linear(t["weight"])) if "weight" in t else None
    agree(BE.rms_norm(t["x"], gain, given["eps"], given.get("offset", 0.0)), t["y"], limit)


@cases_of("rope_apply")
def test_rotations(file: str, case: str) -> None:
    given, t, limit = lookup(file, case, "float32")
    angles = blocks.angles(np, rope_of(given), t["positions"], "float32")
    far = "-far-" in case
    for name in "qk":
        want = FILES[file].tensors[case][f"{name}_rotated_f64"].astype("float32") if far else t[f"{name}_rotated"]
        got = BE.rope(t[name], angles, interleaved=given["pairing"] != "half")
        agree(got, want, f"far {limit}" if far else limit, what=name)


@cases_of("ffn")
def test_feed_forward_layers(file: str, case: str) -> None:
    _, t, limit = lookup(file, case, "float32")
    residual_MD = t["x"][::-1].copy()
    y_MD = fed_forward(BE, prepared(BE, feed_forward(case, t)), t["x"], residual_MD)
    agree(y_MD, residual_MD + t["y"], limit)


@pytest.mark.parametrize("case", [case for case in BLOCKED if FILES["fp8"].tensors[case]["y"].ndim == 2])
def test_fp8_blocks(case: str) -> None:
    """A product with one 1 and zeros is a number of the weight: by the row, by several, and side by side in panels."""
    given, t = FILES["fp8"].given[case], FILES["fp8"].tensors[case]
    w = BE.prepare(Linear(weight(t["codes"], t["factors"], tuple(given["block"]))))
    rows, columns = t["y"].shape
    agree(BE.embed(np.arange(rows), w), t["y"], "exact")
    ones = np.eye(columns, dtype=np.float32)
    for tokens in (1, 3, columns):
        agree(BE.linear(ones[:tokens], w), np.ascontiguousarray(t["y"].T[:tokens]), "exact")
