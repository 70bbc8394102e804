"""Pitfalls 7, 42, 44, 45 and 46: text, positions, rows without keys, whatever the model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npllm
from npllm import blocks
from npllm.arrays import Array
from npllm.backend import Backend
from npllm.blocks import Angles, Rope
from npllm.blocks.dtypes import round_to_bfloat16, widen_bfloat16
from npllm.models import interpret
from npllm.numpy_backend import NumpyBackend
from npllm.reasoning import opens_reasoning, split_reasoning
from npllm.testing.compare import norm
from tests.models import CHATML, END, make_checkpoint, make_config
from tests.pitfalls.case import RIGHT, WRONG
from tests.talker import make_talker
from tests.test_tokenizer import BOS, HELLO, made

HI = [{"role": "user", "content": "Hello"}]


def with_bos(folder: Path, chat_template: str) -> npllm.LLM:
    """A model whose tokenizer puts BOS around a text that is no conversation, as Gemma's does."""
    made(make_checkpoint(folder), adds_bos=True, bos_token=END, chat_template=chat_template)
    return npllm.load(folder, backend="numpy")


def test_pitfall_07_exactly_one_bos(tmp_path: Path) -> None:
    llm, wanted = with_bos(tmp_path, "{{ bos_token }}{{ messages[0].content }}"), [BOS, *HELLO]
    assert llm.chat_tokens(HI) == wanted
    assert llm.tokenizer.apply_chat_template(HI) == wanted
    assert llm.chat(HI, max_tokens=1).usage.prompt_tokens == len(wanted)
    for text in ("Hello", END + "Hello"):
        assert llm.score(text).tokens == wanted
        assert llm.generate(text, max_tokens=1).usage.prompt_tokens == len(wanted)


def test_pitfall_07_a_template_without_bos_gets_none(tmp_path: Path) -> None:
    llm = with_bos(tmp_path, "{{ messages[0].content }}")
    assert llm.chat_tokens(HI) == llm.tokenizer.apply_chat_template(HI) == HELLO


def coarse(positions_M: Array) -> Array:
    return widen_bfloat16(round_to_bfloat16(np, positions_M.astype(np.float32)), "float32")


class CoarsePositions(Backend):
    """Plants a mistake: positions in bfloat16, whose 8 bits make 256 of 257."""

    def angles(self, rope: Rope, positions_M: Array, /) -> Angles:
        return super().angles(rope, coarse(positions_M))


@pytest.mark.parametrize("make", [Backend, NumpyBackend])
def test_pitfall_42_no_two_positions_collide(make: type[Backend]) -> None:
    positions_M, rope = np.array([0, 255, 256, 257, 511, 513, 4097, 131071]), Rope(4, 1e4)
    assert len(np.unique(coarse(positions_M))) < len(positions_M)
    cos_MJ, sin_MJ = make().angles(rope, positions_M)
    phase_MJ = positions_M[:, None] * np.array([1.0, 0.01])
    np.testing.assert_allclose(cos_MJ, np.cos(phase_MJ), atol=1e-2)
    np.testing.assert_allclose(sin_MJ, np.sin(phase_MJ), atol=1e-2)


def test_pitfall_42_only_distances_count() -> None:
    """One layer with a window of 7, tokens that recur every 5: at every place the logits of 5 places before."""
    described = interpret(make_config("mistral", num_hidden_layers=1, sliding_window=7, max_position_embeddings=512))
    tokens_T = np.arange(400) % 5
    for backend, exact in ((Backend(), True), (NumpyBackend(), True), (CoarsePositions(), False)):
        logits_TN = npllm.LLM.random(described, backend).forward(tokens_T)[0]
        early_TN, late_TN = logits_TN[20:100], logits_TN[310:390]
        error = norm(late_TN - early_TN) / norm(early_TN)
        assert error < 10 * RIGHT if exact else error > WRONG


def test_pitfall_44_a_query_that_sees_nothing_gives_zero() -> None:
    """No NaN, no warning, and nothing of it in the rows beside it."""
    generator = np.random.default_rng(0)
    q_THK, k_SGK, v_SGV = (generator.standard_normal(shape, np.float32) for shape in ((3, 4, 6), (5, 2, 6), (5, 2, 8)))
    seen_TS = np.ones((3, 5), bool)
    whole_THV = blocks.softmax_attention(np, q_THK, k_SGK, v_SGV, seen_TS, scale=0.4)
    seen_TS[1] = False
    got_THV = blocks.softmax_attention(np, q_THK, k_SGK, v_SGV, seen_TS, scale=0.4)
    assert not got_THV[1].any()
    np.testing.assert_array_equal(got_THV[[0, 2]], whole_THV[[0, 2]])
    place: dict[str, Any] = {"first_query": 6, "first_key": 0, "scale": 0.4}
    got_THV = blocks.blocked_attention(np, q_THK, k_SGK, v_SGV, mask=blocks.sliding(3), **place)
    assert got_THV.any(axis=(1, 2)).tolist() == [True, False, False]


def test_pitfall_44_rows_of_a_batch_are_not_padded(tmp_path: Path) -> None:
    llm = npllm.load(make_checkpoint(tmp_path), backend="numpy")
    prompts = [[5], list(range(40)), [7, 8, 9]]
    together = llm.generate(prompts, max_tokens=4, logprobs=0)
    for prompt, output in zip(prompts, together, strict=True):
        alone = llm.generate(prompt, max_tokens=4, logprobs=0)
        assert output.tokens == alone.tokens
        assert output.usage.prompt_tokens == len(prompt)
        np.testing.assert_allclose(*([each.logprob for each in out.logprobs] for out in (output, alone)), rtol=1e-5)


def test_pitfall_45_the_prompt_opens_the_reasoning(tmp_path: Path) -> None:
    """As R1's template does; what the model then says begins within."""
    template = CHATML.replace("assistant\n", "assistant\n<think>\n")
    llm = npllm.load(make_talker(tmp_path, "\nhm</think>Yes.<|im_end|>", template=template), backend="numpy")
    prompt = llm.chat_prompt(HI)
    assert prompt.endswith("<think>\n")
    assert llm.tokenizer.decode(llm.chat_tokens(HI), skip_special_tokens=False) == prompt
    answer = llm.chat(HI).text
    assert split_reasoning(answer, opens_reasoning(prompt)) == ("hm", "Yes.")


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_pitfall_46_every_stop_id_of_the_files_stops(tmp_path: Path, file: str) -> None:
    """Wherever the list is, and whichever of it comes; config.json alone would name one."""
    folder = make_talker(tmp_path, "\nab<|endoftext|>on", context=64)
    one = json.loads((folder / "config.json").read_text())["eos_token_id"]
    assert npllm.load(folder, backend="numpy").chat(HI).text.startswith("abo")
    end = npllm.load(folder, backend="numpy").tokenizer.token_id(END)
    path = folder / file
    kept = json.loads(path.read_text()) if path.is_file() else {}
    for ids in ([one, end], [end, one], end):
        path.write_text(json.dumps(kept | {"eos_token_id": ids}))
        answer = npllm.load(folder, backend="numpy").chat(HI)
        assert (answer.text, answer.finish_reason, answer.stop) == ("ab", "stop", end)


def test_pitfall_46_a_wrapper_holds_the_list_for_its_text_part() -> None:
    text = make_config("gemma3_text")
    del text["eos_token_id"]
    described = interpret({"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text})
    assert described.values["eos_token_id"] == [1, 106]
