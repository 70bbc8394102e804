"""Hypothesis strategies: sizes named by the letters of npllm.arrays, arrays named by suffix, and tiny models.

Numbers are drawn from a seed, not one by one: a counterexample is about shapes and settings, and shrinks in those.
A strategy is kept, because Hypothesis validates each that is made anew, which takes longer than many a model.
"""

from functools import cache
from typing import Any

import numpy as np
from hypothesis import strategies as st

from npllm import LLM, Backend
from npllm.arrays import Array
from npllm.blocks import Mask
from npllm.models import REGISTRY, Described, interpret
from tests.export import CASES

SIZES: dict[str, st.SearchStrategy[int]] = {
    "B": st.integers(1, 4),
    "T": st.integers(1, 9),
    "S": st.integers(1, 14),
    "M": st.integers(1, 9),
    "D": st.integers(2, 9),
    "G": st.integers(1, 3),
    "R": st.integers(1, 3),
    "K": st.sampled_from([2, 4, 6, 10]),
    "V": st.integers(1, 7),
    "J": st.integers(1, 5),
}

seeds = st.integers(0, 2**16)
masks = st.builds(Mask, window=st.none() | st.integers(1, 9), chunk=st.none() | st.integers(1, 9))


@st.composite
def arrays(draw: st.DrawFn, *names: str, scale: float = 1.0, **sizes: int) -> list[Array]:
    """A float64 array of normal numbers for each of `names` ("q_MHK"); a letter has one size, H is G times R.

    `sizes` fixes letters.
    """
    sizes = dict(sizes)
    for letter in "".join(name.rpartition("_")[2] for name in names).replace("H", "GR"):
        if letter not in sizes:
            sizes[letter] = draw(SIZES[letter], label=letter)
    if "G" in sizes and "R" in sizes:
        sizes["H"] = sizes["G"] * sizes["R"]
    dice = np.random.default_rng(draw(seeds, label="seed"))
    shapes = [[sizes[letter] for letter in name.rpartition("_")[2]] for name in names]
    return [scale * dice.standard_normal(shape) for shape in shapes]


# What random configs share. The hidden sizes are odd, so never heads x head_dim (even); no size is a power of two by habit.
VOCABULARY, CONTEXT = st.integers(11, 40), 48
widths = st.integers(2, 12).map(lambda n: 2 * n + 1)
layers = st.integers(1, 3)


@cache
@st.composite
def rope_parameters(draw: st.DrawFn) -> dict[str, Any]:
    """`rope_parameters` of every kind; the bands and ramps lie within the tiny context."""
    theta = {"rope_theta": draw(st.sampled_from([20.0, 100.0, 1000.0]))}
    scaled = theta | {"factor": draw(st.sampled_from([2.0, 8.0]))}
    original = {"original_max_position_embeddings": draw(st.integers(8, 24))}
    kinds: list[dict[str, Any]] = [
        theta | {"rope_type": "default"},
        scaled | {"rope_type": "linear"},
        scaled | original | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        scaled | original | {"rope_type": "yarn", "beta_fast": draw(st.sampled_from([2.0, 32.0]))},
    ]
    return draw(st.sampled_from(kinds))


