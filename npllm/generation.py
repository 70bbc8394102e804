"""The generation loop: rows of different lengths advance together, each step packs the tokens they bring.

A row first brings its prompt, in pieces, then one token per step. Finished rows leave the batch.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.cache import Cache, Rows
from npllm.config import shown
from npllm.errors import ArgumentError, ContextError
from npllm.sampling import Alternative, Sampler, Sampling, alternatives, log_softmax, whole
from npllm.tokenizer import StopStrings, TextStream, Tokenizer

if TYPE_CHECKING:
    from npllm.model import Model

# Prompt tokens per step: enough for the matrix products to run at full speed, few enough to bound activations.
PREFILL = 512


class State(NamedTuple):
    """What one step works on: packed new tokens (NumPy, int64), the plan of their rows, the cache, and who draws.

    `samplers` holds one Sampler for each row whose last token's logits are wanted (W of them), in the order of the rows.
    `logprobs` says whether a row asked for log-probabilities, so that the logits have to come back; `ends`, whether a row is
    known to end with this step, so that the next one will be of others.
    """

    tokens_M: Array
    rows: Rows
    cache: Cache
    samplers: tuple[Sampler, ...]
    logprobs: bool
    ends: bool = False


@dataclass(frozen=True)
class Limits:
    """When a row ends: after `max_tokens`, at a stop id, at a stop string, or where the context is full."""

    max_tokens: int
    max_context: int
    stop_ids: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    logprobs: int | None = None


class Options(TypedDict, total=False):
    """The keyword arguments of `generate`, `stream` and `chat`; None, or nothing, leaves the model's default.

    max_tokens      length of the answer; default: max_new_tokens of generation_config.json, else 256.
    temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, seed
                    as in npllm.sampling.Sampling; default: generation_config.json where it samples (a key that it lacks
                    restricts nothing), else greedy. top_k, top_p or min_p without a temperature mean temperature 1.
    logprobs        k >= 0: log-probabilities of the tokens, each with its k likeliest alternatives.
    stop            a string, or strings, that end the answer; they are no part of it.
    stop_ids        token ids that end it, besides those of generation_config.json (or config.json's eos_token_id).
    ignore_eos      the model's own stop ids do not end it.
    """

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    stop: str | Sequence[str] | None
    stop_ids: Sequence[int] | None
    ignore_eos: bool | None


class TokenLogprob(NamedTuple):
    """A generated token, its log-probability under the model (before sampling bends it), and the likeliest alternatives."""

    token: int
    logprob: float
    alternatives: list[Alternative]


class Piece(NamedTuple):
    """What one token adds: whole text (often a word, sometimes ""), and, with the last piece, why the row ended."""

    text: str
    token: int | None
    logprob: TokenLogprob | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt (of which `cached_tokens` were found in a cache) and of the answer."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds for the prompt and for the answer's tokens, of the whole batch that the row was part of."""

    prompt_seconds: float
    generation_seconds: float
    prompt_per_second: float
    generation_per_second: float


@dataclass(frozen=True)
class Output:
    """What `generate` gives for one row.

    text            the answer, without stop strings and special tokens.
    tokens          its token ids, a final stop id included.
    finish_reason   "stop" (a stop id or string) or "length" (max_tokens, or the context is full).
    stop            the stop id or stop string that ended it, or None.
    logprobs        one TokenLogprob per token when asked for, else None.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    usage: Usage
    timings: Timings
    stop: int | str | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclass
class Row:
    """One sequence under way. `pending` are the tokens that the cache does not hold yet."""

    prompt: list[int]
    sampler: Sampler
    limits: Limits
    text: TextStream | None
    pending: list[int] = field(default_factory=list)
    slot: int = -1
    cached: int = 0
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop: int | str | None = None

    def __post_init__(self) -> None:
        self.stops = StopStrings(self.limits.stops)

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt), len(self.tokens), self.cached)

    def accept(self, token: int, logits_N: Array | None) -> Piece:
        """Take the token just drawn; -> its piece of text, with the reason if the row ends here."""
        last = self.is_last
        self.tokens.append(token)
        self.pending = [token]
        logprob = self._logprob(token, logits_N)
        if token in self.limits.stop_ids:
            self.finish_reason, self.stop = "stop", token
        elif last:
            self.finish_reason = "length"
        text = self._text(token)
        return Piece(text, token, logprob, self.finish_reason)

    @property
    def is_last(self) -> bool:
        """Whether the next token is the last one in any case: by number, or since the context is then full."""
        tokens = len(self.tokens) + 1
        return tokens >= self.limits.max_tokens or len(self.prompt) + tokens >= self.limits.max_context

    def _text(self, token: int) -> str:
        if self.text is None:
            return ""
        # A stop id is no text even where the tokenizer does not call it special.
        text = "" if self.stop is not None else self.text.push(token)
        if self.finish_reason is not None:
            text += self.text.finish()
        text = self.stops.push(text, final=self.finish_reason is not None)
        if self.stops.found is not None:
            self.finish_reason, self.stop = "stop", self.stops.found
        return text

    def _logprob(self, token: int, logits_N: Array | None) -> TokenLogprob | None:
        if self.limits.logprobs is None or logits_N is None:
            return None
        logprobs_N = log_softmax(logits_N)
        return TokenLogprob(token, float(logprobs_N[token]), alternatives(logprobs_N, self.limits.logprobs))


@dataclass
class Clock:
    """Where the time of a batch went."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    def timings(self) -> Timings:
        def rate(count: int, seconds: float) -> float:
            return count / seconds if seconds > 0 else 0.0

        return Timings(
            self.prompt_seconds,
            self.seconds,
            rate(self.prompt_tokens, self.prompt_seconds),
            rate(self.tokens, self.seconds),
        )


class Batch:
    """Rows that advance together through one cache. `n` rows per prompt share its prefill."""

    def __init__(self, model: Model, backend: Backend, cache: Cache) -> None:
        self.model, self.backend, self.cache = model, backend, cache
        self.clock = Clock()

    def run(self, rows: Sequence[Row], copies: int = 1) -> Generator[tuple[int, Piece], None, None]:
        """Advance until all rows have ended -> (index of the row, piece), as they come.

        `rows` holds `copies` consecutive rows per prompt; the first of them has its slot and its pending tokens.
        """
        if copies > 1:
            self._spread(rows, copies)
        while active := [i for i, row in enumerate(rows) if row.finish_reason is None]:
            yield from self._step(rows, active)
            for i in active:
                if rows[i].finish_reason is not None and len(rows) > 1:
                    self.cache.free(rows[i].slot)

    def _spread(self, rows: Sequence[Row], copies: int) -> None:
        """Prefill each prompt but for its last token once, and copy the cache: every copy then draws for itself."""
        leaders = rows[::copies]
        for leader in leaders:
            leader.pending = leader.pending[:-1]
        while waiting := [row for row in leaders if row.pending]:
            self._forward(self._share(waiting), drawing=[])
        for leader, followers in ((rows[i], rows[i + 1 : i + copies]) for i in range(0, len(rows), copies)):
            for row, slot in zip(followers, self.cache.spread(leader.slot, copies - 1), strict=True):
                row.slot, row.cached = slot, leader.cached
        for row in rows:
            row.pending = [row.prompt[-1]]

    def _share(self, rows: Sequence[Row]) -> list[tuple[Row, int]]:
        """The rows that take part in the next step, each with how many pending tokens it brings; PREFILL in all, or as many
        as the backend wants."""
        room, taken = self.backend.prompt_tokens or PREFILL, []
        for row in rows:
            size = min(len(row.pending), room)
            if size:
                taken.append((row, size))
            room -= size
        return taken

    def _step(self, rows: Sequence[Row], active: list[int]) -> Iterator[tuple[int, Piece]]:
        taken = self._share([rows[i] for i in active])
        drawing = [row for row, size in taken if size == len(row.pending)]
        pieces = self._forward(taken, drawing)
        index = {id(rows[i]): i for i in active}
        for row, piece in zip(drawing, pieces, strict=True):
            yield index[id(row)], piece

    def _forward(self, taken: list[tuple[Row, int]], drawing: list[Row]) -> list[Piece]:
        """One step over the first pending tokens of the rows in `taken`; those in `drawing` draw a token."""
        start = time.perf_counter()
        rows, counts = [row for row, _ in taken], [size for _, size in taken]
        tokens = [token for row, size in taken for token in row.pending[:size]]
        wanted = {id(row) for row in drawing}
        plan = self.cache.plan([row.slot for row in rows], counts, [id(row) in wanted for row in rows])
        tokens_M = np.array(tokens, dtype=np.int64)
        samplers = tuple(row.sampler for row in drawing)
        logprobs = any(row.limits.logprobs is not None for row in drawing)
        ends = any(row.is_last for row in drawing)
        drawn = self.backend.step(self.model, State(tokens_M, plan, self.cache, samplers, logprobs, ends))
        prefilling = any(not row.tokens for row in rows)
        for row, size in taken:
            row.pending = row.pending[size:]
        logits_WN = [None] * len(drawing) if drawn.logits_WN is None else drawn.logits_WN
        pieces = [
            row.accept(int(token), logits) for row, token, logits in zip(drawing, drawn.tokens_W, logits_WN, strict=True)
        ]
        # A device may have worked on the step while the pieces before it were read.
        self._count(max(time.perf_counter() - start, drawn.seconds), len(tokens), len(pieces), prefilling)
        return pieces

    def _count(self, seconds: float, tokens: int, drawn: int, prefilling: bool) -> None:
        if prefilling:
            self.clock.prompt_tokens += tokens
            self.clock.prompt_seconds += seconds
        else:
            self.clock.tokens += drawn
            self.clock.seconds += seconds


class Stream(Iterator[Piece]):
    """The pieces of one answer as they come; `usage`, `timings` and `finish_reason` tell of what has come so far.

    Closing it early, or leaving its `with` block, ends the run and settles the prompt cache that it uses.
    """

    def __init__(self, rows: Sequence[Row], pieces: Generator[tuple[int, Piece], None, None], clock: Clock) -> None:
        (self._row,), self._pieces, self._clock = rows, pieces, clock

    def __next__(self) -> Piece:
        return next(self._pieces)[1]

    def close(self) -> None:
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def usage(self) -> Usage:
        return self._row.usage

    @property
    def timings(self) -> Timings:
        return self._clock.timings()

    @property
    def finish_reason(self) -> str | None:
        return self._row.finish_reason


def collect(rows: Sequence[Row], pieces: Iterator[tuple[int, Piece]], clock: Clock) -> list[Output]:
    """Run the batch to its end and put each row's pieces together."""
    texts: list[list[str]] = [[] for _ in rows]
    logprobs: list[list[TokenLogprob]] = [[] for _ in rows]
    for i, piece in pieces:
        texts[i].append(piece.text)
        if piece.logprob is not None:
            logprobs[i].append(piece.logprob)
    timings = clock.timings()
    return [
        Output(
            text="".join(texts[i]),
            tokens=row.tokens,
            finish_reason=row.finish_reason or "length",
            usage=row.usage,
            timings=timings,
            stop=row.stop,
            logprobs=None if row.limits.logprobs is None else logprobs[i],
        )
        for i, row in enumerate(rows)
    ]


def check_prompt(ids: Any, vocabulary: int, max_context: int, room: int = 1) -> list[int]:
    """A prompt's token ids, or ContextError / ArgumentError: empty, too long, not integers, beyond the vocabulary.

    `room` tokens of the context must be left for an answer.
    """
    try:
        array = np.asarray(ids)
    except ValueError:  # nested lists of different lengths
        raise ArgumentError("token ids must be a one-dimensional sequence of integers") from None
    if array.size == 0:
        raise ContextError("the prompt is empty")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ArgumentError("token ids must be a one-dimensional sequence of integers")
    if array.min() < 0 or array.max() >= vocabulary:
        bad = array[(array < 0) | (array >= vocabulary)][0]
        raise ArgumentError(f"token id {bad} lies outside the vocabulary of {vocabulary}")
    if len(array) + room > max_context:
        without = " leaves no room for an answer" if room else " is shorter"
        raise ContextError(f"the prompt has {len(array)} tokens; the context of {max_context}{without}")
    return [int(token) for token in array]


def stop_strings(stop: Any) -> tuple[str, ...]:
    """The `stop` argument: None, a string or strings; ArgumentError if anything else or empty."""
    stops = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(stops, Collection) or not all(isinstance(each, str) and each for each in stops):
        raise ArgumentError(f"stop = {shown(stop)} must be a string or strings, none of them empty")
    return tuple(stops)


def stop_tokens(stop_ids: Any, vocabulary: int) -> frozenset[int]:
    """The `stop_ids` argument: None or token ids of the vocabulary; else ArgumentError."""
    if isinstance(stop_ids, str) or not isinstance(stop_ids, Collection | None):
        raise ArgumentError(f"stop_ids = {shown(stop_ids)} must be a list of token ids")
    return frozenset(whole("stop_ids: token id", token, 0, vocabulary - 1) for token in stop_ids or ())


def new_rows(
    prompts: Sequence[list[int]],
    copies: int,
    sampling: Sampling,
    limits: Limits,
    vocabulary: int,
    tokenizer: Tokenizer | None,
) -> list[Row]:
    """`copies` rows per prompt; row r draws from the stream (seed, r)."""
    rows: list[Row] = []
    for prompt in prompts:
        for _ in range(copies):
            sampler = Sampler(sampling, len(rows), prompt, vocabulary)
            rows.append(Row(prompt, sampler, limits, TextStream(tokenizer) if tokenizer else None, list(prompt)))
    return rows
