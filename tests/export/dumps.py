"""Writes `tests/truth/dumps`: activations of tiny models in transformers, as they are and with mistakes planted in them.

    OMP_NUM_THREADS=1 python -m tests.export.dumps [FOLDER]

Each file is what the exporter in the documentation writes (npllm.testing.divergence.exporter), of a checkpoint of
`tests/truth/models`. Of a dump with a mistake only the first layers are kept: it is found there.
"""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from npllm.testing.divergence.exporter import EXPORTER

from . import TRUTH
from .models import EAGER

dump: Callable[..., None] = (space := {}, exec(EXPORTER, space))[0]["dump"]  # type: ignore[attr-defined]

Change = Callable[[PreTrainedModel], None]


ALL = tuple(range(9))

# Not used by the comparison: probabilities, positions, what an activation module sees.
LEFT_OUT = re.compile(r".*(self_attn\.1|rotary_emb\.input.*|act_fn.*)")


class Planted(NamedTuple):
    """A mistake: the checkpoint, changes of its config, a change of the model built, the type, and layers kept."""

    case: str
    config: Mapping[str, Any] = MappingProxyType({})
    change: Change | None = None
    dtype: str = "bfloat16"
    layers: tuple[int, ...] = (0,)


def each(kind: str, act: Callable[[Any], None]) -> Change:
    """Apply `act` to every module whose class has `kind` in its name."""

    def change(model: PreTrainedModel) -> None:
        for module in model.modules():
            if kind in type(module).__name__:
                act(module)

    return change


def setting(kind: str, **values: Any) -> Change:
    return each(kind, lambda module: [setattr(module, name, value) for name, value in values.items()])


def patched(name: str, function: Any) -> Change:
    """Replace a function of the module that defines the model (`main` restores it)."""

    def change(model: PreTrainedModel) -> None:
        setattr(sys.modules[type(model).__module__], name, function)

    return change


def pairs_interleaved(q: Any, k: Any, cos: Any, sin: Any, *_: Any, unsqueeze_dim: int = 1) -> Any:
    half = cos.shape[-1] // 2
    cos, sin = (x[..., :half].repeat_interleave(2, -1).unsqueeze(unsqueeze_dim) for x in (cos, sin))
    return tuple(x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin for x in (q, k))


def repeat_modulo(x: torch.Tensor, n_rep: int) -> torch.Tensor:
    return x.repeat(1, n_rep, 1, 1)


