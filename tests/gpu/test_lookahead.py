"""Steps launched before their tokens are known: the same answers as without, whatever becomes of them, and no waiting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from npllm.backend import Backend
from npllm.backends.cupy_gpu.cache import DeviceCache
from npllm.errors import MemoryLimitError, NumericsError
from npllm.generation import State
from npllm.llm import LLM
from npllm.models import interpret
from npllm.sampling import Drawn, Sampler, Sampling
from npllm.tokenizer import Tokenizer
from tests.gpu.emulator import EmulatedBackend, Emulator, emulated
from tests.gpu.emulator.arrays import STREAM, plain
from tests.gpu.emulator.device import EmulatedTurn
from tests.gpu.emulator.launches import Launches
from tests.models import CONFIGS
from tests.talker import make_talker

pytestmark = emulated

PROMPTS = [[5, 9, 33, 7], [11], [200, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]

# Beside keys that are kept for ever: a window, chunks, latents, experts.
MODELS = ("qwen3", "gemma3_text", "llama4_text", "deepseek_v3", "gemma3n_text")


def model(name: str, ahead: bool = True, **options: Any) -> LLM:
    described = interpret(CONFIGS[name] | {"model_type": name}, name)
    llm = LLM.random(described, EmulatedBackend("float32"), **options)
    llm.backend.looks_ahead = ahead
    return llm


@pytest.fixture(autouse=True)
def log() -> Iterator[list[tuple[str, int]]]:
    """What is put off and waited for from here on."""
    STREAM.finish("a test before")
    STREAM.log.clear()
    yield STREAM.log
    STREAM.finish("the end of a test")


class Rows:
    """Rows of a cache that advance by `step`, as generation has them, but under a test's eyes."""

    def __init__(self, llm: LLM, prompts: Sequence[Sequence[int]] = PROMPTS, **sampling: Any) -> None:
        self.llm, self.sampling = llm, Sampling(**sampling)
        cache = llm.new_cache()
        assert isinstance(cache, DeviceCache)
        self.cache, self.streams = cache, 0
        self.samplers: dict[int, Sampler] = {}
        self.next: dict[int, int] = {}
        for prompt in prompts:
            self.add(prompt)

    def add(self, prompt: Sequence[int], slot: int | None = None) -> int:
        """A new row, or one begun anew."""
        slot = self.cache.add() if slot is None else slot
        self.samplers[slot] = Sampler(self.sampling, self.streams, prompt, self.llm.config.vocab_size)
        self.streams += 1
        self._step([slot], [list(prompt)])
        return slot

    def free(self, slot: int) -> None:
        self.cache.free(slot)
        del self.samplers[slot], self.next[slot]

    def go_on(self, slots: Sequence[int] | None = None, logprobs: bool = False) -> Drawn:
        """A token for each row."""
        slots = list(self.next) if slots is None else list(slots)
        return self._step(slots, [[self.next[slot]] for slot in slots], logprobs)

    def _step(self, slots: list[int], pieces: list[list[int]], logprobs: bool = False) -> Drawn:
        rows = self.cache.plan(slots, list(map(len, pieces)), [True] * len(slots))
        samplers = tuple(self.samplers[slot] for slot in slots)
        state = State(np.concatenate(pieces), rows, self.cache, samplers, logprobs)
        drawn = self.llm.backend.step(self.llm.model, state)
        self.next.update(zip(slots, drawn.tokens_W.tolist(), strict=True))
        return drawn

    def under_way(self) -> bool:
        return self.cache.ahead is not None

    def answers(self, count: int, slots: Sequence[int] | None = None) -> list[list[int]]:
        return [self.go_on(slots).tokens_W.tolist() for _ in range(count)]


# -- no waiting -----------------------------------------------------------------------------------------------------------


