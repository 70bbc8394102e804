"""What the field calls things, and numbers as it writes them: shared by tables and pictures."""

from __future__ import annotations

from npllm.describing.units import number

GATED = {"silu": "SwiGLU", "swish": "SwiGLU", "gelu": "GeGLU", "relu": "ReGLU"}
PLAIN = {"silu": "SiLU", "swish": "SiLU", "gelu": "GELU", "relu": "ReLU"}
SCALING = {"linear": "linear", "llama3": "Llama 3", "yarn": "YaRN"}


def activation(name: str, gated: bool) -> str:
    """What an FFN with this activation (a name of npllm.blocks.ffn) is called."""
    return (GATED if gated else PLAIN).get(name.partition("_")[0], name)


def root(value: float) -> str:
    """A factor, as the root of a whole number or as one part of it where it is that."""
    for power, text in ((2, "√{}"), (-2, "1/√{}")):
        inner = value**power if value > 0 else 0.0
        if 1 < inner < 1e9 and abs(inner - round(inner)) < 1e-6 * inner:
            return text.format(f"{round(inner):,}")
    return number(value)
