"""RoPE: frequencies of every scaling rule, and both pairings."""

import copy

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ..cases.case import rope
from ..float64 import float64
from .case import Cases, Parameters, Tensors, both, normal, seeded


def llama3(theta: float, factor: float, low: float, high: float) -> Parameters:
    bands = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": 8192}
    return rope(theta, "llama3", factor=factor, **bands)


def yarn(theta: float, factor: float, original: int, **options: float) -> Parameters:
    return rope(theta, "yarn", factor=factor, original_max_position_embeddings=original, **options)


BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
PUBLISHED: dict[str, tuple[int, int, Parameters]] = {
    "llama3-8b": (128, 8192, rope(500000.0)),
    "qwen3": (128, 40960, rope(1000000.0)),
    "gemma3-global": (256, 131072, rope(1000000.0, "linear", factor=8.0)),
    "llama3.1-8b": (128, 131072, llama3(500000.0, 8.0, 1.0, 4.0)),
    "llama3.2-1b": (64, 131072, llama3(500000.0, 32.0, 1.0, 4.0)),
    "llama4-scout": (128, 10485760, llama3(500000.0, 16.0, 1.0, 1.0)),
    "deepseek-v3": (64, 163840, yarn(10000.0, 40.0, 4096, **BETAS, mscale=1.0, mscale_all_dim=1.0)),
    "deepseek-v2": (64, 163840, yarn(10000.0, 40.0, 4096, **BETAS, mscale=0.707, mscale_all_dim=0.707)),
    "qwen-yarn4": (128, 131072, yarn(1000000.0, 4.0, 32768)),
    "yarn-mscale": (64, 32768, yarn(10000.0, 8.0, 4096, mscale=1.2, mscale_all_dim=0.5)),
    "yarn-mscale-alone": (64, 32768, yarn(10000.0, 8.0, 4096, mscale=1.2)),
    "yarn-untruncated": (96, 131072, yarn(150000.0, 32.0, 4096, attention_factor=1.25, truncate=False)),
    "yarn-factor1": (64, 4096, yarn(10000.0, 1.0, 4096)),
    "yarn-original-absent": (64, 4096, rope(10000.0, "yarn", factor=4.0)),
}
"""head_dim, max_position_embeddings, RoPE fields, as published (`yarn-*`: made up to reach the other branches)."""


def rotary_config(given: Parameters) -> LlamaConfig:
    """given: head_dim, max_position_embeddings, rope_parameters."""
    return LlamaConfig(hidden_size=4 * given["head_dim"], num_attention_heads=4, **copy.deepcopy(given))


def frequencies(config: LlamaConfig) -> tuple[Tensor, float]:
    """inv_freq [head_dim / 2] and the factor on cos and sin."""
    rules = ROPE_INIT_FUNCTIONS | {"default": LlamaRotaryEmbedding.compute_default_rope_parameters}
    return rules[config.rope_parameters["rope_type"]](config)


def rope_frequency_cases() -> Cases:
    cases: Cases = {}
    for name, (head_dim, longest, rope_fields) in PUBLISHED.items():
        given = {"head_dim": head_dim, "max_position_embeddings": longest, **rope_fields}
        config = rotary_config(given)
        inv_freq, factor = frequencies(config)
        with float64():
            exact, _ = frequencies(config)
        cases[name] = (given | {"attention_factor": factor}, {"inv_freq": inv_freq, "inv_freq_f64": exact})
    return cases


NEAR = (0, 1, 2, 3, 7, 36, 200)
FAR = (511, 4096, 65535, 65536, 65537, 131071)
"""In float32 an angle at position p has an error of up to p * 2**-24: compare far positions with the float64 output."""


def rope_apply_cases() -> Cases:
    """Both pairings, near and far, without and with a factor on cos and sin. q [T,H,K], k [T,G,K]."""
    dice = seeded()
    cases: Cases = {}
    for pairing, rotate in (("half", rotate_half_split), ("interleaved", rotate_interleaved)):
        for reach, positions in (("near", NEAR), ("far", FAR)):
            for rope_fields in (PUBLISHED["llama3-8b"][2], PUBLISHED["qwen-yarn4"][2]):
                given = {"head_dim": 20, "max_position_embeddings": 131072, **rope_fields}
                config = rotary_config(given)
                inputs = {
                    "positions": torch.tensor(positions),
                    "q": normal(dice, len(positions), 3, 20),
                    "k": normal(dice, len(positions), 2, 20),
                }
                tensors = both(lambda positions, q, k, c=config, r=rotate: r(c, positions, q, k), inputs)
                given |= {"pairing": pairing, "attention_factor": frequencies(config)[1]}
                cases[f"{pairing}-{reach}-{config.rope_parameters['rope_type']}"] = (given, tensors)
    return cases


def rotate_half_split(config: LlamaConfig, positions: Tensor, q: Tensor, k: Tensor) -> Tensors:
    """Pairs (j, j + K/2), by transformers."""
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    turned_q, turned_k = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
    return {"q_rotated": turned_q[0], "k_rotated": turned_k[0]}


def rotate_interleaved(config: LlamaConfig, positions: Tensor, q: Tensor, k: Tensor) -> Tensors:
    """Pairs (2j, 2j + 1), as a product of complex numbers."""
    inv_freq, factor = frequencies(config)
    angles_TP = positions[:, None].to(inv_freq.dtype) * inv_freq
    turn_TP = torch.polar(torch.full_like(angles_TP, factor), angles_TP)

    def turned(x_THK: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x_THK.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn_TP[:, None]).flatten(-2)

    return {"q_rotated": turned(q), "k_rotated": turned(k)}
