"""What the Numba backend reaches beyond prompts of 512 tokens and decoding: one figure a line, in one run.

context    a prompt of 8k tokens against one of 512, and the memory that it takes; decoding at 8k, by the bytes of keys
           and values that it reads;
mixture    8 of 64 experts against a dense model that computes as much per token;
latent     decoding at 8k with DeepSeek-V2-Lite's attention: arithmetic per second against the peak;
memory     resident memory against the weights as they are stored, and the cache;
start      seconds to compile what a model needs, and to the first token of the shipped model.

Models have random weights in mapped bfloat16 files. Each runs in a process of its own; the machine's limits are measured
in every round, and the best round counts.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench import checkpoints, counting, limits
from bench.canon import about
from bench.contestants.npllm_model import compiler
from bench.processes import ROOT, Contestant, ContestantError, attempt, contestant, environment, note
from npllm.machine import default_threads
from npllm.models import interpret

SHAPE, DENSE, MIXTURE, LATENT = "qwen3-0.6b", "dense", "moe-64-8", "latent"
CHOSEN = 8

# Tokens that are decoded at a time, and before anything is timed.
NEW, WARM_UP = 32, 4

# Rounds at least, of what a long context costs: a difference of times that are short beside its prompt.
READINGS = 5

QUESTION = "How many experts does DeepSeek V3 activate per token?"


class Figure(NamedTuple):
    """What was reached, and what is to be: at least `reach`, or at most if `most`. `shown` are the numbers behind it."""

    name: str
    value: float
    reach: float
    most: bool = False
    shown: str = ""


class Run(NamedTuple):
    """What every group needs to know. `limits` are the best so far."""

    machine: limits.Machine
    folder: Path
    threads: int
    rounds: int
    prefix: str
    long: int
    short: int
    limits: limits.Limits

    def refresh(self) -> None:
        """Measure the machine once more."""
        self.limits.update(limits.better(self.limits, self.machine.measure()))

    def bandwidth(self) -> float:
        return limits.bandwidth(self.limits)

    @contextlib.contextmanager
    def model(self, shape: str, **options: Any) -> Iterator[Contestant]:
        """npllm with a model of a shape, warmed up, for a block; options as in npllm.load."""
        folder = checkpoints.checkpoint(self.folder, self.prefix + shape)
        arguments = {"folder": str(folder), "backend": "numba", "threads": self.threads, **options}
        with contestant("npllm_model", arguments, self.threads, self.folder / "contestant.log") as one:
            one.ask("prefill", tokens=self.short)
            one.ask("decode", tokens=WARM_UP)
            yield one

    def described(self, shape: str) -> tuple[Any, Any]:
        """A shape's Config and weight spec."""
        found = interpret(checkpoints.values_of(self.prefix + shape), shape)
        return found.config, found.architecture.weight_spec(found.config)


def run(
    threads: int | None = None, rounds: int = 3, work: Path | None = None, tiny: bool = False, only: str = ""
) -> dict[str, Any]:
    """All figures of one run; `work` keeps the files for the next, `only` names words of the groups that are wanted."""
    threads = threads or default_threads()
    failures: dict[str, str] = {}
    figures: list[Figure] = []
    words = [word for word in only.split(",") if word]
    with contextlib.ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        machine = limits.Machine(folder, threads)
        sizes = ("tiny-", 512, 64) if tiny else ("", 8192, 512)
        this = Run(machine, folder, threads, rounds, *sizes, limits={})
        this.refresh()
        for name, group in GROUPS.items():
            if not words or any(word in name for word in words):
                note(name)
                attempt(name, lambda group=group: figures.extend(group(this)), failures)
        return {
            "schema": "npllm.bench.numba/1",
            **about(),
            "versions": about()["versions"] | compiler(),
            "threads": threads,
            "rounds": rounds,
            "limits": this.limits,
            "limits_by": machine.how,
            "figures": [figure._asdict() for figure in figures],
            "failures": failures,
        }


def best(this: Run, *asked: Callable[[], float], rounds: int = 1) -> list[float]:
    """The least seconds of each task over the run's rounds, of which there may have to be more; all are asked in each, one
    after the other, and the machine is measured, too."""
    least = [math.inf] * len(asked)
    for _ in range(max(this.rounds, rounds)):
        this.refresh()
        least = [min(known, ask()) for known, ask in zip(least, asked, strict=True)]
    return least


# -- a long context ---------------------------------------------------------------------------------------------------


def long_prompt(this: Run) -> Iterator[Figure]:
    c, spec = this.described(SHAPE)
    with this.model(SHAPE) as one:
        short, long = best(
            this,
            lambda: one.ask("prefill", tokens=this.short),
            lambda: one.ask("prefill", tokens=this.long),
        )
    rates = this.short / short, this.long / long
    flops = [counting.prompt_flops(c, spec, tokens) / tokens for tokens in (this.short, this.long)]
    shown = f"{rates[1]:.0f} / {rates[0]:.0f} tokens/s; by FLOPs per token {flops[0] / flops[1]:.2f}"
    name = f"prefill {this.long} / prefill {this.short}, tokens/s, over what the FLOPs explain"
    yield Figure(name, rates[1] / rates[0] * flops[1] / flops[0], 0.85, shown=shown)


