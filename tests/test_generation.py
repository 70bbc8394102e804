"""Generation: sampling against its definitions, batches, stops, streams, log-probabilities, and caches that are reused."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

import npllm
from npllm.cache import LayerCache
from npllm.errors import ArgumentError, CheckpointError, ContextError, NumericsError
from npllm.sampling import LARGEST_LOGIT, Sampler, Sampling, adjusted, log_softmax
from tests.models import make_checkpoint
from tests.refusals import refused

PROMPTS = [[5, 250, 17], [40], [99, 98, 97, 96, 95, 94, 93, 200], [5, 250, 17, 3]]
LONG = [(7 * i) % 290 + 3 for i in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("generation") / "model", vocab_size=300)


@pytest.fixture(scope="module")
def llm(folder: Path) -> npllm.LLM:
    return npllm.load(folder, backend="numpy")


def fresh_logits(llm: npllm.LLM, ids: list[int]) -> np.ndarray[Any, Any]:
    """Logits [T, N] of a forward pass over all of `ids`."""
    return llm.forward(np.array([ids]))[0]


# -- sampling --


def drawn(logits: np.ndarray[Any, Any], count: int = 4000, **options: Any) -> np.ndarray[Any, Any]:
    """How often each token is drawn when the random numbers are an even grid over [0, 1)."""
    grid = iter((np.arange(count) + 0.5) / count)
    sampler = Sampler(Sampling(temperature=options.pop("temperature", 1.0), **options), 0, [], len(logits))
    sampler.random = SimpleNamespace(random=lambda: next(grid))
    return np.bincount([sampler.draw(logits) for _ in range(count)], minlength=len(logits)) / count


def defined(
    logits: np.ndarray[Any, Any], temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray[Any, Any]:
    """The distribution by definition: temperature, then the k likeliest, then the nucleus, then min-p."""

    def softmax(kept: list[int]) -> np.ndarray[Any, Any]:
        weights = np.exp((logits[kept] - logits.max()) / temperature)
        return weights / weights.sum()

    kept = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = kept[:top_k] if top_k else kept
    before = np.cumsum(softmax(kept)) - softmax(kept)
    assume(np.abs(before - top_p).min() > 1e-9)
    kept = [token for token, mass in zip(kept, before, strict=True) if mass < top_p]
    relative = softmax(kept) / softmax(kept).max()
    assume(np.abs(relative - min_p).min() > 1e-9 or min_p == 1.0)
    kept = [token for token, ratio in zip(kept, relative, strict=True) if ratio >= min_p]
    result = np.zeros(len(logits))
    result[kept] = softmax(kept)
    return result


@given(
    hnp.arrays(np.float32, st.integers(1, 12), elements=st.integers(-6, 6).map(float)),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.integers(0, 15),
    st.sampled_from([1.0, 0.95, 0.6, 0.2, 1e-6]),
    st.sampled_from([0.0, 0.04, 0.33, 1.0]),
)
def test_draws_follow_the_definitions(logits: Any, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    wanted = defined(logits.astype(np.float64), temperature, top_k, top_p, min_p)
    found = drawn(logits, 1000, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    np.testing.assert_allclose(found, wanted, atol=2.1e-3)
    assert not found[wanted == 0].any()


def test_a_nucleus_wider_than_the_likely_candidates_is_complete() -> None:
    logits = np.linspace(0.0, 1.0, 3000).astype(np.float32)
    found = drawn(logits, 6000, top_p=0.9) > 0
    probabilities = np.exp(log_softmax(logits))
    threshold = probabilities[found].min()
    assert probabilities[probabilities >= threshold].sum() == pytest.approx(0.9, abs=1e-3)


@given(hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)))
def test_greedy_takes_the_largest_and_the_lowest_id_of_a_tie(logits: Any) -> None:
    token = Sampler(Sampling(), 0, [], len(logits)).draw(logits)
    assert token == int(np.argmax(logits))


def test_a_temperature_next_to_zero_is_greedy_and_warns_of_nothing(llm: npllm.LLM) -> None:
    greedy = llm.generate(PROMPTS[0], max_tokens=8, temperature=0)
    assert llm.generate(PROMPTS[0], max_tokens=8, temperature=5e-324, seed=3).tokens == greedy.tokens
    assert llm.generate(PROMPTS[0], max_tokens=8, temperature=100, top_k=1).tokens == greedy.tokens
    assert llm.generate(PROMPTS[0], max_tokens=8, top_p=1e-9).tokens == greedy.tokens
    assert llm.generate(PROMPTS[0], max_tokens=8, min_p=1.0).tokens == greedy.tokens


# -- penalties and bias --


def by_formula(logits: np.ndarray[Any, Any], prompt: list[int], said: list[int], s: Sampling) -> np.ndarray[Any, Any]:
    """Bias, then the three penalties, each by its formula, in float64."""
    result = logits.astype(np.float64)
    for token in range(len(result)):
        result[token] += s.logit_bias.get(token, 0.0)
        if token in prompt + said:  # Keskar et al., and transformers' RepetitionPenaltyLogitsProcessor
            result[token] *= s.repetition_penalty if result[token] < 0 else 1 / s.repetition_penalty
        result[token] -= s.frequency_penalty * said.count(token) + s.presence_penalty * (token in said)
    return result


@given(
    hnp.arrays(np.float32, 9, elements=st.floats(-8, 8, width=16), unique=True),
    st.lists(st.integers(0, 8), max_size=6),
    st.fixed_dictionaries(
        {
            "repetition_penalty": st.sampled_from([1.0, 1.3, 0.5, 5.0]),
            "presence_penalty": st.sampled_from([0.0, 0.7, -0.3, 2.0]),
            "frequency_penalty": st.sampled_from([0.0, 0.9, -2.0]),
            "logit_bias": st.dictionaries(st.integers(0, 7), st.sampled_from([-math.inf, -3.0, 2.5, 100.0]), max_size=4),
        }
    ),
)
def test_penalties_follow_their_formulas(logits: Any, prompt: list[int], options: dict[str, Any]) -> None:
    """In float32, as on every device: four roundings, each of a number no larger than 540, and so 2^-15 at most each. What
    is drawn can differ from arithmetic in float64 where two logits are nearer to each other than that."""
    sampling, near = Sampling(**options), 4 * 2.0**-15
    sampler = Sampler(sampling, 0, prompt, len(logits))
    said: list[int] = []
    for _ in range(6):
        wanted = by_formula(logits, prompt, said, sampling)
        got = adjusted(logits, sampling, sampler.prompted, sampler.counts)
        assert got.dtype == np.float32
        assert np.array_equal(got == -LARGEST_LOGIT, wanted == -math.inf)
        allowed = wanted > -math.inf
        assert np.abs(got[allowed] - wanted[allowed]).max() <= near
        token = sampler.draw(logits)
        assert wanted[token] >= wanted.max() - 2 * near
        said.append(token)


def test_penalties_of_a_model_in_float64_are_in_float64() -> None:
    logits, s = np.array([1.0, -1.0, 1 / 3]), Sampling(repetition_penalty=1.3, presence_penalty=0.7, logit_bias={2: 0.1})
    wanted = [1.0 / 1.3 - 0.7, -1.3, 1 / 3 + 0.1]
    assert adjusted(logits, s, {0, 1}, {0: 1}).tolist() == wanted


def test_penalties_keep_the_largest_logits_finite() -> None:
    """What float32 cannot hold is cut, so that a token is drawn all the same; nothing warns."""
    logits = np.array([3e38, -3e38, 1.0], np.float32)
    for penalty, wanted in ((0.01, [LARGEST_LOGIT, -3e36, 1.0]), (100.0, [3e36, -LARGEST_LOGIT, 1.0])):
        s = Sampling(repetition_penalty=penalty, temperature=1.0)
        assert adjusted(logits, s, {0, 1}, {}) == pytest.approx(wanted, rel=1e-6)
        assert Sampler(s, 0, [0, 1], 3).draw(logits) == 0


def test_a_banned_token_is_never_drawn() -> None:
    logits = np.array([9.0, 1.0, 0.0], np.float32)
    for options in ({}, {"top_k": 3}, {"top_p": 0.999}, {"min_p": 1e-9}):
        found = drawn(logits, 500, logit_bias={0: -math.inf}, temperature=100.0, **options)
        assert found[0] == 0.0
        assert found[1:].all()


def test_bias_that_bans_everything_is_refused(llm: npllm.LLM) -> None:
    bias = dict.fromkeys(range(300), -math.inf)
    refused(ArgumentError, lambda: llm.generate([1], logit_bias=bias), "logit_bias", "every token")
    refused(ArgumentError, lambda: llm.generate([1], logit_bias=bias, temperature=1), "logit_bias", "every token")


def test_huge_bias_is_no_overflow() -> None:
    found = drawn(np.zeros(3, np.float32), 100, logit_bias={0: 1e30, 1: -1e30}, temperature=5e-324, repetition_penalty=9.0)
    assert found.tolist() == [1.0, 0.0, 0.0]


def test_damaged_logits_are_refused() -> None:
    for value in (np.nan, np.inf, -np.inf):
        sampler = Sampler(Sampling(), 0, [], 3)
        refused(NumericsError, lambda value=value, s=sampler: s.draw(np.array([0.0, value, 1.0], np.float32)), "finite")


# -- arguments --


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, 101, math.nan, math.inf, "hot", True, [1]]),
        ("top_k", [-1, 1.5, "3", True, 10.0]),
        ("top_p", [0, -0.5, 1.01, math.nan, "x"]),
        ("min_p", [-0.1, 1.1, math.nan, None.__class__]),
        ("repetition_penalty", [0, -1, 1e9, math.nan]),
        ("presence_penalty", [-2.1, 2.1, math.nan, "x"]),
        ("frequency_penalty", [-3, 3, math.inf]),
        ("logit_bias", [[1, 2], "x", 7, {"5": 1.0}, {-1: 1.0}, {300: 1.0}, {1.5: 1}]),
        ("logit_bias", [{1: math.nan}, {1: math.inf}, {1: 1e300}, {1: "x"}, {1: None}, {1: True}]),
        ("seed", [-1, 1.5, "x", True]),
        ("max_tokens", [0, -1, 1.5, "x", True, 10.0]),
        ("n", [0, -1, 1.5, "x", True, None]),
        ("stop", [5, "", [""], [1], [None], ["a", b"b"], 1.5]),
        ("stop_ids", [5, "x", ["x"], [-1], [300], [1.5], [True], {"a": 1}]),
        ("logprobs", [-1, 301, 1.5, "x", True]),
        ("ignore_eos", ["no", 1, []]),
        ("seed", ["\x1b[2J" * 100, -(10**5000)]),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused_by_name(llm: npllm.LLM, name: str, values: list[Any]) -> None:
    for value in values:
        refused(ArgumentError, lambda value=value: llm.generate([1], **{name: value}), name)
        if name != "n":
            refused(ArgumentError, lambda value=value: llm.stream([1], **{name: value}), name)


def test_an_unknown_argument_is_refused(llm: npllm.LLM) -> None:
    refused(ArgumentError, lambda: llm.generate([1], temprature=1.0), "temprature")
    refused(ArgumentError, lambda: llm.stream([1], n=2), "n")


def test_none_means_the_default(folder: Path) -> None:
    llm = npllm.load(folder, backend="numpy", max_context=20)
    names = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
             "logit_bias", "seed", "stop", "stop_ids", "ignore_eos", "logprobs", "max_tokens"]  # fmt: skip
    assert llm.generate([1, 2], **dict.fromkeys(names)).tokens == llm.generate([1, 2]).tokens


@pytest.mark.parametrize(
    "prompt",
    [[], "", np.zeros(0, np.int64), np.zeros((1, 0), np.int64), [1.5], [True], [None], None, [-1], [300], [2**70], 7,
     [[1], [[2], [3, 4]]], [[1], []], ["a", ""], {1}, [[1], "a", None], np.zeros((2, 2), np.int64), b"abc", [[1.5]]],
)  # fmt: skip
def test_what_is_no_prompt_is_refused(llm: npllm.LLM, prompt: Any) -> None:
    refused(ArgumentError, lambda: llm.generate(prompt))
    refused(ArgumentError, lambda: llm.stream(prompt))
    if not isinstance(prompt, list):
        refused(ArgumentError, lambda: llm.score(prompt))


def test_a_prompt_beyond_the_context_is_refused(llm: npllm.LLM) -> None:
    for length in (256, 257, 5000):
        refused(ContextError, lambda length=length: llm.generate([1] * length), str(length), "256")
    assert llm.generate([1] * 255, ignore_eos=True).usage.completion_tokens == 1
    assert len(llm.score([1] * 256).logprobs) == 256
    refused(ContextError, lambda: llm.score([1] * 257), "257 tokens", "256")
    refused(ContextError, lambda: llm.forward([[1] * 257]), "257", "256")


# -- batches --


def test_rows_of_a_ragged_batch_are_what_each_is_alone(llm: npllm.LLM) -> None:
    alone = [llm.generate(prompt, max_tokens=12).tokens for prompt in PROMPTS]
    together = llm.generate(PROMPTS, max_tokens=12)
    assert [out.tokens for out in together] == alone
    assert [out.usage.prompt_tokens for out in together] == [3, 1, 8, 4]


def test_a_batch_of_strings_arrays_and_ids(llm: npllm.LLM) -> None:
    ids = llm.tokenizer.encode("Hello")
    outputs = llm.generate(["Hello", ids, np.array(ids), tuple(ids)], max_tokens=5)
    assert len({tuple(out.tokens) for out in outputs}) == 1


def test_rows_that_end_early_leave_the_others_alone(llm: npllm.LLM) -> None:
    plain = llm.generate(PROMPTS, max_tokens=12, temperature=1.0, seed=2, ignore_eos=True)
    stops = [plain[0].tokens[1], plain[2].tokens[5]]
    stopped = llm.generate(PROMPTS, max_tokens=12, temperature=1.0, seed=2, ignore_eos=True, stop_ids=stops)
    for one, other in zip(plain, stopped, strict=True):
        ends = [one.tokens.index(stop) + 1 for stop in stops if stop in one.tokens]
        assert other.tokens == one.tokens[: min(ends, default=12)]
    assert {out.finish_reason for out in stopped} >= {"stop"}


def test_row_r_draws_from_the_stream_of_seed_and_r(llm: npllm.LLM) -> None:
    options = {"max_tokens": 10, "temperature": 1.5, "seed": 11}
    first = llm.generate(PROMPTS, **options)
    assert [out.tokens for out in llm.generate(PROMPTS, **options)] == [out.tokens for out in first]
    other = llm.generate([PROMPTS[3], PROMPTS[1], PROMPTS[2]], **options)
    assert [out.tokens for out in other[1:]] == [out.tokens for out in first[1:3]]
    assert llm.generate(PROMPTS[0], **options).tokens == first[0].tokens
    same = llm.generate([PROMPTS[0]] * 6, **options)
    assert len({tuple(out.tokens) for out in same}) == 6
    assert llm.generate(PROMPTS[0], **options | {"seed": 12}).tokens != first[0].tokens


@pytest.mark.parametrize("prompt", [[40], PROMPTS[2]])
def test_n_answers_are_those_of_n_equal_prompts(llm: npllm.LLM, prompt: list[int]) -> None:
    options = {"max_tokens": 9, "temperature": 1.0, "seed": 5}
    answers = llm.generate(prompt, n=3, **options)
    assert [out.tokens for out in answers] == [out.tokens for out in llm.generate([prompt] * 3, **options)]
    groups = llm.generate([prompt, PROMPTS[0]], n=2, **options)
    assert [len(group) for group in groups] == [2, 2]
    assert [out.tokens for out in groups[0]] == [out.tokens for out in answers[:2]]


def test_a_prompt_of_n_answers_is_computed_once(llm: npllm.LLM) -> None:
    with llm.trace() as trace:
        llm.generate(PROMPTS[2], n=5, max_tokens=1)
    assert sum(len(x) for x in trace.every("embedding")) == len(PROMPTS[2]) - 1 + 5


@pytest.mark.parametrize("options", [{"dtype": "float64"}, {"kv_dtype": "bfloat16"}, {"kv_dtype": "float64"}])
def test_other_types_generate_too(folder: Path, options: dict[str, Any]) -> None:
    llm = npllm.load(folder, backend="numpy", **options)
    alone = [llm.generate(prompt, max_tokens=6).tokens for prompt in PROMPTS]
    assert [out.tokens for out in llm.generate(PROMPTS, max_tokens=6)] == alone


# -- where an answer ends --


def test_max_tokens_is_kept(llm: npllm.LLM) -> None:
    for count in (1, 2, 24):
        out = llm.generate(PROMPTS[0], max_tokens=count, ignore_eos=True)
        assert (len(out.tokens), out.finish_reason, out.stop) == (count, "length", None)
        assert out.usage.completion_tokens == count
        assert out.usage.total_tokens == count + 3


def test_a_full_context_ends_the_answer(folder: Path) -> None:
    llm = npllm.load(folder, backend="numpy", max_context=16)
    outputs = llm.generate(PROMPTS, max_tokens=100, ignore_eos=True)
    assert [len(out.tokens) for out in outputs] == [16 - len(prompt) for prompt in PROMPTS]
    assert {out.finish_reason for out in outputs} == {"length"}


def test_stop_ids_end_the_answer_and_are_no_text(llm: npllm.LLM) -> None:
    plain = llm.generate(PROMPTS[0], max_tokens=20, temperature=1.0, seed=1, ignore_eos=True)
    stop = plain.tokens[6]
    end = plain.tokens.index(stop)
    out = llm.generate(PROMPTS[0], max_tokens=20, temperature=1.0, seed=1, ignore_eos=True, stop_ids=[np.int64(stop)])
    assert (out.tokens, out.finish_reason, out.stop) == (plain.tokens[: end + 1], "stop", stop)
    assert out.text == llm.tokenizer.decode(plain.tokens[:end])


def test_the_models_own_stop_ids_hold_unless_ignored(llm: npllm.LLM) -> None:
    bias = {0: 1000.0}
    out = llm.generate(PROMPTS[0], max_tokens=5, logit_bias=bias)
    assert (out.tokens, out.text, out.finish_reason, out.stop) == ([0], "", "stop", 0)
    assert llm.generate(PROMPTS[0], max_tokens=5, logit_bias=bias, stop_ids=[7]).tokens == [0]
    assert llm.generate(PROMPTS[0], max_tokens=5, logit_bias=bias, ignore_eos=True).tokens == [0] * 5
    assert llm.generate(PROMPTS[0], max_tokens=5, logit_bias=bias, ignore_eos=True, stop_ids=[0]).tokens == [0]
    last = llm.generate(PROMPTS[0], max_tokens=1, logit_bias=bias)
    assert last.finish_reason == "stop"


@given(st.integers(0, 40), st.integers(1, 5), st.integers(0, 30))
def test_a_stop_string_ends_the_answer_and_never_leaks(llm: npllm.LLM, start: int, length: int, seed: int) -> None:
    options = {"max_tokens": 30, "temperature": 1.0, "seed": seed, "ignore_eos": True}
    plain = llm.generate("Hello", **options)
    stop = plain.text[start : start + length]
    assume(stop)
    out = llm.generate("Hello", stop=["never in there", stop], **options)
    assert (out.text, out.finish_reason, out.stop) == (plain.text[: plain.text.index(stop)], "stop", stop)
    assert out.tokens == plain.tokens[: len(out.tokens)]
    shown = ""
    for piece in llm.stream("Hello", stop=stop, **options):
        shown += piece.text
        assert out.text.startswith(shown)
    assert shown == out.text


def test_the_stop_string_that_is_complete_first_wins(llm: npllm.LLM) -> None:
    options = {"max_tokens": 30, "temperature": 1.0, "seed": 4, "ignore_eos": True}
    text = llm.generate("Hello", **options).text
    late, early = text[15:17], text[3:6]
    out = llm.generate("Hello", stop=[late, early], **options)
    assert (out.text, out.stop) == (text[: text.index(early)], early)


# -- streams --


@given(st.integers(0, 60), st.sampled_from([{}, {"repetition_penalty": 1.2}, {"top_k": 50}]))
def test_pieces_joined_are_the_text(llm: npllm.LLM, seed: int, options: dict[str, Any]) -> None:
    options = options | {"max_tokens": 20, "temperature": 1.3, "seed": seed}
    out = llm.generate("Hello", **options)
    pieces = list(llm.stream("Hello", **options))
    assert "".join(piece.text for piece in pieces) == out.text
    assert [piece.token for piece in pieces] == out.tokens
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == out.finish_reason
    kept = out.tokens[:-1] if out.stop is not None else out.tokens
    assert out.text == llm.tokenizer.decode(kept)


def test_a_stream_checks_its_arguments_at_once(llm: npllm.LLM) -> None:
    refused(ArgumentError, lambda: llm.stream([[1], [2]]), "one prompt")
    refused(ContextError, lambda: llm.stream([]), "empty")


def test_timings_count_what_was_done(llm: npllm.LLM) -> None:
    out = llm.generate(LONG, max_tokens=6, ignore_eos=True)
    assert out.timings.prompt_seconds > 0
    assert out.timings.prompt_per_second == pytest.approx(20 / out.timings.prompt_seconds)
    assert out.timings.generation_per_second == pytest.approx(5 / out.timings.generation_seconds)


# -- log-probabilities --


def test_logprobs_are_those_of_the_model(llm: npllm.LLM) -> None:
    for options in ({}, {"temperature": 0.3, "top_k": 3, "repetition_penalty": 1.5, "logit_bias": {4: 2.0}}):
        out = llm.generate(LONG, max_tokens=8, logprobs=5, ignore_eos=True, **options)
        logits = fresh_logits(llm, LONG + out.tokens)[len(LONG) - 1 : -1]
        expected = log_softmax(logits)
        assert out.logprobs is not None
        for step, (entry, row) in enumerate(zip(out.logprobs, expected, strict=True)):
            assert entry.token == out.tokens[step]
            assert entry.logprob == pytest.approx(row[entry.token], abs=1e-4)
            likeliest = np.argsort(-row, kind="stable")[:5]
            assert [each.token for each in entry.alternatives] == likeliest.tolist()
            np.testing.assert_allclose([each.logprob for each in entry.alternatives], row[likeliest], atol=1e-4)


def test_logprobs_are_given_when_asked_for(llm: npllm.LLM) -> None:
    assert llm.generate([1], max_tokens=2).logprobs is None
    (entry,) = llm.generate([1], max_tokens=1, logprobs=0).logprobs or []
    assert entry.alternatives == []
    (entry,) = llm.generate([1], max_tokens=1, logprobs=300).logprobs or []
    assert math.fsum(math.exp(each.logprob) for each in entry.alternatives) == pytest.approx(1.0)
    assert all(piece.logprob is not None for piece in llm.stream([1], max_tokens=3, logprobs=1))


@pytest.mark.parametrize("tokens_at_once", [1, 3, 7, 1000])
def test_score_is_that_of_forward(llm: npllm.LLM, monkeypatch: pytest.MonkeyPatch, tokens_at_once: int) -> None:
    monkeypatch.setattr("npllm.llm.SCORE_BYTES", tokens_at_once * 8 * 300)
    score = llm.score(LONG)
    expected = log_softmax(fresh_logits(llm, LONG))[np.arange(19), LONG[1:]]
    assert score.tokens == LONG
    assert score.logprobs[0] is None
    np.testing.assert_allclose(score.logprobs[1:], expected, atol=1e-4)
    assert score.total == pytest.approx(expected.sum(), abs=1e-3)
    assert score.perplexity == pytest.approx(math.exp(-expected.mean()), rel=1e-4)


def test_score_of_a_text_and_of_one_token(llm: npllm.LLM) -> None:
    assert llm.score("Hello you").tokens == llm.tokenizer.encode("Hello you")
    one = llm.score([5])
    assert (one.logprobs, one.total) == ([None], 0.0)
    assert math.isnan(one.perplexity)


# -- forward --


def test_forward_of_the_last_token_computes_only_that(llm: npllm.LLM) -> None:
    tokens = np.array([LONG, LONG[::-1]])
    wanted = llm.forward(tokens)
    assert wanted.shape == (2, 20, 300)
    with llm.trace() as trace:
        last = llm.forward(tokens, logits="last")
    np.testing.assert_allclose(last, wanted[:, -1], rtol=1e-5, atol=1e-5)
    assert trace["logits"].shape == (2, 300)
    assert trace["norm"].shape[0] == 2


def test_forward_of_nothing(llm: npllm.LLM) -> None:
    assert llm.forward(np.zeros((2, 0), int)).shape == (2, 0, 300)
    assert llm.forward(np.zeros((0, 4), int)).shape == (0, 4, 300)
    assert llm.forward(np.zeros((0, 4), int), logits="last").shape == (0, 300)
    refused(ContextError, lambda: llm.forward(np.zeros((2, 0), int), logits="last"), "at least one token")


@pytest.mark.parametrize(
    "tokens", [[[1], [2, 3]], [[1.0]], "abc", [[300]], [[-1]], np.zeros((1, 1, 1), int), None, [[True]]]
)
def test_forward_refuses_what_are_no_tokens(llm: npllm.LLM, tokens: Any) -> None:
    refused(ArgumentError, lambda: llm.forward(tokens), "tokens")


def test_forward_refuses_another_choice_of_logits(llm: npllm.LLM) -> None:
    refused(ArgumentError, lambda: llm.forward([[1]], logits="first"), "logits")  # type: ignore[arg-type]


@pytest.mark.parametrize("at_once", [3, 7, 512])
def test_generation_never_computes_the_logits_of_earlier_prompt_tokens(
    llm: npllm.LLM, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    wanted = [llm.generate(prompt, max_tokens=4, ignore_eos=True).tokens for prompt in [LONG, *PROMPTS]]
    monkeypatch.setattr("npllm.generation.PREFILL", at_once)
    with llm.trace() as trace:
        outputs = llm.generate([LONG, *PROMPTS], max_tokens=4, ignore_eos=True)
    assert [out.tokens for out in outputs] == wanted
    assert sum(len(logits) for logits in trace.every("logits")) == 5 * 4


# -- a cache that is reused --


def test_a_cache_serves_what_the_prompts_share(llm: npllm.LLM) -> None:
    cache = llm.prompt_cache()
    first = llm.generate(LONG, max_tokens=5, cache=cache, ignore_eos=True)
    assert first.usage.cached_tokens == 0
    longer = [*LONG, *first.tokens, 9, 8, 7]
    second = llm.generate(longer, max_tokens=5, cache=cache, ignore_eos=True)
    assert second.usage.cached_tokens == len(LONG) + 4  # the last token drawn never went through the model
    assert second.tokens == llm.generate(longer, max_tokens=5, ignore_eos=True).tokens
    other = [*LONG[:6], 200, 201]
    third = llm.generate(other, max_tokens=5, cache=cache, ignore_eos=True)
    assert third.usage.cached_tokens == 6
    assert third.tokens == llm.generate(other, max_tokens=5, ignore_eos=True).tokens
    assert llm.generate(other, max_tokens=1, cache=cache).usage.cached_tokens == len(other) - 1
    assert llm.generate([1, 2], max_tokens=1, cache=cache).usage.cached_tokens == 0


def test_a_chat_goes_on_where_it_stopped(folder: Path) -> None:
    llm, plain = (npllm.load(folder, backend="numpy") for _ in range(2))
    messages = [{"role": "user", "content": "Hello"}]
    for _ in range(3):
        options = {"max_tokens": 6, "temperature": 1.0, "seed": 3}
        out = llm.chat(messages, **options)
        assert out.tokens == plain.generate(llm.chat_tokens(messages), **options).tokens
        assert out.usage.cached_tokens > 0 or len(messages) == 1
        messages += [{"role": "assistant", "content": out.text}, {"role": "user", "content": "And then?"}]
    pieces = list(llm.chat(messages, stream=True, **options))
    assert [piece.token for piece in pieces] == plain.generate(llm.chat_tokens(messages), **options).tokens
    assert llm.chat(messages[:1], **options).usage.cached_tokens > 0


def test_template_arguments_cannot_take_the_place_of_npllms_own(llm: npllm.LLM) -> None:
    for name in ("conversation", "messages", "template", "tools", "tokenize", "special_tokens", "budget"):
        with pytest.raises(ArgumentError, match=name):
            llm.chat([{"role": "user", "content": "Hello"}], template_args={name: "x"})


def test_a_cache_is_for_one_row(llm: npllm.LLM) -> None:
    cache = llm.prompt_cache()
    refused(ArgumentError, lambda: llm.generate([[1], [2]], cache=cache), "cache")
    refused(ArgumentError, lambda: llm.generate([1], n=2, cache=cache), "cache")


def consistent(llm: npllm.LLM, cache: Any) -> None:
    """The cache holds what it says it holds: going on from there gives what a fresh run gives."""
    assert len(cache.tokens) == cache.cache.lengths[cache.slot]
    prompt = [*cache.tokens, 11, 12]
    out = llm.generate(prompt, max_tokens=4, cache=cache, ignore_eos=True)
    assert out.usage.cached_tokens == len(prompt) - 2
    assert out.tokens == llm.generate(prompt, max_tokens=4, ignore_eos=True).tokens


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_run_that_breaks_off_between_steps_leaves_a_cache_consistent(
    llm: npllm.LLM, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], steps: int
) -> None:
    cache, step, count = llm.prompt_cache(), type(llm.backend).step, itertools.count()

    def breaks(self: npllm.Backend, *arguments: Any) -> Any:
        if next(count) == steps:
            raise error
        return step(self, *arguments)

    monkeypatch.setattr(type(llm.backend), "step", breaks)
    with pytest.raises(error):
        llm.generate(LONG, max_tokens=9, cache=cache, ignore_eos=True)
    monkeypatch.undo()
    assert len(cache.tokens) == (0 if steps == 0 else len(LONG) + steps - 1)
    consistent(llm, cache)


@pytest.mark.parametrize("appends", range(8))
def test_a_run_that_breaks_off_between_layers_leaves_a_cache_consistent(
    llm: npllm.LLM, monkeypatch: pytest.MonkeyPatch, appends: int
) -> None:
    cache, append, count = llm.prompt_cache(), LayerCache.append, itertools.count()
    llm.generate([*LONG[:9], 1], max_tokens=2, cache=cache, ignore_eos=True)

    def breaks(self: LayerCache, *arguments: Any) -> Any:
        if next(count) == appends:
            raise KeyboardInterrupt
        return append(self, *arguments)

    monkeypatch.setattr(LayerCache, "append", breaks)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(LONG, max_tokens=9, cache=cache, ignore_eos=True)
    monkeypatch.undo()
    assert cache.tokens[:9] == LONG[:9]
    consistent(llm, cache)


def test_a_stream_that_is_dropped_leaves_its_cache_consistent(llm: npllm.LLM) -> None:
    for taken in (0, 1, 3):
        cache = llm.prompt_cache()
        stream = llm.stream(LONG, max_tokens=9, cache=cache, ignore_eos=True)
        for _ in itertools.islice(stream, taken):
            pass
        stream.close()  # type: ignore[attr-defined]
        assert len(cache.tokens) == (0 if taken == 0 else len(LONG) + taken - 1)
        consistent(llm, cache)


def test_a_chat_that_is_interrupted_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = npllm.load(folder, backend="numpy")
    messages = [{"role": "user", "content": "Hello you"}]
    wanted = llm.generate(llm.chat_tokens(messages), max_tokens=8, ignore_eos=True).tokens

    def interrupted() -> None:
        for number, _ in enumerate(llm.chat(messages, stream=True, max_tokens=8, ignore_eos=True)):
            if number == 2:
                raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    out = llm.chat(messages, max_tokens=8, ignore_eos=True)
    assert out.tokens == wanted


def test_a_later_run_on_a_cache_ends_a_stream_that_is_under_way(llm: npllm.LLM) -> None:
    cache = llm.prompt_cache()
    stream = llm.stream(LONG, max_tokens=9, cache=cache, ignore_eos=True)
    unstarted = llm.stream(PROMPTS[0], max_tokens=9, cache=cache, ignore_eos=True)
    refused(ArgumentError, lambda: next(stream), "later call")
    started = llm.stream(LONG, max_tokens=9, cache=cache, ignore_eos=True)
    next(started)
    other = llm.generate(PROMPTS[2], max_tokens=3, cache=cache, ignore_eos=True)
    assert other.tokens == llm.generate(PROMPTS[2], max_tokens=3, ignore_eos=True).tokens
    refused(ArgumentError, lambda: next(started), "later call")
    refused(ArgumentError, lambda: next(unstarted), "later call")
    consistent(llm, cache)


# -- a cache on disk --


@pytest.fixture
def saved(llm: npllm.LLM, tmp_path: Path) -> Path:
    cache = llm.prompt_cache()
    llm.generate(LONG, max_tokens=3, cache=cache, ignore_eos=True)
    cache.save(tmp_path / "cache.safetensors")
    return tmp_path / "cache.safetensors"


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "bfloat16"}, {"dtype": "float64"}])
def test_a_cache_comes_back_as_it_was_saved(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    llm = npllm.load(folder, backend="numpy", **options)
    cache, again = llm.prompt_cache(), npllm.load(folder, backend="numpy", **options).prompt_cache()
    llm.generate(LONG, max_tokens=3, cache=cache, ignore_eos=True)
    path = tmp_path / "cache.safetensors"
    cache.save(str(path))
    again.load(str(path))
    assert again.tokens == cache.tokens
    for name, values in cache.cache.contents(cache.slot).items():
        np.testing.assert_array_equal(again.cache.contents(again.slot)[name], values, strict=True)
    consistent(llm, again)
    assert [file.name for file in tmp_path.iterdir()] == ["cache.safetensors"]


RINGS: dict[str, dict[str, Any]] = {
    "qwen3": {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 6},
    "gemma3_text": {},
    "llama4_text": {"attention_chunk_size": 5},
}


@pytest.mark.parametrize("architecture", RINGS)
@pytest.mark.parametrize("products", [None, 1, 6, 9])
def test_a_cache_saved_after_a_broken_step_gives_up_what_its_rings_have_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, products: int | None
) -> None:
    """Some layers have put a token in the place of one that a shorter prompt sees; None: a stream goes back and is left."""
    llm = npllm.load(make_checkpoint(tmp_path / "model", architecture, **RINGS[architecture]), backend="numpy")
    cache, linear, count = llm.prompt_cache(), type(llm.backend).linear, itertools.count()
    llm.generate(LONG, max_tokens=1, cache=cache)

    def breaks(self: npllm.Backend, *arguments: Any, **options: Any) -> Any:
        if next(count) == products:
            raise KeyboardInterrupt
        return linear(self, *arguments, **options)

    if products is None:
        llm.stream(LONG, cache=cache)
    else:
        monkeypatch.setattr(type(llm.backend), "linear", breaks)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([*LONG, 7], cache=cache)
        monkeypatch.undo()
    cache.save(tmp_path / "cache")
    for back in range(4):
        again, prompt = llm.prompt_cache(), [*LONG[: len(LONG) - back], 9, 9]
        again.load(tmp_path / "cache")
        wanted = llm.generate(prompt, max_tokens=4, ignore_eos=True, logprobs=0)
        got = llm.generate(prompt, max_tokens=4, ignore_eos=True, logprobs=0, cache=again)
        np.testing.assert_allclose([each.logprob for each in got.logprobs], [each.logprob for each in wanted.logprobs], 1e-4)


def test_a_cache_follows_its_model_to_another_folder(saved: Path, tmp_path: Path) -> None:
    cache = npllm.load(make_checkpoint(tmp_path / "copy", vocab_size=300), backend="numpy").prompt_cache()
    cache.load(saved)
    assert cache.tokens[:20] == LONG


def test_an_empty_cache_can_be_saved(llm: npllm.LLM, tmp_path: Path) -> None:
    cache = llm.prompt_cache()
    cache.save(tmp_path / "empty")
    cache.load(tmp_path / "empty")
    assert cache.tokens == []
    consistent(llm, cache)


def test_a_cache_of_another_model_is_refused(saved: Path, tmp_path: Path, folder: Path) -> None:
    other = npllm.load(make_checkpoint(tmp_path / "other", seed=1, vocab_size=300), backend="numpy")
    refused(CheckpointError, lambda: other.prompt_cache().load(saved), str(saved), "model differ")
    turned = npllm.load(make_checkpoint(tmp_path / "turned", vocab_size=300, rope_theta=50.0), backend="numpy")
    refused(CheckpointError, lambda: turned.prompt_cache().load(saved), str(saved), "model differ")
    narrow = npllm.load(folder, backend="numpy", kv_dtype="bfloat16")
    refused(CheckpointError, lambda: narrow.prompt_cache().load(saved), "kv_dtype differ")
    short = npllm.load(folder, backend="numpy", max_context=10)
    refused(CheckpointError, lambda: short.prompt_cache().load(saved), "22 tokens", "10")


def test_a_checkpoint_is_no_prompt_cache(llm: npllm.LLM, folder: Path, tmp_path: Path) -> None:
    refused(CheckpointError, lambda: llm.prompt_cache().load(folder / "model.safetensors"), "not a prompt cache")
    refused(CheckpointError, lambda: llm.prompt_cache().load(tmp_path / "none"), "cannot be read")
    refused(CheckpointError, lambda: llm.prompt_cache().save(tmp_path / "no" / "folder"), "cannot be written")


def test_a_damaged_cache_is_refused_and_the_old_one_kept(llm: npllm.LLM, saved: Path) -> None:
    whole, cache = saved.read_bytes(), llm.prompt_cache()
    llm.generate(PROMPTS[2], max_tokens=2, cache=cache, ignore_eos=True)
    before = list(cache.tokens)
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        refused(CheckpointError, lambda: cache.load(saved), str(saved))
    assert cache.tokens == before
    consistent(llm, cache)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("tokens"),
        lambda t: t.pop("layers.1.v"),
        lambda t: t.update(more=np.zeros(3)),
        lambda t: t.update(tokens=t["tokens"][:-1].copy()),
        lambda t: t.update(tokens=t["tokens"].astype(np.int32)),
        lambda t: t.update(tokens=t["tokens"][None]),
        lambda t: t.update({"layers.0.k": t["layers.0.k"][:1].copy()}),
        lambda t: t.update({"layers.0.k": t["layers.0.k"].astype(np.float16)}),
    ],
)
def test_a_cache_with_other_tensors_is_refused(llm: npllm.LLM, saved: Path, change: Callable[..., Any]) -> None:
    tensors = load_file(saved)
    change(tensors)
    save_file(tensors, saved, metadata=metadata(saved))
    refused(CheckpointError, lambda: llm.prompt_cache().load(saved), str(saved), "damaged")


def metadata(saved: Path) -> dict[str, str]:
    length = int.from_bytes(saved.read_bytes()[:8], "little")
    found: dict[str, str] = json.loads(saved.read_bytes()[8 : 8 + length])["__metadata__"]
    return found


@pytest.mark.parametrize("lost", ["", "x", "[0]", "[0, 0, 0]", "[0, -1]", "[0, 1.0]", "{}", "[" * 100_000])
def test_a_cache_that_does_not_say_what_it_lost_is_refused(llm: npllm.LLM, saved: Path, lost: str) -> None:
    save_file(load_file(saved), saved, metadata=metadata(saved) | {"lost": lost})
    refused(CheckpointError, lambda: llm.prompt_cache().load(saved), str(saved), "damaged", "lost")


def test_a_cache_whose_metadata_is_no_text_is_refused(llm: npllm.LLM, saved: Path) -> None:
    text = b'{"__metadata__":{"format":5}}'
    saved.write_bytes(len(text).to_bytes(8, "little") + text)
    refused(CheckpointError, lambda: llm.prompt_cache().load(saved), str(saved), "not a prompt cache")


# -- generation_config.json --


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., npllm.LLM]:
    """Load the model with a generation_config.json of the given content."""

    def load(**content: Any) -> npllm.LLM:
        target = make_checkpoint(tmp_path / "told", vocab_size=300)
        (target / "generation_config.json").write_text(json.dumps(content))
        return npllm.load(target, backend="numpy")

    return load


def test_defaults_of_the_model_hold_until_told_otherwise(llm: npllm.LLM, told: Callable[..., npllm.LLM]) -> None:
    greedy = llm.generate(LONG, max_tokens=7).tokens
    sampled = llm.generate(LONG, max_tokens=7, temperature=1.2, top_k=40, seed=9).tokens
    model = told(do_sample=True, temperature=1.2, top_k=40, max_new_tokens=7)
    assert model.generate(LONG, seed=9).tokens == sampled
    assert model.generate(LONG, temperature=0).tokens == greedy
    assert model.generate(LONG, top_k=1).tokens == greedy
    assert len(model.generate(LONG, max_tokens=3).tokens) == 3
    calm = told(do_sample=False, temperature=1.2, top_k=40, max_new_tokens=7)
    assert calm.generate(LONG, seed=9).tokens == greedy


def test_penalties_of_the_model_hold_without_sampling(llm: npllm.LLM, told: Callable[..., npllm.LLM]) -> None:
    wanted = llm.generate(LONG, max_tokens=12, repetition_penalty=3.0).tokens
    assert told(repetition_penalty=3.0).generate(LONG, max_tokens=12).tokens == wanted
