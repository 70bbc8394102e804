"""Activations and feed-forward networks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2Config, LlamaConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from .case import Cases, both, fill, normal, seeded


def activation_cases() -> Cases:
    x = torch.cat([torch.linspace(-12, 12, 193), torch.tensor([-100.0, -88.5, -1e-8, -0.0, 1e-30, 1e-8, 88.5, 100.0])])
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "gelu_erf": F.gelu,
    }
    return {name: ({}, both(lambda x, f=f: {"y": f(x)}, {"x": x.clone()})) for name, f in functions.items()}


def ffn_cases() -> Cases:
    """x [T,D]; weights under their checkpoint names: Linear [out, in], GPT-2's Conv1D [in, out]."""
    dice = seeded()
    swiglu = LlamaConfig(hidden_size=36, intermediate_size=44, num_attention_heads=6)
    biased = LlamaConfig(hidden_size=36, intermediate_size=44, num_attention_heads=6, mlp_bias=True)
    gpt2 = GPT2Config(n_embd=30, n_inner=52, n_head=5, resid_pdrop=0.0)
    makers: dict[str, Callable[[], nn.Module]] = {
        "swiglu": lambda: LlamaMLP(swiglu),
        "swiglu-bias": lambda: LlamaMLP(biased),
        "gelu": lambda: GPT2MLP(gpt2.n_inner, gpt2),
    }
    widths = {"swiglu": 36, "swiglu-bias": 36, "gelu": 30}
    cases: Cases = {}
    for name, make in makers.items():
        weights = {key: (0.25 if w.ndim == 2 else 0.3) * normal(dice, *w.shape) for key, w in make().state_dict().items()}
        inputs = {"x": normal(dice, 7, widths[name])} | weights
        cases[name] = ({}, both(lambda x, make=make, **weights: {"y": fill(make(), weights)(x)}, inputs))
    return cases
