"""Runs one model case in transformers (eager attention, CPU) and writes its folder. See `tests/truth/README.md`."""

import copy
import json
import platform
import re
import shutil
from contextlib import nullcontext
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
from .fp8 import dequantised, quantise
from .matformer import sliced

# transformers lists it among the models that read images only.
AutoModelForCausalLM.register(transformers.Mistral4Config, transformers.Mistral4ForCausalLM, exist_ok=True)

EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
ROWS, PROMPT, NEW = 2, 9, 24
LARGEST_FOLDER = 300_000


def write_model(name: str, case: Case, folder: Path) -> str:
    """Writes the checkpoint, its trace and its provenance into `folder`, replacing it; returns a line of figures.

    Raises ValueError if the truth would prove little: see `check`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(case, folder)
    model = load(case, folder, torch.float32)
    trace = run(model, case, folder)
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
    model = build(configured(case), torch.float32)
    if case.sliced_from:
        parent = AutoModelForCausalLM.from_pretrained(folder.parent / case.sliced_from, dtype=torch.float32)
        model.load_state_dict(sliced(parent.state_dict(), model, case.kept_layers))
    else:
        draw_weights(model)
    shards = {"max_shard_size": case.shard_size} if case.shard_size else {}
    model.to(dtype).save_pretrained(folder, save_original_format=not case.fused, **shards)
    if case.quantisation:
        quantise(folder, case)


def load(case: Case, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    with dequantised(folder, case, dtype) if case.quantisation else nullcontext(folder) as plain:
        return AutoModelForCausalLM.from_pretrained(plain, dtype=dtype, **EAGER).eval()


def configured(case: Case, **changes: Any) -> PreTrainedConfig:
    """The case's config, of copies: transformers writes into the dictionaries that it is given."""
    return AutoConfig.for_model(case.model, **copy.deepcopy(case.config | changes))


def build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **EAGER).eval()


def draw_weights(model: PreTrainedModel) -> None:
    """Weights that leave nothing at its neutral value.

    Vectors (norm gains, biases) keep what transformers starts them with, plus noise, which is right for gains around 1
    and for gains stored as an offset from 1. Matrices have a gain of 1.4, so attention is far from uniform, and
    embeddings give logits of a scale of 3 to 6. A head tied to scaled embeddings (Gemma) would repeat the last token for
    ever: there, embeddings are smaller and vectors noisier.
    """
    scaled = any(hasattr(module, "embed_scale") for module in model.modules())
    vector_noise, embedding_noise = (0.8, 0.3) if scaled else (0.3, 0.5)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    embeddings.add(id(model.get_output_embeddings().weight))
    columns_first = {id(m.weight) for m in model.modules() if isinstance(m, transformers.pytorch_utils.Conv1D)}
    # A router's correction bias is a buffer.
    buffers = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for weight in [*model.parameters(), *buffers]:
            noise = torch.randn_like(weight)
            if weight.ndim == 1:
                weight += vector_noise * noise
            elif id(weight) in embeddings:
                weight.copy_(embedding_noise * noise)
            else:
                fan_in = weight.shape[0 if id(weight) in columns_first else -1]
                weight.copy_(1.6 * fan_in**-0.5 * noise)


def run(model: PreTrainedModel, case: Case, folder: Path) -> dict[str, Tensor]:
    """The content of `trace.safetensors`, from the model in float32 and, for `logits_f64`, in float64."""
    dice = torch.Generator().manual_seed(case.seed)
    tokens_BT = torch.randint(0, model.config.vocab_size, (ROWS, case.tokens), generator=dice)
    trace = {"tokens": tokens_BT} | traced(model, tokens_BT)
    trace["greedy"] = greedy(model, tokens_BT[:1, :PROMPT])
    weights = load(case, folder, torch.float64).state_dict()
    with float64():
        exact = build(configured(case), torch.float64)
        exact.load_state_dict(weights)
        trace["logits_f64"] = logits_of(exact, tokens_BT[:1])[0]
    return {key: value.contiguous() for key, value in trace.items()}


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    return model(tokens_BT, use_cache=False).logits


def traced(model: PreTrainedModel, tokens_BT: Tensor) -> dict[str, Tensor]:
    """Residual stream before the first block and after each, the final norm's output, the logits."""
    # Llama 4's get_decoder gives the model with its head.
    stack = getattr(model.get_decoder(), "model", model.get_decoder())
    blocks = stack.h if hasattr(stack, "h") else stack.layers
    norm = stack.ln_f if hasattr(stack, "ln_f") else stack.norm
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> None:
        found[name] = side_by_side(value[0] if isinstance(value, tuple) else value).clone()

    hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: keep("embedding", inputs))]
    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(lambda _, __, output, i=i: keep(f"layers.{i}", output)))
    hooks.append(norm.register_forward_hook(lambda _, __, output: keep("norm", output)))
    found["logits"] = logits_of(model, tokens_BT)
    for hook in hooks:
        hook.remove()
    return found


def side_by_side(x: Tensor) -> Tensor:
    """[B, T, D] as it is; the streams of Gemma 3n, [A, B, T, D], as [B, T, A * D]."""
    return x if x.ndim == 3 else x.movedim(0, 2).flatten(2)


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
    controls += [relative(logits_without(model, case, names, tokens_BT), logits_BTV) for names in case.zeroed]
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
    without = build(configured(case, **change), torch.float32)
    missing = without.load_state_dict(model.state_dict(), strict=False).missing_keys
    if missing:
        raise ValueError(f"control {change} needs weights that the case has not: {missing}")
    return logits_of(without, tokens_BT)


def logits_without(model: PreTrainedModel, case: Case, names: str, tokens_BT: Tensor) -> Tensor:
    """Logits where the weights whose names `names` matches are 0."""
    zeroed = {key: value * 0 if re.search(names, key) else value for key, value in model.state_dict().items()}
    without = build(configured(case), torch.float32)
    without.load_state_dict(zeroed)
    return logits_of(without, tokens_BT)


def write_old_config(model: PreTrainedModel, case: Case, folder: Path, trace: dict[str, Tensor]) -> None:
    """Writes `config.old.json`, after transformers has read it to the same logits."""
    old = old_spelling(json.loads((folder / "config.json").read_text()), case)
    (folder / "config.old.json").write_text(json.dumps(old, indent=2) + "\n")
    twin = build(AutoConfig.for_model(**old), torch.float32)
    twin.load_state_dict(model.state_dict())
    # Not to the last bit: weights mapped from a file and weights in memory are aligned differently.
    if relative(logits_of(twin, trace["tokens"]), trace["logits"]) > 1e-6:
        raise ValueError(f"{folder.name}: config.old.json does not say what config.json says")


def old_spelling(config: dict[str, Any], case: Case) -> dict[str, Any]:
    """A config.json as it was published before transformers 5; a RoPE per layer type becomes keys of each (Gemma 3, 3n)."""
    gone = ("dtype", "rope_parameters", "layer_types", "transformers_version", *case.old_without)
    shared = {key: value for key, value in config.items() if key not in gone} | case.old
    typed = config["rope_parameters"]
    scaling = dict(typed.get("full_attention", typed))
    theta, rope_type = scaling.pop("rope_theta"), scaling.pop("rope_type")
    old_scaling = None if rope_type == "default" else scaling | {case.old_rope_key: rope_type}
    old = shared | {"torch_dtype": config["dtype"], "rope_theta": theta, "rope_scaling": old_scaling}
    return old | ({"rope_local_base_freq": typed["sliding_attention"]["rope_theta"]} if "sliding_attention" in typed else {})
