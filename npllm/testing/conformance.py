"""Is a backend what it says: every operation, in every storage format and arithmetic that it has, and whole models.

    npllm verify --backend mine
    python -c "from npllm.testing.conformance import conformance; print(conformance('mine'))"

Operations are those of the kit, with their cases and budgets; the rounding points are those of npllm's backends: values of
the storage format come in, everything else is in the arithmetic, but for what the backend declares (`Backend.rounding`).
What a backend declines goes to the canon, and is told. Tiny models with fixed random weights then run through the backend's
own `step`: prefill, decode, ragged batches, greedy answers, and answers where the best tokens are tied.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend, log, log_once
from npllm.handles import Weight
from npllm.registry import get_backend
from npllm.testing.case import Case, cases
from npllm.testing.checking import Kernel, check
from npllm.testing.compare import Limit, agree
from npllm.testing.isolate import Trial
from npllm.testing.operation import Operation, operation, operations
from npllm.testing.report import Report, Suite
from npllm.testing.rounding import Rounding, format_of
from npllm.weights import build_tree, random_weights

if TYPE_CHECKING:
    from npllm.llm import LLM

STORAGES = ("f32", "f16", "bf16")

# How weights of a case are stored, where that is not the type of its arrays, by npllm's names.
QUANTISED = {"fp8": "f8_e4m3", "q8": "q8", "q4": "q4"}

# What stands in a trial for an operation when a whole model runs.
MODEL = "step"


@dataclass(frozen=True)
class Conformity(Report):
    """A report on a backend: its name, its arithmetic, and what it left to the canon, each "operation: reason"."""

    backend: str = ""
    dtype: str = ""
    declined: tuple[str, ...] = ()


def conformance(
    backend: str | type[Backend],
    ops: Iterable[str] | None = None,
    *,
    tags: Iterable[str] = (),
    storages: Iterable[str] = STORAGES,
    dtypes: Iterable[str] | None = None,
    seed: int = 0,
    limit_s: float = 60.0,
) -> Suite:
    """Check a backend, by name or class, in this process.

    ops        names of operations, "step" for whole models; None: all.
    tags       only cases that have all of these; no models then.
    storages   formats of weights and activations; dtypes: arithmetic, of that which the backend has (None: all).
    """
    made = backend if isinstance(backend, type) else functools.partial(get_backend, backend)
    suite = trials(made, ops, tags=tags, storages=storages, dtypes=dtypes, seed=seed)
    return Suite(tuple(conformity(made, trial, limit_s) for trial in suite))


# Makes a backend of a dtype: a class of backends, or the registry's.
Maker = Callable[..., Backend]


def trials(
    made: Maker, ops: Iterable[str] | None = None, *, tags: Iterable[str] = (), storages: Iterable[str] = STORAGES,
    dtypes: Iterable[str] | None = None, seed: int = 0,
) -> list[Trial]:  # fmt: skip
    """What `conformance` checks, in order. ArgumentError for unknown names, BackendError for a dtype that it has not."""
    has = made().dtypes
    wanted = [made(dtype=dtype) for dtype in (has if dtypes is None else dtypes)]
    names = [each.name for each in operations() if each.backends] + [MODEL] if ops is None else list(ops)
    found = [
        Trial(op.name, case.id, policy(be, storage, op.name, case), seed, be.dtype)
        for op in map(operation, (name for name in names if name != MODEL))
        for be in wanted
        for storage in storages
        for case in chosen(op, tags, strict=ops is not None)
    ]
    if MODEL in names and not tags:
        ids = [f"{MODEL}/{case}" for case in MODEL_CASES]
        found += [Trial(MODEL, each, policy(be, "f32", MODEL), dtype=be.dtype) for be in wanted for each in ids]
    return found


def chosen(op: Operation, tags: Iterable[str], *, strict: bool) -> Iterable[Any]:
    """The cases of an operation that have the tags; a tag that it does not know is an error only if it was asked for."""
    if strict:
        cases(op.name, tags)
    return [case for case in op.cases if frozenset(tags) <= case.tags]


def policy(be: Backend, storage: str, op: str, case: Case | None = None) -> Rounding:
    """The rounding points of a backend: values of the storage format, and the type of its activations everywhere else, but
    for what it declares of the operation and of the weights' format."""
    at, stored = format_of(be.array_dtype).name, format_of(storage).name
    declared = be.rounding(op, QUANTISED[case.settings["storage"]] if case and "storage" in case.settings else stored)
    return Rounding(**{"inputs": stored, **dict.fromkeys(("accumulate", "output", "probs", "hidden"), at), **declared})


