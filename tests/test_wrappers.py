"""Multimodal wrappers: the text part alone, under both spellings of its tensors; the towers are skipped, with one line."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npllm
from npllm.models import WRAPPERS
from tests.models import ABSENT, make_checkpoint, make_config, make_tensors, save_tensors

# model_type of each wrapper -> what lies beside its text model.
TOWERS = {
    "gemma3": ("vision_tower", "multi_modal_projector"),
    "gemma3n": ("vision_tower", "audio_tower", "embed_vision", "embed_audio"),
    "llama4": ("vision_model", "multi_modal_projector"),
    "mistral3": ("vision_tower", "multi_modal_projector"),
}

# Names of tensors as published, and as transformers 5 keeps them: before the text model, the head, the towers.
SPELLINGS = {
    "published": ("language_model.model.", "language_model.lm_head.weight", ""),
    "transformers 5": ("model.language_model.", "lm_head.weight", "model."),
}

IDS = np.array([[5, 250, 17, 3, 99]])

every_wrapper = pytest.mark.parametrize("kind", TOWERS)
every_spelling = pytest.mark.parametrize("spelling", SPELLINGS)


def wrapped(folder: Path, kind: str, spelling: str, text: dict[str, Any], stored: dict[str, Any], **more: Any) -> Path:
    """A wrapper's checkpoint: `text` is its text_config, `stored` the config that its text tensors are drawn for."""
    before, head, before_towers = SPELLINGS[spelling]
    folder.mkdir()
    config = {"model_type": kind, "text_config": text, "vision_config": {"hidden_size": 8}} | more
    (folder / "config.json").write_text(json.dumps(config))
    tensors = make_tensors(stored, prefix=before)
    if "lm_head.weight" in tensors:
        tensors[head] = tensors.pop("lm_head.weight")
    towers = {f"{before_towers}{tower}.{name}": np.ones(3, np.float32) for tower in TOWERS[kind] for name in "ab"}
    save_tensors(folder, tensors | towers)
    return folder


def logits(folder: Path) -> np.ndarray[Any, Any]:
    return npllm.load(folder, backend="numpy").forward(IDS)


def plain_logits(tmp_path: Path, kind: str, tied: bool) -> np.ndarray[Any, Any]:
    return logits(make_checkpoint(tmp_path / "plain", WRAPPERS[kind], tie_word_embeddings=tied, with_tokenizer=False))


def text_config(kind: str, tied: Any) -> dict[str, Any]:
    return make_config(WRAPPERS[kind], tie_word_embeddings=tied)


def test_every_wrapper_is_tried() -> None:
    assert set(TOWERS) == set(WRAPPERS)


@every_wrapper
@every_spelling
@pytest.mark.parametrize("tied", [False, True])
def test_the_text_part_computes_what_the_plain_model_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, spelling: str, tied: bool
) -> None:
    wanted, text = plain_logits(tmp_path, kind, tied), text_config(kind, tied)
    folder = wrapped(tmp_path / "wrapped", kind, spelling, text, text)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "npllm"):
        np.testing.assert_array_equal(logits(folder), wanted)
    (line,) = [record.getMessage() for record in caplog.records if "tensors" in record.getMessage()]
    assert all(f"{tower} (2)" in line for tower in TOWERS[kind])


@every_wrapper
def test_a_text_part_without_model_type_is_the_wrappers(tmp_path: Path, kind: str) -> None:
    text = text_config(kind, False)
    silent = {key: value for key, value in text.items() if key != "model_type"}
    folder = wrapped(tmp_path / "wrapped", kind, "published", silent, text)
    np.testing.assert_array_equal(logits(folder), plain_logits(tmp_path, kind, False))


@every_wrapper
@every_spelling
@pytest.mark.parametrize("said", [False, True, ABSENT], ids=["false", "true", "absent"])
def test_a_stored_head_counts_though_the_wrapper_ties_it(tmp_path: Path, kind: str, spelling: str, said: Any) -> None:
    text, stored = text_config(kind, said), text_config(kind, False)
    folder = wrapped(tmp_path / "wrapped", kind, spelling, text, stored, tie_word_embeddings=True)
    np.testing.assert_array_equal(logits(folder), plain_logits(tmp_path, kind, False))


@every_wrapper
@every_spelling
def test_a_head_that_the_wrapper_ties_need_not_be_stored(tmp_path: Path, kind: str, spelling: str) -> None:
    """transformers 5 writes a tied Mistral 3 so, though its text part says false."""
    text, stored = text_config(kind, False), text_config(kind, True)
    folder = wrapped(tmp_path / "wrapped", kind, spelling, text, stored, tie_word_embeddings=True)
    np.testing.assert_array_equal(logits(folder), plain_logits(tmp_path, kind, True))
