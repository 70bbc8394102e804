"""The checkpoints of tests/truth on the emulated device, nothing left to the canon, against what transformers computed."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

import npllm
from npllm import loading
from npllm.testing.conformance import stepped
from tests.compare import agree
from tests.export import CASES
from tests.gpu.emulator import EmulatedBackend, checked, emulated
from tests.test_truth import MODELS, limit, truth

pytestmark = [emulated, checked]

# What the first case of an architecture does not have (tests/gpu/test_models.py runs that); the others are for
# `pytest -m full`.
OFTEN = ("deepseek-v3-fp8", "mixtral-yarn-gelu", "qwen2-moe-window", "llama4-top2")

some_cases = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.full) for name in CASES]
)


@cache
def model(name: str) -> npllm.LLM:
    """A case with float32 arithmetic; an operation that the backend declines is an error."""

    def emulated(*args: Any, dtype: str | None = None, **options: Any) -> EmulatedBackend:
        return EmulatedBackend(dtype, strict=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "get_backend", emulated)
        return npllm.load(MODELS / name, dtype="float32", weights="memory")


@some_cases
def test_logits(name: str) -> None:
    """Of a prompt; and of rows of different lengths, one of which brings a single token."""
    llm, want = model(name), truth(name)
    agree(llm.forward(want["tokens"]), want["logits"], limit("truth", name), what=name)
    (a_T, b_T), cache = want["tokens"], llm.new_cache()
    a, b = cache.add(), cache.add()
    a_TN, b_TN = want["logits"]
    got = stepped(llm, cache, [b, a], [b_T[:11], a_T[:3]])
    agree(got, np.concatenate([b_TN[:11], a_TN[:3]]), limit("truth", name), what=f"{name}, two prompts")
    got = stepped(llm, cache, [a, b], [a_T[3:20], b_T[11:12]])
    agree(got, np.concatenate([a_TN[3:20], b_TN[11:12]]), limit("truth", name), what=f"{name}, a piece and a token")


@some_cases
def test_greedy_tokens(name: str) -> None:
    """Decoding, most of it by a launched graph."""
    want = truth(name)
    output = model(name).generate(want["tokens"][0, :9], max_tokens=24, temperature=0, ignore_eos=True)
    assert output.tokens == want["greedy"][0].tolist()
