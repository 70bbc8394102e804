"""Routers and mixtures of experts, by transformers' own modules."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Llama4TextConfig,
    Mistral4Config,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe, DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextMoe
from transformers.models.mistral4.modeling_mistral4 import Mistral4MoE, Mistral4TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock, Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock, Qwen3MoeTopKRouter

from ..models import relative
from .case import Cases, Parameters, Tensors, both, drawn, fill, normal, seeded


class Classes(NamedTuple):
    """What transformers has for one `model_type`, and the config's name for the number of experts and for their width."""

    config: type[Any]
    router: type[nn.Module]
    block: type[nn.Module]
    experts: str
    inner: str = "moe_intermediate_size"


CLASSES = {
    "qwen3_moe": Classes(Qwen3MoeConfig, Qwen3MoeTopKRouter, Qwen3MoeSparseMoeBlock, "num_experts"),
    "qwen2_moe": Classes(Qwen2MoeConfig, Qwen2MoeTopKRouter, Qwen2MoeSparseMoeBlock, "num_experts"),
    "mixtral": Classes(MixtralConfig, MixtralTopKRouter, MixtralSparseMoeBlock, "num_local_experts", "intermediate_size"),
    "deepseek_v2": Classes(DeepseekV2Config, DeepseekV2TopkRouter, DeepseekV2Moe, "n_routed_experts"),
    "deepseek_v3": Classes(DeepseekV3Config, DeepseekV3TopkRouter, DeepseekV3MoE, "n_routed_experts"),
    "mistral4": Classes(Mistral4Config, Mistral4TopkRouter, Mistral4MoE, "n_routed_experts"),
    "llama4_text": Classes(Llama4TextConfig, Llama4Router, Llama4TextMoe, "num_local_experts", "intermediate_size"),
}


class Declared(NamedTuple):
    """A case: the `model_type`, the config fields that rule its routing, fields that must change the result.

    `correction`: mean of the drawn `e_score_correction_bias`, where the router has one.
    """

    model: str
    rule: Parameters
    controls: tuple[Parameters, ...] = ()
    correction: float = 0.0


GROUPS = {"n_group": 4, "topk_group": 2}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
V3 = GROUPS | {"norm_topk_prob": True, "routed_scaling_factor": 2.5}
V2 = ONE_GROUP | {"topk_method": "greedy", "routed_scaling_factor": 1.0}
LIMITED = GROUPS | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}
NORM, RAW = {"norm_topk_prob": True}, {"norm_topk_prob": False}

ROUTERS = {
    "qwen3": Declared("qwen3_moe", NORM, (RAW,)),
    "qwen3-raw": Declared("qwen3_moe", RAW, (NORM,)),
    "qwen2": Declared("qwen2_moe", RAW, (NORM,)),
    "mixtral": Declared("mixtral", {}),
    "deepseek-v2-greedy": Declared("deepseek_v2", V2, ({"routed_scaling_factor": 2.0},)),
    "deepseek-v2-groups": Declared(
        "deepseek_v2",
        LIMITED | {"n_group": 6, "topk_group": 3, "num_experts_per_tok": 5},
        ({"topk_group": 4}, {"routed_scaling_factor": 1.0}),
    ),
    "deepseek-v3": Declared("deepseek_v3", V3, (ONE_GROUP, {"topk_group": 3}, RAW, {"routed_scaling_factor": 1.0})),
    "deepseek-v3-raw": Declared("deepseek_v3", V3 | RAW, (NORM,)),
    "deepseek-v3-one-group": Declared("deepseek_v3", V3 | ONE_GROUP, (GROUPS,)),
    # Every corrected score is below 0: experts of dropped groups stay out only where they count as -inf.
    "deepseek-v3-negative": Declared("deepseek_v3", V3, (ONE_GROUP,), correction=-1.6),
    "mistral4": Declared("mistral4", ONE_GROUP | NORM | {"routed_scaling_factor": 1.0}, (RAW,)),
    "mistral4-groups": Declared("mistral4", V3, (ONE_GROUP, RAW)),
    "llama4-top1": Declared("llama4_text", {"num_experts_per_tok": 1}),
    "llama4-top2": Declared("llama4_text", {"num_experts_per_tok": 2}, ({"num_experts_per_tok": 1},)),
}