@dataclass(frozen=True)
class BackendWork:
    """For npllm.testing.isolate: the trials of a backend by its registered name."""

    name: str
    limit_s: float = 60.0

    def __str__(self) -> str:
        return f"backend {self.name!r}"

    def load(self) -> Callable[[Trial], Report]:
        made = functools.partial(get_backend, self.name)
        made()
        return functools.partial(conformity, made, limit_s=self.limit_s)


def conformity(made: Maker, trial: Trial, limit_s: float = 60.0) -> Conformity:
    """One trial of a backend."""
    be = made(dtype=trial.dtype or None)
    with declines() as declined:
        if trial.operation == MODEL:
            report = model_report(be, trial)
        else:
            op = operation(trial.operation)
            report = check(op, backend_kernel(op, be), trial.case, trial.rounding, seed=trial.seed, limit_s=limit_s)
    return Conformity(**asdict(report), backend=be.name, dtype=be.dtype, declined=tuple(declined))


def backend_kernel(op: str | Operation, be: Backend) -> Kernel:
    """A backend's operation as a kernel of the kit: takes the operation's arrays and settings, returns NumPy arrays."""
    known = operation(op)

    def kernel(**given: Any) -> Any:
        inputs = {name: given.pop(name) for name in known.inputs if given.get(name) is not None}
        settings = {name: value for name, value in given.items() if name not in known.inputs}
        outputs = tuple(np.asarray(be.to_numpy(x)) for x in known.run(be, inputs, settings))
        return outputs[0] if len(outputs) == 1 else outputs

    arrays = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in known.inputs]
    kernel.__signature__ = Signature([*arrays, Parameter("settings", Parameter.VAR_KEYWORD)])  # type: ignore[attr-defined]
    return kernel


@contextlib.contextmanager
def declines() -> Iterator[list[str]]:
    """What backends decline meanwhile, each "operation: reason", once."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            name, falls_back, why = record.getMessage().partition(" falls back: ")
            if falls_back:
                heard.append(f"{name.rpartition('.')[2]}: {why}")

    listener, level = Listener(), log.level
    log_once.cache_clear()  # it would keep back what an earlier trial has heard
    log.addHandler(listener)
    log.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield heard
    finally:
        log.setLevel(level)
        log.removeHandler(listener)


# -- whole models -------------------------------------------------------------------------------------------------------

WIDTH = 32

COMMON = {
    "vocab_size": 97, "hidden_size": WIDTH, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64, "tie_word_embeddings": True, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip

# One for each way that keys are kept and seen: all, a window, a chunk, latents; with and without experts.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": COMMON | {"model_type": "qwen3"},
    "gpt2": {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": COMMON | {"model_type": "gemma2", "sliding_window": 5},
    "llama4": COMMON
    | {"model_type": "llama4_text", "intermediate_size_mlp": 40, "num_local_experts": 3, "num_experts_per_tok": 1}
    | {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "attention_chunk_size": 8, "floor_scale": 8},
    "deepseek_v3": {key: value for key, value in COMMON.items() if key != "head_dim"}
    | {"model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 12, "v_head_dim": 8}
    | {"qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "moe_intermediate_size": 14, "n_routed_experts": 6}
    | {"n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
}

# Of the logits of such a model: about 100 roundings of the arithmetic, as tests of npllm ask of its own float32 canon.
LIMITS = {
    "float32": Limit(1e-5, 5e-5, "the logits of a model of two layers in float32 against its own float64"),
    "float64": Limit(1e-13, 1e-12, "as above with roundings of 1e-16"),
    "bfloat16": Limit(3e-2, 0.1, "twice what rounding everything that is multiplied to bfloat16 does to these models"),
}

TOKENS = np.random.default_rng(4).integers(1, 97, (3, 21))

PROMPTS = [list(TOKENS[0]), list(TOKENS[1, :1]), list(TOKENS[2, :7])]


def prefill(llm: LLM) -> Array:
    """Logits of every position of a batch."""
    return llm.forward(TOKENS)


def decode(llm: LLM) -> Array:
    """Logits of tokens that come one by one, after a first piece, through the cache."""
    cache = llm.new_cache()
    slot = cache.add()
    pieces = [stepped(llm, cache, [slot], [piece]) for piece in np.split(TOKENS[0], range(9, 21))]
    return np.concatenate(pieces)


def ragged(llm: LLM) -> Array:
    """Logits of rows that bring tokens of different number in one step: a prompt, one token, a few."""
    cache = llm.new_cache()
    slots = [cache.add() for _ in TOKENS]
    first = stepped(llm, cache, slots[1:], [TOKENS[1, :11], TOKENS[2, :6]])
    return np.concatenate([first, stepped(llm, cache, slots, [TOKENS[0], TOKENS[1, 11:12], TOKENS[2, 6:10]])])


def greedy(llm: LLM) -> Array:
    """The tokens of greedy answers to prompts of different length."""
    outputs = llm.generate(PROMPTS, max_tokens=12, ignore_eos=True)
    return np.array([output.tokens for output in outputs])


def stepped(llm: LLM, cache: Any, slots: list[int], pieces: list[Array]) -> Array:
    """Logits [M, N] of the rows' new tokens, which go to the cache."""
    rows = cache.plan(slots, [len(piece) for piece in pieces])
    tokens_M = llm.backend.asarray(np.concatenate(pieces), dtype="int64")
    return llm.backend.to_numpy(llm.model.run(llm.backend, tokens_M, rows, cache))


