"""The script that dumps a transformers model for `npllm diff`. It needs PyTorch and transformers, not npllm: copy it."""

from __future__ import annotations

# `dump(model, tokens, path)`: what every module returns under the module's name (".1", ".2" where it returns several), what
# it is given under ".input", "#2" for a second call; a tensor that stands there already is not stored again.
EXPORTER = """\
import torch
from safetensors.torch import save_file

def dump(model, tokens, path):
    found, seen, calls = {}, [tokens], {}
    def keep(name, values):
        calls[name] = calls.get(name, 0) + 1
        values = values if isinstance(values, tuple) else (getattr(values, "logits", values),)
        for i, x in enumerate(values):
            if isinstance(x, torch.Tensor) and (name == "logits" or all(x is not other for other in seen)):
                key = name + (f".{i}" if i else "") + (f"#{calls[name]}" if calls[name] > 1 else "")
                found[key] = x.detach().cpu().clone().contiguous()
                seen.append(x)
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, inputs, n=name: keep(f"{n}.input", inputs))
        module.register_forward_hook(lambda module, inputs, output, n=name: keep(n or "logits", output))
    with torch.no_grad():
        model(tokens, use_cache=False)
    save_file(found | {"tokens": tokens}, path)
"""
