"""npllm against other engines on the same random weights, and against what the machine can do, interleaved in one run.

Every contestant is a process of its own that loads once. A round measures the machine's limits, then has one contestant
after the other compute a prompt and decode from an almost empty context; the next round begins with another of them. The
best round counts for every ratio: other work on the machine only ever takes time. Engines are not asked to sample, npllm
is (greedy): what it costs is in its figures.

Weights are written once, as bfloat16 safetensors and as GGUF with every matrix in one type, head included.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import checkpoints, counting, limits
from bench.canon import about
from bench.processes import ROOT, Contestant, ContestantError, attempt, note
from npllm.machine import default_threads
from npllm.models import interpret

ENGINES = ("llama.cpp", "transformers")

# Tokens of the prompt after which everybody's logits are compared, and the one they are compared with.
COMPARED, REFERENCE = 64, "npllm bf16, float32 arithmetic"

# Tokens that are decoded before anything is timed.
WARM_UP = 4

# Bits per weight: of GGUF's types, 32 codes and a float16 factor.
BITS = {"BF16": 16.0, "Q8_0": 8.5, "Q4_0": 4.5}


class Entry(NamedTuple):
    """A contestant: the module that serves it with which arguments; the arithmetic whose limit its prompts are held
    against, and, for other engines, the type of the weights."""

    name: str
    module: str
    arguments: dict[str, Any]
    arithmetic: str = "bfloat16"
    kind: str = ""


class Target(NamedTuple):
    """A ratio that is to be reached: of a contestant's `task` to its limit, or to the same of another contestant."""

    task: str
    name: str
    reach: float
    against: str = ""


BF16, Q8, Q4 = "npllm bf16", "npllm q8", "npllm q4"
TARGETS = (
    Target("decode", BF16, 0.95),
    Target("decode", Q8, 0.92),
    Target("decode", Q4, 0.90),
    Target("decode", BF16, 1.0, "llama.cpp BF16"),
    Target("decode", Q8, 1.0, "llama.cpp Q8_0"),
    Target("decode", Q4, 1.2, "llama.cpp Q4_0"),
    Target("decode", BF16, 3.0, "transformers bf16"),
    Target("prefill", BF16, 0.75),
    Target("prefill", REFERENCE, 0.75),
    Target("prefill", BF16, 1.4, "llama.cpp BF16"),
    Target("prefill", Q8, 1.6, "llama.cpp Q8_0"),
    Target("prefill", Q4, 1.5, "llama.cpp Q4_0"),
    Target("prefill", BF16, 1.4, "transformers bf16"),
)


def run(
    engines: str = "",
    shape: str = "qwen3-0.6b",
    threads: int | None = None,
    rounds: int = 5,
    python: str = sys.executable,
    work: Path | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
) -> dict[str, Any]:
    """All figures of one run; `python` has the other `engines` and package `gguf`, `work` keeps the files for the next."""
    threads = threads or default_threads()
    failures: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        note(f"weights of {shape} in {folder}")
        model = checkpoints.checkpoint(folder, shape)
        named = [name for name in engines.split(",") if name]
        entries = list(contestants(model, named, python, threads, max(prompt_tokens, new_tokens + 1), failures))
        started = start(stack, entries, python, threads, folder, failures)
        logits = compared(started, folder, failures)
        machine = limits.Machine(folder, threads)
        times, found = measured(machine, started, rounds, {"prefill": prompt_tokens, "decode": new_tokens}, failures)
        return {
            "schema": "npllm.bench.peers/1",
            "shape": shape,
            **about(),
            "versions": about()["versions"] | versions(started),
            "threads": threads,
            "rounds": rounds,
            "tokens": {"prefill": prompt_tokens, "decode": new_tokens},
            "prompt_flops": prompt_flops(shape, prompt_tokens),
            "limits": found,
            "limits_by": machine.how,
            "contestants": {
                entry.name: {
                    "arithmetic": entry.arithmetic,
                    "weight_bytes": weight_bytes(started[entry.name], entry, shape),
                    "seconds": times[entry.name],
                }
                for entry in entries
                if entry.name in started
            },
            "logits": logits,
            "failures": failures,
        }


# -- contestants ------------------------------------------------------------------------------------------------------


