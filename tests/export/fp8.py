"""Checkpoints in FP8: written in the published layouts, and widened again for transformers.

transformers' own loader is no truth here: it divides a tensor's rows by the number of scale rows, and so misreads blocks
that are partial at the edges. The definition is DeepSeek's: `weight = codes * scale of the block`, blocks of the same size
counted from the first row and column.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .cases import Case

LARGEST = 448.0
KEPT = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "router.weight")
"""Matrices that published FP8 checkpoints leave as they were."""


def quantise(folder: Path, case: Case) -> None:
    """Rewrites `folder`: linear weights become codes with scales, and config.json tells of it."""
    path, config = folder / "model.safetensors", folder / "config.json"
    stored: dict[str, Tensor] = {}
    for name, weight in load_file(path).items():
        if weight.ndim < 2 or name.endswith(KEPT):
            stored[name] = weight
        else:
            stored[name], stored[scale_name(name, case)] = encode(weight.float(), case)
    save_file(stored, path, metadata={"format": "pt"})
    told = json.loads(config.read_text()) | {"quantization_config": case.quantisation}
    config.write_text(json.dumps(told, indent=2) + "\n")


def scale_name(name: str, case: Case) -> str:
    return name + ("_scale_inv" if case.quantisation["quant_method"] == "fp8" else "_scale")


def encode(weight: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """[..., M, N] -> its codes, and its scales as the case wants them stored."""
    block = block_of(weight, case)
    largest = in_blocks(weight, block).abs().amax((-3, -1))
    scale = rounded(largest / LARGEST, getattr(torch, case.scales))
    codes = (weight / spread(scale.float(), block, weight)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes, scale.reshape(1) if scale.numel() == 1 else scale


def rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in `dtype`; the next power of two where that is all that the dtype has."""
    return (scale.log2().ceil().exp2() if dtype is torch.float8_e8m0fnu else scale).to(dtype)


def block_of(weight: Tensor, case: Case) -> tuple[int, int]:
    """Rows and columns of `weight` that share a scale."""
    if case.quantisation["quant_method"] == "fp8":
        return tuple(case.quantisation["weight_block_size"])
    (group,) = case.quantisation["config_groups"].values()
    rows, columns = weight.shape[-2:]
    declared = {"tensor": (rows, columns), "channel": (1, columns), "block": group["weights"].get("block_structure")}
    return tuple(declared[group["weights"]["strategy"]])


def in_blocks(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """[..., M, N] -> [..., M / bm, bm, N / bn, bn], the last blocks filled up with zeros."""
    rows, columns = (math.ceil(size / per) for size, per in zip(weight.shape[-2:], block, strict=True))
    padding = (0, columns * block[1] - weight.shape[-1], 0, rows * block[0] - weight.shape[-2])
    return torch.nn.functional.pad(weight, padding).unflatten(-1, (columns, -1)).unflatten(-3, (rows, -1))


def spread(scale: Tensor, block: tuple[int, int], weight: Tensor) -> Tensor:
    """Each block's scale for each of its elements: [..., M, N]."""
    each = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return each[..., : weight.shape[-2], : weight.shape[-1]]


@contextmanager
def dequantised(folder: Path, case: Case, dtype: torch.dtype) -> Iterator[Path]:
    """A temporary folder with the checkpoint of `folder` in `dtype`, without quantisation."""
    stored = load_file(folder / "model.safetensors")
    plain: dict[str, Tensor] = {}
    for name, weight in stored.items():
        scale = stored.get(scale_name(name, case))
        if scale is not None:
            scale = scale.to(dtype).reshape((1, 1) if scale.numel() == 1 else scale.shape)
            plain[name] = weight.to(dtype) * spread(scale, block_of(weight, case), weight)
        elif weight.dtype is not torch.float8_e8m0fnu and not name.endswith(("_scale", "_scale_inv")):
            plain[name] = weight.to(dtype)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    with TemporaryDirectory() as temporary:
        save_file(plain, Path(temporary) / "model.safetensors", metadata={"format": "pt"})
        (Path(temporary) / "config.json").write_text(json.dumps(config))
        yield Path(temporary)
