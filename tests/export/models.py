"""Runs one model case in transformers (eager attention, CPU) and writes its folder. See `tests/truth/README.md`."""

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from . import FORMAT, command
from .cases import Case, digest
from .float64 import float64

ROWS, PROMPT, NEW = 2, 9, 24
LARGEST_FOLDER = 300_000


def write_model(name: str, case: Case, folder: Path) -> str:
    """Writes the checkpoint, its trace and its provenance into `folder`, replacing it; returns a line of figures.

    Raises ValueError if the truth would prove little: see `check`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(case, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    trace = run(model, case)
    figures = check(model, case, trace)
    if case.old_rope_key:
        write_old_config(model, case, folder, trace)
    save_file(trace, folder / "trace.safetensors")
    provenance = versions() | {
        "command": command(name),
        "declaration": digest(case),
        "model_type": case.model,
        "storage": case.storage,
        "seed": case.seed,
        "notes": case.notes,
        "figures": figures,
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    size = sum(file.stat().st_size for file in folder.iterdir())
    if size >= LARGEST_FOLDER:
        raise ValueError(f"{name}: {size} bytes, at most {LARGEST_FOLDER} are allowed; make its shape smaller")
    return f"{name:28} {size:7,d} bytes  " + "  ".join(f"{key} {value}" for key, value in figures.items())


def versions() -> dict[str, Any]:
    """What made the files."""
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def write_checkpoint(case: Case, folder: Path) -> None:
    torch.manual_seed(case.seed)
    dtype = getattr(torch, case.storage)
    model = build(AutoConfig.for_model(case.model, **case.config), torch.float32)
    draw_weights(model)
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": case.shard_size} if case.shard_size else {}))


def build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()


def draw_weights(model: PreTrainedModel) -> None:
    """Weights that leave nothing at its neutral value.

    Vectors (norm gains, biases) keep what transformers starts them with, plus noise, which is right for gains around 1
    and for gains stored as an offset from 1. Matrices have a gain of 1.4, so attention is far from uniform, and
    embeddings give logits of a scale of 3 to 6.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    embeddings.add(id(model.get_output_embeddings().weight))
    columns_first = {id(m.weight) for m in model.modules() if isinstance(m, transformers.pytorch_utils.Conv1D)}
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            if weight.ndim == 1:
                weight += 0.3 * noise
            elif id(weight) in embeddings:
                weight.copy_(0.5 * noise)
            else:
                fan_in = weight.shape[0 if id(weight) in columns_first else -1]
                weight.copy_(1.6 * fan_in**-0.5 * noise)


def run(model: PreTrainedModel, case: Case) -> dict[str, Tensor]:
    """The content of `trace.safetensors`, from the model in float32 and, for `logits_f64`, in float64."""
    dice = torch.Generator().manual_seed(case.seed)
    tokens_BT = torch.randint(0, model.config.vocab_size, (ROWS, case.tokens), generator=dice)
    trace = {"tokens": tokens_BT} | traced(model, tokens_BT)
    trace["greedy"] = greedy(model, tokens_BT[:1, :PROMPT])
    with float64():
        exact = build(AutoConfig.for_model(case.model, **case.config), torch.float64)
        exact.load_state_dict(model.state_dict())
        trace["logits_f64"] = logits_of(exact, tokens_BT[:1])[0]
    return {key: value.contiguous() for key, value in trace.items()}


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    return model(tokens_BT, use_cache=False).logits


