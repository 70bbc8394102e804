"""A mixture of experts against a dense model that computes as much per token, both on the NumPy backend, in one run.

Two layers each: those of Qwen3-30B-A3B (8 of 128 experts of width 768), the same with 32 experts, and a dense FFN as
wide as eight experts (6144). Attention is the same, the vocabulary is cut to 4096.

prefill   arithmetic operations on active weights per second, for a prompt of 512 tokens;
decode    bytes of active weights per second, token by token; and seconds per token with 128 experts against 32.
"""

from __future__ import annotations

from typing import Any

from bench.canon import about, keep
from npllm.bench import measure
from npllm.llm import LLM
from npllm.models import interpret
from npllm.registry import get_backend
from npllm.weights import active_parameters

PROMPT, NEW, CHOSEN = 512, 64, 8

SHARED: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "max_position_embeddings": 4096,
}  # fmt: skip
MIXTURE = SHARED | {"model_type": "qwen3_moe", "num_experts_per_tok": CHOSEN, "moe_intermediate_size": 768}
SHAPES = {
    "dense": SHARED | {"model_type": "qwen3", "intermediate_size": 6144},
    "experts128": MIXTURE | {"num_experts": 128},
    "experts32": MIXTURE | {"num_experts": 32},
}


def run(rounds: int) -> dict[str, Any]:
    """All figures of one run."""
    models = {name: LLM.random(interpret(shape, name), get_backend("numpy"), name=name) for name, shape in SHAPES.items()}
    table = SHARED["vocab_size"] * SHARED["hidden_size"]
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, llm in models.items():
            pp, tg = measure(llm, PROMPT, NEW, repetitions=1)
            # The embedding is looked up, and the head sees the last token of a prompt only.
            layers = active_parameters(llm.model.spec, CHOSEN) - 2 * table
            keep(best, f"{name}_prefill_flops", 2 * layers * pp.tokens_per_second)
            keep(best, f"{name}_decode_bytes", 4 * (layers + table) * tg.tokens_per_second)
    return {
        "schema": "npllm.bench.moe/1",
        **about(),
        **best,
        "prefill_ratio": best["experts128_prefill_flops"] / best["dense_prefill_flops"],
        "decode_ratio": best["experts128_decode_bytes"] / best["dense_decode_bytes"],
        "decode_128_against_32": best["experts128_decode_bytes"] / best["experts32_decode_bytes"],
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = [
        ("prefill 512, GFLOP/s on active weights", "prefill_flops", "dense", "prefill_ratio"),
        ("decode, GB of active weights/s", "decode_bytes", "dense", "decode_ratio"),
        ("the same, 128 experts against 32", "decode_bytes", "experts32", "decode_128_against_32"),
    ]
    lines = ["| figure | 8 of 128 experts | against | ratio |", "|---|---|---|---|"]
    for name, figure, other, ratio in rows:
        mine, theirs = figures[f"experts128_{figure}"] / 1e9, figures[f"{other}_{figure}"] / 1e9
        lines.append(f"| {name} | {mine:.1f} | {theirs:.1f} ({other}) | {figures[ratio]:.2f} |")
    return "\n".join(lines)