WAYS = {way.__name__: way for way in (prefill, decode, ragged, greedy)}

# A model whose greedy answers are ties: three tokens have each logit, and the first of them is the answer.
TIED = "tied"

MODEL_CASES = (*(f"{model}-{way}" for model in CONFIGS for way in WAYS), f"{TIED}-greedy")


def model_report(be: Backend, trial: Trial) -> Report:
    """A whole model on a backend against the canon in float64. Weights and prompts are always the same."""
    model, _, way = trial.case.removeprefix(f"{MODEL}/").rpartition("-")
    began = time.perf_counter()
    want = canon_result(model, way)
    try:
        with np.errstate(all="ignore"):
            got = WAYS[way](tiny(model, be))
        coarse = bool(be.rounding(MODEL, "f32"))
        if way != "greedy":
            agree(got.astype(want.dtype), want, LIMITS["bfloat16" if coarse else be.array_dtype], what="logits")
        elif coarse:
            best_tokens(got, model)
        else:
            same_tokens(got, want, model)
        report = trial.report("", "")
    except AssertionError as different:
        report = trial.report("spread", f"{model}, {way}: {different}")
    except Exception as error:
        report = trial.report("raised", f"{model}, {way}: {type(error).__name__}: {error}")
    return replace(report, seconds=time.perf_counter() - began)


def same_tokens(got: Array, want: Array, model: str) -> None:
    """AssertionError tells the first token that differs, and for TIED whether it is another of the best."""
    for row, (ours, theirs) in enumerate(zip(got.tolist(), want.tolist(), strict=True)):
        if ours == theirs:
            continue
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        a, b = ours[at], theirs[at]
        tied = model == TIED and (a - b) % WIDTH == 0
        why = "; their logits are equal, and of equal logits the lowest index wins (the rule of ties)" if tied else ""
        raise AssertionError(f"answer {row}, token {at} is {a} and must be {b}{why}")


def best_tokens(got: Array, model: str) -> None:
    """AssertionError tells the first token whose true logit is not the best but for what coarse arithmetic does to it, or
    that is not the first of equal ones."""
    canon, limit = tiny(model, Backend("float64")), LIMITS["bfloat16"].element
    for row, (prompt, answer) in enumerate(zip(PROMPTS, got.tolist(), strict=True)):
        logits_TN = canon.forward(np.array([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]
        for at, (token, logits_N) in enumerate(zip(answer, logits_TN, strict=True)):
            lost = (logits_N.max() - logits_N[token]) / np.abs(logits_N).max()
            if lost > limit or (model == TIED and token >= WIDTH):
                raise AssertionError(f"answer {row}, token {at} is {token}, whose logit is {lost:.2f} below the largest")


@functools.cache
def canon_result(model: str, way: str) -> Array:
    return WAYS[way](tiny(model, Backend("float64")))


def tiny(model: str, be: Backend) -> LLM:
    from npllm.llm import LLM
    from npllm.models import interpret

    return tied(be) if model == TIED else LLM.random(interpret(CONFIGS[model]), be)


def tied(be: Backend) -> LLM:
    """A model in which tokens n, n + 32 and n + 64 are the same: each row of its tied embedding has a single number, so that
    equal logits are equal whatever the order of a sum."""
    from npllm.llm import LLM
    from npllm.model import Model
    from npllm.models import interpret

    described = interpret(CONFIGS["qwen3"])
    spec = described.architecture.weight_spec(described.config)
    handles = random_weights(spec)
    name = next(name for name in handles if "embed_tokens" in name)
    rows = np.tile(np.eye(WIDTH, dtype=np.float32), (4, 1))[: spec[name].shape[0]]
    handles[name] = replace(Weight.of(name, rows), axes=spec[name].axes, part=spec[name].part)
    return LLM(Model(described.architecture, described.config, build_tree(spec, handles, be.prepare), spec), be)
