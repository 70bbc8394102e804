"""Kernels compiled for GPUs where none is: by NVRTC (package nvidia-cuda-nvrtc, through CuPy) or nvcc."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from npllm.backends.cupy_gpu.attention import LANES, TILE_WIDTHS
from npllm.backends.cupy_gpu.latent import TILES
from npllm.backends.cupy_gpu.matrix import FORMATS, PER_VECTOR
from npllm.backends.cupy_gpu.products import MORE_ROWS, ROWS
from npllm.backends.cupy_gpu.sources import source

ARCHITECTURES = (80, 90, 100)

# Besides, those of cards whose blocks have less shared memory.
ALL_ARCHITECTURES = (80, 86, 89, 90, 100)


class Usage(NamedTuple):
    """What ptxas says of a kernel: the bytes that a thread spills."""

    kernel: str
    spilled: int


def variants() -> dict[str, list[dict[str, int]]]:
    """The macros that each file is compiled with; the first is that of a Qwen3 in bf16, or near it."""
    formats = [2, *(number for number in FORMATS.values() if number != 2)]
    few = [{"FORMAT": f, "TOKENS": t, "ROWS": 2} for f, t in product(formats, (1, 2, 4, 8)) if (f, t) != (FORMATS["q4"], 8)]
    tensor = few + [{"FORMAT": FORMATS["bf16"], "TOKENS": 8, "ROWS": rows, "TENSOR": 1} for rows in (ROWS, *MORE_ROWS)]
    tiles = [{"FORMAT": f, "TILE": tile, "TENSOR": 1} for f, tile in product(formats, (128, 64))]
    tiles += [{"FORMAT": f, "TILE": 64, "TENSOR": 0} for f in formats]
    by_format = [{"FORMAT": f} for f in formats]
    kept = [{"STORED": 2}, {"STORED": 0}]
    sizes = ((64, 1), (32, 1), (32, 2), (16, 2), (16, 4), (8, 4), (4, 4))
    splits = [stored | {"LANES": n, "KEYS": k, "VALUES": v} for stored, n, (k, v) in product(kept, LANES, sizes)]
    heads = sorted(TILE_WIDTHS, key=lambda width: abs(width - 128))
    wide = [stored | {"HEAD": h, "VALUES": h, "CAPPED": c} for stored, h, c in product(kept, heads, (0, 1))]
    latent = [stored | {"WIDTH": 576, "LATENT": 512, "HEAD_TILES": t} for stored, t in product(kept, TILES)]
    absorbed = [{"FORMAT": FORMATS[name], "TOKENS": min(4, 32 // PER_VECTOR[name])} for name in ("bf16", *FORMATS)]
    return {
        "gemv.cu": tensor, "gemv_gated.cu": tensor, "gemv_activated.cu": tensor, "gemm.cu": tiles, "attention.cu": splits,
        "attention_tiles.cu": wide, "norms.cu": [{"WIDE": 1}, {"WIDE": 0}], "rope.cu": [{}], "embed.cu": by_format,
        "widen.cu": by_format, "heads.cu": kept, "elementwise.cu": [{}], "latent.cu": [{}],
        "absorb.cu": absorbed, "latent_attention.cu": latent,
        "moe_few.cu": [{"FORMAT": f, "TOKENS": 1, "ROWS": r} for f, r in product(formats, (2, 4))], "moe_many.cu": tiles,
        "moe_plan.cu": [{}], "route.cu": [{}], "route_few.cu": few, "adjust.cu": [{}],
        "sample.cu": [{"N": 151936}, {"N": 50257}],
    }  # fmt: skip


@cache
def compiler() -> str:
    """The compiler at hand: "nvrtc", "nvcc" or ""."""
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except Exception:
        return "nvcc" if shutil.which("nvcc") else ""
    return "nvrtc"


def compiled(file: str, macros: dict[str, int], architecture: int) -> list[Usage]:
    """What the kernels of a file take on an architecture; RuntimeError with what the compiler says against it."""
    options = ["-std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]
    log = (_by_nvrtc if compiler() == "nvrtc" else _by_nvcc)(file, options, architecture)
    entry = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", re.S)
    return [Usage(name, int(stored) + int(loaded)) for name, stored, loaded in entry.findall(log)]


def _by_nvrtc(file: str, options: list[str], architecture: int) -> str:
    from cupy_backends.cuda.libs import nvrtc

    program: Any = nvrtc.createProgram(source(file), file, (), ())
    try:
        nvrtc.compileProgram(program, (f"-arch=sm_{architecture}", "-default-device", "--ptxas-options=-v", *options))
    except nvrtc.NVRTCError:
        raise RuntimeError(nvrtc.getProgramLog(program)) from None
    return str(nvrtc.getProgramLog(program))


def _by_nvcc(file: str, options: list[str], architecture: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / file
        text.write_text(source(file), encoding="utf-8")
        out = ["-cubin", "-o", str(text.with_suffix(".cubin")), str(text)]
        command = ["nvcc", f"-arch=sm_{architecture}", "-Xptxas=-v", *options, *out]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return result.stderr
