"""`python -m bench gpu`: what it measures, on tiny shapes and the emulated device; and what it says without a GPU."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from npllm.errors import BackendError

pytest.importorskip("numba")

from bench import gpu
from bench.__main__ import main
from bench.numba import Figure
from npllm.backends.cupy_gpu import cubins
from tests.gpu.compiled import compiler
from tests.gpu.emulator import EmulatedBackend, emulated


@emulated
def test_every_group_runs() -> None:
    models = {"Qwen3-8B tiny": gpu.QWEN3_8B | gpu.TINY}
    this = gpu.Run(EmulatedBackend("bfloat16"), gpu.Machine(1e12, 1e14), 1, 3, 20, models, True)
    kept: list[int] = []
    figures, failures = gpu.collected(this, [], lambda figures, failures: kept.append(len(figures) + len(failures)))
    assert kept == list(range(1, len(figures) + len(failures) + 1))
    assert set(failures) <= {f"{name} peers" for name in models}, failures
    assert len([figure for figure in figures if "transformers" not in figure.name]) == 7 + 1 + 2 + 4
    assert all(figure.value > 0 for figure in figures)
    shown = gpu.table(gpu.written(this, figures, failures, {}))
    assert "| Qwen3-8B tiny decode, batch 8 / batch 1 | at least 6 |" in shown
    assert "| Qwen3-8B tiny decode: host's time / token's time | at most 1 |" in shown


@emulated
def test_what_a_token_asks_of_the_device() -> None:
    """A layer more is as many launches more as it has; the host's time is taken once for each token."""
    from tests.gpu.test_launches import DENSE, HEADS

    be: Any = EmulatedBackend("bfloat16")

    def watched(layers: int) -> gpu.Watch:
        llm = gpu.random_model(be, gpu.QWEN3_8B | gpu.TINY | {"num_hidden_layers": layers}, "tiny")
        with gpu.watching(be.device) as watch:
            gpu.rate(gpu.Run(be, gpu.Machine(1.0, 1.0), 1, 8, 20, {}, True), llm, 1)
        return watch

    few, more = watched(1), watched(2)
    assert more.launches - few.launches == len(HEADS + DENSE)
    assert len(few.between) >= 8
    assert min(few.between) > 0
    assert "launch" not in vars(be.device)


def test_a_run_that_is_ended_keeps_its_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One group fails, the next has a figure, and the one after it hangs until somebody ends the run."""
    be = SimpleNamespace(device=SimpleNamespace(release=lambda: None), warm_up=lambda *args: None)

    def failing(this: Any, llm: Any) -> Any:
        raise ZeroDivisionError("no such kernel")

    def hanging(this: Any, llm: Any) -> Any:
        raise KeyboardInterrupt

    def decoding(this: Any, llm: Any) -> Any:
        yield Figure("tokens/s", 7.0, 1.0)

    monkeypatch.setattr(gpu, "get_backend", lambda *args, **options: be)
    monkeypatch.setattr(gpu, "measured", lambda be: gpu.Machine(1e12, 1e14))
    monkeypatch.setattr(gpu, "gpu_about", lambda be: {})
    monkeypatch.setattr(gpu, "random_model", lambda *args: SimpleNamespace(model=None))
    for name, group in {"decode": failing, "host": decoding, "prefill": hanging}.items():
        group.__name__ = name
        monkeypatch.setattr(gpu, name, group)
    out = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["bench", "gpu", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        main()
    found = json.loads(out.read_text())
    assert [figure["name"] for figure in found["figures"]] == ["tokens/s"]
    assert found["failures"] == {"Qwen3-0.6B decode": "ZeroDivisionError: no such kernel"}


@emulated
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_decodes_the_same_on_the_same_weights(tied: bool) -> None:
    """Where PyTorch is installed: its arrays are the backend's, and its tokens too."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from bench.contestants.transformers_gpu import TransformersGpu

    values = gpu.QWEN3_8B | gpu.TINY | {"tie_word_embeddings": tied, "num_hidden_layers": 2}
    llm = gpu.random_model(EmulatedBackend("bfloat16"), values, "Qwen3-8B tiny")
    peer = TransformersGpu(llm, compiled=False)
    tokens, rate = peer.decoded(12)
    assert tokens == llm.generate([7], max_tokens=13, temperature=0, ignore_eos=True).tokens
    assert rate > 0
    peer.close()


@pytest.mark.skipif(compiler() != "nvrtc", reason="NVRTC (nvidia-cuda-nvrtc with CuPy) is not installed")
def test_the_kernel_that_reads_compiles() -> None:
    assert len(cubins.compile_cubin(gpu.READ, "read_all.cu", 90, ())) > 1000


class Clock:
    """In CuPy's place, for what is timed: each call takes a millisecond, those that fail none."""

    def __init__(self) -> None:
        event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        self.cuda = SimpleNamespace(Event=lambda: event, get_elapsed_time=lambda began, ended: 1.0)


@emulated
@pytest.mark.parametrize("possible", [True, False])
def test_the_matmul_rate_needs_one_of_two_libraries(possible: bool, capsys: pytest.CaptureFixture[str]) -> None:
    be: Any = EmulatedBackend("bfloat16")
    called: list[Any] = []
    blas = SimpleNamespace(plan=lambda shape: SimpleNamespace(possible=possible), multiply=lambda *args: called.append(args))
    device = SimpleNamespace(
        cupy=Clock(), upload=lambda bits: SimpleNamespace(), empty=be.device.empty, address=id, blas=lambda: blas
    )
    rate = gpu.matmul_rate(SimpleNamespace(device=device), 64)
    assert "bf16 products by CuPy" in capsys.readouterr().err
    assert rate == 2 * 64**3 / 1e-3 if possible else math.isnan(rate)
    assert len(called) == 10 * possible


def test_figures_that_were_predicted_are_measured() -> None:
    """By the same names, or a prediction would stand beside nothing."""
    this = gpu.Run(None, gpu.Machine(1.0, 1.0), 1, 1, 4096, gpu.MODELS, False)
    names = {"read bandwidth, TB/s", "bf16 matmul, TFLOP/s"}
    for name in this.models:
        names |= {f"{name} decode, tokens/s", f"{name} decode: weight bytes per second / read bandwidth"}
        names |= {f"{name} decode, batch 8 / batch 1", f"{name} prefill of 4096: arithmetic / matmul rate"}
        names |= {f"{name} decode / transformers {kind}" for kind in ("eager", "compiled")}
    experts, latents = gpu.gpu_layers.QWEN3_30B, (gpu.gpu_layers.V2_LITE, gpu.gpu_layers.V3)
    names |= {f"{experts.name} decode: active bytes per second / read bandwidth"}
    names |= {f"{experts.name}: experts' bytes per second / bandwidth, batch {batch}" for batch in experts.batches}
    for name, batch in ((f"{of.name}, decode at {of.context}, batch", batch) for of in latents for batch in of.layers):
        names |= {f"{name} {batch}: bytes per second / bandwidth", f"{name} {batch}: arithmetic / matmul rate"}
    assert gpu.PREDICTED.keys() <= names


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any, **options: Any) -> Any:
        raise BackendError("backend 'cupy' cannot run here: no NVIDIA GPU is visible")

    monkeypatch.setattr(gpu, "get_backend", none)
    with pytest.raises(SystemExit, match=r"^python -m bench gpu: backend 'cupy' cannot run here: no NVIDIA GPU is visible$"):
        gpu.run()
