"""Tiny checkpoints and a tiny tokenizer for tests, written to a folder like those that people download."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from npllm.handles import Stack
from npllm.models import REGISTRY, interpret
from npllm.weights import random_weights
from tests.export import CASES

END, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT = """The quick brown fox jumps over the lazy dog. A model of language gives the probability of the next token.
Grouped heads share their keys and values; a cache keeps them, so that no token is computed twice. Die Straße ist naß."""

COMMON = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}

DECODER = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}

LATENT = DECODER | {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    "moe_intermediate_size": 14,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

MIXTURE = DECODER | {"num_local_experts": 6, "num_experts_per_tok": 2}

OWN: dict[str, dict[str, Any]] = {
    "qwen3": DECODER | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "deepseek_v2": LATENT | {"architectures": ["DeepseekV2ForCausalLM"], "topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT | {"architectures": ["DeepseekV3ForCausalLM"]},
    "kimi_k2": LATENT | {"architectures": ["DeepseekV3ForCausalLM"]},
    "mistral4": LATENT | {"architectures": ["Mistral4ForCausalLM"]},
    "gemma2": DECODER | {"architectures": ["Gemma2ForCausalLM"], "head_dim": 16, "sliding_window": 7},
    "gemma3_text": DECODER
    | {"architectures": ["Gemma3ForCausalLM"], "head_dim": 16, "sliding_window": 7, "sliding_window_pattern": 2},
    "gemma3n_text": DECODER
    | {"architectures": ["Gemma3nForCausalLM"], "head_dim": 16, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 7, "laurel_rank": 6}
    | {"vocab_size_per_layer_input": 310, "hidden_size_per_layer_input": 6, "activation_sparsity_pattern": [0.5, 0, 0, 0]},
    "qwen2": DECODER | {"architectures": ["Qwen2ForCausalLM"]},
    "llama": DECODER | {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5},
    "llama4_text": DECODER
    | {"architectures": ["Llama4ForCausalLM"], "head_dim": 16, "intermediate_size_mlp": 40, "num_local_experts": 3}
    | {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "attention_chunk_size": 16, "floor_scale": 8},
    "mistral": DECODER | {"architectures": ["MistralForCausalLM"], "head_dim": 16, "sliding_window": None},
    "mixtral": MIXTURE | {"architectures": ["MixtralForCausalLM"], "intermediate_size": 14},
    "qwen2_moe": MIXTURE
    | {"architectures": ["Qwen2MoeForCausalLM"], "moe_intermediate_size": 14, "shared_expert_intermediate_size": 10},
    "qwen3_moe": MIXTURE | {"architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16, "moe_intermediate_size": 14},
    "olmo2": DECODER | {"architectures": ["Olmo2ForCausalLM"]},
    "gpt2": COMMON | {"architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
}


def exported(name: str) -> dict[str, Any]:
    """The config of the first case whose truth is exported, with a vocabulary and a context as the others have them."""
    config = next(case.config for case in CASES.values() if case.model == name)
    return config | COMMON | {"max_position_embeddings": DECODER["max_position_embeddings"]}


# A config for each model_type; one that has none of its own above takes that of an exported case.
CONFIGS = {name: OWN[name] if name in OWN else exported(name) for name in sorted(REGISTRY)}

# What published files put before a tensor's own name (not before lm_head.weight).
PREFIX = dict.fromkeys(CONFIGS, "model.") | {"gpt2": "transformer."}

STORAGE = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

# A value of `config_changes` that takes the key away.
ABSENT = object()


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE of 300 tokens: ids 0 to 2 are END, IM_START and IM_END; any text can be encoded."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in (END, IM_START, IM_END)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    built.train_from_iterator([TEXT], trainer)
    return built


def make_tokenizer(folder: Path, chat_template: Any = True, **settings: Any) -> None:
    """Write tokenizer.json and tokenizer_config.json; `settings` change the latter.

    `chat_template` is True (ChatML), False (none), or what the setting of that name shall be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    values: dict[str, Any] = {"eos_token": IM_END, "pad_token": END, "model_max_length": 256}
    if chat_template is not False:
        values["chat_template"] = CHATML if chat_template is True else chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(values | settings))


def make_config(architecture: str = "qwen3", **changes: Any) -> dict[str, Any]:
    """The config.json of a tiny model; a change to ABSENT removes the key."""
    values = {"model_type": architecture} | CONFIGS[architecture] | changes
    return {key: value for key, value in values.items() if value is not ABSENT}


def make_tensors(config: dict[str, Any], seed: int = 0, prefix: str | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Random float32 tensors under the names of the checkpoint, experts one by one; `prefix` replaces the published one."""
    described = interpret(config)
    spec = described.architecture.weight_spec(described.config)
    before = PREFIX[config["model_type"]] if prefix is None else prefix
    tensors = {}
    for name, weight in random_weights(spec, seed).items():
        if isinstance(weight, Stack):
            each = spec[name].forms[0].name
            tensors |= {before + each.format(e): expert.data for e, expert in enumerate(weight.weights)}
        else:
            tensors[name if name == "lm_head.weight" else before + name] = weight.data
    return tensors


def save_tensors(folder: Path, tensors: dict[str, np.ndarray[Any, Any]], storage: str = "F32", shards: int = 1) -> None:
    """Write model.safetensors, or `shards` files with their index."""
    stored = {name: np.ascontiguousarray(values.astype(STORAGE[storage])) for name, values in tensors.items()}
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        names = list(stored)[i::shards]
        save_file({name: stored[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(each.nbytes for each in stored.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_checkpoint(
    folder: Path,
    architecture: str = "qwen3",
    seed: int = 0,
    storage: str = "F32",
    with_tokenizer: bool = True,
    **config_changes: Any,
) -> Path:
    """Write a whole model folder (created if need be): config.json, model.safetensors, the tokenizer -> the folder.

    Random weights of `seed`, stored as F32, F16 or BF16; the model is 2 layers of width 32, 320 tokens, context 256.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(architecture, **config_changes)
    (folder / "config.json").write_text(json.dumps(config))
    save_tensors(folder, make_tensors(config, seed), storage)
    if with_tokenizer:
        make_tokenizer(folder)
    return folder
