"""Models in Mistral's own files: `params.json` beside `consolidated*.safetensors`, with names of their own.

Nothing is converted. The parameters become the values that config.json would hold, the tensors' names become those of the
model files, and the rows of q and k stay as they are: in pairs (2j, 2j + 1), which `rope_interleave` tells the model.

| params.json                       | config.json of transformers                                                  |
|-----------------------------------|------------------------------------------------------------------------------|
| sliding_window absent             | sliding_window null (the class default would be a window of 4096)            |
| rope_theta absent                 | 1e6; 1e4 beside a sliding_window (mistral-inference's choice)                |
| yarn: beta, alpha                 | rope_parameters: beta_fast, beta_slow                                        |
| yarn: apply_scale false           | attention_factor 1 and no mscale: neither cos and sin nor the softmax change |
| yarn: apply_scale true or absent  | transformers' own factor; with latent attention mscale = mscale_all_dim = 1  |
| llama_4_scaling: beta             | rope_parameters: llama_4_scaling_beta                                        |
| moe with latent attention         | `mistral4`; weights of the chosen experts always sum to 1                    |
| moe without                       | `mixtral`                                                                    |

Sources: mistral-inference (args.py, transformer.py), vLLM (transformers_utils/configs/mistral.py, models/
mistral_large_3.py), transformers (models/mistral4, and its converter for that class's scale names).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from npllm.config import MOST_LAYERS, Reader, read_json
from npllm.errors import CheckpointError, ConfigError

log = logging.getLogger("npllm")

PARAMS = "params.json"
SINGLE = "consolidated.safetensors"
INDEX = "consolidated.safetensors.index.json"
SHARD = re.compile(r"consolidated-(\d{5})-of-(\d{5})\.safetensors")

# In the order in which they are looked for.
HUGGING_FACE_WEIGHTS = ("model.safetensors.index.json", "model.safetensors")

# Positions that mistral-inference prepares; what vLLM takes where params.json does not say.
POSITIONS = 128_000

# Of every published vocabulary; params.json does not say them.
BOS, EOS = 1, 2


# -- which files ------------------------------------------------------------------------------------------------------


def is_native(names: Collection[str]) -> bool:
    """Whether a folder or repository of files `names` is read from Mistral's own files.

    Only when they are all there is: with config.json and its weights there too, those are used, because their rows suit
    every other tool and one model must not be loaded twice.
    """
    if PARAMS not in names:
        return False
    hugging_face = any(name in names for name in HUGGING_FACE_WEIGHTS)
    return "config.json" not in names or (bool(weight_files(names)) and not hugging_face)


def names_in(folder: Path) -> list[str]:
    """The names in a folder; none where it cannot be listed, which the next attempt to read a file will say."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def description(names: Collection[str]) -> str:
    """The file that describes the model of a folder or repository of files `names`, whether it is there or not."""
    return PARAMS if is_native(names) else "config.json"


def weight_files(names: Collection[str]) -> list[str]:
    """Mistral's own weights among `names`: the index, which outranks the rest, or the single file, or the shards."""
    for name in (INDEX, SINGLE):
        if name in names:
            return [name]
    return sorted(name for name in names if SHARD.fullmatch(name))


def require_weights(names: Collection[str], where: str) -> list[str]:
    """`weight_files` of a model for which `is_native` holds; CheckpointError, which begins with `where`, if any lack."""
    files = weight_files(names)
    if not files:
        if any(name in names for name in HUGGING_FACE_WEIGHTS):
            raise CheckpointError(
                f"{where}: {PARAMS} describes Mistral's own files, but the weights are Hugging Face's; download config.json"
            )
        raise CheckpointError(f"{where}: {PARAMS} without weights; download {SINGLE} or its shards")
    numbers = [tuple(map(int, found.groups())) for name in files if (found := SHARD.fullmatch(name))]
    if numbers:
        _check_shards(numbers, where)
    return files


