"""A loaded model with its tokenizer: forward passes, generation, chat, scores, traces."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.cache import Cache
from npllm.config import shown
from npllm.errors import ArgumentError, ContextError, NpllmError, NumericsError, TokenizerError
from npllm.generation import (
    PREFILL,
    Batch,
    Clock,
    Limits,
    Options,
    Output,
    Piece,
    Row,
    Stream,
    check_prompt,
    collect,
    new_rows,
    stop_strings,
    stop_tokens,
)
from npllm.grouped import marked
from npllm.handles import fingerprint
from npllm.model import Model, check_memory
from npllm.models import Described
from npllm.promptcache import PromptCache
from npllm.sampling import Sampling, check_finite, log_softmax, whole
from npllm.tokenizer import Tokenizer
from npllm.trace import Trace, tracing
from npllm.weights import build_tree, leaves, random_weights

Prompt = str | Sequence[int] | Array

# An answer's length when neither the call nor generation_config.json gives one.
MAX_TOKENS = 256

# Names that a chat template's own arguments cannot have.
RESERVED = {"conversation", "messages", "template", "tools", "tokenize", "special_tokens", "budget"}

# Logits that `score` holds at once.
SCORE_BYTES = 64 << 20


@dataclass(frozen=True)
class Score:
    """Log-probabilities of given tokens: `logprobs[i]` is that of `tokens[i]` after all before it; the first has none."""

    tokens: list[int]
    logprobs: list[float | None]

    @property
    def total(self) -> float:
        """Sum of the log-probabilities, in nats."""
        return math.fsum(value for value in self.logprobs if value is not None)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability; NaN for a single token, of which nothing is predicted."""
        scored = len(self.logprobs) - 1
        return math.exp(-self.total / scored) if scored else math.nan


