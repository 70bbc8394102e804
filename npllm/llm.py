"""`npllm.load` and the object it gives: a model with its tokenizer, ready to run."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend, get_backend
from npllm.cache import Cache
from npllm.checkpoint import Checkpoint, Weight
from npllm.config import Reader, read_json
from npllm.errors import ArgumentError, ConfigError, ContextError, MemoryLimitError, TokenizerError
from npllm.generation import PREFILL, Batch, Clock, Limits, Output, Piece, Row, check_prompt, collect, new_rows
from npllm.machine import available_memory, gibibytes
from npllm.models import Architecture, Described, read_config
from npllm.promptcache import PromptCache
from npllm.sampling import Sampling, check_finite, log_softmax
from npllm.tokenizer import Tokenizer
from npllm.trace import Trace, tracing
from npllm.weights import Spec, build_tree, count_parameters, match, random_weights

log = logging.getLogger("npllm")

Prompt = str | Sequence[int] | Array

# An answer's length when neither the call nor generation_config.json gives one.
MAX_TOKENS = 256

# Logits that `score` holds at once.
SCORE_BYTES = 64 << 20


@dataclass(frozen=True)
class Model:
    """An architecture with its configuration and prepared weights."""

    architecture: Architecture
    config: Any
    weights: Any
    spec: Spec

    def run(self, be: Backend, tokens_M: Array, rows: Any, cache: Cache) -> Array:
        """One forward pass -> logits_WN; the rows' lengths in `cache` grow only when it has succeeded."""
        # A damaged weight is reported by name of what it spoils (NumericsError), not by a warning of NumPy's.
        with be.limited(), np.errstate(over="ignore", invalid="ignore"):
            logits_WN = self.architecture.forward(be, self.config, self.weights, tokens_M, rows, cache)
        cache.advance(rows)
        return logits_WN

    def new_cache(self, be: Backend, max_context: int, kv_dtype: str | None) -> Cache:
        return Cache(be.xp, self.architecture.cache_spec(self.config), be.dtype, max_context, kv_dtype)


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
    ) -> None:
        self.model, self.backend, self.kv_dtype = model, backend, kv_dtype
        self.defaults, self.name, self.folder = defaults or Defaults(), name, folder
        self._tokenizer = tokenizer
        trained: int = model.config.max_position_embeddings
        if max_context is not None and max_context < 1:
            raise ArgumentError(f"max_context = {max_context} must be at least 1")
        self.max_context = min(max_context or trained, trained)
        self._trace: Trace | None = None
        self._conversation: PromptCache | None = None
        model.new_cache(backend, self.max_context, kv_dtype)  # refuses an unknown kv_dtype now, not at the first prompt

    @classmethod
    def random(cls, described: Described, backend: Backend, *, seed: int = 0, **kwargs: Any) -> LLM:
        """A model with random weights: nothing sensible to say, but every product to compute."""
        spec = described.architecture.weight_spec(described.config)
        check_memory(backend, spec, "random weights")
        tree = build_tree(spec, random_weights(spec, seed), backend.prepare)
        return cls(Model(described.architecture, described.config, tree, spec), backend, **kwargs)

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
        return count_parameters(self.model.spec)

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
        cache = self.new_cache()
        slots = [cache.add() for _ in range(B)]
        rows = cache.plan(slots, [T] * B, None if logits == "all" else [True] * B)
        be = tracing(self.backend, self._trace)
        logits_WN = self.backend.to_numpy(self.model.run(be, be.asarray(tokens_BT.reshape(-1)), rows, cache))
        return logits_WN.reshape(B, T, -1) if logits == "all" else logits_WN

    def _check_tokens(self, tokens: Any) -> Array:
        tokens_BT = np.atleast_2d(np.asarray(tokens))
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
        return PromptCache(self.new_cache(), self.name)

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
    def generate(self, prompt: Prompt, *, n: Literal[1] = 1, **options: Any) -> Output: ...
    @overload
    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Any: ...

    def generate(self, prompt: Any, *, n: int = 1, cache: PromptCache | None = None, **options: Any) -> Any:
        """Continue a prompt: a string or a 1-D sequence of token ids -> Output; a list of prompts -> a list of Outputs.

        n                    that many answers per prompt, in place of each Output a list of n.
        cache                a `prompt_cache()`: what it shares with the prompt is not computed again (one prompt, n=1).
        max_tokens           default: max_new_tokens of generation_config.json, else 256.
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, seed
                             as in npllm.sampling.Sampling; None takes generation_config.json's value, else greedy.
        logprobs             k >= 0: log-probabilities of the tokens, each with its k likeliest alternatives.
        stop                 stop strings; stop_ids: stop token ids besides the model's own; ignore_eos: not even those.

        ContextError: the prompt is empty or fills the context. NumericsError: the logits are not finite.
        """
        prompts, single = self._prompts(prompt)
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ArgumentError(f"n = {n!r} must be a whole number of at least 1")
        if cache is not None and len(prompts) * n != 1:
            raise ArgumentError("cache= serves one prompt and one answer")
        rows, pieces, clock = self._start(prompts, n, cache, options)
        outputs = collect(rows, pieces, clock)
        grouped: list[Any] = [outputs[i : i + n] for i in range(0, len(outputs), n)] if n > 1 else outputs
        return grouped[0] if single else grouped

    def stream(self, prompt: Prompt, *, cache: PromptCache | None = None, **options: Any) -> Iterator[Piece]:
        """`generate` for one prompt, piece by piece; arguments are checked before the first piece is asked for."""
        prompts, single = self._prompts(prompt)
        if not single:
            raise ArgumentError("stream takes one prompt")
        _, pieces, _ = self._start(prompts, 1, cache, options)
        return (piece for _, piece in pieces)

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
        """The assistant's answer to a conversation -> Output, or an iterator of Pieces with stream=True.

        messages        [{"role": "user", "content": "..."}, ...], rendered by the model's chat template.
        template_args   variables for the template, such as {"enable_thinking": False}.
        cache           as in `generate`; without one, the conversation before this one is reused as far as it agrees.
        """
        ids = self.chat_tokens(messages, tools=tools, template_args=template_args)
        if cache is None:
            cache, self._conversation = self._conversation or self.prompt_cache(), None
            options["_keep"] = True
        return self.stream(ids, cache=cache, **options) if stream else self.generate(ids, cache=cache, **options)

    def chat_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids that `chat` generates from."""
        arguments = {"add_generation_prompt": True} | dict(template_args or {})
        return self.tokenizer.apply_chat_template(messages, tools=tools, **arguments)  # type: ignore[return-value]

    def _prompts(self, prompt: Any) -> tuple[list[list[int]], bool]:
        """Token ids of each prompt, and whether a single one was given."""
        if isinstance(prompt, list | tuple) and any(isinstance(each, str | list | tuple | np.ndarray) for each in prompt):
            return [self._ids(each) for each in prompt], False
        return [self._ids(prompt)], True

    def _ids(self, prompt: Any) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return check_prompt(ids, self.config.vocab_size, self.max_context)

    def _start(
        self, prompts: list[list[int]], copies: int, reuse: PromptCache | None, options: dict[str, Any]
    ) -> tuple[list[Row], Iterator[tuple[int, Piece]], Clock]:
        keep = options.pop("_keep", False)
        limits, sampling = self._limits(options), self._sampling(options)
        if options:
            raise ArgumentError(f"unknown argument: {', '.join(sorted(options))}")
        rows = new_rows(prompts, copies, sampling, limits, self.config.vocab_size, self._tokenizer)
        cache = self.new_cache() if reuse is None else reuse.cache
        batch = Batch(self.model, tracing(self.backend, self._trace), cache)
        for leader in rows[::copies]:
            if reuse is None:
                leader.slot = cache.add()
            else:
                leader.slot, leader.cached = reuse.slot, reuse.rewind(leader.prompt)
                leader.pending = leader.prompt[leader.cached :]
        return rows, self._finally(batch.run(rows, copies), rows, reuse, keep), batch.clock

    def _finally(
        self, pieces: Iterator[tuple[int, Piece]], rows: list[Row], reuse: PromptCache | None, keep: bool
    ) -> Iterator[tuple[int, Piece]]:
        """The same pieces; however the run ends, a reused cache afterwards knows what it holds."""
        try:
            yield from pieces
        finally:
            if reuse is not None:
                reuse.settle(rows[0].prompt + rows[0].tokens)
                if keep:
                    self._conversation = reuse

    def _limits(self, options: dict[str, Any]) -> Limits:
        max_tokens = options.pop("max_tokens", None)
        if max_tokens is None:
            max_tokens = self.defaults.max_tokens or MAX_TOKENS
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int | np.integer) or max_tokens < 1:
            raise ArgumentError(f"max_tokens = {max_tokens!r} must be a whole number of at least 1")
        stop = options.pop("stop", None) or ()
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(each, str) and each for each in stops):
            raise ArgumentError("stop must hold strings that are not empty")
        if stops and self._tokenizer is None:
            raise TokenizerError(f"{self.name}: stop strings need a tokenizer, and the folder has none")
        stop_ids = set(options.pop("stop_ids", None) or ())
        if not options.pop("ignore_eos", False):
            stop_ids |= set(self.defaults.stop_ids)
        logprobs = options.pop("logprobs", None)
        if logprobs is not None and not 0 <= int(logprobs) <= self.config.vocab_size:
            raise ArgumentError(f"logprobs = {logprobs!r} must lie between 0 and the vocabulary's size")
        return Limits(
            int(max_tokens),
            self.max_context,
            frozenset(int(token) for token in stop_ids),
            stops,
            None if logprobs is None else int(logprobs),
        )

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        names = [each.name for each in fields(Sampling)]
        given = {name: value for name in names if (value := options.pop(name, None)) is not None}
        values = dict(self.defaults.sampling) | given
        if "temperature" not in values and {"top_k", "top_p", "min_p"} & set(given):
            values["temperature"] = 1.0
        return Sampling(**values)

    # -- scoring ------------------------------------------------------------------------------------------------------

    def score(self, text_or_ids: Prompt) -> Score:
        """Log-probability of every given token after those before it, in nats; the sequence is read in pieces."""
        ids = self.tokenizer.encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
        ids = check_prompt(ids, self.config.vocab_size, self.max_context + 1)
        cache, be = self.new_cache(), tracing(self.backend, self._trace)
        slot = cache.add()
        size = max(1, min(PREFILL, SCORE_BYTES // (8 * self.config.vocab_size)))
        logprobs: list[float | None] = [None]
        for start in range(0, len(ids) - 1, size):
            piece = ids[start : min(start + size, len(ids) - 1)]
            rows = cache.plan([slot], [len(piece)])
            logits_TN = self.backend.to_numpy(self.model.run(be, be.asarray(piece, dtype="int64"), rows, cache))
            check_finite(logits_TN)
            targets = np.array(ids[start + 1 : start + 1 + len(piece)])
            logprobs += log_softmax(logits_TN)[np.arange(len(piece)), targets].tolist()
        return Score(ids, logprobs)


# -- loading ----------------------------------------------------------------------------------------------------------


def load(
    source: str | Path | None = None,
    backend: str = "auto",
    dtype: str | None = None,
    quantize: str | None = None,
    kv_dtype: str | None = None,
    weights: Literal["auto", "memory", "disk"] = "auto",
    threads: int | None = None,
    revision: str | None = None,
    max_context: int | None = None,
    strict: bool = False,
) -> LLM:
    """Load a model: a local folder, a hub id, or (None) the small model that ships with npllm.

    backend      "numpy", an installed backend's name, or "auto": the fastest that loads.
    dtype        arithmetic: "float32", "float64"; None is the backend's choice.
    kv_dtype     how keys and values are cached: "float32", "float64", "bfloat16"; None: as they are computed.
    weights      "memory" or "auto"; `threads`: of BLAS and of the backend; `revision`: branch, tag or commit on the hub.
    max_context  at most so many tokens per row; never more than the model was trained for.
    strict       an operation that a backend declines is an error.

    ConfigError, CheckpointError, TokenizerError, HubError, MemoryLimitError, BackendError say in one line what is wrong.
    """
    be = get_backend(backend, dtype=dtype, strict=strict, threads=threads)
    if quantize is not None:
        raise ArgumentError(f"quantize = {quantize!r}: the {be.name} backend does not quantise; leave it None")
    if weights not in ("auto", "memory"):
        raise ArgumentError(f"weights = {weights!r}: the {be.name} backend keeps weights in memory; use 'auto' or 'memory'")
    folder = locate(source, revision)
    described = read_config(folder)
    tokenizer = _read_tokenizer(folder, described.config.vocab_size)
    defaults = read_defaults(folder, described)
    spec = described.architecture.weight_spec(described.config)
    handles = match(spec, Checkpoint(folder), getattr(described.architecture, "BUFFERS", None))
    check_memory(be, spec, str(source or "the shipped model"))
    tree = _prepare(be, spec, handles)
    model = Model(described.architecture, described.config, tree, spec)
    return LLM(
        model,
        be,
        tokenizer=tokenizer,
        defaults=defaults,
        max_context=max_context,
        kv_dtype=kv_dtype,
        name="npllm-shipped" if source is None else str(source),
        folder=folder,
    )


def locate(source: str | Path | None, revision: str | None = None) -> Path:
    """The folder of a model: given, downloaded, or the shipped one."""
    if source is None:
        return Path(__file__).parent / "shipped"
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ConfigError(f"{folder}: give the model's folder, not a file in it")
    from npllm import hub
    from npllm.models import interpret

    def check(values: dict[str, Any]) -> None:
        interpret(values, f"{source}: config.json")

    return hub.fetch(str(source), revision=revision, check=check)


def check_memory(be: Backend, spec: Spec, name: str) -> None:
    """MemoryLimitError, before anything is allocated, when the prepared weights exceed the memory that is free."""
    needed, available = be.bytes_needed(spec), available_memory()
    if needed > available:
        raise MemoryLimitError(
            f"{name}: {count_parameters(spec):,} weights need {gibibytes(needed)} as {be.dtype}, {gibibytes(available)} "
            f"of memory is available: free some, take a smaller model" + ("" if be.dtype == "float32" else ", or float32")
        )


def _prepare(be: Backend, spec: Spec, handles: dict[str, Weight]) -> Any:
    if not sys.stderr.isatty():
        return build_tree(spec, handles, be.prepare)
    from tqdm import tqdm

    total = sum(handle.nbytes for handle in handles.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading", delay=0.5, leave=False) as bar:
        return build_tree(spec, handles, be.prepare, bar.update)


def _read_tokenizer(folder: Path, vocabulary: int) -> Tokenizer | None:
    if not (folder / "tokenizer.json").exists():
        return None
    tokenizer = Tokenizer(folder)
    if tokenizer.size > vocabulary:
        raise TokenizerError(
            f"{folder / 'tokenizer.json'}: ids up to {tokenizer.size - 1}, but the model's vocabulary has {vocabulary} rows"
        )
    return tokenizer


def read_defaults(folder: Path, described: Described) -> Defaults:
    """`generation_config.json`, with `config.json`'s eos_token_id where it says nothing of stop ids."""
    path = folder / "generation_config.json"
    reader = Reader(read_json(path) if path.is_file() else {}, str(path))
    sampling: dict[str, Any] = {}
    if reader.flag("do_sample", False):
        sampling["temperature"] = reader.real("temperature", 1.0, positive=False)
        sampling["top_k"] = reader.integer("top_k", 0, least=0)
        sampling["top_p"] = reader.real("top_p", 1.0)
        sampling["min_p"] = reader.real("min_p", 0.0, positive=False)
    sampling["repetition_penalty"] = reader.real("repetition_penalty", 1.0)
    eos = reader.raw("eos_token_id")
    if eos is None:
        eos = described.values.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise reader.fail("eos_token_id", "must be a token id or a list of them")
    max_tokens = reader.integer("max_new_tokens", 0) or None
    try:
        Sampling(**sampling)
    except ArgumentError as bad:
        raise ConfigError(f"{path}: {bad}") from None
    return Defaults(sampling, tuple(ids), max_tokens)
