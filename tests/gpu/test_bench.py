"""`python -m bench gpu`: what it measures, on tiny shapes and the emulated device; and what it says without a GPU."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from npllm.errors import BackendError

pytest.importorskip("numba")

from bench import gpu
from tests.gpu.emulator import EmulatedBackend

needs_gxx = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ compiles the kernels for the CPU, and is not installed"
)


@needs_gxx
def test_every_group_runs() -> None:
    models = {"Qwen3-8B tiny": gpu.QWEN3_8B | gpu.TINY}
    this = gpu.Run(EmulatedBackend("bfloat16"), gpu.Machine(1e12, 1e14), 1, 3, 20, models, True)
    figures, failures = gpu.collected(this, [])
    assert set(failures) <= {f"{name} peers" for name in models}, failures
    assert len(figures) == 4 + 1 + 2 + 4
    assert all(figure.value > 0 for figure in figures)
    shown = gpu.table(gpu.written(this, figures, failures, {}))
    assert "| Qwen3-8B tiny decode, batch 8 / batch 1 | at least 6 |" in shown


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