def done_for_tokens(stream: Iterator[Any], log: list[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    """What the host does for each of seven tokens, from the fifth on, while the next step is under way."""
    for _ in range(4):
        next(stream)
    for _ in range(7):
        assert len(STREAM.todo) == 2, "a buffer to be written, a graph to be launched"
        log.clear()
        next(stream)
        yield log.copy()


def test_between_two_tokens_the_host_waits_for_nothing_but_the_step_before(log: list[tuple[str, int]]) -> None:
    """While a token is read, the next step is under way; asking for it launches another and waits for this one alone."""
    stream = model("qwen3").stream([5, 6, 7], max_tokens=12, ignore_eos=True)
    for (one, wrote), (two, launched), waited in done_for_tokens(stream, log):
        assert (one, two) == ("write", "turn")
        assert waited == ("wait", wrote - 1) == ("wait", launched - 2)
    assert [piece.finish_reason for piece in stream] == ["length"]
    assert not STREAM.todo, "a step behind the last one"


def test_a_step_reads_what_the_one_before_it_drew() -> None:
    """Tokens come from the host once. Then each launch reads them ahead of its last kernel, which puts its own there, and
    those go to the host before anything else is done."""
    rows = Rows(model("gemma3n_text"))
    rows.answers(2)
    step = rows.cache.steps[id(rows.llm.model), 4, False]
    device = rows.llm.backend.device
    device.launches = launches = Launches()
    try:
        rows.answers(4)
        STREAM.finish("all")
    finally:
        device.launches = None
    uses = launches.uses(step.tokens_M)
    assert uses[0] == ("from the host", "writes")
    once = uses[1:][: len(uses) // 5]
    assert once[0] == ("embed.cu:embed", "reads")
    assert once[-2:] == [("sample.cu:sample", "writes"), ("to the host", "reads")]
    assert {how for _, how in once[:-2]} == {"reads"}
    assert uses[1:] == once * 5
    assert launches.hazards() == []


def test_log_probabilities_come_with_the_token(log: list[tuple[str, int]]) -> None:
    """The same as without looking ahead and, but for rounding, as the canon's; nothing more is waited for."""
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 2, "logprobs": 3, "ignore_eos": True}
    stream = model("qwen3").stream([5, 6, 7], **options)
    pieces = [next(stream) for _ in range(5)]
    log.clear()
    pieces.append(next(stream))
    assert [what for what, _ in log] == ["write", "turn", "wait"]
    pieces += stream
    told = [piece.logprob for piece in pieces]
    assert told == model("qwen3", ahead=False).generate([5, 6, 7], **options).logprobs
    described = interpret(CONFIGS["qwen3"] | {"model_type": "qwen3"}, "qwen3")
    want = LLM.random(described, Backend("float32")).generate([5, 6, 7], **options).logprobs
    assert want is not None
    for ours, theirs in zip(told, want, strict=True):
        assert ours is not None
        assert ours.token == theirs.token
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.4,
    "logit_bias": {9: 2.0, 33: -np.inf, 7: -0.5},
}  # fmt: skip


def test_penalties_and_biases_keep_nobody_waiting(log: list[tuple[str, int]]) -> None:
    """A row's history goes to the device once; the device adds what it draws, and the next step reads it."""
    stream = model("qwen3").stream([5, 6, 7], max_tokens=12, ignore_eos=True, **PENALTIES)
    for done in done_for_tokens(stream, log):
        assert [what for what, _ in done] == ["write", "turn", "wait"]
    assert len(list(stream)) == 1


@pytest.mark.parametrize(
    ("name", "temperature"),
    [("qwen3", 0.0), ("qwen3", 1.2), ("gemma3n_text", 0.0), pytest.param("gemma3n_text", 1.2, marks=pytest.mark.full)],
)
def test_the_canon_draws_the_same_by_penalties(name: str, temperature: float) -> None:
    """Rows leave the batch one by one, so that others come to stand in their places."""
    described = interpret(CONFIGS[name] | {"model_type": name}, name)
    stop = range(0, described.config.vocab_size, 17)
    options: dict[str, Any] = {"max_tokens": 16, "stop_ids": stop, "temperature": temperature, "seed": 6, **PENALTIES}
    want = LLM.random(described, Backend("float32")).generate(PROMPTS * 2, **options)
    assert len({len(each.tokens) for each in want}) > 2
    for ahead in (True, False):
        got = model(name, ahead).generate(PROMPTS * 2, **options)
        assert [each.tokens for each in got] == [each.tokens for each in want]


def test_it_can_be_switched_off(log: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPLLM_LOOKAHEAD", "0")
    assert not EmulatedBackend("float32").looks_ahead
    rows = Rows(model("qwen3", ahead=False))
    rows.answers(3)
    log.clear()
    rows.answers(4)
    assert [what for what, _ in log] == ["write", "turn", "wait"] * 4
    assert not rows.under_way()
    assert not STREAM.todo


def test_a_window_has_room_for_one_key_more() -> None:
    sizes = []
    for ahead in (True, False):
        cache = model("gemma3_text", ahead).new_cache()
        cache.add()
        cache.reserve(40)
        sizes.append({layer.spec.mask.span: layer.size for layer in cache.layers})
    spans = [span for span in sizes[0] if span]
    assert spans
    assert all((sizes[0][span], sizes[1][span]) == (span + 1, span) for span in spans)


# -- the same answers -----------------------------------------------------------------------------------------------------

WAYS: tuple[dict[str, Any], ...] = (
    {}, {"temperature": 0.9, "seed": 3}, {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "seed": 8},
)  # fmt: skip


@pytest.mark.parametrize(("name", "way"), list(zip(MODELS, (*WAYS, *WAYS), strict=False)))
def test_the_canon_draws_the_same(name: str, way: dict[str, Any]) -> None:
    """Answers that end where they like: rows leave the batch one by one."""
    described = interpret(CONFIGS[name] | {"model_type": name}, name)
    options: dict[str, Any] = {"max_tokens": 12, "stop_ids": range(0, described.config.vocab_size, 9), **way}
    want = LLM.random(described, Backend("float32")).generate(PROMPTS, **options)
    for ahead in (True, False):
        got = model(name, ahead).generate(PROMPTS, **options)
        told = [(each.tokens, each.finish_reason, each.usage) for each in got]
        assert told == [(each.tokens, each.finish_reason, each.usage) for each in want]


ACTIONS = st.one_of(
    st.tuples(st.just("go on"), st.integers(1, 6)),
    st.tuples(st.just("some go on"), st.integers(1, 3)),
    st.tuples(st.just("another token"), st.integers(0, 90)),
    st.tuples(st.just("logits"), st.just(0)),
    st.tuples(st.just("free"), st.integers(0, 9)),
    st.tuples(st.just("add"), st.integers(1, 9)),
    # Not by more: a ring that has an entry more may hold what the other has lost.
    st.tuples(st.just("cut"), st.integers(0, 1)),
    st.tuples(st.just("fork"), st.integers(0, 9)),
    st.tuples(st.just("as before"), st.integers(0, 9)),
    st.tuples(st.just("new sampler"), st.integers(0, 9)),
)


def act(rows: Rows, action: str, number: int) -> list[Any]:
    """Do something to the rows -> what is seen of it."""
    slots = sorted(rows.next)
    slot = slots[number % len(slots)]
    match action:
        case "go on":
            return rows.answers(number)
        case "some go on":
            return rows.answers(number, slots[:-1] or slots)
        case "another token":
            rows.next[slots[0]] = number
        case "logits":
            drawn = rows.go_on(logprobs=True)
            assert drawn.logits_WN is not None
            return drawn.logits_WN.tolist()
        case "free" if len(slots) > 1:
            rows.free(slot)
        case "add":
            rows.add(range(1, 1 + number))
        case "as before":
            # The same slot with as many tokens, the last one the same: only what stands before differs.
            length, token, sampler = rows.cache.lengths[slot], rows.next[slot], rows.samplers[slot]
            rows.cache.truncate(slot, 0)
            rows.add([token] * length, slot)
            rows.next[slot], rows.samplers[slot] = token, sampler
        case "cut":
            return cut(rows, slots[0], number)
        case "fork":
            new = rows.cache.fork(slot)
            rows.next[new], rows.samplers[new] = rows.next[slot], Sampler(rows.sampling, 50 + new, [1], 90)
        case "new sampler":
            rows.samplers[slot] = Sampler(rows.sampling, 90, [1], rows.llm.config.vocab_size)
    return []


def cut(rows: Rows, slot: int, tokens: int) -> list[Any]:
    """Cut a row back; one that has lost what it needs begins anew."""
    length = rows.cache.truncate(slot, max(0, rows.cache.lengths[slot] - tokens))
    if length == 0:
        rows.add([7, 8, 9], slot)
    return [length]


def beside_rows_that_do_not(name: str, actions: list[tuple[str, int]], **sampling: Any) -> None:
    """The same tokens, the same logits to the last bit."""
    ours, theirs = (Rows(model(name, ahead), PROMPTS[:2], **sampling) for ahead in (True, False))
    for action, number in [("go on", 4), *actions, ("go on", 2), ("logits", 0)]:
        assert act(ours, action, number) == act(theirs, action, number), (action, number)


EXAMPLE = [
    ("cut", 1), ("go on", 3), ("another token", 5), ("go on", 2), ("as before", 0), ("go on", 3), ("fork", 0), ("go on", 4),
    ("new sampler", 1), ("go on", 2), ("free", 1), ("add", 6), ("go on", 3), ("logits", 0), ("some go on", 2), ("cut", 1),
]  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param("gemma3_text", marks=pytest.mark.full), "llama4_text"])
def test_whatever_becomes_of_the_rows(name: str) -> None:
    beside_rows_that_do_not(name, EXAMPLE, temperature=1.0)


