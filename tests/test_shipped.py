"""The model in the wheel: small, whole, and right about what it was taught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npllm
from npllm.arrays import Array
from npllm.backend import Backend
from npllm.blocks import Angles, sliding
from npllm.cache import Keys, Rows
from npllm.llm import LLM
from npllm.loading import locate
from npllm.weights import Linear

QUESTIONS = json.loads((Path(__file__).parent / "data" / "shipped_questions.json").read_text())


@pytest.fixture(scope="module")
def llm() -> LLM:
    return npllm.load()


def answer(llm: LLM, question: str) -> str:
    return str(llm.chat([{"role": "user", "content": question}], temperature=0, max_tokens=64).text)


def answers(llm: LLM, questions: list[str]) -> list[str]:
    """To all at once, which takes a fraction of the time."""
    prompts = [llm.chat_tokens([{"role": "user", "content": question}]) for question in questions]
    return [out.text for out in llm.generate(prompts, temperature=0, max_tokens=64)]


def answered_wrong(llm: LLM, asked: list[dict[str, str]]) -> list[str]:
    said = answers(llm, [each["question"] for each in asked])
    return [each["question"] for each, text in zip(asked, said, strict=True) if text != each["answer"]]


def test_it_fits_into_the_wheel() -> None:
    assert sum(path.stat().st_size for path in locate(None).iterdir() if path.is_file()) <= 4_000_000


@pytest.mark.parametrize(("side", "share"), [("train", 0.95), ("held_out", 0.80)])
def test_it_answers_what_it_was_taught(llm: LLM, side: str, share: float) -> None:
    asked = QUESTIONS[side]
    wrong = answered_wrong(llm, asked)
    assert len(asked) >= 50
    assert len(wrong) <= (1 - share) * len(asked), wrong


class WrongPairs(Backend):
    """RoPE turns neighbours instead of halves."""

    def rope(self, x_MHK: Array, angles: Angles, /, interleaved: bool = False) -> Array:
        return super().rope(x_MHK, angles, interleaved=not interleaved)


class WrongScale(Backend):
    """Scores are scaled twice."""

    def attention(self, q_MHK: Array, keys: Keys, rows: Rows, /, **how: Any) -> Array:
        return super().attention(q_MHK, keys, rows, **how | {"scale": how["scale"] ** 2})


class WrongMask(Backend):
    """A window where there is none."""

    def attention(self, q_MHK: Array, keys: Keys, rows: Rows, /, **how: Any) -> Array:
        return super().attention(q_MHK, keys, rows, **how | {"mask": sliding(8)})


class WrongGroups(Backend):
    """Query head h reads key head h % G instead of h // (H / G)."""

    def attention(self, q_MHK: Array, keys: Keys, rows: Rows, /, **how: Any) -> Array:
        H, G = q_MHK.shape[1], keys.k_BSGK.shape[2]
        order = np.arange(H).reshape(H // G, G).T.reshape(-1)
        return super().attention(q_MHK[:, order], keys, rows, **how)[:, np.argsort(order)]


class WrongGain(Backend):
    """A gain of 1 + w instead of w."""

    def rms_norm(self, x_D: Array, w: Linear | None, /, eps: float, offset: float = 0.0) -> Array:
        return super().rms_norm(x_D, w, eps, offset + 1.0)


@pytest.mark.parametrize("wrong", [WrongPairs, WrongScale, WrongMask, WrongGroups, WrongGain])
def test_a_wrong_kernel_shows_in_its_words(wrong: type[Backend]) -> None:
    llm = npllm.load()
    llm.backend = wrong()
    assert len(answered_wrong(llm, QUESTIONS["train"][:10])) >= 7


def test_its_shape_hides_no_mistake(llm: LLM) -> None:
    c = llm.config
    assert c.num_key_value_heads not in (1, c.num_attention_heads)
    assert c.num_attention_heads * c.head_dim != c.hidden_size


def test_plain_text_and_batches_work_too(llm: LLM) -> None:
    questions = [each["question"] for each in QUESTIONS["train"][:8]]
    assert answers(llm, questions) == [answer(llm, question) for question in questions]
