"""Multi-head latent attention, by transformers' own modules; in float32 and float64 as `case.both` does."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config, Mistral4Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.mistral4.modeling_mistral4 import Mistral4Attention, Mistral4RotaryEmbedding

from ..cases.case import rope
from ..models import relative
from .case import Cases, Parameters, Tensors, both, drawn, fill, normal, seeded


class Classes(NamedTuple):
    """What transformers has for one `model_type`."""

    config: type[Any]
    attention: type[nn.Module]
    rotary: type[nn.Module]


CLASSES = {
    "deepseek_v2": Classes(DeepseekV2Config, DeepseekV2Attention, DeepseekV2RotaryEmbedding),
    "deepseek_v3": Classes(DeepseekV3Config, DeepseekV3Attention, DeepseekV3RotaryEmbedding),
    "mistral4": Classes(Mistral4Config, Mistral4Attention, Mistral4RotaryEmbedding),
}

SIZES: Parameters = {
    "hidden_size": 15,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "attention_bias": False,
}
"""The norms of the latents have an eps of their own, 1e-6, whatever `rms_norm_eps` says: it is far from that here."""

NO_LORA = {"q_lora_rank": None}
PLAIN = rope(100.0)


def yarn(**options: float) -> Parameters:
    bands = {"original_max_position_embeddings": 8, "beta_fast": 2.0, "beta_slow": 0.25}
    return rope(100.0, "yarn", factor=4.0, **bands | options)


BETA = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4}

LARGE3 = yarn(attention_factor=1.0, **BETA)
UNTUNED = yarn(attention_factor=1.0, **BETA | {"llama_4_scaling_beta": 0.0})

DECLARED: dict[str, tuple[str, Parameters, tuple[Parameters, ...]]] = {
    "v3": ("deepseek_v3", PLAIN, (rope(50.0),)),
    "v3-no-q-lora": ("deepseek_v3", PLAIN | NO_LORA, ()),
    "v3-bias": ("deepseek_v3", PLAIN | {"attention_bias": True}, ()),
    "v3-yarn": (
        "deepseek_v3",
        yarn(mscale=1.0, mscale_all_dim=1.0),
        (yarn(mscale=1.0), yarn(attention_factor=1.0), PLAIN),
    ),
    "v3-yarn-two-mscales": (
        "deepseek_v3",
        yarn(mscale=1.4, mscale_all_dim=0.6) | NO_LORA,
        (yarn(mscale=0.6, mscale_all_dim=0.6), yarn(mscale=1.4, mscale_all_dim=1.4)),
    ),
    "v2": ("deepseek_v2", yarn(mscale=0.707, mscale_all_dim=0.707), (yarn(attention_factor=1.0), PLAIN)),
    "v2-no-q-lora": ("deepseek_v2", PLAIN | NO_LORA, ()),
    "mistral4": ("mistral4", yarn(mscale=1.0, mscale_all_dim=1.0, **BETA), (yarn(mscale=1.0, **BETA),)),
    "large3": ("mistral4", LARGE3, (yarn(**BETA), UNTUNED)),
}
"""`model_type`, what its config has besides `SIZES`, and changes that must show in the output."""


def mla_cases() -> Cases:
    """x [T,D] at positions 0 to T-1 -> y [T,D], after the output projection; weights under their checkpoint names."""
    dice = seeded()
    cases: Cases = {}
    for name, (model, own, controls) in DECLARED.items():
        classes, given = CLASSES[model], SIZES | own

        def outputs(x: Tensor, classes: Classes = classes, given: Parameters = given, **weights: Tensor) -> Tensors:
            return {"y": attend(classes, given, x, weights)}

        weights = drawn(classes.attention(config_of(classes, given), 0), dice)
        inputs = {"x": normal(dice, 11, given["hidden_size"])} | weights
        tensors = both(outputs, inputs)
        for change in controls:
            if relative(outputs(**inputs, given=given | change)["y"], tensors["y"]) < 0.01:
                raise ValueError(f"{name}: no effect of {change}")
        cases[name] = ({"model": model, **given}, tensors)
    return cases


def config_of(classes: Classes, given: Parameters) -> Any:
    return classes.config(**copy.deepcopy(given), attn_implementation="eager")


@torch.no_grad()
def attend(classes: Classes, given: Parameters, x: Tensor, weights: Tensors) -> Tensor:
    config = config_of(classes, given)
    attention = fill(classes.attention(config, 0), weights)
    positions = torch.arange(len(x))[None]
    angles = classes.rotary(config)(x[None], positions)
    mask_TT = torch.full((len(x), len(x)), -torch.inf, dtype=x.dtype).triu(1)
    y, _ = attention(
        hidden_states=x[None], position_embeddings=angles, attention_mask=mask_TT[None, None], position_ids=positions
    )
    return y[0]
