"""transformers: python -m bench.contestants.transformers_model '{"folder": ..., "threads": ..., "dtype": ...}'.

The model's own forward with its cache, in inference mode: no generation loop around it, nothing is sampled.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers

from bench.contestants.serving import prompt_ids, serve


class Transformers:
    def __init__(self, folder: str, threads: int, dtype: str) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.vocabulary = self.model.config.vocab_size

    def about(self) -> dict[str, Any]:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        return {"versions": versions, "attention": self.model.config._attn_implementation}

    def prefill(self, tokens: int) -> float:
        """Seconds for a prompt of so many tokens, with the logits of the last."""
        ids = self._ids(tokens)
        start = time.perf_counter()
        self._forward(ids)
        return time.perf_counter() - start

    def decode(self, tokens: int) -> float:
        """Seconds for so many tokens, one by one, after a prompt of one token."""
        ids = self._ids(tokens + 1)
        cache = self._forward(ids[:, :1]).past_key_values
        start = time.perf_counter()
        for i in range(1, tokens + 1):
            cache = self._forward(ids[:, i : i + 1], cache).past_key_values
        return time.perf_counter() - start

    def logits(self, tokens: int, path: str) -> None:
        """Write the logits of the last of so many tokens, float32 [N]."""
        np.save(path, self._forward(self._ids(tokens)).logits[0, -1].float().numpy())

    def _ids(self, tokens: int) -> torch.Tensor:
        return torch.tensor([prompt_ids(tokens, self.vocabulary)])

    def _forward(self, ids: torch.Tensor, cache: Any = None) -> Any:
        with torch.inference_mode():
            return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


if __name__ == "__main__":
    serve(lambda: Transformers(**json.loads(sys.argv[1])))
