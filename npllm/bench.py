"""Measuring one model: prompt and generation tokens per second, as a user gets them.

`ppN` is a prompt of N tokens up to its first token, `tgN` is N tokens generated one by one after a prompt of one. The
first run of each is a warm-up and reported apart: it holds compilation, where a backend compiles.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from npllm import published
from npllm.backend import Backend
from npllm.config import nearest
from npllm.errors import ArgumentError
from npllm.llm import LLM
from npllm.models import interpret
from npllm.promptcache import PromptCache

# Published sizes to measure with random weights, by short name: their config.json.
SHAPES: dict[str, dict[str, Any]] = {short: published.MODELS[name].config for short, name in published.NAMES.items()}


@dataclass(frozen=True)
class Result:
    """Tokens per second of one test: mean and standard deviation over the repetitions, and the first run's seconds."""

    test: str
    tokens: int
    tokens_per_second: float
    deviation: float
    repetitions: int
    first_run_seconds: float


def random_llm(shape: str, backend: Backend, seed: int = 0) -> LLM:
    """A model of a published shape with random weights."""
    if shape not in SHAPES:
        raise ArgumentError(f"shape {shape!r} is unknown; known: {nearest(shape, SHAPES)}")
    return LLM.random(interpret(SHAPES[shape], shape), backend, seed=seed, name=f"{shape} (random weights)")


def measure(
    llm: LLM,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    repetitions: int = 3,
    progress: Callable[[str], None] | None = None,
) -> list[Result]:
    """`pp` and `tg` of a model; a count of 0 leaves that test out."""
    if repetitions < 1 or prompt_tokens < 0 or new_tokens < 0 or prompt_tokens == new_tokens == 0:
        raise ArgumentError("bench needs at least one repetition, and token counts of at least 0, not both 0")
    longest = max(prompt_tokens + 1, new_tokens + 2)
    if longest > llm.max_context:
        raise ArgumentError(f"bench: {longest} tokens do not fit into the context of {llm.max_context}; ask for fewer")
    ids = np.random.default_rng(0).integers(0, llm.config.vocab_size, max(prompt_tokens, 1)).tolist()
    results = []
    if prompt_tokens:
        run = partial(prompt_seconds, llm, ids)
        results.append(_repeat(f"pp{prompt_tokens}", prompt_tokens, repetitions, run, progress))
    if new_tokens:
        run = partial(generation_seconds, llm, ids[:1], new_tokens)
        results.append(_repeat(f"tg{new_tokens}", new_tokens, repetitions, run, progress))
    return results


def prompt_seconds(llm: LLM, ids: Sequence[int]) -> float:
    """Seconds for a prompt, up to the first token of its answer."""
    return llm.generate(ids, max_tokens=1, temperature=0, ignore_eos=True).timings.prompt_seconds


def generation_seconds(llm: LLM, ids: Sequence[int], count: int, cache: PromptCache | None = None) -> float:
    """Seconds for `count` tokens one by one, after a prompt (of which `cache` may hold the most) and a first token."""
    return llm.generate(ids, max_tokens=count + 1, temperature=0, ignore_eos=True, cache=cache).timings.generation_seconds


def _repeat(
    test: str, tokens: int, repetitions: int, run: Callable[[], float], progress: Callable[[str], None] | None
) -> Result:
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    rates = []
    for i in range(repetitions):
        if progress is not None:
            progress(f"{test}: {i + 1} of {repetitions}")
        rates.append(tokens / run())
    deviation = statistics.stdev(rates) if len(rates) > 1 else 0.0
    return Result(test, tokens, statistics.fmean(rates), deviation, repetitions, first)


def render(results: list[Result], style: str, about: dict[str, Any]) -> str:
    """The results as `markdown`, `csv` or `json`; `about` says what was measured (model, backend, dtype, threads ...)."""
    if style == "json":
        return json.dumps({"schema": "npllm.bench/1", **about, "results": [asdict(each) for each in results]}, indent=2)
    rows = [
        {**about, "test": each.test, "t/s": f"{each.tokens_per_second:.2f} ± {each.deviation:.2f}",
         "first run": f"{each.first_run_seconds:.2f} s"}
        for each in results
    ]  # fmt: skip
    if style == "csv":
        out = io.StringIO()
        flat = [{**about, **asdict(each)} for each in results]
        writer = csv.DictWriter(out, list(flat[0]) if flat else ["test"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return out.getvalue().rstrip()
    heads = list(rows[0]) if rows else ["test"]
    lines = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
