"""transformers on the GPU, in the process and on the weights of a model of the CuPy backend: only norms are copied.

`compiled` is `torch.compile(mode="reduce-overhead")` with a static cache: PyTorch's own CUDA graphs.
"""

from __future__ import annotations

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
    """The decoder of `llm`, a Qwen3 in bf16."""

    def __init__(self, llm: LLM, compiled: bool) -> None:
        torch.set_grad_enabled(False)
        c = llm.config
        config = transformers.Qwen3Config(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
            tie_word_embeddings=c.tie_word_embeddings, max_position_embeddings=c.max_position_embeddings,
        )  # fmt: skip
        with torch.device("meta"):
            model = transformers.Qwen3ForCausalLM(config).eval()
        tensors = {_name(path): _tensor(leaf) for path, leaf in leaves(llm.model.weights)}
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        # Made on the meta device, its frequencies have no values.
        model.model.rotary_emb = type(model.model.rotary_emb)(config, device="cuda")
        missing = [name for name, each in model.named_parameters() if each.is_meta]
        if missing:
            raise RuntimeError(f"transformers has no weights for {missing[0]}")
        self.model, self.compiled, self.vocabulary = model, compiled, c.vocab_size
        self.forward: Any = (
            torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if compiled else model.forward
        )

    def _cache(self) -> Any:
        if not self.compiled:
            return transformers.DynamicCache()
        return transformers.StaticCache(config=self.model.config, max_cache_len=CONTEXT)

    def rate(self, count: int) -> float:
        """Greedy tokens per second, after a prompt of one token."""
        cache = self._cache()
        token = torch.tensor([[7]], device="cuda")
        position = torch.zeros(1, dtype=torch.long, device="cuda")
        for i in range(count + 1):
            if i == 1:
                torch.cuda.synchronize()
                began = time.perf_counter()
            logits = self.forward(input_ids=token, past_key_values=cache, use_cache=True, cache_position=position).logits
            token = logits[:, -1:].argmax(dim=-1)
            token.item()
            position = position + 1
        return count / (time.perf_counter() - began)


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