def test_whatever_becomes_of_rows_with_penalties(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that the host draws of the same logits, in steps that wait for it: its samplers know their own history."""
    ours = Rows(model("qwen3"), PROMPTS[:2], temperature=1.0, **PENALTIES)
    theirs = Rows(model("qwen3", ahead=False), PROMPTS[:2], temperature=1.0, **PENALTIES)
    for action, number in [("go on", 4), *EXAMPLE, ("go on", 2)]:
        got = act(ours, action, number)
        with monkeypatch.context() as patch:
            patch.setattr(EmulatedBackend, "settings", lambda self, state, vocabulary: None)
            assert got == act(theirs, action, number), (action, number)


def test_a_step_ahead_is_not_for_a_sampler_that_has_seen_other_tokens() -> None:
    """As many of them, so that no setting differs."""
    answers = []
    for ahead in (True, False):
        rows = Rows(model("qwen3", ahead), PROMPTS[:1], repetition_penalty=5.0)
        said = [tokens[0] for tokens in rows.answers(5)]
        other = Sampler(rows.sampling, 0, [1, 2, 3, 4], rows.llm.config.vocab_size)
        for token in range(20, 21 + len(said)):
            other.take(token)
        rows.samplers[0] = other
        assert rows.under_way() == ahead
        answers.append(rows.answers(4))
    assert answers[0] == answers[1]


@pytest.mark.full
@pytest.mark.parametrize("name", ["gemma3_text", "llama4_text", "deepseek_v3"])
@given(st.lists(ACTIONS, min_size=4, max_size=14), st.sampled_from([0.0, 1.0]), st.sampled_from([{}, PENALTIES]))
@settings(max_examples=15, phases=(Phase.generate,))
def test_whatever_else(name: str, actions: list[tuple[str, int]], temperature: float, bent: dict[str, Any]) -> None:
    beside_rows_that_do_not(name, actions, temperature=temperature, **bent)


def test_a_freed_slot_that_another_row_is_copied_into() -> None:
    """As long, with the same token and the same draws to come: but what stands before it is the other row's."""
    answers = []
    for ahead in (True, False):
        rows = Rows(model("qwen3", ahead), [[5, 9, 33, 7], [11, 12, 13, 14]])
        gone, other = rows.next
        rows.answers(5, [other])
        rows.answers(5, [gone])
        assert rows.under_way() == ahead
        token, sampler = rows.next[gone], rows.samplers[gone]
        rows.free(gone)
        assert rows.cache.fork(other) == gone
        rows.next[gone], rows.samplers[gone] = token, sampler
        answers.append(rows.answers(4, [gone]))
    assert answers[0] == answers[1]


# -- limits and faults ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [24, 256])
def test_nothing_is_launched_for_which_there_is_no_room(context: int) -> None:
    """Where the context is full, or the cache would have to grow first."""
    rows = Rows(model("qwen3", max_context=context), [[7] * (min(256, context) - 8)])
    while rows.cache.lengths[0] < min(256, context):
        rows.go_on()
        captured = rows.cache.lengths[0] > min(256, context) - 6
        assert rows.under_way() == (captured and rows.cache.lengths[0] < rows.cache.size)
    assert rows.cache.lengths[0] == rows.cache.size


def test_logits_that_are_not_finite_fail_the_step_that_has_them() -> None:
    """Those of a step ahead when it is asked for, not before; and chance is left as it was."""
    rows = Rows(model("qwen3"), PROMPTS[:2], temperature=1.0)
    wanted = rows.answers(4)
    assert len(STREAM.todo) == 2
    gain = np.asarray(plain(rows.llm.model.weights.norm.weight))
    kept = gain[0]
    gain[0] = np.nan
    numbers = [sampler.foreseen(0) for sampler in rows.samplers.values()]
    with pytest.raises(NumericsError, match="not finite"):
        rows.go_on()
    assert not rows.under_way()
    assert [sampler.foreseen(0) for sampler in rows.samplers.values()] == numbers
    STREAM.finish("what was launched")
    gain[0] = kept
    again = Rows(rows.llm, PROMPTS[:2], temperature=1.0)
    assert again.answers(4) == wanted


def test_a_step_ahead_that_finds_no_memory_costs_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model("qwen3")
    wanted = llm.generate(PROMPTS, max_tokens=10, temperature=1.0, ignore_eos=True)
    turn, calls = Emulator.turn, []

    def second_fails(self: Emulator, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryLimitError("the GPU's memory is full")
        return turn(self, *args)

    monkeypatch.setattr(Emulator, "turn", second_fails)
    got = llm.generate(PROMPTS, max_tokens=10, temperature=1.0, ignore_eos=True)
    assert [each.tokens for each in got] == [each.tokens for each in wanted]
    assert len(calls) == 1 + 7, "a step that has failed so is not tried again"


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_an_interrupt_while_a_token_is_waited_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversation's cache goes on from what it holds."""
    llm = model(name)
    cache, options = llm.prompt_cache(), {"max_tokens": 12, "ignore_eos": True}
    wanted = llm.generate([5, 6, 7], **options).tokens
    wait, waits = EmulatedTurn.wait, []

    def interrupted(self: EmulatedTurn) -> Any:
        waits.append(1)
        if len(waits) == 4:
            raise KeyboardInterrupt
        return wait(self)

    monkeypatch.setattr(EmulatedTurn, "wait", interrupted)
    stream = llm.stream([5, 6, 7], cache=cache, **options)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    said = stream._row.tokens
    assert said == wanted[: len(said)]
    assert cache.tokens == [5, 6, 7, *said]
    output = llm.generate([5, 6, 7, *said, 8], cache=cache, **options)
    assert output.usage.cached_tokens == 3 + len(said)
    assert output.tokens == llm.generate([5, 6, 7, *said, 8], **options).tokens


@pytest.mark.parametrize("name", ["gemma3_text", pytest.param("llama4_text", marks=pytest.mark.full)])
def test_a_stream_that_is_closed_leaves_a_cache_that_can_be_cut_back(name: str) -> None:
    """By one token beyond what was said, as when the same answer is asked for again."""
    llm = model(name)
    for count in (9, 10):
        cache, options = llm.prompt_cache(), {"max_tokens": 30, "ignore_eos": True}
        with llm.stream([5, 6, 7], cache=cache, **options) as stream:
            said = [next(stream).token for _ in range(count)]
        prompt = [5, 6, 7, *said[:-1]]
        output = llm.generate(prompt, cache=cache, **options)
        assert output.usage.cached_tokens == len(prompt) - 1, "a key is lost"
        assert output.tokens == llm.generate(prompt, **options).tokens


@pytest.mark.parametrize("name", [pytest.param("qwen3", marks=pytest.mark.full), "gemma3_text"])
def test_a_stop_string_that_is_complete_while_a_step_is_under_way(name: str, tmp_path: Path) -> None:
    """The answer ends there as it does without that step, others go on, and the cache has lost nothing by it."""
    tokenizer = Tokenizer(make_talker(tmp_path))
    letters = set(tokenizer.encode("abcdefghijklmnopqrstuvwxyz"))
    banned = {token: -np.inf for token in range(CONFIGS[name]["vocab_size"]) if token not in letters}
    options: dict[str, Any] = {"temperature": 1.0, "seed": 3, "logit_bias": banned, "ignore_eos": True}
    whole = [each.text for each in model(name, tokenizer=tokenizer).generate(PROMPTS, max_tokens=13, **options)]
    stop = whole[0][7:10]
    wanted = [text.partition(stop)[0] for text in whole]
    assert [len(text) for text in wanted] == [7, 13, 13]
    for ahead in (True, False):
        llm = model(name, ahead, tokenizer=tokenizer)
        got = llm.generate(PROMPTS, max_tokens=13, stop=stop, **options)
        assert [(each.text, each.stop) for each in got] == list(zip(wanted, (stop, None, None), strict=True))
        cache = llm.prompt_cache()
        said = llm.generate(PROMPTS[0], max_tokens=13, stop=stop, cache=cache, **options)
        assert (said.text, len(said.tokens), len(STREAM.todo)) == (wanted[0], 10, 2 if ahead else 0)
        prompt = [*PROMPTS[0], *said.tokens, 8]
        more = llm.generate(prompt, max_tokens=9, cache=cache, **options)
        assert more.usage.cached_tokens == len(prompt) - 2
        assert more.text == llm.generate(prompt, max_tokens=9, **options).text


def test_time_that_the_device_takes_counts_where_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = EmulatedTurn.wait
    monkeypatch.setattr(EmulatedTurn, "wait", lambda self: (wait(self)[0], 2.5))
    stream = model("qwen3").stream([5, 6, 7], max_tokens=9, ignore_eos=True)
    pieces = list(stream)
    captured = len(pieces) - 3  # the prompt's, and two steps that run
    assert 2.5 * captured < stream.timings.generation_seconds < 2.5 * captured + 2.5
    assert stream.usage.completion_tokens == 9
