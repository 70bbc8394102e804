"""Truth cases rewritten as Mistral publishes its models: params.json, consolidated.safetensors, interleaved rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from npllm.arrays import Array
from tests.export import TRUTH

Tensors = dict[str, Array]

# Part of a name in Hugging Face's files -> in Mistral's, applied one after the other.
PARTS = {
    "model.": "",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a_with_mqa",
    "self_attn.kv_a_layernorm": "attention.kv_a_norm",
    "self_attn.kv_b_proj": "attention.wkv_b",
    "self_attn.q_a_layernorm": "attention.q_a_norm",
    "self_attn.q_a_proj": "attention.wq_a",
    "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "block_sparse_moe": "feed_forward",
    "mlp.gate.": "gate.",
    "mlp.shared_experts": "shared_experts",
    "mlp.experts": "experts",
    "mlp.": "feed_forward.",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}

KEYS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size", "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps", "tied_embeddings": "tie_word_embeddings", "sliding_window": "sliding_window",
    "max_position_embeddings": "max_position_embeddings", "kv_lora_rank": "kv_lora_rank", "q_lora_rank": "q_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim", "qk_rope_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim",
}  # fmt: skip

MOE_KEYS = {
    "num_experts": "n_routed_experts", "num_experts_per_tok": "num_experts_per_tok",
    "expert_hidden_dim": "moe_intermediate_size", "num_shared_experts": "n_shared_experts",
    "first_k_dense_replace": "first_k_dense_replace", "routed_scale": "routed_scaling_factor",
    "num_expert_groups": "n_group", "num_expert_groups_per_tok": "topk_group",
}  # fmt: skip


def make_native(folder: Path, case: str) -> Array:
    """Write truth case `case` to `folder` (created if need be) in Mistral's own form -> the tokens [B, T] of its trace."""
    folder.mkdir(parents=True, exist_ok=True)
    source = TRUTH / "models" / case
    config = json.loads((source / "config.json").read_text())
    (folder / "params.json").write_text(json.dumps(native_params(config)))
    save_file(native_tensors(load_file(source / "model.safetensors"), config), folder / "consolidated.safetensors")
    return load_file(source / "trace.safetensors")["tokens"]


def native_params(config: dict[str, Any]) -> dict[str, Any]:
    """params.json that says what a config.json of mistral, mixtral or mistral4 says; a window of null is left out."""
    params = {key: config[name] for key, name in KEYS.items() if config.get(name) is not None}
    params["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config["rope_parameters"]
    params["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] == "yarn":
        named = {"factor": "factor", "original_max_position_embeddings": "original_max_position_embeddings"}
        named |= {"beta": "beta_fast", "alpha": "beta_slow"}
        params["yarn"] = {key: rope[name] for key, name in named.items() if name in rope}
        params["yarn"]["apply_scale"] = rope.get("attention_factor") != 1.0
    if "llama_4_scaling_beta" in rope:
        original = rope["original_max_position_embeddings"]
        params["llama_4_scaling"] = {"beta": rope["llama_4_scaling_beta"], "original_max_position_embeddings": original}
    if "kv_lora_rank" in config:
        params["moe"] = {key: config[name] for key, name in MOE_KEYS.items()}
    elif "num_local_experts" in config:
        params["moe"] = {"num_experts": config["num_local_experts"], "num_experts_per_tok": config["num_experts_per_tok"]}
    return params


def native_tensors(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """The same weights under Mistral's names; rows of q and k interleaved, unless RoPE was so before."""
    native = {}
    for name, values in split_experts(tensors).items():
        if name.endswith(("q_proj.weight", "k_proj.weight")) and not config.get("rope_interleave"):
            values = interleaved_rows(
                values, config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            )
        for theirs, mistrals in PARTS.items():
            name = name.replace(theirs, mistrals)
        native[name] = np.ascontiguousarray(values)
    return native


def split_experts(tensors: Tensors) -> Tensors:
    """Experts one by one, where transformers keeps those of a layer in one tensor."""
    split = {}
    for name, values in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(np.split(expert, 2) for expert in values):
                base = f"{name.removesuffix('gate_up_proj')}{e}."
                split |= {f"{base}gate_proj.weight": gate, f"{base}up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            base = name.removesuffix("down_proj")
            split |= {f"{base}{e}.down_proj.weight": expert for e, expert in enumerate(values)}
        else:
            split[name] = values
    return split


def interleaved_rows(weight: Array, head_dim: int) -> Array:
    """Rows of q or k from half-split order to interleaved: row j + b K/2 of each head becomes row 2j + b."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[-1])
    return np.ascontiguousarray(halves.transpose(0, 2, 1, 3).reshape(weight.shape))
