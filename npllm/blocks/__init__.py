"""The math of the models as pure functions over an array module `xp`; nothing here knows a model or a backend.

Every function computes in the dtype of its input (float32 or float64; float16 is widened to float32 inside) and returns
the input's dtype. Array names follow the letters of `npllm.arrays`.
"""

from npllm.blocks.altup import altup_correct, altup_predict, match_rms
from npllm.blocks.attention import attention_pieces, blocked_attention, soft_cap, softmax_attention, temperature
from npllm.blocks.ffn import ACTIVATIONS, gaussian_topk, gelu, gelu_tanh, relu, sigmoid, silu
from npllm.blocks.masks import CAUSAL, Mask, chunked, sliding
from npllm.blocks.mla import absorb, absorbed_is_cheaper, expand, latent, unabsorb
from npllm.blocks.moe import Router, moe_by_token, moe_pieces, route, top_k
from npllm.blocks.norms import layer_norm, rms_norm
from npllm.blocks.rope import Angles, Rope, angles, frequencies, rotate_halves, rotate_interleaved

__all__ = [
    "ACTIVATIONS",
    "CAUSAL",
    "Angles",
    "Mask",
    "Rope",
    "Router",
    "absorb",
    "absorbed_is_cheaper",
    "altup_correct",
    "altup_predict",
    "angles",
    "attention_pieces",
    "blocked_attention",
    "chunked",
    "expand",
    "frequencies",
    "gaussian_topk",
    "gelu",
    "gelu_tanh",
    "latent",
    "layer_norm",
    "match_rms",
    "moe_by_token",
    "moe_pieces",
    "relu",
    "rms_norm",
    "rotate_halves",
    "rotate_interleaved",
    "route",
    "sigmoid",
    "silu",
    "sliding",
    "soft_cap",
    "softmax_attention",
    "temperature",
    "top_k",
    "unabsorb",
]
