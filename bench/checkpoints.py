"""Models of random weights as files, written once: what is compared with each other reads the same bytes.

A folder holds a Hugging Face checkpoint: bfloat16 safetensors and config.json, no tokenizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.bench import SHAPES as PUBLISHED
from npllm.blocks.dtypes import round_to_bfloat16
from npllm.config import nearest
from npllm.errors import ArgumentError
from npllm.handles import Stack, Weight
from npllm.models import interpret
from npllm.saving import SHARD_BYTES, Outgoing, move_into_place, workplace, write_tensors
from npllm.weights import Tensor, random_weights

CLASSES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}

# What a shape's twin "tiny-..." has, to see that everything runs.
TINY = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}

# As in bench/moe.py: a mixture, and a dense model that computes as much per token.
SHARED: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip

# DeepSeek-V2-Lite's attention, with no experts and a narrow FFN.
LATENT: dict[str, Any] = {
    "model_type": "deepseek_v2", "vocab_size": 4096, "hidden_size": 2048, "intermediate_size": 512, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1,
    "moe_intermediate_size": 128, "first_k_dense_replace": 8, "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = PUBLISHED | {
    "dense": SHARED | {"model_type": "qwen3", "intermediate_size": 6144},
    "moe-64-8": SHARED
    | {"model_type": "qwen3_moe", "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "latent": LATENT,
}


def values_of(shape: str) -> dict[str, Any]:
    """The config.json of a shape, or of its tiny twin; ArgumentError names the shapes that there are."""
    name = shape.removeprefix("tiny-")
    if name not in SHAPES:
        raise ArgumentError(f"shape {shape!r} is unknown; known: {nearest(name, SHAPES)}")
    return SHAPES[name] | (TINY if name != shape else {})


def checkpoint(folder: Path, shape: str, **changes: Any) -> Path:
    """The folder of a model of a shape, below `folder`; written if it is not there yet. `changes` to its config.json."""
    place = folder / "-".join([shape, *(f"{name}-{value}" for name, value in changes.items())])
    if (place / "config.json").is_file():
        return place
    values = values_of(shape) | changes
    described = interpret(values, shape)
    spec = described.architecture.weight_spec(described.config)
    tensors: dict[str, Outgoing] = {}
    for seed, (name, tensor) in enumerate(spec.items()):
        if tensor.alias is None:
            tensors |= outgoing(name, tensor, seed)
    shutil.rmtree(place, ignore_errors=True)
    with workplace(place) as temporary:
        for _ in write_tensors(temporary, tensors, SHARD_BYTES, place):
            pass
        written = {"architectures": [CLASSES[values["model_type"]]], "torch_dtype": "bfloat16"} | values
        (temporary / "config.json").write_text(json.dumps(written, indent=2) + "\n")
        move_into_place(temporary, place)
    return place


def outgoing(name: str, tensor: Tensor, seed: int) -> dict[str, Outgoing]:
    """The tensors of a file that hold one of a model: its own, or one per expert."""

    def written(draw: Callable[[], Array], shape: tuple[int, ...]) -> Outgoing:
        return Outgoing("BF16", shape, 2, partial(pieces, draw))

    if not tensor.forms:
        return {published(name): written(partial(draw_one, name, tensor, seed), tensor.shape)}
    names = [published(tensor.forms[0].name.format(e)) for e in range(tensor.shape[0])]
    return {
        each: written(partial(draw_expert, name, tensor, seed * 1000 + e), tensor.shape[1:]) for e, each in enumerate(names)
    }


def published(name: str) -> str:
    """A tensor's name in Hugging Face's checkpoints."""
    return name if name.startswith("lm_head") else f"model.{name}"


def draw_one(name: str, tensor: Tensor, seed: int) -> Array:
    """A tensor's random values, float32."""
    handle = random_weights({name: tensor}, seed)[name]
    assert isinstance(handle, Weight)
    return handle.data


def draw_expert(name: str, tensor: Tensor, seed: int) -> Array:
    """The matrix of one expert."""
    one = Tensor((1, *tensor.shape[1:]), tensor.axes, tensor.part, forms=tensor.forms)
    handle = random_weights({name: one}, seed)[name]
    assert isinstance(handle, Stack)
    return handle[0].data


def pieces(draw: Callable[[], Array]) -> Iterator[Array]:
    yield np.ascontiguousarray(round_to_bfloat16(np, draw()))
