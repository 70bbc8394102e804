"""The CuPy backend on a GPU: every figure of it, in one run, with what was predicted before one was at hand.

machine    read bandwidth (a kernel that reads 4 GiB and adds) and bf16 matmul rate (8192 cubed, by cuBLAS);
decode     tokens per second and weight bytes per second of Qwen3 shapes, batch 1 and 8, greedy and drawn;
host       what a token costs the host, and how many launches its step is;
prefill    4096 tokens at once, arithmetic over the matmul rate;
mixture    the same of Qwen3-30B-A3B, by the bytes of the experts that a token is given;
layers     mixtures and latent attention by the layer (bench.gpu_layers);
peers      transformers in the same process on the same weights, eager and compiled, where PyTorch is installed.

Weights are random bf16. The best round counts; the clock runs from before the first token is asked for to after the last one
has come back to the host.
"""

from __future__ import annotations

import contextlib
import gc
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from bench import counting, gpu_layers
from bench.canon import about
from bench.numba import Figure
from bench.processes import note
from npllm.backends.cupy_gpu import cublaslt
from npllm.bench import SHAPES
from npllm.errors import NpllmError
from npllm.handles import Handle, Stack
from npllm.llm import LLM
from npllm.model import Model
from npllm.models import interpret
from npllm.registry import get_backend
from npllm.weights import Spec, build_tree

QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "max_position_embeddings": 40960,
}  # fmt: skip

QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "max_position_embeddings": 40960, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "norm_topk_prob": True,
}  # fmt: skip

MODELS = {"Qwen3-0.6B": SHAPES["qwen3-0.6b"], "Qwen3-8B": QWEN3_8B}

# Fewer of everything, to see that all of it runs.
TINY = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32,
}  # fmt: skip

# What was predicted for an H200 from published measurements of others, before any of this had run on one.
PREDICTED = {
    "read bandwidth, TB/s": 4.3,
    "bf16 matmul, TFLOP/s": 780.0,
    "Qwen3-0.6B decode, tokens/s": 1513.0,
    "Qwen3-8B decode: weight bytes per second / read bandwidth": 0.87,
    "Qwen3-0.6B decode, batch 8 / batch 1": 6.5,
    "Qwen3-8B decode, batch 8 / batch 1": 7.0,
    "Qwen3-8B prefill of 4096: arithmetic / matmul rate": 0.8,
    "Qwen3-0.6B decode / transformers eager": 10.0,
    "Qwen3-0.6B decode / transformers compiled": 2.5,
    "Qwen3-8B decode / transformers eager": 2.3,
    "Qwen3-8B decode / transformers compiled": 1.3,
    "Qwen3-30B-A3B decode: active bytes per second / read bandwidth": 0.68,
    "Qwen3-30B-A3B: experts' bytes per second / bandwidth, batch 1": 0.75,
    "DeepSeek-V2-Lite, decode at 8192, batch 32: bytes per second / bandwidth": 0.75,
    "DeepSeek-V3, decode at 8192, batch 32: arithmetic / matmul rate": 0.4,
}

# As Qwen3's generation_config.json has it, and a penalty besides.
DRAWN: dict[str, Any] = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "seed": 1}

READ = r"""
extern "C" __global__ void read_all(const uint4* from, long long count, unsigned* out) {
    unsigned sum = 0;
    long long step = (long long)gridDim.x * blockDim.x;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < count; i += 4 * step) {
        uint4 a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
        sum += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    for (; i < count; i += step) sum += from[i].x ^ from[i].y ^ from[i].z ^ from[i].w;
    if (sum == 0x12345678u) *out = sum;
}
"""


class Machine(NamedTuple):
    """Bytes per second that can be read, and multiply-adds times two per second in bf16."""

    bandwidth: float
    matmul: float


def measured(be: Any) -> Machine:
    """The limits of the current GPU."""
    return Machine(read_bandwidth(be), matmul_rate(be))


