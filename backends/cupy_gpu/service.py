"""What `npllm doctor` and `npllm warmup` ask for: what there is, and kernels compiled before they are needed.

Which kernels a model needs is found out by running it: on a device that launches nothing, notes what it is asked for and
gives memory of zeros. Steps do not look at numbers, so they ask for the same as ever.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from npllm.arrays import Array, DTypeLike
from npllm.backends.cupy_gpu.device import Argument, Grid, Kernel
from npllm.backends.cupy_gpu.sampling import MOST_LOGITS, SETTINGS, Draws
from npllm.blocks.dtypes import round_to_bfloat16
from npllm.handles import Handle, Stack, Weight
from npllm.models import interpret
from npllm.weights import build_tree, random_weights

if TYPE_CHECKING:
    from npllm.model import Model

Progress = Callable[[int, int], None]

# A file and the macros that it is compiled with.
Variant = tuple[str, tuple[tuple[str, int], ...]]

# Rows of decode steps, and tokens of prompts, that need other kernels.
ROWS, PROMPTS = (1, 2, 4, 8), (3, 7, 100, 700)

SMALL: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512,
    "max_position_embeddings": 1024, "num_hidden_layers": 1, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip

# Where no model is named: small ones with heads, experts and latents as wide as published ones have them.
USUAL: tuple[dict[str, Any], ...] = (
    {"model_type": "qwen3", "head_dim": 128},
    {"model_type": "llama", "head_dim": 64},
    {"model_type": "gemma3_text", "head_dim": 256, "num_hidden_layers": 2, "sliding_window_pattern": 2},
    {"model_type": "qwen3_moe", "head_dim": 128, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    {
        "model_type": "deepseek_v3", "num_key_value_heads": 2, "q_lora_rank": 128, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 128,
        "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "num_hidden_layers": 2,
    },
)  # fmt: skip


class Listing:
    """A device on which nothing runs; `wanted` are the variants of the kernels that would."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.wanted: dict[Variant, None] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        return self.device.xp.zeros(tuple(shape), dtype=dtype)

    def kernel(self, file: str, name: str, defines: Mapping[str, int]) -> Kernel:
        macros = tuple(sorted(defines.items()))
        self.wanted[file, macros] = None
        return Kernel(file, name, macros, None)

    def launch(self, kernel: Kernel, grid: Grid, block: int, args: Iterable[Argument], shared: int = 0) -> None:
        pass

    def blas(self) -> Any:
        blas = self.device.blas()
        return None if blas is None else Asked(blas)


class Asked:
    """cuBLASLt that says whether it has a kernel, and multiplies nothing."""

    def __init__(self, blas: Any) -> None:
        self.blas = blas

    def multiply(self, shape: Any, *places: int, add: bool = False) -> bool:
        return self.blas.plan(shape).possible


class Service(Draws):
    """Facts, and compiling ahead."""

    def facts(self) -> dict[str, Any]:
        return {
            "gpu": self.device.name,
            "architecture": f"sm_{self.device.architecture}",
            "compiler": self.device.compiler,
            "memory_bytes": self.device.memory().total,
            "looks_ahead": self.looks_ahead,
            "dtypes": list(self.dtypes),
            "quantizations": list(self.quantizations),
            "kernels": self.device.kept(),
        }

    def warm_up(self, progress: Progress, model: Model | None = None) -> int:
        variants = self.variants_of(model) if model else set().union(*map(self.variants_of, self._usual()))
        missing = sorted(each for each in variants if not self.device.is_kept(*each))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = [pool.submit(self.device.compile, *each) for each in missing]
            try:
                for done, part in enumerate(as_completed(parts)):
                    part.result()
                    progress(done + 1, len(parts))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return len(missing)

    def variants_of(self, model: Model) -> set[Variant]:
        """What a model's steps launch: decode steps of several numbers of rows, prompts of several lengths."""
        be = copy.copy(self)
        be.device = listing = Listing(self.device)
        specs, most = model.architecture.cache_spec(model.config), model.config.max_position_embeddings
        for rows, tokens in itertools.chain(((rows, 1) for rows in ROWS), ((1, tokens) for tokens in PROMPTS)):
            cache = be.new_cache(specs, most)
            slots = [cache.add() for _ in range(rows)]
            plan = cache.plan(slots, [min(tokens, most)] * rows, [True] * rows)
            tokens_M = be.asarray([0] * sum(plan.counts), dtype="int64")
            logits_WN = model.run(be, tokens_M, plan, cache)
            if be.dtype != "float64" and model.config.vocab_size < MOST_LOGITS:
                settings_WS, entries_WT2 = be.empty(rows, SETTINGS, dtype="float64"), be.empty(rows, 1, 2, dtype="int32")
                be.sample(logits_WN, settings_WS, be.empty(rows, dtype="int64"), entries_WT2)
        return set(listing.wanted)

    def _usual(self) -> Iterator[Model]:
        """The models of USUAL, with bf16 weights."""
        from npllm.model import Model

        for values in USUAL:
            described = interpret(SMALL | values, str(values["model_type"]))
            spec = described.architecture.weight_spec(described.config)
            handles = {name: _halved(handle) for name, handle in random_weights(spec).items()}
            tree = build_tree(spec, handles, self.prepare)
            yield Model(described.architecture, described.config, tree, spec)


def _halved(handle: Handle) -> Handle:
    """The same in bf16."""
    if isinstance(handle, Stack):
        return replace(handle, weights=tuple(_in_bf16(each) for each in handle.weights))
    return _in_bf16(handle)


def _in_bf16(weight: Weight) -> Weight:
    return replace(weight, format="bf16", data=round_to_bfloat16(np, weight.data))
