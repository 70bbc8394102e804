"""How many launches a layer of a decode step takes: each costs the GPU a start and a drain, whatever the kernel does."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from npllm.generation import State
from npllm.llm import LLM
from npllm.models import interpret
from npllm.sampling import Sampler, Sampling
from tests.gpu.emulator import EmulatedBackend, emulated
from tests.gpu.emulator.launches import Launches
from tests.models import CONFIGS

pytestmark = emulated

HEADS = ["gemv", "place_heads", "attend", "gemv"]
LATENTS = ["gemv", "gemv", "place_latents", "absorb", "attend_latents", "unabsorb", "gemv"]
DENSE = ["gemv_gated", "gemv"]
EXPERTS = ["norm_rows", "route_few", "moe_hidden_few", "moe_say_few"]

# What stands behind the last layer: norm, logits, and the draw.
END = ["norm_rows", "gemv", "find_tops", "sample"]

# The last of so many layers, and its launches.
LAYERS: list[tuple[str, int, list[str]]] = [
    ("llama", 2, HEADS + DENSE),
    ("qwen3", 2, HEADS + DENSE),
    ("gpt2", 2, ["norm_rows", *HEADS, "gemv_activated", "gemv"]),
    ("olmo2", 2, [*HEADS, "norm_rows", *DENSE, "norm_rows"]),
    ("gemma3_text", 3, [*HEADS, "norm_rows", *DENSE, "norm_rows"]),
    ("qwen3_moe", 2, HEADS + EXPERTS),
    ("mixtral", 2, HEADS + EXPERTS),
    ("llama4_text", 3, HEADS + DENSE),
    ("llama4_text", 4, HEADS + EXPERTS + DENSE),
    ("deepseek_v3", 1, LATENTS + DENSE),
    ("deepseek_v3", 3, LATENTS + EXPERTS + DENSE),
    ("mistral4", 3, LATENTS + EXPERTS + DENSE),
]  # fmt: skip


class Step(NamedTuple):
    """The kernels of a captured step, and what else it asks of the device."""

    kernels: list[str]
    others: int


def captured(name: str, layers: int, **sampling: Any) -> Step:
    """A decode step of one row, of a random model with so many layers."""
    fields = {"n_layer": layers} if name == "gpt2" else {"num_hidden_layers": layers}
    llm = LLM.random(interpret(CONFIGS[name] | fields | {"model_type": name}, name), EmulatedBackend("stored"))
    be, cache = llm.backend, llm.new_cache()
    slot = cache.add()
    cache.reserve(40)
    for _ in range(3):
        rows = cache.plan([slot], [1], [True])
        sampler = Sampler(Sampling(**sampling), 0, [1], llm.config.vocab_size)
        be.step(llm.model, State(np.array([7]), rows, cache, (sampler,), False))
    (step,) = cache.steps.values()
    device: Any = be.device
    assert step.graph is not None, step.problem
    device.launches = found = Launches()
    try:
        step.graph.run()
    finally:
        device.launches = None
    return Step([launch.kernel.name for launch in found.all], len(step.graph.calls) - len(found.all))


@pytest.mark.parametrize(("name", "layers", "want"), LAYERS, ids=[f"{name}-{layers}" for name, layers, _ in LAYERS])
def test_launches_of_a_layer(name: str, layers: int, want: list[str]) -> None:
    step = captured(name, layers)
    assert step.kernels[-len(want + END) :] == want + END


@pytest.mark.parametrize("way", [{"repetition_penalty": 1.3}, {"logit_bias": {3: 1.0}}])
def test_penalties_and_biases_take_one_more(way: dict[str, Any]) -> None:
    assert captured("qwen3", 2, **way).kernels[-len(END) - 1 :] == [*END[:-2], "adjust", *END[-2:]]


@pytest.mark.parametrize(("name", "layers"), [("qwen3", 2), ("deepseek_v3", 2), ("qwen3_moe", 2), ("gemma3_text", 2)])
def test_a_layer_leaves_nothing_to_the_array_library(name: str, layers: int) -> None:
    """Its kernels know no dependent launch, and a plain multiplication costs as much as an attention."""
    assert captured(name, layers + 1).others == captured(name, layers).others
