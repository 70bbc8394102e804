"""Decode steps of single operations on the GPU: mixtures of experts, and latent attention over a long context.

Each figure is a number of layers with weights and caches of their own, more bytes than the second cache holds, captured as
one graph and launched over and over. Weights and caches are filled from one random block: their values do not matter for
time, but for routers, which differ from layer to layer so that other experts are chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from bench.numba import Figure
from npllm.arrays import Array
from npllm.backends.cupy_gpu.base import Base
from npllm.backends.cupy_gpu.device import Device
from npllm.backends.cupy_gpu.steps import StepRows
from npllm.blocks.dtypes import round_to_bfloat16
from npllm.blocks.masks import CAUSAL
from npllm.blocks.moe import Router
from npllm.cache import Keys
from npllm.handles import Stack, Weight
from npllm.weights import Experts, Gate, Linear


class Mixture(NamedTuple):
    """Sizes of a mixture: hidden width D, experts E of width F, of which a token is given C."""

    name: str
    D: int
    F: int
    E: int
    C: int
    layers: int
    batches: tuple[int, ...]


class Latents(NamedTuple):
    """Sizes of latent attention: heads, widths of a head's key without rope, of the rope, of a value, and of the latent."""

    name: str
    heads: int
    nope: int
    rope: int
    value: int
    latent: int
    context: int
    layers: dict[int, int]  # by batch


QWEN3_30B = Mixture("Qwen3-30B-A3B", 2048, 768, 128, 8, 16, (1, 8))
V2_LITE = Latents("DeepSeek-V2-Lite", 16, 128, 64, 128, 512, 8192, {1: 27, 32: 4})
V3 = Latents("DeepSeek-V3", 128, 128, 64, 128, 512, 8192, {1: 16, 32: 4})

TINY_MIXTURE = Mixture("a tiny mixture", 64, 32, 8, 2, 2, (1, 3))
TINY_LATENTS = Latents("tiny latents", 16, 16, 8, 16, 32, 64, {1: 2, 3: 1})

# Launches of a graph that are timed together, after as many that are not.
LAUNCHES = 20


class Fixed:
    """In the place of a step: every layer reads its keys by one plan, which lies on the device."""

    def __init__(self, plan: Array) -> None:
        self._plan = plan

    def plan(self, keys: Keys) -> Array:
        return self._plan


def seconds(device: Device, function: Callable[[], Array], launches: int = LAUNCHES) -> float:
    """What one run of a captured function takes, on the average."""
    function()
    graph, result = device.capture(function)
    for _ in ("to warm up", "to be timed"):
        device.download(result)
        began = time.perf_counter()
        for _ in range(launches):
            graph.launch()
        device.download(result)
        took = time.perf_counter() - began
    return took / launches


def stored(name: str, shape: tuple[int, ...], scale: float) -> Weight:
    """A bf16 weight of random numbers."""
    count = int(np.prod(shape))
    block = np.random.default_rng(1).standard_normal(min(count, 1 << 20)).astype(np.float32) * np.float32(scale)
    bits = np.resize(round_to_bfloat16(np, block), count)
    return Weight(name, shape, "bf16", bits.reshape(shape), "a benchmark")


