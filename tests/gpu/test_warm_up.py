"""`npllm warmup --backend cupy`: what a model launches is known before it runs, and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from npllm.backends.cupy_gpu import cubins, cuda
from npllm.backends.cupy_gpu.matrix import FORMATS
from npllm.cli import main
from npllm.cli.warmup import answer
from npllm.errors import BackendError
from npllm.llm import LLM
from npllm.models import interpret
from tests.gpu.emulator import EmulatedBackend, Emulator, emulated
from tests.models import CONFIGS, make_checkpoint

pytestmark = emulated


class Unbuilt(Emulator):
    """One that says what it would compile, and is quick about it."""

    def compile(self, file: str, macros: tuple[tuple[str, int], ...]) -> Path:
        self.compiled.add((file, macros))
        return Path()


def model(name: str, device: Emulator, monkeypatch: pytest.MonkeyPatch, dtype: str = "bfloat16") -> LLM:
    monkeypatch.setattr(EmulatedBackend, "shared_device", device)
    return LLM.random(interpret(CONFIGS[name] | {"model_type": name}, name), EmulatedBackend(dtype))


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "deepseek_v3", "qwen3_moe"])
def test_no_kernel_is_left_to_be_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then prompts of several lengths, decoding and batches ask for no other; and nothing has run for it."""
    device = Emulator()
    llm = model(name, device, monkeypatch)
    seen: list[tuple[int, int]] = []
    count = llm.backend.warm_up(lambda done, total: seen.append((done, total)), llm.model)
    assert count > 10
    assert seen == [(i + 1, count) for i in range(count)]
    assert device.seed == 0, "something was launched"
    before = set(device.compiled)
    answer(llm)
    llm.generate([[5]] * 3, max_tokens=6, temperature=1.0, top_p=0.9, ignore_eos=True)
    assert device.compiled == before
    assert llm.backend.warm_up(lambda done, total: None, llm.model) == 0


def test_without_a_model_it_is_what_usual_ones_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the formats, and the widths of heads and latents, of published models in bf16."""
    device = Unbuilt()
    monkeypatch.setattr(EmulatedBackend, "shared_device", device)
    count = EmulatedBackend().warm_up(lambda done, total: None)
    assert count == len(device.compiled)
    macros = [dict(macros) for _, macros in device.compiled]
    assert {each["FORMAT"] for each in macros if "FORMAT" in each} == {FORMATS["bf16"]}
    assert {each["HEAD"] for each in macros if "HEAD" in each} >= {64, 128, 256}
    assert {each["TOKENS"] for each in macros if "TOKENS" in each} == {1, 2, 4, 8}
    assert {"latent_attention.cu", "moe_few.cu", "moe_many.cu", "sample.cu"} <= {file for file, _ in device.compiled}


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path)
    monkeypatch.setattr(EmulatedBackend, "shared_device", Emulator())
    monkeypatch.setattr("npllm.loading.get_backend", lambda *args, **options: EmulatedBackend("bfloat16"))
    assert main(["warmup", "--backend", "cupy", str(tmp_path)]) == 0
    assert main(["warmup", "--backend", "cupy", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("compiled ")
    assert first.endswith("kept in /emulated")
    assert second.startswith("nothing to compile: ")


def test_a_kernel_that_does_not_compile_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model("qwen3", Unbuilt(), monkeypatch)

    def fails(self: Unbuilt, file: str, macros: Any) -> Path:
        raise BackendError(f"{file} does not compile for sm_90: no such thing")

    monkeypatch.setattr(Unbuilt, "compile", fails)
    with pytest.raises(BackendError, match=r"\.cu does not compile for sm_90"):
        llm.backend.warm_up(lambda done, total: None, llm.model)


def test_code_that_is_kept_is_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NPLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(cubins, "compile_cubin", lambda *args: b"machine code")
    gpu = cuda.Cuda.__new__(cuda.Cuda)
    gpu.architecture, gpu.compiler = 90, "nvrtc 13"
    variants = [("norms.cu", (("WIDE", 1),)), ("rope.cu", ())]
    for number, each in enumerate(variants):
        assert not gpu.is_kept(*each)
        gpu.compile(*each)
        assert gpu.is_kept(*each)
        assert gpu.kept() == {"folder": str(tmp_path / "cuda"), "bytes": 28 * (number + 1), "compiled": number + 1}
    gpu.compiler = "nvrtc 14"
    assert not gpu.is_kept(*variants[0])
