"""Reasoning is found where it opens the text, whatever pieces the text comes in, and nowhere else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllm.reasoning import Part, ReasoningSplitter, join_parts, opens_reasoning, split_reasoning

CASES = [
    ("<think>\nhm, well\n</think>\n\nYes.", False, "hm, well", "Yes."),
    ("\n<think>a</think>b", False, "a", "b"),
    ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
    ("Yes.", False, "", "Yes."),
    ("  Yes.\n", False, "", "  Yes.\n"),
    ("The tag <think> opens it, </think> closes it.", False, "", "The tag <think> opens it, </think> closes it."),
    ("hm\n</think>\n\nYes.", True, "hm", "Yes."),
    ("<think>no end", False, "no end", ""),
    ("no end\n", True, "no end", ""),
    ("<thin", False, "", "<thin"),
    ("<think>a </thin", False, "a </thin", ""),
    ("<think>a</think>\n\n  indented\n<think>b</think>", False, "a", "  indented\n<think>b</think>"),
    (" \n", False, "", " \n"),
    ("", False, "", ""),
    ("", True, "", ""),
]


@pytest.mark.parametrize(("text", "inside", "reasoning", "answer"), CASES)
def test_split(text: str, inside: bool, reasoning: str, answer: str) -> None:
    assert split_reasoning(text, inside) == (reasoning, answer)


@pytest.mark.parametrize(("text", "inside", "reasoning", "answer"), CASES)
def test_one_character_at_a_time(text: str, inside: bool, reasoning: str, answer: str) -> None:
    splitter = ReasoningSplitter(inside)
    parts = [part for character in text for part in splitter.push(character)] + splitter.finish()
    assert join_parts(parts) == (reasoning, answer)


PIECES = st.sampled_from(["<think>", "</think>", "<", "</", "think>", "a", " ", "\n", "é"])


@given(st.lists(PIECES, max_size=20), st.booleans(), st.lists(st.integers(0, 40), max_size=5))
def test_pieces_do_not_matter(pieces: list[str], inside: bool, cuts: list[int]) -> None:
    text = "".join(pieces)
    splitter, ends = ReasoningSplitter(inside), [*sorted(cuts), len(text)]
    parts = [part for begin, end in zip([0, *ends], ends, strict=False) for part in splitter.push(text[begin:end])]
    assert join_parts(parts + splitter.finish()) == split_reasoning(text, inside)


def test_text_is_not_held_back_longer_than_needed() -> None:
    splitter = ReasoningSplitter()
    assert splitter.push("<thi") == []
    assert splitter.push("nk>hm") == [Part("reasoning", "hm")]
    assert splitter.push(" </thinking") == [Part("reasoning", " </thinking")]
    assert splitter.push("</") == []
    assert splitter.push("think>\nYes") == [Part("answer", "Yes")]
    assert splitter.push("</think>") == [Part("answer", "</think>")]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|Assistant|><think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("What does <think> mean?<|im_end|>\n<|im_start|>assistant\n", False),
        ("", False),
    ],
)
def test_opens_reasoning(prompt: str, expected: bool) -> None:
    assert opens_reasoning(prompt) is expected