def mixture(be: Base, of: Mixture, bandwidth: float, launches: int = LAUNCHES) -> Iterator[Figure]:
    """Routing and experts of `layers` layers: bytes of what is chosen, over seconds and over the read bandwidth."""
    one = stored("gate", (of.F, of.D), of.D**-0.5)
    other = stored("down", (of.D, of.F), of.F**-0.5)
    router, dice = Router(of.C, normalise=True), np.random.default_rng(3)
    layers: list[tuple[Gate, Any]] = []
    for layer in range(of.layers):
        gate = Weight.of(f"router {layer}", dice.standard_normal((of.E, of.D)).astype(np.float32))
        bits = round_to_bfloat16(np, gate.data)
        prepared: Any = be.prepare(Linear(Weight(gate.name, gate.shape, "bf16", bits)))
        stacks = (Linear(Stack("experts", (each,) * of.E)) for each in (one, one, other))
        layers.append((Gate(Linear(*prepared)), be.prepare(Experts(*stacks))))
    for batch in of.batches:
        x_MD = be.asarray(dice.standard_normal((batch, of.D)).astype(np.float32))

        def step(x_MD: Array = x_MD) -> Array:
            for gate, experts in layers:
                index_MC, weight_MC = be.route(x_MD, gate, router)
                y_MD = be.moe(x_MD, experts, index_MC, weight_MC, "silu")
            return y_MD

        took = seconds(be.device, step, launches)
        chosen = sum(len(np.unique(be.to_numpy(be.route(x_MD, gate, router)[0]))) for gate, _ in layers)
        read = 2 * (chosen * 3 * of.D * of.F + of.layers * of.E * of.D)
        shown = f"{took / of.layers * 1e6:.1f} us a layer, {read / took / 1e9:.0f} GB/s"
        name = f"{of.name}: experts' bytes per second / bandwidth, batch {batch}"
        yield Figure(name, read / took / bandwidth, 0.6 if batch == 1 else 0.0, shown=shown)


def latents(be: Base, of: Latents, bandwidth: float, matmul: float, launches: int = LAUNCHES) -> Iterator[Figure]:
    """Absorbed decode: bytes of latents and kv_b_proj, and arithmetic, over seconds, over bandwidth and matmul rate."""
    width, dice = of.latent + of.rope, np.random.default_rng(5)
    block = round_to_bfloat16(np, dice.standard_normal(1 << 16).astype(np.float32))
    prepared: Any = be.prepare(Linear(stored("kv_b", (of.heads * (of.nope + of.value), of.latent), of.latent**-0.5)))
    w = Linear(*prepared)
    for batch, count in of.layers.items():
        filled = np.resize(block, (batch, of.context, 1, width))
        caches = [be.device.upload(filled) for _ in range(count)]
        ends = (of.context,) * batch
        keys = [
            Keys(x, x[..., : of.latent], tuple(range(batch)), ends, (0,) * batch, (0,) * batch, be.xp, "float32")
            for x in caches
        ]
        starts, positions = (of.context - 1,) * batch, be.asarray([of.context - 1] * batch, dtype="int64")
        rows = StepRows(tuple(range(batch)), starts, (1,) * batch, positions)
        planned = StepRows(*(getattr(rows, name) for name in ("slots", "starts", "counts", "positions_M")), None,
                           Fixed(be.plan(keys[0], rows)))  # type: ignore[arg-type]  # fmt: skip
        q_MHF = be.asarray(dice.standard_normal((batch, of.heads, of.nope + of.rope)).astype(np.float32))

        def step(q_MHF: Array = q_MHF, keys: list[Keys] = keys, rows: StepRows = planned) -> Array:
            for each in keys:
                out_MHV = be.latent_attention(q_MHF, each, rows, w, mask=CAUSAL, scale=(of.nope + of.rope) ** -0.5)
            return out_MHV

        took = seconds(be.device, step, launches) / count
        read = 2 * (batch * of.context * width + of.heads * (of.nope + of.value) * of.latent)
        flops = 2 * batch * of.heads * of.context * (width + of.latent)
        shown = f"{took * 1e6:.1f} us a layer, {read / took / 1e9:.0f} GB/s, {flops / took / 1e12:.1f} TFLOP/s"
        name = f"{of.name}, decode at {of.context}, batch {batch}"
        few = of.heads <= 32
        yield Figure(
            f"{name}: bytes per second / bandwidth", read / took / bandwidth, 0.6 * (few and batch > 1), shown=shown
        )
        yield Figure(f"{name}: arithmetic / matmul rate", flops / took / matmul, 0.4 * (not few and batch > 1), shown=shown)
        del caches, keys