def contestants(
    model: Path, engines: list[str], python: str, threads: int, batch: int, failures: dict[str, str]
) -> Iterator[Entry]:
    """Everybody, npllm first."""
    npllm: dict[str, Any] = {"folder": str(model), "backend": "numba", "threads": threads}
    yield Entry(BF16, "npllm_model", npllm)
    yield Entry(REFERENCE, "npllm_model", npllm | {"dtype": "float32"}, "float32")
    yield Entry(Q8, "npllm_model", npllm | {"quantize": "q8"})
    yield Entry(Q4, "npllm_model", npllm | {"quantize": "q4"})
    for kind in BITS if "llama.cpp" in engines else ():
        file = attempt(f"llama.cpp {kind}", lambda kind=kind: gguf_file(model, kind, python), failures)
        if file is not None:
            arguments = {"file": str(file), "threads": threads, "context": -(-batch // 256) * 256, "batch": batch}
            yield Entry(f"llama.cpp {kind}", "llama_cpp_model", arguments, kind=kind)
    if "transformers" in engines:
        arguments = {"folder": str(model), "threads": threads, "dtype": "bfloat16"}
        yield Entry("transformers bf16", "transformers_model", arguments, kind="BF16")


def gguf_file(model: Path, kind: str, python: str) -> Path:
    """The model as GGUF, beside its folder; ContestantError if it cannot be written."""
    out = model.with_name(f"{model.name}-{kind}.gguf")
    if not out.exists():
        note(f"writing {out.name}")
        command = [python, "-m", "bench.contestants.gguf_file", str(model), str(out), kind]
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if made.returncode:
            raise ContestantError(f"{out.name} is not written: {made.stderr.strip().splitlines()[-1]}")
    return out


def start(
    stack: contextlib.ExitStack,
    entries: list[Entry],
    python: str,
    threads: int,
    folder: Path,
    failures: dict[str, str],
) -> dict[str, Contestant]:
    """The contestants that start, by name, each warmed up; `stack` ends them."""
    started = {}
    for i, entry in enumerate(entries):
        note(f"starting {entry.name}")
        interpreter = sys.executable if entry.module == "npllm_model" else python
        log = folder / f"contestant-{i}.log"

        def begin(entry: Entry = entry, interpreter: str = interpreter, log: Path = log) -> Contestant:
            one = Contestant(entry.module, entry.arguments, interpreter, threads, log)
            stack.callback(one.close)
            one.ask("prefill", tokens=COMPARED)
            one.ask("decode", tokens=WARM_UP)
            return one

        one = attempt(entry.name, begin, failures)
        if one is not None:
            started[entry.name] = one
    return started


def compared(started: dict[str, Contestant], folder: Path, failures: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Whether everybody computes the same model: relative error of the logits, and whether the likeliest token is one."""
    given = {}
    for name, one in started.items():
        path = folder / "logits.npy"
        attempt(f"{name}: logits", lambda one=one, path=path: one.ask("logits", tokens=COMPARED, path=str(path)), failures)
        if f"{name}: logits" not in failures:
            given[name] = np.load(path).astype(np.float64)
    if REFERENCE not in given:
        return {}
    want = given.pop(REFERENCE)
    return {
        name: {
            "error": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
            "same_top": bool(got.argmax() == want.argmax()),
        }
        for name, got in given.items()
    }


def versions(started: dict[str, Contestant]) -> dict[str, str]:
    return {name: version for one in started.values() for name, version in one.about["versions"].items()}


def weight_bytes(one: Contestant, entry: Entry, shape: str) -> float:
    """Bytes of weights that a token reads: as npllm keeps them, as a type of GGUF has them."""
    if not entry.kind:
        return float(one.about["weight_bytes"])
    found = interpret(checkpoints.values_of(shape), shape)
    spec = found.architecture.weight_spec(found.config)
    return counting.active_bytes(found.config, spec) * BITS[entry.kind] / BITS["BF16"]


def prompt_flops(shape: str, tokens: int) -> int:
    found = interpret(checkpoints.values_of(shape), shape)
    return counting.prompt_flops(found.config, found.architecture.weight_spec(found.config), tokens)


# -- rounds -----------------------------------------------------------------------------------------------------------


def measured(
    machine: limits.Machine,
    started: dict[str, Contestant],
    rounds: int,
    tokens: dict[str, int],
    failures: dict[str, str],
) -> tuple[dict[str, dict[str, list[float]]], limits.Limits]:
    """Seconds of every contestant, task and round; and the machine's limits, the best of all rounds."""
    times: dict[str, dict[str, list[float]]] = {name: {task: [] for task in tokens} for name in started}
    found: limits.Limits = {}
    for i in range(rounds):
        note(f"round {i + 1} of {rounds}")
        found = limits.better(found, machine.measure())
        for name in rotated([name for name in started if name not in failures], i):
            for task, count in tokens.items():
                seconds = attempt(name, lambda name=name, task=task, n=count: started[name].ask(task, tokens=n), failures)
                if seconds is None:
                    break
                times[name][task].append(seconds)
    return times, found


def rotated(names: list[str], by: int) -> list[str]:
    """The same in a circle, begun elsewhere."""
    by %= max(1, len(names))
    return names[by:] + names[:by]


# -- the table --------------------------------------------------------------------------------------------------------


def speeds(figures: dict[str, Any], name: str, task: str, of: Callable[[list[float]], float] = min) -> float | None:
    """Tokens per second of the best round, or of the round that `of` gives the seconds of; None if there was none."""
    seconds = figures["contestants"].get(name, {}).get("seconds", {}).get(task)
    return figures["tokens"][task] / of(seconds) if seconds else None


def achieved(figures: dict[str, Any], name: str, task: str) -> float | None:
    """Operations per second of a prompt, bytes of weights per second of decoding."""
    speed = speeds(figures, name, task)
    if speed is None:
        return None
    if task == "prefill":
        return speed * figures["prompt_flops"] / figures["tokens"]["prefill"]
    return speed * float(figures["contestants"][name]["weight_bytes"])


def limit(figures: dict[str, Any], name: str, task: str) -> float:
    if task == "decode":
        return limits.bandwidth(figures["limits"])
    return limits.arithmetic(figures["limits"], figures["contestants"][name]["arithmetic"])


def burst(figures: dict[str, Any], name: str, task: str) -> tuple[str, float]:
    """What that limit is at best, for a tenth of a second."""
    if task == "decode":
        return "reading", limits.burst(figures["limits"])
    return "arithmetic", limits.peak(figures["limits"], figures["contestants"][name]["arithmetic"])


def reached(figures: dict[str, Any], target: Target) -> float | None:
    """The ratio that a target asks for; None if somebody is missing."""
    mine = achieved(figures, target.name, target.task)
    if mine is None:
        return None
    if not target.against:
        return mine / limit(figures, target.name, target.task)
    mine, theirs = (speeds(figures, name, target.task) for name in (target.name, target.against))
    return None if mine is None or theirs is None else mine / theirs


def table(figures: dict[str, Any]) -> str:
    """Everybody's figures, the ratios to be reached, the machine's limits and what else to know, as Markdown."""
    parts = (contestant_lines(figures), target_lines(figures))
    bounds = limits.described(figures["limits"], figures["limits_by"])
    return "\n".join([*parts[0], "", *parts[1], "", *bounds, "", *notes(figures)])


def contestant_lines(figures: dict[str, Any]) -> list[str]:
    tokens = figures["tokens"]
    heads = [
        "engine and weights", f"prefill {tokens['prefill']}, tokens/s", "median", "GFLOP/s", "of the limit",
        f"decode {tokens['decode']}, tokens/s", "median", "GB/s", "of the limit",
    ]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name in figures["contestants"]:
        cells = [cell for task in tokens for cell in contestant_cells(figures, name, task)]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def contestant_cells(figures: dict[str, Any], name: str, task: str) -> list[str]:
    """Best and median tokens per second, what was achieved, and the share of the limit."""
    best, middle = speeds(figures, name, task), speeds(figures, name, task, statistics.median)
    done = achieved(figures, name, task)
    if best is None or middle is None or done is None:
        return ["-"] * 4
    return [f"{best:.1f}", f"{middle:.1f}", f"{done / 1e9:.1f}", f"{done / limit(figures, name, task):.2f}"]


def target_lines(figures: dict[str, Any]) -> list[str]:
    lines = ["| ratio | to reach | reached |", "|---|---|---|"]
    for target in TARGETS:
        against = target.against or f"its limit ({'read bandwidth' if target.task == 'decode' else 'arithmetic'})"
        ratio = reached(figures, target)
        lines.append(f"| {target.task}: {target.name} / {against} | {target.reach:.2f} | {shown(ratio)} |")
        done = None if target.against else achieved(figures, target.name, target.task)
        if done is not None:
            what, most = burst(figures, target.name, target.task)
            lines.append(f"| the same / the fastest burst of {what} | | {shown(done / most)} |")
    return lines


def shown(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{ratio:.2f}"


def notes(figures: dict[str, Any]) -> list[str]:
    """Where it ran with which versions, whose logits agree, and who did not take part."""
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    lines = [
        f"{figures['shape']}, random weights, {figures['threads']} threads, best of {figures['rounds']} rounds, "
        f"on {figures['machine']}, {figures['date']}; {versions}."
    ]
    if figures["logits"]:
        each = (
            f"{name} {found['error']:.1e}{'' if found['same_top'] else ' (another likeliest token)'}"
            for name, found in figures["logits"].items()
        )
        lines.append(f"Relative error of the logits after {COMPARED} tokens, against {REFERENCE}: {', '.join(each)}.")
    lines += [f"{name}: {reason}." for name, reason in figures["failures"].items()]
    return lines