def tied_head(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def gain_without_one(module: Any) -> None:
    module.forward = lambda x: (module._norm(x.float()) * module.weight.float()).type_as(x)


def no_qk_norm(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()


def correction_in_weights(module: Any) -> None:
    def forward(x: torch.Tensor) -> Any:
        logits = torch.nn.functional.linear(x.view(-1, module.hidden_dim).float(), module.weight.float())
        scores = logits.sigmoid() + module.e_score_correction_bias
        worth = scores.view(-1, module.num_group, module.num_experts // module.num_group).topk(2, -1)[0].sum(-1)
        kept = torch.zeros_like(worth).scatter_(1, worth.topk(module.topk_group, -1)[1], 1).bool()
        ranks = scores.masked_fill(~kept.repeat_interleave(module.num_experts // module.num_group, 1), -torch.inf)
        index = ranks.topk(module.top_k, -1)[1]
        weights = scores.gather(1, index)
        return logits, weights / weights.sum(-1, keepdim=True) * module.routed_scaling_factor, index

    module.forward = forward


def gate_up_exchanged(module: Any) -> None:
    with torch.no_grad():
        gate, up = module.gate_up_proj.chunk(2, dim=1)
        module.gate_up_proj.copy_(torch.cat([up, gate], dim=1))


def no_shared_experts(module: Any) -> None:
    module.shared_experts.forward = torch.zeros_like


HONEST = {
    f"{case}.{dtype}": Planted(case, dtype=dtype, layers=ALL)
    for case, dtypes in {
        "llama3-bf16": ("bfloat16", "float32"),
        "gemma2-bf16": ("bfloat16",),
        "gemma3-bf16": ("bfloat16", "float32"),
        "deepseek-v3": ("bfloat16", "float32"),
        "qwen3-moe": ("bfloat16", "float32"),
    }.items()
    for dtype in dtypes
}

ROPE = "rope_parameters"
PLANTED = {
    "llama-pairs-interleaved": Planted("llama3-bf16", change=patched("apply_rotary_pos_emb", pairs_interleaved)),
    "llama-eps": Planted("llama3", {"rms_norm_eps": 1e-6}, dtype="float32"),
    "llama-scaling-ignored": Planted("llama3-scaling", {ROPE: {"rope_type": "default", "rope_theta": None}}),
    "llama-theta": Planted("llama3-bf16", {ROPE: {"rope_type": "default", "rope_theta": 10000.0}}),
    "llama-head-tied": Planted("llama3-bf16", change=tied_head, layers=()),
    "llama-heads-modulo": Planted("llama3-bf16", change=patched("repeat_kv", repeat_modulo)),
    "gemma2-cap-omitted": Planted("gemma2-bf16", {"attn_logit_softcapping": None}),
    "gemma2-window": Planted("gemma2-bf16", {"sliding_window": 8}),
    "gemma2-embedding-scale": Planted("gemma2-bf16", change=setting("ScaledWord", embed_scale=torch.tensor(1.0)), layers=()),
    "gemma2-gain": Planted("gemma2-bf16", change=each("RMSNorm", gain_without_one)),
    "gemma2-final-cap": Planted("gemma2-bf16", {"final_logit_softcapping": None}, layers=()),
    "gemma2-scale": Planted("gemma2-bf16", {"query_pre_attn_scalar": 10}),
    "gemma2-activation": Planted("gemma2-bf16", {"hidden_activation": "silu"}),
    "gemma3-qk-norm": Planted("gemma3-bf16", change=no_qk_norm),
    "gemma2-window-everywhere": Planted("gemma2-bf16", {"layer_types": ["sliding_attention"] * 3}, layers=(1,)),
    "gemma3-local-everywhere": Planted("gemma3-bf16", {"layer_types": ["sliding_attention"] * 3}, layers=()),
    "gemma3-window-ignored": Planted("gemma3-bf16", {"sliding_window": 64}),
    "deepseek-correction": Planted("deepseek-v3", change=each("TopkRouter", correction_in_weights), layers=(1,)),
    "deepseek-not-normalised": Planted("deepseek-v3", {"norm_topk_prob": False}, layers=(1,)),
    "deepseek-scaling-factor": Planted("deepseek-v3", {"routed_scaling_factor": 1.0}, layers=(1,)),
    "deepseek-groups": Planted("deepseek-v3", {"n_group": 1, "topk_group": 1}, layers=(1,)),
    "deepseek-halves": Planted("deepseek-v3", {"rope_interleave": False}),
    "deepseek-mscale": Planted("deepseek-v3", change=setting("Attention", scaling=18**-0.5)),
    "deepseek-shared": Planted("deepseek-v3", change=each("V3MoE", no_shared_experts), layers=(1,)),
    "qwen3-moe-not-normalised": Planted("qwen3-moe", {"norm_topk_prob": False}),
    "qwen3-moe-fewer": Planted("qwen3-moe", {"num_experts_per_tok": 1}),
    "qwen3-moe-gate-up": Planted("qwen3-moe", change=each("Experts", gate_up_exchanged)),
    "qwen3-moe-activation": Planted("qwen3-moe", {"hidden_act": "gelu"}),
}


def built(plan: Planted) -> PreTrainedModel:
    folder = TRUTH / "models" / plan.case
    config = AutoConfig.from_pretrained(folder)
    for name, value in plan.config.items():
        if name == ROPE and value["rope_theta"] is None:
            value = value | {"rope_theta": getattr(config, ROPE)["rope_theta"]}
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=getattr(torch, plan.dtype), **EAGER).eval()
    if plan.change is not None:
        plan.change(model)
    return model


def write(plan: Planted, path: Path, tokens: int) -> None:
    model = built(plan)
    vocabulary = model.config.vocab_size
    dice = torch.Generator().manual_seed(7)
    dump(model, torch.randint(0, vocabulary, (1, tokens), generator=dice), path)
    kept = {name: x for name, x in load_file(path).items() if is_kept(name, plan.layers)}
    save_file(kept, path)


def is_kept(name: str, layers: tuple[int, ...]) -> bool:
    found = re.search(r"layers\.(\d+)(\.)?", name)
    if LEFT_OUT.fullmatch(name):
        return False
    if found is None:
        return layers in ((), ALL) or name in ("tokens", "model.embed_tokens") or "rotary" in name
    return int(found[1]) in layers or (found[2] is None and int(found[1]) + 1 in layers)


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else TRUTH / "dumps"
    folder.mkdir(parents=True, exist_ok=True)
    for name, plan in (HONEST | PLANTED).items():
        path = folder / f"{name}.safetensors"
        module = sys.modules[type(built(plan._replace(change=None))).__module__]
        before = dict(vars(module))
        write(plan, path, 10 if "window" in name else 8 if "gemma3-bf16." in name else 6 if name in PLANTED else 4)
        vars(module).update(before)
        print(f"{name:32} {path.stat().st_size:8,d} bytes")


if __name__ == "__main__":
    main()
