"""transformers on the GPU, in the process and on the weights of a model of the CuPy backend: only norms are copied.

`compiled` is `torch.compile(mode="reduce-overhead")` with a static cache: PyTorch's own CUDA graphs.
"""

from __future__ import annotations

import gc
import inspect
import time
from typing import Any

import torch
import transformers

from npllm.backends.cupy_gpu.matrix import Matrix
from npllm.llm import LLM
from npllm.weights import leaves

# Room of a static cache.
CONTEXT = 512


class TransformersGpu:
    """The decoder of `llm`, a Qwen3 in bf16, on the device that its weights lie on."""

    def __init__(self, llm: LLM, compiled: bool) -> None:
        torch.set_grad_enabled(False)
        c = llm.config
        config = transformers.Qwen3Config(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
            tie_word_embeddings=c.tie_word_embeddings, max_position_embeddings=c.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta},
        )  # fmt: skip
        with torch.device("meta"):
            model = transformers.Qwen3ForCausalLM(config).eval()
        tensors = {_name(path): _tensor(leaf) for path, leaf in leaves(llm.model.weights)}
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        self.device = next(iter(tensors.values())).device
        # Made on the meta device, its frequencies have no values.
        with torch.device(self.device):
            model.model.rotary_emb = type(model.model.rotary_emb)(config)
        missing = [name for name, each in [*model.named_parameters(), *model.named_buffers()] if each.is_meta]
        if missing:
            raise RuntimeError(f"transformers has no weights for {missing[0]}")
        self.model, self.compiled = model, compiled
        self.static: Any = None
        # Versions differ in what they call a cache, and in whether they are told where its new entries go.
        self.takes = inspect.signature(type(model).forward).parameters
        self.forward: Any = (
            torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if compiled else model.forward
        )

    def _cache(self) -> Any:
        """An empty one. Compiled code gets the same each time: its graphs know where that lies."""
        if not self.compiled:
            return transformers.DynamicCache(config=self.model.config)
        if self.static is None:
            self.static = transformers.StaticCache(config=self.model.config, max_cache_len=CONTEXT)
        self.static.reset()
        return self.static

    def decoded(self, count: int) -> tuple[list[int], float]:
        """Greedy tokens after a prompt of one token, and how many of them come per second once the first has."""
        cache = {"cache" if "cache" in self.takes else "past_key_values": self._cache()}
        token = torch.tensor([[7]], device=self.device)
        tokens: list[int] = []
        for i in range(count + 1):
            if i == 1:
                began = time.perf_counter()
            place = {"position_ids": torch.full((1, 1), i, device=self.device)}
            if "cache_position" in self.takes:
                place["cache_position"] = place["position_ids"][0]
            token = self.forward(input_ids=token, use_cache=True, **cache, **place).logits[:, -1:].argmax(dim=-1)
            # Waits for the device, as whoever shows the token must.
            tokens.append(int(token.item()))
        return tokens, count / (time.perf_counter() - began)

    def close(self) -> None:
        """Let go of the weights, also those that compiled code holds."""
        del self.model, self.forward, self.static
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _name(path: str) -> str:
    """The checkpoint's name of a leaf of the tree."""
    path = path.replace(".qkv.", ".")
    return path if path.startswith("lm_head") else f"model.{path}"


def _tensor(leaf: Any) -> torch.Tensor:
    """The same memory as a bf16 tensor; a gain's copy."""
    if not isinstance(leaf, Matrix):
        return torch.from_dlpack(leaf).to(torch.bfloat16)
    rows, columns = leaf.shape
    return torch.from_dlpack(leaf.rows_of_bytes).view(torch.bfloat16).reshape(rows, -1)[:, :columns]
