"""Hypothesis strategies: sizes named by the letters of npllm.arrays, arrays named by suffix, and tiny models.

Numbers are drawn from a seed, not one by one: a counterexample is about shapes and settings, and shrinks in those.
"""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from npllm import LLM, Backend
from npllm.blocks import Mask
from npllm.models import Described, interpret
from tests.compare import Array

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


@st.composite
def llama(draw: st.DrawFn) -> dict[str, Any]:
    return draw(decoder()) | {"mlp_bias": draw(st.booleans())}


@st.composite
def qwen3(draw: st.DrawFn) -> dict[str, Any]:
    window = {"use_sliding_window": draw(st.booleans()), "sliding_window": draw(st.integers(1, 12))}
    return draw(decoder()) | window | {"max_window_layers": draw(st.integers(0, 2))}


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


# One strategy per model_type; a house test demands that the registry has no other.
CONFIGS: dict[str, st.SearchStrategy[dict[str, Any]]] = {"gpt2": gpt2(), "llama": llama(), "qwen3": qwen3()}


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
