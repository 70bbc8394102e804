"""Multi-head latent attention: projection to latents, keys and values made of them, and attention over them.

A token's latent is `[c | k]`: L numbers that all heads' keys and values are made of, and a rotated key of 2 J numbers that
all heads share. What each operation computes stands in npllm.blocks.mla, and how its budget comes about in latent_budget.
"""

from __future__ import annotations

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.blocks.masks import sliding
from npllm.cache import Keys, Rows
from npllm.testing.estimate import Estimate, factor, handed_on, linear, rounded
from npllm.testing.operation import Arrays, Operation, Settings
from npllm.testing.ops import factors, feed, latent_budget, latent_cases, latent_mistakes
from npllm.testing.ops.latent_budget import Parts, joined
from npllm.testing.ops.rope import angle_budget, of_inputs
from npllm.testing.rounding import FORMATS, Rounding
from npllm.weights import LatentKV


def run_project(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    bundle = LatentKV(feed.linear(be, inputs, "kv_a"), feed.linear(be, inputs, "norm"))
    angles = be.angles(of_inputs(inputs), feed.activation(be, inputs["positions"]))
    h_MD, interleaved = feed.activation(be, inputs["h"]), settings.get("interleaved", False)
    return (be.latent_project(h_MD, bundle, angles, settings["eps"], interleaved=interleaved)[:, 0],)


@factors.known("h", "kv_a")
def estimate_project(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    """A kernel may keep the projection in the type of its sums, or round it to `hidden` before norm and rotation."""
    h_MD, kv_a = (factor(inputs[name], rounding.format("factors")) for name in ("h", "kv_a"))
    sums = linear(h_MD, kv_a, rounding.format("accumulate"))
    down_MF = rounded(sums, rounding.format("hidden"))
    # Cosines and sines are given in float32: theirs are float32 at best.
    single, to = FORMATS["f32"], rounding.format("angles")
    angles = angle_budget(of_inputs(inputs), inputs["positions"], single, min(to, single, key=lambda each: each.bits))
    interleaved = settings.get("interleaved", False)
    out = latent_budget.latent(down_MF, inputs["norm"], angles, settings["eps"], interleaved, rounding)
    return (rounded(out, rounding.format("output")),)


def run_expand(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    latent_SGF = feed.activation(be, inputs["latent"])[:, None]
    return be.latent_expand(latent_SGF, feed.linear(be, inputs, "kv_b"), settings["nope"], settings["heads"])


def estimate_expand(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    latent, kv_b, to = inputs["latent"], inputs["kv_b"], rounding.format("output")
    nope, heads, (S, _), L = settings["nope"], settings["heads"], latent.shape, kv_b.shape[1]
    c_SL, weight = (factor(x, rounding.format("factors")) for x in (latent[:, :L], kv_b))
    up_SF = rounded(linear(c_SL, weight, rounding.format("accumulate")), to)
    up_SHF = up_SF.map(lambda x: x.reshape(S, heads, len(kv_b) // heads))
    rope_SHJ = np.broadcast_to(latent[:, None, L:], (S, heads, latent.shape[1] - L))
    shared_SHJ = handed_on(rope_SHJ, rounding.format("inputs"), to)
    return joined(up_SHF.map(lambda x: x[..., :nope]), shared_SHJ), up_SHF.map(lambda x: x[..., nope:])


def run_attention(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    B, T, H, F = inputs["q"].shape
    w = feed.linear(be, inputs, "kv_b")
    S, L = inputs["latent"].shape[1], inputs["kv_b"].shape[1]
    latent_BSGK = feed.activation(be, inputs["latent"])[:, :, None]
    keys = Keys(latent_BSGK, latent_BSGK[..., :L], tuple(range(B)), (S,) * B, (0,) * B, (0,) * B, be.xp)
    positions = np.tile(np.arange(S - T, S, dtype=np.int64), B)
    rows = Rows(tuple(range(B)), (S - T,) * B, (T,) * B, be.asarray(positions))
    q_MHF = feed.activation(be, inputs["q"]).reshape(B * T, H, F)
    mask = sliding(settings.get("window"))
    out_MHV = be.latent_attention(q_MHF, keys, rows, w, mask=mask, scale=settings["scale"])
    return (out_MHV.reshape(B, T, H, out_MHV.shape[-1]),)


@factors.known("q", "latent", "kv_b")
def estimate_attention(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    out_BHTV = latent_budget.attention(operands(inputs, settings), rounding)
    return (out_BHTV.map(lambda x: x.transpose(0, 2, 1, 3)),)


def operands(inputs: Arrays, settings: Settings) -> Parts:
    q_BTHF, kv_b, nope = inputs["q"], inputs["kv_b"], settings["nope"]
    (_, T, H, _), S = q_BTHF.shape, inputs["latent"].shape[1]
    up_HFL = kv_b.reshape(H, len(kv_b) // H, kv_b.shape[1])
    seen_TS = sliding(settings.get("window")).allowed(np, np.arange(S - T, S), np.arange(S))
    latent_B1SK = inputs["latent"][:, None]
    return Parts(q_BTHF.transpose(0, 2, 1, 3), latent_B1SK, up_HFL[:, :nope], up_HFL[:, nope:], seen_TS, settings["scale"])


OPERATIONS = (
    Operation(
        name="latent_project",
        about="what latent attention caches of a token: [norm(c) | rope(k)] of one projection [c | k]",
        inputs={
            "h": ("token", "feature"),
            "kv_a": ("latent feature", "feature"),
            "norm": ("latent feature",),
            "cos": ("token", "pair"),
            "sin": ("token", "pair"),
            "positions": ("token",),
            "inv_freq": ("pair",),
            "theta": ("one",),
        },
        outputs={"latent": ("token", "latent feature")},
        derived=frozenset({"cos", "sin", "positions", "inv_freq", "theta"}),
        run=run_project,
        estimate=estimate_project,
        cases=latent_cases.PROJECT,
        mistakes=latent_mistakes.PROJECT,
    ),
    Operation(
        name="latent_expand",
        about="keys and values of all heads from the latents of latent attention",
        inputs={"latent": ("key", "latent feature"), "kv_b": ("width", "latent feature")},
        outputs={"k": ("key", "head", "width"), "v": ("key", "head", "width")},
        run=run_expand,
        estimate=estimate_expand,
        cases=latent_cases.EXPAND,
        mistakes=latent_mistakes.EXPAND,
    ),
    Operation(
        name="latent_attention",
        about="causal attention of queries [nope | rope] over cached latents, absorbed or expanded",
        inputs={
            "q": ("batch", "query", "head", "width"),
            "latent": ("batch", "key", "latent feature"),
            "kv_b": ("width", "latent feature"),
        },
        outputs={"out": ("batch", "query", "head", "width")},
        run=run_attention,
        estimate=estimate_attention,
        cases=latent_cases.ATTENTION,
        mistakes=latent_mistakes.ATTENTION,
    ),
)