def prompt_memory(this: Run) -> Iterator[Figure]:
    """A prompt's memory beyond weights and cache must not go by the square of its length."""
    found = {}
    for tokens in (this.long // 2, this.long):
        with this.model(SHAPE) as one:
            found[tokens] = one.ask("peak", tokens=tokens)
    half, whole = found.values()
    shown = " / ".join(f"{each['grown'] / 2**20:.0f} MiB (cache: {each['cache'] / 2**20:.0f})" for each in (whole, half))
    name = f"memory that a prompt of {this.long} takes / one of {this.long // 2}"
    yield Figure(name, ratio(whole["grown"], half["grown"]), 2.1, True, shown)


def long_context(this: Run, kv_dtype: str | None) -> Iterator[Figure]:
    with this.model(SHAPE, kv_dtype=kv_dtype) as one:
        rate, shown = reading(this, one)
    name = f"decode at {this.long}, kv_dtype={kv_dtype}: KV bytes read per second / read bandwidth"
    yield Figure(name, rate / this.bandwidth(), 0.8, shown=shown)


def reading(this: Run, one: Contestant) -> tuple[float, str]:
    """Bytes of keys and values per second: what a token in a long context reads, over what it takes longer for it."""
    context = this.long - NEW
    one.ask("decode", tokens=1, context=context)
    empty, full = best(
        this,
        lambda: one.ask("decode", tokens=NEW),
        lambda: one.ask("decode", tokens=NEW, context=context),
        rounds=READINGS,
    )
    longer = (full - empty) / NEW
    size = one.ask("context_bytes", length=this.long - NEW // 2)
    shown = f"{NEW / full:.1f} / {NEW / empty:.1f} tokens/s, {size / 2**20:.0f} MiB, {size / longer / 1e9:.1f} GB/s"
    return size / longer, shown


# -- mixtures and latent attention ------------------------------------------------------------------------------------


def mixture(this: Run) -> Iterator[Figure]:
    shapes = (DENSE, MIXTURE)
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(this.model(shape)) for shape in shapes)
        prompts = best(this, *(lambda each=each: each.ask("prefill", tokens=this.short) for each in (one, other)))
        tokens = best(this, *(lambda each=each: each.ask("decode", tokens=NEW) for each in (one, other)))
    flops, read = [], []
    for shape in shapes:
        c, spec = this.described(shape)
        flops.append(counting.prompt_flops(c, spec, this.short, CHOSEN))
        read.append(counting.active_bytes(c, spec, CHOSEN) * NEW)
    rates = [amount / seconds / 1e9 for amount, seconds in zip(read, tokens, strict=True)]
    shown = f"{rates[1]:.1f} / {rates[0]:.1f} GB/s"
    yield Figure("8 of 64 experts: decode per active byte / dense", rates[1] / rates[0], 0.9, shown=shown)
    rates = [amount / seconds / 1e9 for amount, seconds in zip(flops, prompts, strict=True)]
    shown = f"{rates[1]:.0f} / {rates[0]:.0f} GFLOP/s"
    yield Figure(f"8 of 64 experts: prefill {this.short} per active FLOP / dense", rates[1] / rates[0], 0.7, shown=shown)


def latent(this: Run, **options: str) -> Iterator[Figure]:
    c, _ = this.described(LATENT)
    flops = counting.latent_flops(c, this.long - NEW // 2)
    with this.model(LATENT, **options) as one:
        rate, _ = reading(this, one)
        size = one.ask("context_bytes", length=this.long - NEW // 2)
    done = rate * flops / size
    most, other, peak = (
        limits.arithmetic(this.limits, "float32"),
        limits.arithmetic(this.limits, "bfloat16"),
        limits.peak(this.limits, "float32"),
    )
    shown = (
        f"{done / 1e9:.0f} GFLOP/s; {done / other:.2f} of bfloat16; {done / peak:.2f} of the fastest burst; "
        f"{rate / 1e9:.1f} GB/s of the cache"
    )
    said = ", ".join(f"{key}={value}" for key, value in options.items())
    yield Figure(f"latent attention, decode at {this.long}, {said} / float32 arithmetic", done / most, 0.6, shown=shown)


# -- memory -----------------------------------------------------------------------------------------------------------


def memory(this: Run, quantize: str | None) -> Iterator[Figure]:
    """After a prompt and an answer: everything that is resident, the interpreter and the compiler among it."""
    with this.model(SHAPE, quantize=quantize):
        pass  # a process that compiles keeps memory that others do not need
    with this.model(SHAPE, quantize=quantize) as one:
        one.ask("decode", tokens=NEW)
        found, cache = one.ask("memory"), one.ask("context_bytes", length=this.short)
    parts = {"anonymous": found["anonymous"], "libraries": found["before"], "at most": found["most"]}
    shown = f"{found['now'] / 2**20:.0f} MiB; " + ", ".join(f"{name} {size / 2**20:.0f}" for name, size in parts.items())
    value = found["now"] / (found["weights"] + cache)
    yield Figure(f"resident memory, {quantize or 'bf16'} / weights as stored + cache", value, 1.1, True, shown)


# -- compiling and starting -------------------------------------------------------------------------------------------


def compiling(this: Run, shape: str) -> Iterator[Figure]:
    """What a model's prompts and answers of every kind (`npllm warmup MODEL`) take longer with an empty folder of kernels
    than with a full one."""
    folder = checkpoints.checkpoint(this.folder, this.prefix + shape)
    command = ["-m", "npllm", "warmup", str(folder), "--backend", "numba"]
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (seconds_of(command, this.threads, cache) for _ in range(2))
    shown = f"{cold:.1f} with an empty cache, {warm:.1f} with a full one"
    yield Figure(f"compiling for {shape}, seconds", cold - warm, 40.0, True, shown)


def compiling_all(this: Run) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as cache:
        seconds = seconds_of(["-m", "npllm", "warmup", "--backend", "numba"], this.threads, cache)
    yield Figure("npllm warmup: all kernels, several processes, seconds", seconds, 40.0, True)


def starting(this: Run) -> Iterator[Figure]:
    """A question to the shipped model: process start to the end of the process."""
    code = "import npllm; npllm.load(backend='numba').generate('What is attention?', max_tokens=1)"
    with tempfile.TemporaryDirectory() as cache:
        command = ["-m", "npllm", "generate", "--backend", "auto", QUESTION]
        cold = seconds_of(command, this.threads, cache)
        yield Figure("auto, empty cache: the shipped model's whole answer, seconds", cold, 10.0, True)
    with tempfile.TemporaryDirectory() as cache:
        for name, command in {
            "npllm generate --backend numba": ["-m", "npllm", "generate", "--backend", "numba", "-n", "1", QUESTION],
            "npllm generate (auto)": ["-m", "npllm", "generate", "-n", "1", QUESTION],
            "npllm.load(backend='numba')": ["-c", code],
        }.items():
            cold = seconds_of(command, this.threads, cache)
            warm = min(seconds_of(command, this.threads, cache) for _ in range(this.rounds))
            shown = f"{cold:.1f} the first time"
            yield Figure(f"{name}, full cache: to the first token, seconds", warm, 2.0, True, shown)


def seconds_of(arguments: list[str], threads: int, cache: str) -> float:
    """Seconds of a Python process from start to end; ContestantError if it fails."""
    start = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(threads, NPLLM_CACHE=cache),
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    if ended.returncode:
        raise ContestantError(f"{arguments[0]} ended with status {ended.returncode}: {ended.stderr.strip()[-300:]}")
    return seconds


def ratio(one: float, other: float) -> float:
    return one / other if other else math.inf


GROUPS: dict[str, Callable[[Run], Iterator[Figure]]] = {
    "long prompt": long_prompt,
    "prompt memory": prompt_memory,
    "long context, float32 cache": partial(long_context, kv_dtype=None),
    "long context, bfloat16 cache": partial(long_context, kv_dtype="bfloat16"),
    "mixture": mixture,
    "latent attention, float32": partial(latent, dtype="float32"),
    "latent attention, bfloat16 cache": partial(latent, kv_dtype="bfloat16"),
    "resident memory, bf16": partial(memory, quantize=None),
    "resident memory, q8": partial(memory, quantize="q8"),
    "resident memory, q4": partial(memory, quantize="q4"),
    "compiling, dense": partial(compiling, shape=SHAPE),
    "compiling, mixture": partial(compiling, shape=MIXTURE),
    "compiling, latent attention": partial(compiling, shape=LATENT),
    "compiling, everything": compiling_all,
    "starting": starting,
}


# -- the table --------------------------------------------------------------------------------------------------------


def table(figures: dict[str, Any]) -> str:
    """The figures, the machine's limits and what else to know, as Markdown."""
    lines = ["| figure | to reach | reached | |", "|---|---|---|---|"]
    for each in (Figure(**values) for values in figures["figures"]):
        bound = "at most" if each.most else "at least"
        lines.append(f"| {each.name} | {bound} {each.reach:g} | {each.value:.2f} | {each.shown} |")
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    where = f"{figures['threads']} threads, best of {figures['rounds']} rounds, on {figures['machine']}, {figures['date']}"
    notes = [f"{where}; {versions}.", *(f"{name}: {reason}." for name, reason in figures["failures"].items())]
    return "\n".join([*lines, "", *limits.described(figures["limits"], figures["limits_by"]), "", *notes])