def _check_shards(numbers: list[tuple[int, ...]], where: str) -> None:
    totals = sorted({total for _, total in numbers})
    if len(totals) > 1:
        raise CheckpointError(f"{where}: shards of {' and of '.join(map(str, totals))} files are mixed; keep one set")
    wanted = range(1, totals[0] + 1)
    missing = sorted(set(wanted) - {number for number, _ in numbers})
    if missing:
        absent = f"consolidated-{missing[0]:05}-of-{totals[0]:05}.safetensors"
        raise CheckpointError(f"{where}: {absent} is missing, {len(missing)} of {totals[0]} in all; download it again")


def left_alone(names: Collection[str]) -> list[str]:
    """Mistral's own weights among `names` that are not read because Hugging Face's files are there."""
    theirs = any(name in names for name in HUGGING_FACE_WEIGHTS)
    return weight_files(names) if theirs and not is_native(names) else []


# -- params.json ------------------------------------------------------------------------------------------------------


def read_described(folder: Path, warn: Callable[..., None] = log.warning) -> tuple[dict[str, Any], str]:
    """The values of `folder`'s config.json, or of its params.json in their place, and a name for errors about them."""
    path = folder / description(names_in(folder))
    values = read_json(path, missing="; a model folder needs one")
    if path.name == PARAMS:
        return config_values(values, str(path), warn), f"{path}, as config.json would say it"
    return values, str(path)


def config_values(params: dict[str, Any], name: str = PARAMS, warn: Callable[..., None] = log.warning) -> dict[str, Any]:
    """Parsed parameters -> the values that config.json would hold; `name` and `warn` as in npllm.config.Reader."""
    reader = Reader(params, name, warn)
    reader.only("model_type", "transformer")
    reader.only("lora", None)
    values = _common(reader)
    moe, latent = reader.section("moe"), reader.raw("kv_lora_rank") is not None
    if latent:
        values |= _latent(reader, moe) | {"model_type": "mistral4"}
    else:
        values |= _grouped(reader, values["num_hidden_layers"])
        if moe is not None:
            values |= _mixture(moe)
    values["rope_parameters"] = rope = _rope(reader, windowed=bool(values.get("sliding_window")), latent=latent)
    if not latent and "llama_4_scaling_beta" in rope:
        values["model_type"] = "ministral3"
    values |= _quantisation(reader)
    towers = [tower for tower in ("vision_encoder", "multimodal") if reader.section(tower) is not None]
    reader.finish({"max_batch_size"})
    return {"model_type": "mistral3", "text_config": values, "vision_config": {}} if towers else values


def _required(reader: Reader, *keys: str) -> None:
    for key in keys:
        if reader.raw(key) is None:
            raise ConfigError(f"{reader.name}: has no {key}, which every model of Mistral's own files states")