@dataclass(frozen=True)
class Defaults:
    """What `generation_config.json` says: sampling, stop ids, an answer's length."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    max_tokens: int | None = None


class LLM:
    """A loaded model. Made by `npllm.load`, or by `LLM.random` for tests and benchmarks.

    model, backend, tokenizer (None for a folder without one), config, max_context, name.
    """

    def __init__(
        self,
        model: Model,
        backend: Backend,
        *,
        tokenizer: Tokenizer | None = None,
        defaults: Defaults | None = None,
        max_context: int | None = None,
        kv_dtype: str | None = None,
        name: str = "",
        folder: Path | None = None,
        fingerprint: str = "",
    ) -> None:
        self.model, self.backend, self.kv_dtype = model, backend, kv_dtype
        self.defaults, self.name, self.folder, self.fingerprint = defaults or Defaults(), name, folder, fingerprint
        self._tokenizer = tokenizer
        trained: int = model.config.max_position_embeddings
        self.max_context = trained if max_context is None else min(whole("max_context", max_context, 1), trained)
        self._trace: Trace | None = None
        self._conversation: PromptCache | None = None
        self._lock = threading.Lock()
        model.new_cache(backend, self.max_context, kv_dtype)  # refuses an unknown kv_dtype now, not at the first prompt

    @classmethod
    def random(cls, described: Described, backend: Backend, *, seed: int = 0, **kwargs: Any) -> LLM:
        """A model with random weights: nothing sensible to say, but every product to compute."""
        spec = described.architecture.weight_spec(described.config)
        check_memory(backend, [tensor for tensor in spec.values() if tensor.alias is None], "random weights")
        weights = random_weights(spec, seed)
        if backend.quantize is not None:
            weights = marked(spec, weights, backend.quantize)
        tree = build_tree(spec, weights, backend.prepare)
        model = Model(described.architecture, described.config, tree, spec)
        return cls(model, backend, **{"fingerprint": fingerprint(weights)} | kwargs)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; TokenizerError where the model folder has none."""
        if self._tokenizer is None:
            raise TokenizerError(f"{self.name}: no tokenizer.json, so text cannot be read; give token ids instead")
        return self._tokenizer

    @property
    def parameters(self) -> int:
        return self.model.parameters

    def __repr__(self) -> str:
        return f"<npllm.LLM {self.name}: {self.parameters:,} parameters, {self.backend.name} {self.backend.dtype}>"

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, tokens: Any, logits: Literal["all", "last"] = "all") -> Array:
        """Logits of token ids [B, T] (or [T]) -> float32 [B, T, N], or [B, N] with logits="last" (float64 if that is dtype).

        "last" computes no other position's logits. Nothing is remembered between calls.
        """
        tokens_BT = self._check_tokens(tokens)
        if logits not in ("all", "last"):
            raise ArgumentError(f"logits = {logits!r} must be 'all' or 'last'")
        B, T = tokens_BT.shape
        if logits == "last" and T == 0:
            raise ContextError("logits='last' needs at least one token")
        if tokens_BT.size == 0:
            N = self.config.vocab_size
            return np.zeros((B, T, N) if logits == "all" else (B, N), self.backend.array_dtype)
        cache = self.new_cache()
        slots = [cache.add() for _ in range(B)]
        rows = cache.plan(slots, [T] * B, None if logits == "all" else [True] * B)
        be = tracing(self.backend, self._trace)
        logits_WN = self.backend.to_numpy(self.model.run(be, be.asarray(tokens_BT.reshape(-1)), rows, cache))
        return logits_WN.reshape(B, T, logits_WN.shape[-1]) if logits == "all" else logits_WN

    def _check_tokens(self, tokens: Any) -> Array:
        try:
            tokens_BT = np.atleast_2d(np.asarray(tokens))
        except ValueError:
            raise ArgumentError("tokens must be an array: rows of different lengths are for generate") from None
        if tokens_BT.ndim != 2 or (tokens_BT.dtype.kind not in "iu" and tokens_BT.size):
            raise ArgumentError("tokens must be an integer array of shape [B, T] or [T]")
        if tokens_BT.size and (tokens_BT.min() < 0 or tokens_BT.max() >= self.config.vocab_size):
            raise ArgumentError(f"tokens must lie between 0 and {self.config.vocab_size - 1}")
        if tokens_BT.shape[1] > self.max_context:
            raise ContextError(f"{tokens_BT.shape[1]} tokens do not fit into the context of {self.max_context}")
        return tokens_BT.astype(np.int64)

    def new_cache(self) -> Cache:
        """An empty key/value cache for this model (npllm.cache)."""
        return self.model.new_cache(self.backend, self.max_context, self.kv_dtype)

    def prompt_cache(self) -> PromptCache:
        """A cache that one conversation or document can go on in: pass it as `cache=`, save it, load it."""
        return PromptCache(self.new_cache(), self._identity)

    @property
    def _identity(self) -> str:
        return self.fingerprint or self.name

    @contextlib.contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record named intermediates of the passes inside the block; `trace.patch(name, value)` replaces one."""
        before, self._trace = self._trace, Trace()
        try:
            yield self._trace
        finally:
            self._trace = before

    # -- generation ---------------------------------------------------------------------------------------------------

    @overload
    def generate(self, prompt: str | Array, **options: Unpack[Options]) -> Output: ...
    @overload
    def generate(self, prompt: Any, *, n: int = 1, cache: PromptCache | None = None, **options: Unpack[Options]) -> Any: ...

    def generate(self, prompt: Any, *, n: int = 1, cache: PromptCache | None = None, **options: Unpack[Options]) -> Any:
        """Continue a prompt: a string or a 1-D sequence of token ids -> Output; a list of prompts -> a list of Outputs.

        n          that many answers per prompt, in place of each Output a list of n.
        cache      a `prompt_cache()`: what it shares with the prompt is not computed again (one prompt, n=1).
        options    max_tokens, temperature, top_k, top_p, min_p, seed, repetition_penalty, presence_penalty,
                   frequency_penalty, logit_bias, logprobs, stop, stop_ids, ignore_eos: npllm.generation.Options.

        ContextError: the prompt is empty or fills the context. NumericsError: the logits are not finite.
        """
        prompts, single = self._prompts(prompt)
        n = whole("n", n, 1)
        if cache is not None and len(prompts) * n != 1:
            raise ArgumentError("cache= serves one prompt and one answer")
        outputs = collect(*self._start(prompts, n, cache, options))
        grouped: list[Any] = [outputs[i : i + n] for i in range(0, len(outputs), n)] if n > 1 else outputs
        return grouped[0] if single else grouped

    def stream(self, prompt: Prompt, *, cache: PromptCache | None = None, **options: Unpack[Options]) -> Stream:
        """`generate` for one prompt, piece by piece; arguments are checked before the first piece is asked for."""
        prompts, single = self._prompts(prompt)
        if not single:
            raise ArgumentError("stream takes one prompt")
        return Stream(*self._start(prompts, 1, cache, options))

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[False] = False,
        template_args: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        cache: PromptCache | None = None,
        **options: Unpack[Options],
    ) -> Output: ...
    @overload
    def chat(self, messages: Sequence[Mapping[str, Any]], *, stream: bool, **options: Any) -> Any: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        template_args: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        cache: PromptCache | None = None,
        **options: Any,
    ) -> Any:
        """The assistant's answer to a conversation -> Output, or a Stream of Pieces with stream=True.

        messages        [{"role": "user", "content": "..."}, ...], rendered by the model's chat template.
        template_args   variables for the template, such as {"enable_thinking": False}.
        cache           as in `generate`; without one, the conversation before this one is reused as far as it agrees.
        options         as in `generate`.
        """
        ids = self._ids(self.chat_tokens(messages, tools=tools, template_args=template_args))
        # A trace wants to see the whole prompt, and what it patches must not outlive it in a cache.
        run = self._start([ids], 1, cache, options, keep=cache is None and self._trace is None)
        return Stream(*run) if stream else collect(*run)[0]

    def chat_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids that `chat` generates from."""
        prompt = self.chat_prompt(messages, tools=tools, template_args=template_args)
        return self.tokenizer.encode(prompt, add_special_tokens=False)

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that `chat` generates from, special tokens included."""
        arguments = {"add_generation_prompt": True} | dict(template_args or {})
        if taken := sorted(RESERVED & arguments.keys()):
            raise ArgumentError(f"template_args: {', '.join(taken)} cannot be set, npllm sets it")
        return str(self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **arguments))

    def _prompts(self, prompt: Any) -> tuple[list[list[int]], bool]:
        """Token ids of each prompt, and whether a single one was given."""
        if isinstance(prompt, list | tuple) and any(isinstance(each, str | list | tuple | np.ndarray) for each in prompt):
            return [self._ids(each) for each in prompt], False
        return [self._ids(prompt)], True

    def _ids(self, prompt: Any) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return check_prompt(ids, self.config.vocab_size, self.max_context)

    def _start(
        self,
        prompts: list[list[int]],
        copies: int,
        reuse: PromptCache | None,
        options: Mapping[str, Any],
        keep: bool = False,
    ) -> tuple[list[Row], Generator[tuple[int, Piece], None, None], Clock]:
        """The rows of a run, their pieces to come, and its clock. `keep`: the run goes on in this object's own cache."""
        given = {name: value for name, value in options.items() if value is not None}
        limits, sampling = self._limits(given), self._sampling(given)
        if unknown := sorted(set(options) - Options.__optional_keys__):
            raise ArgumentError(f"unknown argument: {', '.join(unknown)}")
        rows = new_rows(prompts, copies, sampling, limits, self.config.vocab_size, self._tokenizer)
        if keep:
            reuse = self._take_conversation()
        elif reuse is not None:
            self._check_cache(reuse)
        cache = self.new_cache() if reuse is None else reuse.cache
        batch = Batch(self.model, tracing(self.backend, self._trace), cache)
        for leader in rows[::copies]:
            if reuse is None:
                leader.slot = cache.add()
            else:
                leader.slot, leader.cached = reuse.slot, reuse.rewind(leader.prompt)
                leader.pending = leader.prompt[leader.cached :]
        pieces = batch.run(rows, copies)
        if reuse is not None:
            pieces = self._reusing(reuse, reuse.runs, pieces, rows[0], keep)
        return rows, self._explained(pieces), batch.clock

    def _explained(self, pieces: Iterator[tuple[int, Piece]]) -> Generator[tuple[int, Piece], None, None]:
        with self._explaining():
            yield from pieces

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Numbers that are not finite are reported with the model's name and the weight they come from."""
        try:
            yield
        except NumericsError as error:
            raise NumericsError(f"{self.name}: {error}{self._damage()}") from None

    def _damage(self) -> str:
        # What is wrong has been said: a cause that cannot be found must not take its place.
        with contextlib.suppress(NpllmError, MemoryError):
            for path, weight in leaves(self.model.weights):
                if not self.backend.is_finite(weight):
                    return f"; {path} holds such numbers"
        return ""

    def _take_conversation(self) -> PromptCache:
        """The cache of the conversation before this one, out of reach of other threads until the run has ended."""
        with self._lock:
            cache, self._conversation = self._conversation, None
        return cache or self.prompt_cache()

    def _check_cache(self, cache: PromptCache) -> None:
        if not isinstance(cache, PromptCache):
            raise ArgumentError(f"cache = {shown(cache)} must be a prompt_cache() of this model")
        if differs := cache.differences(self.new_cache(), self._identity):
            raise ArgumentError(f"cache: it belongs to another model or setting ({', '.join(differs)} differ)")
        if self._trace is not None and self._trace.patches:
            raise ArgumentError("cache: it would keep what the trace's patches change; leave it out while patching")

    def _reusing(
        self, cache: PromptCache, run: int, pieces: Iterator[tuple[int, Piece]], row: Row, keep: bool
    ) -> Generator[tuple[int, Piece], None, None]:
        """The same pieces; however the run ends, the reused cache afterwards knows what it holds."""
        try:
            cache.guard(run)
            for piece in pieces:
                yield piece
                if row.finish_reason is None:
                    cache.guard(run)
        finally:
            cache.settle(run, row.prompt + row.tokens)
            if keep:
                self._conversation = cache

    def _limits(self, given: Mapping[str, Any]) -> Limits:
        vocabulary = self.config.vocab_size
        stops = stop_strings(given.get("stop"))
        if stops and self._tokenizer is None:
            raise TokenizerError(f"{self.name}: stop strings need a tokenizer, and the folder has none")
        stop_ids = stop_tokens(given.get("stop_ids"), vocabulary)
        ignore_eos = given.get("ignore_eos", False)
        if not isinstance(ignore_eos, bool):
            raise ArgumentError(f"ignore_eos = {shown(ignore_eos)} must be true or false")
        if not ignore_eos:
            stop_ids |= frozenset(self.defaults.stop_ids)
        return Limits(
            whole("max_tokens", given.get("max_tokens", self.defaults.max_tokens or MAX_TOKENS), 1),
            self.max_context,
            stop_ids,
            stops,
            whole("logprobs", given["logprobs"], 0, vocabulary) if "logprobs" in given else None,
        )

    def _sampling(self, given: Mapping[str, Any]) -> Sampling:
        own = {each.name: given[each.name] for each in fields(Sampling) if each.name in given}
        values = dict(self.defaults.sampling) | own
        if "temperature" not in values and {"top_k", "top_p", "min_p"} & set(own):
            values["temperature"] = 1.0
        return Sampling(**values)

    # -- scoring ------------------------------------------------------------------------------------------------------

    def score(self, text_or_ids: Prompt) -> Score:
        """Log-probability of every given token after those before it, in nats; the sequence is read in pieces."""
        ids = self.tokenizer.encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
        ids = check_prompt(ids, self.config.vocab_size, self.max_context, room=0)
        cache, be = self.new_cache(), tracing(self.backend, self._trace)
        slot = cache.add()
        size = max(1, min(PREFILL, SCORE_BYTES // (8 * self.config.vocab_size)))
        logprobs: list[float | None] = [None]
        for start in range(0, len(ids) - 1, size):
            piece = ids[start : min(start + size, len(ids) - 1)]
            rows = cache.plan([slot], [len(piece)])
            logits_TN = self.backend.to_numpy(self.model.run(be, be.asarray(piece, dtype="int64"), rows, cache))
            with self._explaining():
                check_finite(logits_TN)
            targets = np.array(ids[start + 1 : start + 1 + len(piece)])
            logprobs += log_softmax(logits_TN)[np.arange(len(piece)), targets].tolist()
        return Score(ids, logprobs)
