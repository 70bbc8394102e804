"""The README's table of models and what is measured below it: `python -m tests.readme` prints both.

Sizes come from the published configurations (`npllm/published`), agreement with PyTorch from `python -m bench truth`. Of
a model the text part counts, without layers that predict further tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from npllm.backend import Backend
from npllm.describing import description_of
from npllm.models import NESTED, interpret
from npllm.published import MODELS
from tests.export import CASES

README = Path(__file__).parent.parent / "README.md"
TOKENS = 8192

HEADER = """\
| system | file | published sizes | GiB as published | GiB in float32 | MiB at 8k | state |
|---|---|---|---|---|---|---|"""

# Storage formats of npllm.describing by the torch_dtype of config.json.
STORED = {"float32": "f32", "bfloat16": "bf16"}


class Row(NamedTuple):
    """A system: its file in npllm/models, its `model_type` in tests/export/cases, and its sizes, each with the name that it
    has in npllm/published. `dtype` is that of the published files where the configuration does not say it."""

    system: str
    file: str
    model: str
    sizes: dict[str, str]
    dtype: str = ""


def each(family: str, sizes: str) -> dict[str, str]:
    """Sizes that npllm/published names by family and size."""
    return {size: f"{family} {size}" for size in sizes.split()}


GPT2 = {"small": "gpt2"} | {size: f"gpt2-{size}" for size in ("medium", "large", "xl")}
LLAMA = each("Llama 3.2", "1B 3B") | each("Llama 3.1", "8B 70B 405B")
MISTRAL = {"7B v0.1": "Mistral 7B v0.1", "7B v0.3": "Mistral 7B v0.3", "Small 3.1": "Mistral Small 3.1"}
QWEN_MOE = {"A2.7B": "Qwen1.5-MoE A2.7B", "57B-A14B": "Qwen2 57B-A14B"}

ROWS = (
    Row("GPT-2", "gpt2", "gpt2", GPT2, "float32"),
    Row("Llama 3, 3.1, 3.2, 3.3", "llama3", "llama", LLAMA),
    Row("OLMo 2", "olmo2", "olmo2", each("OLMo 2", "1B 7B 13B 32B")),
    Row("Mistral 7B, Small 3.1", "mistral", "mistral", MISTRAL),
    Row("Mixtral", "mixtral", "mixtral", each("Mixtral", "8x7B 8x22B")),
    Row("Qwen2, Qwen2.5", "qwen2", "qwen2", each("Qwen2.5", "0.5B 1.5B 3B 7B 14B 32B 72B")),
    Row("Qwen1.5-MoE, Qwen2-MoE", "qwen2_moe", "qwen2_moe", QWEN_MOE),
    Row("Qwen3", "qwen3", "qwen3", each("Qwen3", "0.6B 1.7B 4B 8B 14B 32B")),
    Row("Qwen3-MoE", "qwen3_moe", "qwen3_moe", each("Qwen3", "30B-A3B 235B-A22B")),
    Row("Gemma 2", "gemma2", "gemma2", each("Gemma 2", "2B 9B 27B")),
    Row("Gemma 3", "gemma3", "gemma3_text", each("Gemma 3", "270m 1B 4B 12B 27B")),
    Row("Gemma 3n", "gemma3n", "gemma3n_text", each("Gemma 3n", "E2B E4B")),
    Row("Llama 4", "llama4", "llama4_text", each("Llama 4", "Scout Maverick")),
    Row("DeepSeek V2-Lite, V2", "deepseek_v2", "deepseek_v2", {"V2-Lite": "DeepSeek V2-Lite", "V2": "DeepSeek V2"}),
    Row("DeepSeek V3, R1; Kimi K2, Moonlight", "deepseek_v3", "deepseek_v3", {"V3, R1": "DeepSeek V3", "K2": "Kimi K2"}),
    Row("Mistral Large 3", "mistral4", "mistral4", {"675B": "Mistral Large 3"}, "bfloat16"),
)


class Size(NamedTuple):
    """One published size.

    active     parameters that a token meets; None where it meets all.
    published  bytes of its weights as its files store them, in `dtype`.
    prepared   bytes of its weights as the backend "numpy" keeps them, in float32.
    cache      bytes of a bfloat16 cache at `tokens` tokens.
    """

    active: int | None
    published: int
    dtype: str
    prepared: int
    cache: int
    tokens: int


def measure(config: dict[str, Any], dtype: str) -> Size:
    """The numbers of a published config.json; `dtype` as in `Row`."""
    found = interpret(config, warn=lambda *_: None)
    d, tensors = description_of(found, ""), found.architecture.weight_spec(found.config).values()
    dtype = config.get("torch_dtype") or config.get(NESTED, {}).get("torch_dtype") or dtype
    quantised = found.values.get("quantization_config")
    tokens = min(TOKENS, d.context)
    return Size(
        active=d.parameters.active if d.parameters.active < d.parameters.total else None,
        published=dict(d.weight_bytes)["f8_e4m3" if quantised else STORED[dtype]],
        dtype="FP8" if quantised else dtype,
        prepared=Backend().bytes_needed(tensor for tensor in tensors if tensor.alias is None),
        cache=d.kv_allocated(tokens),
        tokens=tokens,
    )


def table() -> str:
    """The table in Markdown."""
    return "\n".join([HEADER, *map(line, ROWS)])


def line(row: Row) -> str:
    sizes = {name: measure(MODELS[published].config, row.dtype) for name, published in row.sizes.items()}
    names = [name if size.active is None else f"{name} ({size.active / 1e9:.1f}B active)" for name, size in sizes.items()]
    (dtype,) = {size.dtype for size in sizes.values()}
    (tokens,) = {size.tokens for size in sizes.values()}
    cells = (
        row.system,
        f"[`{row.file}.py`](npllm/models/{row.file}.py)",
        " / ".join(names),
        f"{dtype}: {joined(size.published / 2**30 for size in sizes.values())}",
        joined(size.prepared / 2**30 for size in sizes.values()),
        joined(size.cache / 2**20 for size in sizes.values()) + f" (at {tokens:,})" * (tokens < TOKENS),
        state(row),
    )
    return f"| {' | '.join(cells)} |"


def joined(values: Iterable[float]) -> str:
    return " / ".join(f"{value:,.{0 if value >= 9.95 else 1 if value >= 0.995 else 2}f}" for value in values)


# -- agreement with PyTorch -------------------------------------------------------------------------------------------


@cache
def agreement() -> dict[str, dict[str, Any]]:
    """What `python -m bench truth` measured last, by `model_type`."""
    figures: dict[str, Any] = json.loads(newest("truth").read_text())
    return dict(figures["architectures"])


def newest(verb: str) -> Path:
    """The last file of figures that `python -m bench` wrote for a verb."""
    return max((README.parent / "bench" / "results").glob(f"{verb}-*.json"))


def state(row: Row) -> str:
    cases, measured = Counter(case.model for case in CASES.values())[row.model], agreement()[row.model]
    if measured["cases"] != cases:
        raise ValueError(f"{row.model} has {cases} cases, {measured['cases']} were measured: run python -m bench truth")
    return f"equals PyTorch: {cases} cases, {measured['float32']:.1e}"


def summary() -> str:
    """The sentence on all cases; Gemma 3n, which has a limit of its own, apart."""
    single, double = ({name: each[dtype] for name, each in agreement().items()} for dtype in ("float32", "float64"))
    own = single.pop("gemma3n_text")
    worst = f"{max(single.values()):.1e} (Gemma 3n: {own:.1e}) in float32, {max(double.values()):.1e} in float64"
    return f"The worst relative error over all {len(CASES)} cases is {worst}."


if __name__ == "__main__":
    print(table(), summary(), sep="\n\n")
