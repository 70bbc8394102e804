"""The math of the models as pure functions over an array module `xp`; nothing here knows a model or a backend.

Every function computes in the dtype of its input (float32 or float64; float16 is widened to float32 inside) and returns
the input's dtype. Array names follow the letters of `npllm.arrays`.
"""

from npllm.blocks.attention import attention_pieces, blocked_attention, softmax_attention
from npllm.blocks.ffn import ACTIVATIONS, gelu, gelu_tanh, relu, silu
from npllm.blocks.masks import CAUSAL, Mask, chunked, sliding
from npllm.blocks.norms import layer_norm, rms_norm
from npllm.blocks.rope import Angles, Rope, angles, frequencies, rotate_halves, rotate_interleaved

__all__ = [
    "ACTIVATIONS",
    "CAUSAL",
    "Angles",
    "Mask",
    "Rope",
    "angles",
    "attention_pieces",
    "blocked_attention",
    "chunked",
    "frequencies",
    "gelu",
    "gelu_tanh",
    "layer_norm",
    "relu",
    "rms_norm",
    "rotate_halves",
    "rotate_interleaved",
    "silu",
    "sliding",
    "softmax_attention",
]