def read_bandwidth(be: Any, size: int = 1 << 32) -> float:
    """Bytes per second of a kernel that reads so many."""
    cupy, blocks = be.device.cupy, 8 * be.device.multiprocessors
    kernel, out = cupy.RawKernel(READ, "read_all"), cupy.zeros(1, cupy.uint32)
    memory = cupy.arange(size // 4, dtype=cupy.uint32)
    memory *= cupy.uint32(2654435761)
    reading = [_elapsed(cupy, lambda: kernel((blocks,), (512,), (memory, memory.nbytes // 16, out))) for _ in range(10)]
    return float(memory.nbytes) / min(reading)


def matmul_rate(be: Any, size: int = 8192) -> float:
    """Multiply-adds times two per second of bf16 matrices, by cuBLASLt (sums and result in float32) or by CuPy's cuBLAS
    (result in bf16), whichever is faster. CuPy's needs CUDA's headers, which not every machine has: it may be missing."""
    import ml_dtypes

    device, cupy, blas = be.device, be.device.cupy, be.device.blas()
    a, b = (device.upload(gpu_layers.stored(f"side {i}", (size, size), 1.0).data) for i in (1, 2))
    out = device.empty((size, size), "float32")
    shape = cublaslt.Shape(size, size, size, "bf16", size, size, 256)
    ways: dict[str, Callable[[], Any]] = {"CuPy": lambda: a.view(ml_dtypes.bfloat16) @ b.view(ml_dtypes.bfloat16).T}
    if blas is not None and blas.plan(shape).possible:
        ways["cuBLASLt"] = lambda: blas.multiply(shape, *map(device.address, (a, b, out)))
    rates: list[float] = []
    for name, multiply in ways.items():
        try:
            rates.append(2 * size**3 / min(_elapsed(cupy, multiply) for _ in range(10)))
        except Exception as error:  # whatever it is that this library says of what it misses
            note(f"bf16 products by {name}: {error}")
    return max(rates, default=math.nan)


def _elapsed(cupy: Any, work: Callable[[], Any]) -> float:
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(begin, end)) / 1e3


def random_model(be: Any, values: dict[str, Any], name: str) -> LLM:
    """A model with bf16 weights: matrices that keep the activations' scale, gains of 1 and a little."""
    described = interpret(values, name)
    spec = described.architecture.weight_spec(described.config)
    tree = build_tree(spec, random_handles(spec), be.prepare)
    return LLM(Model(described.architecture, described.config, tree, spec), be, name=name)


def random_handles(spec: Spec) -> dict[str, Handle]:
    made: dict[str, Handle] = {}
    for name, tensor in spec.items():
        if tensor.alias is not None:
            continue
        # Experts are copies of one: each has memory of its own on the GPU.
        shape = tensor.shape[1:] if tensor.forms else tensor.shape
        weight = gpu_layers.stored(name, shape, 1.0 if tensor.part == "norm" else shape[-1] ** -0.5)
        made[name] = Stack(name, (weight,) * tensor.shape[0]) if tensor.forms else weight
    return made


class Run(NamedTuple):
    """What every group needs to know."""

    be: Any
    machine: Machine
    rounds: int
    new: int
    prompt: int
    models: dict[str, dict[str, Any]]
    tiny: bool


def decode(this: Run, llm: LLM) -> Iterator[Figure]:
    """Tokens per second of one row and of eight, and where a token's time goes."""
    seconds = {batch: rate(this, llm, batch) for batch in (1, 8)}
    size = counting.active_bytes(llm.config, llm.model.spec)
    speed = size * seconds[1] / this.machine.bandwidth
    shown = f"{seconds[1]:.0f} tokens/s, {size * seconds[1] / 1e12:.2f} TB/s"
    big = "8B" in llm.name
    yield Figure(f"{llm.name} decode: weight bytes per second / read bandwidth", speed, 0.85 if big else 0.33, shown=shown)
    yield Figure(f"{llm.name} decode, tokens/s", seconds[1], 0.0 if big else 1200.0)
    shown = f"{seconds[8]:.0f} tokens/s in all"
    yield Figure(f"{llm.name} decode, batch 8 / batch 1", seconds[8] / seconds[1], 6.0, shown=shown)
    drawn = rate(this, llm, 1, **DRAWN)
    shown = f"{drawn:.0f} tokens/s by top-k, top-p and a penalty"
    yield Figure(f"{llm.name} decode, drawn / greedy", drawn / seconds[1], 0.0, shown=shown)


def rate(this: Run, llm: LLM, batch: int, **sampling: Any) -> float:
    """Tokens per second, of all rows together."""
    prompts, sampling = [[7 + row] for row in range(batch)], sampling or {"temperature": 0.0}

    def once() -> float:
        outputs = llm.generate(prompts, max_tokens=this.new + 1, ignore_eos=True, **sampling)
        return float(outputs[0].timings.generation_per_second)

    once()
    return max(once() for _ in range(this.rounds))


def host(this: Run, llm: LLM) -> Iterator[Figure]:
    """What a token costs the host between two waits for the GPU, and of how many launches a captured step is."""
    with watching(this.be.device) as watch:
        tokens = rate(this, llm, 1)
    work = statistics.median(watch.between)
    shown = f"{work * 1e6:.0f} us of {1e6 / tokens:.0f} us"
    yield Figure(f"{llm.name} decode: host's time / token's time", work * tokens, 1.0, True, shown)
    layers = llm.config.num_hidden_layers
    shown = f"{watch.launches} launches, {layers} layers"
    yield Figure(f"{llm.name} decode: launches per step and layer", watch.launches / layers, 6.5, True, shown)


@dataclass
class Watch:
    """Seconds from the end of each wait for the device to the next one, and the launches of the step captured last."""

    between: list[float] = field(default_factory=list)
    launches: int = 0
    asked: int = 0
    ended: float | None = None

    def waited(self, wait: Callable[[], Any]) -> Any:
        if self.ended is not None:
            self.between.append(time.perf_counter() - self.ended)
        result = wait()
        self.ended = time.perf_counter()
        return result


@contextlib.contextmanager
def watching(device: Any) -> Iterator[Watch]:
    """What is asked of the device meanwhile."""
    watch, turn, capture, launch = Watch(), device.turn, device.capture, device.launch

    def turned(*args: Any) -> Any:
        made = turn(*args)
        return SimpleNamespace(wait=lambda: watch.waited(made.wait))

    def captured(function: Callable[[], Any]) -> Any:
        def counted() -> Any:
            before = watch.asked
            result = function()
            watch.launches = watch.asked - before
            return result

        return capture(counted)

    def launched(*args: Any) -> None:
        watch.asked += 1
        launch(*args)

    device.turn, device.capture, device.launch = turned, captured, launched
    try:
        yield watch
    finally:
        del device.turn, device.capture, device.launch


def prefill(this: Run, llm: LLM) -> Iterator[Figure]:
    tokens_T = np.random.default_rng(0).integers(0, llm.config.vocab_size, this.prompt)
    least = math.inf
    for _ in range(this.rounds + 1):
        began = time.perf_counter()
        llm.forward(tokens_T, logits="last")
        least = min(least, time.perf_counter() - began)
    flops = counting.prompt_flops(llm.config, llm.model.spec, this.prompt)
    shown = f"{this.prompt / least:.0f} tokens/s, {flops / least / 1e12:.0f} TFLOP/s"
    name = f"{llm.name} prefill of {this.prompt}: arithmetic / matmul rate"
    yield Figure(name, flops / least / this.machine.matmul, 0.75 if "8B" in llm.name else 0.0, shown=shown)


def peers(this: Run, llm: LLM) -> Iterator[Figure]:
    """transformers on the very arrays that the backend multiplies with."""
    from bench.contestants.transformers_gpu import TransformersGpu

    ours = rate(this, llm, 1)
    big = "8B" in llm.name
    for kind, reach in (("eager", 2.0 if big else 8.0), ("compiled", 1.2 if big else 2.0)):
        peer = TransformersGpu(llm, compiled=kind == "compiled")
        theirs = max(peer.decoded(this.new)[1] for _ in range(this.rounds + 1))
        peer.close()
        yield Figure(f"{llm.name} decode / transformers {kind}", ours / theirs, reach, shown=f"{theirs:.0f} tokens/s there")


def mixture(this: Run) -> Iterator[Figure]:
    """A whole mixture, all layers of which fit into 80 GiB."""
    name, smaller = "Qwen3-30B-A3B", TINY | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    llm = random_model(this.be, QWEN3_30B | (smaller if this.tiny else {}), name)
    tokens = rate(this, llm, 1)
    size = counting.active_bytes(llm.config, llm.model.spec, llm.config.router.experts_per_token)
    shown = f"{tokens:.0f} tokens/s, {size * tokens / 1e12:.2f} TB/s"
    speed = size * tokens / this.machine.bandwidth
    yield Figure(f"{name} decode: active bytes per second / read bandwidth", speed, 0.6, shown=shown)


def layers(this: Run) -> Iterator[Figure]:
    if this.tiny:
        yield from gpu_layers.mixture(this.be, gpu_layers.TINY_MIXTURE, this.machine.bandwidth, 1)
        yield from gpu_layers.latents(this.be, gpu_layers.TINY_LATENTS, *this.machine, 1)
        return
    yield from gpu_layers.mixture(this.be, gpu_layers.QWEN3_30B, this.machine.bandwidth)
    for of in (gpu_layers.V2_LITE, gpu_layers.V3):
        yield from gpu_layers.latents(this.be, of, *this.machine)


def run(rounds: int = 3, only: str = "", keep: Callable[[dict[str, Any]], None] = lambda figures: None) -> dict[str, Any]:
    """All figures; `only` names words of the groups that are wanted. SystemExit in one line where there is no GPU.

    `keep` is given what there is after each figure, since a run may be ended at any time.
    """
    try:
        be: Any = get_backend("cupy", dtype="bfloat16")
    except NpllmError as error:
        raise SystemExit(f"python -m bench gpu: {error}") from None
    note("read bandwidth, bf16 matmul")
    this = Run(be, measured(be), rounds, 128, 4096, MODELS, False)

    def kept(figures: list[Figure], failures: dict[str, str]) -> None:
        keep(written(this, figures, failures, gpu_about(be)))

    figures, failures = collected(this, [word for word in only.split(",") if word], kept)
    return written(this, figures, failures, gpu_about(be))


Kept = Callable[[list[Figure], dict[str, str]], None]


def collected(this: Run, words: list[str], kept: Kept) -> tuple[list[Figure], dict[str, str]]:
    """The figures of the groups that are wanted, and why others are missing; `kept` sees them as they come."""
    figures: list[Figure] = []
    failures: dict[str, str] = {}

    def group(name: str, work: Callable[[], Iterator[Figure]]) -> None:
        if words and not any(word in name for word in words):
            return
        note(name)
        try:
            for figure in work():
                note(f"  {figure.name}: {figure.value:.3g} ({figure.shown})")
                figures.append(figure)
                kept(figures, failures)
        except Exception as error:  # one group that fails must not cost the others, nor the time on the machine
            failures[name] = f"{type(error).__name__}: {error}"
            kept(figures, failures)

    for name, values in this.models.items():
        if words and not any(word in f"{name} decode host prefill peers" for word in words):
            continue
        note(f"{name}: weights, kernels")
        try:
            llm = random_model(this.be, values, name)
            this.be.warm_up(lambda done, all: None, llm.model)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
            kept(figures, failures)
            continue
        for part in (decode, host, prefill, peers):
            group(f"{name} {part.__name__}", lambda part=part, llm=llm: part(this, llm))
        del llm
        gc.collect()
        this.be.device.release()
    group("mixture", lambda: mixture(this))
    gc.collect()
    this.be.device.release()
    group("layers", lambda: layers(this))
    return figures, failures


def written(this: Run, figures: list[Figure], failures: dict[str, str], where: dict[str, Any]) -> dict[str, Any]:
    known = {"read bandwidth, TB/s": this.machine.bandwidth / 1e12, "bf16 matmul, TFLOP/s": this.machine.matmul / 1e12}
    return {
        "schema": "npllm.bench.gpu/1",
        **about(),
        **where,
        "rounds": this.rounds,
        "limits": known,
        "figures": [figure._asdict() | {"predicted": PREDICTED.get(figure.name)} for figure in figures],
        "predicted_limits": {name: PREDICTED[name] for name in known},
        "failures": failures,
    }


def gpu_about(be: Any) -> dict[str, Any]:
    """The GPU, its driver and versions, the commit."""
    device = be.device
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    commit = ["git", "rev-parse", "HEAD"]
    return {
        "gpu": {"name": device.name, "architecture": device.architecture, "smi": said(query)},
        "compiler": device.compiler,
        "dependent_launch": device.dependent,
        "cupy": device.cupy.__version__,
        "commit": said(commit),
        "python": platform.python_version(),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def results_file(figures: dict[str, Any]) -> Path:
    """Where the figures are kept when nobody says where."""
    return Path(__file__).parent / "results" / f"gpu-{figures['date']}.json"


def said(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError as error:
        return str(error)
    return done.stdout.strip() or done.stderr.strip()


def table(figures: dict[str, Any]) -> str:
    """The figures with their predictions, and the machine's limits, as Markdown."""
    lines = ["| figure | to reach | predicted | reached | |", "|---|---|---|---|---|"]
    for name, value in figures["limits"].items():
        lines.append(f"| {name} | | {figures['predicted_limits'][name]:g} | {value:.2f} | |")
    for each in figures["figures"]:
        reach = f"at {'most' if each['most'] else 'least'} {each['reach']:g}" if each["reach"] else ""
        predicted = "" if each["predicted"] is None else f"{each['predicted']:g}"
        lines.append(f"| {each['name']} | {reach} | {predicted} | {each['value']:.2f} | {each['shown']} |")
    lines += ["", f"{figures.get('gpu', {}).get('smi', '')}; {figures['date']}; commit {figures.get('commit', '')}."]
    return "\n".join([*lines, *(f"{name}: {reason}." for name, reason in figures["failures"].items())])