ROUTED = {
    "qwen3": Declared("qwen3_moe", NORM, (RAW, {"num_experts_per_tok": 1})),
    "qwen3-raw": Declared("qwen3_moe", RAW, (NORM,)),
    "mixtral": Declared("mixtral", {}, ({"num_experts_per_tok": 3},)),
    "mixtral-gelu": Declared("mixtral", {"hidden_act": "gelu_pytorch_tanh"}, ({"hidden_act": "silu"},)),
    "llama4-top1": Declared("llama4_text", {"num_experts_per_tok": 1}),
}
SHARED = {
    "qwen2": Declared("qwen2_moe", RAW | {"shared_expert_intermediate_size": 7}, (NORM,)),
    "deepseek-v2": Declared(
        "deepseek_v2", LIMITED | {"n_group": 3, "topk_group": 1, "n_shared_experts": 2}, ({"topk_group": 3},)
    ),
    "deepseek-v3": Declared("deepseek_v3", V3 | {"n_group": 3, "n_shared_experts": 2}, (RAW, {"topk_group": 3})),
    "mistral4": Declared("mistral4", ONE_GROUP | NORM | {"routed_scaling_factor": 1.0, "n_shared_experts": 1}, (RAW,)),
    "llama4-top2": Declared("llama4_text", {"num_experts_per_tok": 2}, ({"num_experts_per_tok": 1},)),
}


def router_cases() -> Cases:
    """x [T,D] -> `logits` [T,E], and `weights` [T,E]: each token's weight of each expert, 0 where it was not chosen."""
    sizes = {"hidden_size": 14, "experts": 12, "inner": 10, "num_experts_per_tok": 3, "num_attention_heads": 2}
    return cases_of(ROUTERS, sizes, tokens=15, make=lambda classes: classes.router, run=route)


def moe_cases(declared: dict[str, Declared]) -> Cases:
    """x [T,D] -> y [T,D]; weights under transformers' names: all experts of a layer in one tensor, gate above up."""
    sizes = {"hidden_size": 16, "experts": 6, "inner": 10, "num_experts_per_tok": 2, "num_attention_heads": 2}
    return cases_of(declared, sizes, tokens=11, make=lambda classes: classes.block, run=mix)


def cases_of(
    declared: dict[str, Declared],
    sizes: dict[str, int],
    tokens: int,
    make: Callable[[Classes], type[nn.Module]],
    run: Callable[[nn.Module, Tensor], Tensors],
) -> Cases:
    """One case per declaration; ValueError where float32 and float64 choose differently, or a control has no effect."""
    dice = seeded()

    def case_of(name: str, case: Declared) -> tuple[Parameters, Tensors]:
        classes = CLASSES[case.model]
        given = {**sizes, "hidden_act": "silu", **case.rule}
        given[classes.experts], given[classes.inner] = given.pop("experts"), given.pop("inner")

        def outputs(x: Tensor, change: Parameters | None = None, **weights: Tensor) -> Tensors:
            return run(fill(make(classes)(classes.config(**given | (change or {}))), weights), x)

        weights = drawn(make(classes)(classes.config(**given)), dice, columns_first=case.model == "llama4_text")
        for bias in [key for key in weights if key.endswith("e_score_correction_bias")]:
            weights[bias] += case.correction
        inputs = {"x": normal(dice, tokens, sizes["hidden_size"])} | weights
        tensors = both(outputs, inputs)
        output = "weights" if "weights" in tensors else "y"
        if relative(tensors[output], tensors[f"{output}_f64"]) > 1e-6:
            raise ValueError(f"{name}: float32 and float64 choose different experts")
        for change in case.controls:
            if relative(outputs(**inputs, change=change)[output], tensors[output]) < 0.01:
                raise ValueError(f"{name}: no effect of {change}")
        return {"model": case.model, **given}, tensors

    return {name: case_of(name, case) for name, case in declared.items()}


@torch.no_grad()
def route(router: nn.Module, x: Tensor) -> Tensors:
    if isinstance(router, Llama4Router):
        weights_TE, logits_TE = router(x)
    else:
        logits_TE, weight_TC, index_TC = router(x)
        weights_TE = torch.zeros_like(logits_TE).scatter(1, index_TC, weight_TC)
    return {"logits": logits_TE, "weights": weights_TE}


@torch.no_grad()
def mix(block: nn.Module, x: Tensor) -> Tensors:
    y = block(x[None])
    return {"y": (y[0] if isinstance(y, tuple) else y).reshape(x.shape)}