@cache
@st.composite
def decoder(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a config.json of the Llama lineage: 2 or 3 key/value heads, 2 or 3 query heads for each."""
    kv_heads = draw(st.integers(2, 3))
    return {
        "vocab_size": draw(VOCABULARY),
        "hidden_size": draw(widths),
        "intermediate_size": draw(st.integers(3, 20)),
        "num_hidden_layers": draw(layers),
        "num_attention_heads": kv_heads * draw(st.integers(2, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(SIZES["K"]),
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "rope_parameters": draw(rope_parameters()),
    }


@cache
@st.composite
def llama(draw: st.DrawFn) -> dict[str, Any]:
    return draw(decoder()) | {"mlp_bias": draw(st.booleans())}


@cache
@st.composite
def llama4(draw: st.DrawFn) -> dict[str, Any]:
    """MoE and dense layers, RoPE and NoPE, chunks and not, each apart from the others."""
    fields, experts = draw(decoder()), draw(st.integers(2, 5))
    some = st.lists(st.integers(0, 1), min_size=fields["num_hidden_layers"], max_size=fields["num_hidden_layers"])
    kinds = [("full_attention", "chunked_attention")[kind] for kind in draw(some)]
    return (
        fields
        | {"intermediate_size_mlp": draw(st.integers(3, 20)), "num_local_experts": experts}
        | {"num_experts_per_tok": draw(st.integers(1, min(experts, 3))), "use_qk_norm": draw(st.booleans())}
        | {"moe_layers": [i for i, is_moe in enumerate(draw(some)) if is_moe], "no_rope_layers": draw(some)}
        | {"attention_chunk_size": draw(st.integers(1, 12))}
        | {"attn_temperature_tuning": draw(st.sampled_from([True, False, 4])), "floor_scale": draw(st.integers(1, 9))}
        | draw(st.sampled_from([{}, {"layer_types": kinds}]))
    )


@cache
@st.composite
def qwen3(draw: st.DrawFn) -> dict[str, Any]:
    window = {"use_sliding_window": draw(st.booleans()), "sliding_window": draw(st.integers(1, 12))}
    return draw(decoder()) | window | {"max_window_layers": draw(st.integers(0, 2))}


@cache
@st.composite
def qwen2(draw: st.DrawFn) -> dict[str, Any]:
    """As Qwen3, with the biases that it always has."""
    return {key: value for key, value in draw(qwen3()).items() if key != "attention_bias"}


@cache
@st.composite
def mixture(draw: st.DrawFn) -> dict[str, Any]:
    """What the mixtures of Qwen and Mixtral share: 2 to 5 experts, of which 1 to all are chosen."""
    experts = draw(st.integers(2, 5))
    fields = {key: value for key, value in draw(decoder()).items() if key != "attention_bias"}
    return fields | {"num_local_experts": experts, "num_experts_per_tok": draw(st.integers(1, experts))}


@cache
@st.composite
def qwen3_moe(draw: st.DrawFn) -> dict[str, Any]:
    """Dense and sparse layers, in any pattern that the fields allow."""
    return draw(mixture()) | {
        "moe_intermediate_size": draw(st.integers(1, 9)),
        "norm_topk_prob": draw(st.booleans()),
        "decoder_sparse_step": draw(st.integers(1, 2)),
        "mlp_only_layers": draw(st.lists(st.integers(0, 3), max_size=2)),
        "attention_bias": draw(st.booleans()),
        "use_sliding_window": draw(st.booleans()),
        "sliding_window": draw(st.integers(1, 12)),
    }


@cache
@st.composite
def qwen2_moe(draw: st.DrawFn) -> dict[str, Any]:
    fields = {key: value for key, value in draw(qwen3_moe()).items() if key != "attention_bias"}
    shared = {"shared_expert_intermediate_size": draw(st.integers(1, 9)), "qkv_bias": draw(st.booleans())}
    return fields | shared | {"max_window_layers": draw(st.integers(0, 3))}


@cache
@st.composite
def mixtral(draw: st.DrawFn) -> dict[str, Any]:
    return draw(mixture()) | {"sliding_window": draw(st.none() | st.integers(1, 12)), "rope_interleave": draw(st.booleans())}


@cache
@st.composite
def mistral(draw: st.DrawFn) -> dict[str, Any]:
    fields = {key: value for key, value in draw(decoder()).items() if key != "attention_bias"}
    window = {"sliding_window": draw(st.none() | st.integers(1, 12))}
    return fields | window | {"rope_interleave": draw(st.booleans())}


@cache
@st.composite
def olmo2(draw: st.DrawFn) -> dict[str, Any]:
    """Grouped heads, or as many key/value heads as heads."""
    fields = draw(decoder())
    return fields | draw(st.sampled_from([{}, {"num_key_value_heads": fields["num_attention_heads"]}]))


@cache
@st.composite
def gemma2(draw: st.DrawFn) -> dict[str, Any]:
    caps = st.none() | st.sampled_from([2.0, 30.0])
    fields = draw(decoder()) | {
        "hidden_activation": draw(st.sampled_from(["gelu_pytorch_tanh", "gelu"])),
        "query_pre_attn_scalar": draw(st.integers(1, 20)),
        "sliding_window": draw(st.integers(1, 12)),
        "attn_logit_softcapping": draw(caps),
        "final_logit_softcapping": draw(caps),
    }
    types = st.sampled_from(["sliding_attention", "full_attention"])
    return fields | draw(st.sampled_from([{}, {"layer_types": [draw(types) for _ in range(fields["num_hidden_layers"])]}]))


@cache
@st.composite
def gemma3(draw: st.DrawFn) -> dict[str, Any]:
    ropes = {"full_attention": draw(rope_parameters()), "sliding_attention": draw(rope_parameters())}
    pattern = {"sliding_window_pattern": draw(st.integers(1, 3))}
    return draw(gemma2()) | pattern | {"rope_parameters": ropes, "attn_logit_softcapping": None}


@cache
@st.composite
def gemma3n(draw: st.DrawFn) -> dict[str, Any]:
    """Two to four layers, of which some share keys: those before have every type that occurs."""
    fields, streams = draw(gemma3()), draw(st.integers(2, 4))
    own, shared = draw(st.integers(1, 3)), draw(st.integers(0, 1))
    types = draw(st.lists(st.sampled_from(["sliding_attention", "full_attention"]), min_size=own, max_size=own))
    types += [draw(st.sampled_from(types)) for _ in range(shared)]
    width = st.integers(3, 20)
    unused = ("attn_logit_softcapping", "query_pre_attn_scalar", "sliding_window_pattern")
    return {key: value for key, value in fields.items() if key not in unused} | {
        "num_hidden_layers": len(types),
        "num_kv_shared_layers": shared,
        "layer_types": types,
        "intermediate_size": draw(width | st.lists(width, min_size=len(types), max_size=len(types))),
        "activation_sparsity_pattern": [draw(st.sampled_from([0.0, 0.5, 0.9])) for _ in types],
        "vocab_size_per_layer_input": fields["vocab_size"] - draw(st.integers(-1, 9)),
        "hidden_size_per_layer_input": draw(st.integers(1, 5)),
        "altup_num_inputs": streams,
        "altup_active_idx": draw(st.integers(0, streams - 1)),
        "altup_correct_scale": draw(st.booleans()),
        "laurel_rank": draw(st.integers(1, 4)),
    }


@cache
@st.composite
def gpt2(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(2, 4))
    return {
        "vocab_size": draw(VOCABULARY),
        "n_embd": heads * draw(st.integers(2, 7)),
        "n_head": heads,
        "n_layer": draw(layers),
        "n_inner": draw(st.none() | st.integers(3, 20)),
        "n_positions": CONTEXT,
        "tie_word_embeddings": draw(st.booleans()),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
    }


@cache
@st.composite
def latent(draw: st.DrawFn) -> dict[str, Any]:
    """What DeepSeek V2, V3 and Mistral Large 3 share: latent widths, dense layers, experts in groups."""
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    kept, heads = draw(st.integers(1, groups)), draw(st.integers(2, 5))
    fields = {key: value for key, value in draw(decoder()).items() if key not in ("head_dim", "num_key_value_heads")}
    return fields | {
        "num_attention_heads": heads,
        "q_lora_rank": draw(st.none() | st.integers(2, 12)),
        "kv_lora_rank": draw(st.integers(2, 12)),
        "qk_nope_head_dim": draw(st.integers(1, 7)),
        "qk_rope_head_dim": draw(SIZES["K"]),
        "v_head_dim": draw(SIZES["V"]),
        "moe_intermediate_size": draw(st.integers(1, 9)),
        "n_routed_experts": groups * per_group,
        "n_shared_experts": draw(st.integers(1, 2)),
        "num_experts_per_tok": draw(st.integers(1, min(4, kept * per_group))),
        "n_group": groups,
        "topk_group": kept,
        "first_k_dense_replace": draw(st.integers(0, 3)),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
    }


@cache
@st.composite
def deepseek_v3(draw: st.DrawFn) -> dict[str, Any]:
    flags = {"rope_interleave": draw(st.booleans()), "norm_topk_prob": draw(st.booleans())}
    fields = draw(latent()) | flags | {"moe_layer_freq": draw(st.integers(1, 2))}
    rope = fields["rope_parameters"]
    if rope["rope_type"] != "default" and draw(st.booleans()):
        rope |= {"mscale": draw(st.sampled_from([0.707, 1.0])), "mscale_all_dim": draw(st.sampled_from([0, 0.707, 1.0]))}
    return fields


@cache
@st.composite
def deepseek_v2(draw: st.DrawFn) -> dict[str, Any]:
    method = draw(st.sampled_from(["greedy", "group_limited_greedy"]))
    return draw(latent()) | {"topk_method": method, "mlp_bias": draw(st.booleans())}


@cache
@st.composite
def mistral4(draw: st.DrawFn) -> dict[str, Any]:
    """The context is many times the one that the query temperature counts in."""
    fields = {key: value for key, value in draw(deepseek_v3()).items() if key != "moe_layer_freq"}
    rope = fields["rope_parameters"] | {"llama_4_scaling_beta": draw(st.sampled_from([0.0, 0.5]))}
    if rope["rope_type"] != "default":
        rope |= {"original_max_position_embeddings": 7}
    return fields | {"rope_parameters": rope}


OWN: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "deepseek_v2": deepseek_v2(),
    "deepseek_v3": deepseek_v3(),
    "gemma2": gemma2(),
    "gemma3_text": gemma3(),
    "gemma3n_text": gemma3n(),
    "gpt2": gpt2(),
    "kimi_k2": deepseek_v3(),
    "llama": llama(),
    "llama4_text": llama4(),
    "mistral": mistral(),
    "mistral4": mistral4(),
    "mixtral": mixtral(),
    "olmo2": olmo2(),
    "qwen2": qwen2(),
    "qwen2_moe": qwen2_moe(),
    "qwen3": qwen3(),
    "qwen3_moe": qwen3_moe(),
}


def exported(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """The configs of the cases whose truth is exported."""
    return st.sampled_from([case.config for case in CASES.values() if case.model == name])


# A strategy for each model_type; one that has none of its own above draws from its exported cases.
CONFIGS = {name: OWN[name] if name in OWN else exported(name) for name in sorted(REGISTRY)}


@cache
def tiny_config(architecture: str | None = None) -> st.SearchStrategy[Described]:
    """A random small configuration of one architecture (None: of any)."""
    names = [architecture] if architecture else list(CONFIGS)
    return st.sampled_from(names).flatmap(
        lambda name: CONFIGS[name].map(lambda config: interpret({"model_type": name} | config))
    )


@st.composite
def tiny_model(draw: st.DrawFn, architecture: str | None = None, dtype: str = "float64", **options: Any) -> LLM:
    """A random small model with weights that leave nothing neutral: gains apart from 1, biases apart from 0."""
    return LLM.random(draw(tiny_config(architecture)), Backend(dtype), seed=draw(seeds), **options)


@st.composite
def model_and_tokens(draw: st.DrawFn, rows: int = 1, **options: Any) -> tuple[LLM, list[Array]]:
    """A tiny model, and rows of 1 to 30 token ids."""
    llm = draw(tiny_model(**options))
    token = st.integers(0, llm.config.vocab_size - 1)
    ids = st.lists(token, min_size=1, max_size=30).map(lambda row: np.array(row, dtype=np.int64))
    return llm, [draw(ids) for _ in range(rows)]


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[int]:
    """Places to cut a sequence of `length`; pieces may be empty."""
    return sorted(draw(st.lists(st.integers(0, length), max_size=5)))
