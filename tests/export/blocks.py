"""Truth of single operations, from torch and from transformers' own modules. See `tests/truth/README.md`.

A file holds several cases. Tensor `<case>/<name>` is an input or an output; an output comes in float32 and, as
`<case>/<name>_f64`, computed in float64 from the same inputs. The header's metadata entry "about" is JSON: "cases" has the
parameters of each case, "provenance" what `provenance.json` has for a model.

Letters: T queries, S keys, H query heads, G key/value heads, K width of q and k, V width of v, D model, F ffn width.
"""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from . import command
from .cases.case import rope
from .float64 import float64
from .models import versions

LARGEST_FILE = 100_000
SEED = 0

Tensors = dict[str, Tensor]
Parameters = dict[str, Any]
Cases = dict[str, tuple[Parameters, Tensors]]
"""By name: the parameters of a case, and its tensors."""


def write_blocks(folder: Path) -> list[str]:
    """Writes every file of `folder`; returns a line of figures for each. ValueError for a case that proves nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write_file(folder / f"{name}.safetensors", make()) for name, make in FILES.items()]


def write_file(path: Path, cases: Cases) -> str:
    tensors = {f"{case}/{name}": value.contiguous() for case, (_, inside) in cases.items() for name, value in inside.items()}
    reals = {name: value for name, value in tensors.items() if value.is_floating_point()}
    useless = [name for name, x in reals.items() if not x.isfinite().all() or (x == x.flatten()[0]).all()]
    if useless:
        raise ValueError(f"{path.name}: not finite, or all the same: {', '.join(useless)}")
    provenance = versions() | {"command": command("blocks"), "seed": SEED}
    about = {"provenance": provenance, "cases": {case: given for case, (given, _) in cases.items()}}
    # One entry only: safetensors writes several in an order that changes from run to run.
    save_file(tensors, path, metadata={"about": json.dumps(about)})
    size = path.stat().st_size
    if size >= LARGEST_FILE:
        raise ValueError(f"{path.name}: {size} bytes, at most {LARGEST_FILE} are allowed")
    return f"blocks/{path.name:28} {size:7,d} bytes  {len(cases)} cases"


@torch.no_grad()
def both(outputs: Callable[..., Tensors], inputs: Tensors) -> Tensors:
    """inputs, outputs(**inputs), and the same in float64 under names that end in `_f64`."""
    with float64():
        exact = outputs(**{name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})
    return inputs | outputs(**inputs) | {f"{name}_f64": value for name, value in exact.items()}


def normal(dice: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=dice)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def fill(module: nn.Module, weights: Tensors) -> nn.Module:
    module.load_state_dict(weights)
    return module


# Norms


def scaled_rows(dice: torch.Generator, width: int) -> Tensor:
    """[7, width]: rows from so small that eps rules to large, one that is constant, one of zeros."""
    x_TD = normal(dice, 7, width) * torch.tensor([1.0, 1e-4, 1e-3, 3e-3, 1e4, 1.0, 0.0])[:, None]
    x_TD[5] = 0.7
    return x_TD


def rms_norm_cases() -> Cases:
    dice = seeded()
    cases: Cases = {}
    for eps in (1e-6, 1e-5, 1e-3):
        inputs = {"x": scaled_rows(dice, 37), "weight": 1 + 0.3 * normal(dice, 37)}
        cases[f"rows-eps{eps:g}"] = ({"eps": eps}, both(lambda x, weight, eps=eps: llama_norm(x, weight, eps), inputs))
    heads = {"x": normal(dice, 5, 6, 10), "weight": 1 + 0.3 * normal(dice, 10)}
    cases["heads"] = ({"eps": 1e-6}, both(lambda x, weight: llama_norm(x, weight, 1e-6), heads))
    return cases


def llama_norm(x: Tensor, weight: Tensor, eps: float) -> Tensors:
    return {"y": fill(LlamaRMSNorm(weight.shape[0], eps), {"weight": weight})(x)}


def layer_norm_cases() -> Cases:
    dice = seeded()
    cases: Cases = {}
    for eps in (1e-5, 1e-3):
        inputs = {"x": 0.4 + scaled_rows(dice, 30), "weight": 1 + 0.3 * normal(dice, 30), "bias": normal(dice, 30)}
        cases[f"rows-eps{eps:g}"] = (
            {"eps": eps},
            both(lambda x, weight, bias, eps=eps: {"y": F.layer_norm(x, x.shape[-1:], weight, bias, eps)}, inputs),
        )
    return cases


# RoPE


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


# Attention

MASKS: dict[str, Callable[[Tensor, Tensor, Parameters], Tensor]] = {
    "causal": lambda i, j, given: j <= i,
    "window": lambda i, j, given: (j <= i) & (i - j < given["window"]),
    "chunk": lambda i, j, given: (j <= i) & (i // given["chunk"] == j // given["chunk"]),
}

CAUSAL: dict[str, Parameters] = {
    "causal": {"mask": "causal", "T": 11, "S": 11},
    "causal-bottom-right": {"mask": "causal", "T": 5, "S": 13},
    "one-query": {"mask": "causal", "T": 1, "S": 19},
    "equal-heads": {"mask": "causal", "T": 9, "S": 9, "H": 4, "G": 4},
    "one-kv-head": {"mask": "causal", "T": 9, "S": 9, "G": 1},
    "wide-values": {"mask": "causal", "T": 9, "S": 9, "V": 14},
    "own-scale": {"mask": "causal", "T": 9, "S": 9, "scale": 0.5},
    "saturated": {"mask": "causal", "T": 9, "S": 9, "q_times": 40.0},
    "softcap": {"mask": "causal", "T": 9, "S": 9, "softcap": 3.0, "q_times": 4.0},
    "nothing-to-see": {"mask": "causal", "T": 5, "S": 6, "first_query": -2, "first_key": 0},
}
WINDOWED: dict[str, Parameters] = {
    "window": {"mask": "window", "window": 5, "T": 17, "S": 17},
    "window-bottom-right": {"mask": "window", "window": 5, "T": 4, "S": 17},
    "window-ring": {"mask": "window", "window": 5, "T": 3, "S": 7, "first_key": 9, "turned_by": 3},
    "chunk": {"mask": "chunk", "chunk": 4, "T": 13, "S": 13},
    "chunk-bottom-right": {"mask": "chunk", "chunk": 4, "T": 5, "S": 14},
    "softcap-window": {"mask": "window", "window": 3, "T": 9, "S": 9, "softcap": 3.0, "q_times": 4.0},
}
"""Shapes (default H 6, G 2, K 8, V 8) and rules. `first_query`: queries lie at consecutive positions from there, by
default so that the last query and the last key share a position. `turned_by`: keys are stored as in a ring buffer.
Queries that see no key at all (`nothing-to-see`: positions -2 and -1) give 0."""


def attention_cases(declared: dict[str, Parameters]) -> Cases:
    dice = seeded()
    cases: Cases = {}
    for name, own in declared.items():
        given = {"H": 6, "G": 2, "K": 8, "V": 8, "q_times": 1.0, "softcap": None, "first_key": 0, "turned_by": 0} | own
        given.setdefault("scale", given["K"] ** -0.5)
        given.setdefault("first_query", given["first_key"] + given["S"] - given["T"])
        inputs = {
            "q": given["q_times"] * normal(dice, given["T"], given["H"], given["K"]),
            "k": normal(dice, given["S"], given["G"], given["K"]),
            "v": normal(dice, given["S"], given["G"], given["V"]),
        }
        i_T = given["first_query"] + torch.arange(given["T"])
        j_S = torch.roll(given["first_key"] + torch.arange(given["S"]), given["turned_by"])
        mask_TS = MASKS[given["mask"]](i_T[:, None], j_S[None], given)
        outputs = both(lambda q, k, v, mask=mask_TS, given=given: attend(q, k, v, mask, given), inputs)
        cases[name] = (given, outputs | {"q_positions": i_T, "k_positions": j_S, "mask": mask_TS})
    return cases


def attend(q: Tensor, k: Tensor, v: Tensor, mask_TS: Tensor, given: Parameters) -> Tensors:
    """q [T,H,K], k [S,G,K], v [S,G,V] -> y [T,H,V]; query head h reads key/value head h // (H / G)."""
    if given["softcap"] is None:
        y = fused_attention(q, k, v, mask_TS, given["scale"])
    else:
        y = capped_attention(q, k, v, mask_TS, given["scale"], given["softcap"])
    return {"y": y.masked_fill(~mask_TS.any(1)[:, None, None], 0.0)}


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask_TS: Tensor, scale: float) -> Tensor:
    """torch's own."""
    q_HTK, k_GSK, v_GSV = (x.transpose(0, 1)[None] for x in (q, k, v))
    y_HTV = F.scaled_dot_product_attention(q_HTK, k_GSK, v_GSV, attn_mask=mask_TS, scale=scale, enable_gqa=True)
    return y_HTV[0].transpose(0, 1)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask_TS: Tensor, scale: float, softcap: float) -> Tensor:
    """cap * tanh(score / cap), before the mask."""
    repeats = q.shape[1] // k.shape[1]
    k_SHK, v_SHV = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores_HTS = softcap * torch.tanh(torch.einsum("thk,shk->hts", q, k_SHK) * scale / softcap)
    return torch.einsum("hts,shv->thv", scores_HTS.masked_fill(~mask_TS, -math.inf).softmax(-1), v_SHV)


# Activations and feed-forward networks


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


FILES: dict[str, Callable[[], Cases]] = {
    "rms_norm": rms_norm_cases,
    "layer_norm": layer_norm_cases,
    "rope_frequencies": rope_frequency_cases,
    "rope_apply": rope_apply_cases,
    "attention": lambda: attention_cases(CAUSAL),
    "attention_windowed": lambda: attention_cases(WINDOWED),
    "activations": activation_cases,
    "ffn": ffn_cases,
}