def _common(reader: Reader) -> dict[str, Any]:
    _required(reader, "dim", "n_layers", "n_heads", "hidden_dim", "vocab_size", "norm_eps")
    positions = reader.integer("max_seq_len", POSITIONS)
    return {
        "hidden_size": reader.integer("dim", 0),
        "num_hidden_layers": reader.integer("n_layers", 0, most=MOST_LAYERS),
        "num_attention_heads": reader.integer("n_heads", 0),
        "num_key_value_heads": reader.integer("n_kv_heads", reader.integer("n_heads", 0)),
        "intermediate_size": reader.integer("hidden_dim", 0),
        "vocab_size": reader.integer("vocab_size", 0),
        "rms_norm_eps": reader.real("norm_eps", 0.0),
        "hidden_act": reader.choice("activation", "silu", ["silu"]),
        "tie_word_embeddings": reader.flag("tied_embeddings", False),
        "max_position_embeddings": reader.integer("max_position_embeddings", positions),
        "rope_interleave": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def _grouped(reader: Reader, layers: int) -> dict[str, Any]:
    """Attention with grouped heads: the width of a head, and the window."""
    window = reader.raw("sliding_window")
    values = {"model_type": "mistral", "head_dim": reader.optional_integer("head_dim")}
    if not isinstance(window, list):
        return values | {"sliding_window": reader.optional_integer("sliding_window")}
    usable = all(size is None or (type(size) is int and size > 0) for size in window)
    if not window or layers % len(window) or not usable:
        raise reader.fail("sliding_window", f"must be windows or null, repeated over n_layers = {layers}")
    sizes = set(window)
    if len(sizes) == 1:
        return values | {"sliding_window": window[0]}
    if len(sizes - {None}) > 1:
        raise reader.fail("sliding_window", "names windows of several widths, which is not supported")
    kinds = ["full_attention" if size is None else "sliding_attention" for size in window]
    layer_types = kinds * (layers // len(window))
    return values | {"model_type": "ministral", "sliding_window": max(sizes - {None}), "layer_types": layer_types}


def _latent(reader: Reader, moe: Reader | None) -> dict[str, Any]:
    """Latent attention and its mixture of experts, as in Mistral Large 3."""
    if moe is None:
        raise reader.fail("kv_lora_rank", "without a moe section is not supported")
    reader.only("sliding_window", None)
    reader.raw("head_dim")  # the sum of the two parts below
    _required(reader, "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    _required(moe, "num_experts", "num_experts_per_tok", "expert_hidden_dim")
    moe.only("route_every_n", 1)
    moe.only("renorm_strategy", "WEIGHTS")
    moe.only("use_load_balancing_bias", False)
    values = {
        "q_lora_rank": reader.optional_integer("q_lora_rank"),
        "kv_lora_rank": reader.integer("kv_lora_rank", 0),
        "qk_nope_head_dim": reader.integer("qk_nope_head_dim", 0),
        "qk_rope_head_dim": reader.integer("qk_rope_head_dim", 0),
        "v_head_dim": reader.integer("v_head_dim", 0),
        "n_routed_experts": moe.integer("num_experts", 0),
        "num_experts_per_tok": moe.integer("num_experts_per_tok", 0),
        "moe_intermediate_size": moe.integer("expert_hidden_dim", 0),
        "n_shared_experts": moe.integer("num_shared_experts", 1),
        "first_k_dense_replace": moe.integer("first_k_dense_replace", 0, least=0),
        "routed_scaling_factor": moe.real("routed_scale", 1.0),
        "n_group": moe.integer("num_expert_groups", 1),
        "topk_group": moe.integer("num_expert_groups_per_tok", 1),
        "norm_topk_prob": True,
    }
    moe.finish({"expert_parallel", "expert_model_parallel"})
    return values


def _mixture(moe: Reader) -> dict[str, Any]:
    """The experts of Mixtral, each as wide as `hidden_dim` says."""
    _required(moe, "num_experts", "num_experts_per_tok")
    values = {
        "model_type": "mixtral",
        "num_local_experts": moe.integer("num_experts", 0),
        "num_experts_per_tok": moe.integer("num_experts_per_tok", 0),
    }
    moe.finish()
    return values


def _rope(reader: Reader, *, windowed: bool, latent: bool) -> dict[str, Any]:
    theta = reader.real("rope_theta", 1e4 if windowed else 1e6)
    yarn, temperature = reader.section("yarn"), reader.section("llama_4_scaling")
    if yarn is None:
        if temperature is not None:
            raise reader.fail("llama_4_scaling", "without a yarn section is not supported")
        return {"rope_type": "default", "rope_theta": theta}
    _required(yarn, "factor", "original_max_position_embeddings")
    original = yarn.integer("original_max_position_embeddings", 0)
    rope = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": yarn.real("factor", 0.0),
        "original_max_position_embeddings": original,
        "beta_fast": yarn.real("beta", 32.0),
        "beta_slow": yarn.real("alpha", 1.0),
    }
    if not yarn.flag("apply_scale", True):
        rope["attention_factor"] = 1.0
    elif latent:
        rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    yarn.finish()
    if temperature is not None:
        rope["llama_4_scaling_beta"] = _temperature(temperature, original)
    return rope


def _temperature(section: Reader, original: int) -> float:
    """The slope of the queries' growth; it counts in steps of the same original context as yarn."""
    _required(section, "beta", "original_max_position_embeddings")
    if section.integer("original_max_position_embeddings", 0) != original:
        raise section.fail("original_max_position_embeddings", f"differs from yarn's {original}, which is not supported")
    beta = section.real("beta", 0.0, positive=False)
    section.finish()
    return beta


def _quantisation(reader: Reader) -> dict[str, Any]:
    """`quantization_config` as Hugging Face's loaders read it; FP8 of Mistral's own has one factor per tensor."""
    own, theirs = reader.section("quantization"), reader.raw("quantization_config")
    if theirs is not None:
        return {"quantization_config": theirs}
    if own is None or not own.values:
        return {}
    if own.raw("quant_method") is not None:
        method = str(own.raw("quant_method")).lower().replace("_", "-")
        return {"quantization_config": own.values | {"quant_method": method}}
    _required(own, "qformat_weight")
    own.choice("qformat_weight", "", ["fp8_e4m3"])
    scheme = own.choice("qscheme_act", "TENSOR", ["TENSOR", "NO_SCALES", "DYNAMIC"])
    own.finish()
    activations = "static" if scheme == "TENSOR" else "dynamic"
    return {"quantization_config": {"quant_method": "fp8", "activation_scheme": activations, "weight_block_size": None}}


# -- names ------------------------------------------------------------------------------------------------------------

# What the text model does without.
TOWERS = re.compile(r"(vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm)\.")

# Name in the file -> name in the model. Experts come first: in a large model nearly all tensors are theirs.
NAMES = [
    (re.compile(old + r"\.(?P<leaf>\w+)"), new + r".\g<leaf>")
    for old, new in [
        (r"(layers\.\d+)\.experts\.(\d+)\.w1", r"\1.mlp.experts.\2.gate_proj"),
        (r"(layers\.\d+)\.experts\.(\d+)\.w2", r"\1.mlp.experts.\2.down_proj"),
        (r"(layers\.\d+)\.experts\.(\d+)\.w3", r"\1.mlp.experts.\2.up_proj"),
        (r"(layers\.\d+)\.gate", r"\1.mlp.gate"),
        (r"(layers\.\d+)\.shared_experts\.w1", r"\1.mlp.shared_experts.gate_proj"),
        (r"(layers\.\d+)\.shared_experts\.w2", r"\1.mlp.shared_experts.down_proj"),
        (r"(layers\.\d+)\.shared_experts\.w3", r"\1.mlp.shared_experts.up_proj"),
        (r"(layers\.\d+)\.feed_forward\.(gate|experts\.\d+\.w[123])", r"\1.block_sparse_moe.\2"),
        (r"(layers\.\d+)\.feed_forward\.w1", r"\1.mlp.gate_proj"),
        (r"(layers\.\d+)\.feed_forward\.w2", r"\1.mlp.down_proj"),
        (r"(layers\.\d+)\.feed_forward\.w3", r"\1.mlp.up_proj"),
        (r"(layers\.\d+)\.attention\.w([qkvo])", r"\1.self_attn.\2_proj"),
        (r"(layers\.\d+)\.attention\.w(q_[ab]|kv_b)", r"\1.self_attn.\2_proj"),
        (r"(layers\.\d+)\.attention\.wkv_a_with_mqa", r"\1.self_attn.kv_a_proj_with_mqa"),
        (r"(layers\.\d+)\.attention\.(q_a|kv_a)_norm", r"\1.self_attn.\2_layernorm"),
        (r"(layers\.\d+)\.attention_norm", r"\1.input_layernorm"),
        (r"(layers\.\d+)\.ffn_norm", r"\1.post_attention_layernorm"),
        (r"tok_embeddings", r"embed_tokens"),
        (r"norm", r"norm"),
        (r"output", r"lm_head"),
    ]
]


def own_name(name: str) -> str | None:
    """The model's name for tensor `name` of Mistral's own files; None if it belongs to another tower.

    A name that is not known comes back as it is, to be refused where tensors are matched.
    """
    if TOWERS.match(name):
        return None
    for pattern, own in NAMES:
        if found := pattern.fullmatch(name):
            return found.expand(own)
    return name