def traced(model: PreTrainedModel, tokens_BT: Tensor) -> dict[str, Tensor]:
    """Residual stream before the first block and after each, the final norm's output, the logits."""
    stack = model.get_decoder()
    blocks = stack.h if hasattr(stack, "h") else stack.layers
    norm = stack.ln_f if hasattr(stack, "ln_f") else stack.norm
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> None:
        found[name] = value[0].clone() if isinstance(value, tuple) else value.clone()

    hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: keep("embedding", inputs))]
    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(lambda _, __, output, i=i: keep(f"layers.{i}", output)))
    hooks.append(norm.register_forward_hook(lambda _, __, output: keep("norm", output)))
    found["logits"] = logits_of(model, tokens_BT)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt_1T: Tensor) -> Tensor:
    """[1, NEW]: what transformers' own generate appends, with no token that ends it."""
    model.generation_config.eos_token_id = None
    output = model.generate(
        prompt_1T, attention_mask=torch.ones_like(prompt_1T), max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    return output[:, prompt_1T.shape[1] :]


def check(model: PreTrainedModel, case: Case, trace: dict[str, Tensor]) -> dict[str, Any]:
    """Figures that go into the provenance; ValueError for a truth that could hide a fault."""
    logits_BTV, tokens_BT, new_1N = trace["logits"], trace["tokens"], trace["greedy"]
    margin = greedy_margin(model, tokens_BT[:1, :PROMPT], new_1N)
    peaked = attention_peakedness(model, tokens_BT)
    float32_error = relative(logits_BTV[0], trace["logits_f64"])
    controls = [relative(control_logits(model, case, change, tokens_BT), logits_BTV) for change in case.controls]
    spread = logits_BTV.std().item()
    demands = {
        "every value is finite": all(value.isfinite().all() for value in trace.values()),
        "logits spread by 1.5 to 10": 1.5 < spread < 10,
        "rows differ": (tokens_BT[0] != tokens_BT[1]).any() and relative(logits_BTV[0], logits_BTV[1]) > 0.1,
        "attention is not uniform": peaked > 1.5,
        "greedy has at least 5 different tokens": len(set(new_1N[0].tolist())) >= 5,
        "greedy has no near tie": margin > 1e-3,
        "greedy is the argmax of uncached logits": margin >= 0,
        "float32 is near float64": float32_error < 2e-5,
        "every control changes the logits": all(change > 0.01 for change in controls),
    }
    broken = [demand for demand, holds in demands.items() if not holds]
    if broken:
        raise ValueError(f"{case.model}, seed {case.seed}: not true that {'; '.join(broken)}")
    return {
        "logits_std": round(spread, 2),
        "attention_peak_over_uniform": round(peaked, 2),
        "greedy_margin": round(margin, 4),
        "float32_vs_float64": float(f"{float32_error:.1e}"),
        "controls": [round(change, 3) for change in controls],
    }


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||"""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def greedy_margin(model: PreTrainedModel, prompt_1T: Tensor, new_1N: Tensor) -> float:
    """Smallest lead of the chosen token over the best other one, in one uncached pass; negative if it has none."""
    logits_NV = logits_of(model, torch.cat([prompt_1T, new_1N], dim=1))[0, prompt_1T.shape[1] - 1 : -1]
    chosen_N1 = logits_NV.gather(1, new_1N.T)
    others_NV = logits_NV.scatter(1, new_1N.T, -torch.inf)
    return (chosen_N1[:, 0] - others_NV.amax(dim=1)).min().item()


@torch.no_grad()
def attention_peakedness(model: PreTrainedModel, tokens_BT: Tensor) -> float:
    """Mean over queries of the largest attention weight, as a multiple of 1 / (number of keys seen)."""
    layers = model(tokens_BT, use_cache=False, output_attentions=True).attentions
    weights = torch.stack([layer.double() for layer in layers])
    return (weights.amax(-1) * (weights > 0).sum(-1)).mean().item()


def control_logits(model: PreTrainedModel, case: Case, change: dict[str, Any], tokens_BT: Tensor) -> Tensor:
    """Logits of the same weights without the case's feature; weights that belong to the feature are dropped."""
    without = build(AutoConfig.for_model(case.model, **(case.config | change)), torch.float32)
    missing = without.load_state_dict(model.state_dict(), strict=False).missing_keys
    if missing:
        raise ValueError(f"control {change} needs weights that the case has not: {missing}")
    return logits_of(without, tokens_BT)


def write_old_config(model: PreTrainedModel, case: Case, folder: Path, trace: dict[str, Tensor]) -> None:
    """Writes `config.old.json`, after transformers has read it to the same logits."""
    old = old_spelling(json.loads((folder / "config.json").read_text()), case)
    (folder / "config.old.json").write_text(json.dumps(old, indent=2) + "\n")
    twin = build(AutoConfig.for_model(**old), torch.float32)
    twin.load_state_dict(model.state_dict())
    if not torch.equal(logits_of(twin, trace["tokens"]), trace["logits"]):
        raise ValueError(f"{folder.name}: config.old.json does not say what config.json says")


def old_spelling(config: dict[str, Any], case: Case) -> dict[str, Any]:
    """A config.json as it was published before transformers 5."""
    gone = ("dtype", "rope_parameters", "layer_types", "transformers_version", *case.old_without)
    shared = {key: value for key, value in config.items() if key not in gone} | case.old
    scaling = dict(config["rope_parameters"])
    theta, rope_type = scaling.pop("rope_theta"), scaling.pop("rope_type")
    old_scaling = None if rope_type == "default" else scaling | {case.old_rope_key: rope_type}
    return shared | {"torch_dtype": config["dtype"], "rope_theta": theta, "rope_scaling": old_scaling}
