"""FP8 tensors for tests, and safetensors files of any format (the package's NumPy side has no FP8)."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from npllm.arrays import Array
from npllm.handles import FORMATS, SCALE_FORMATS

LARGEST = 448.0
Stored = dict[str, tuple[str, Array]]
"""Tensors by name, each with its format in the header and its bytes as an array."""


def encode(values: Array, block: tuple[int, int]) -> tuple[Array, Array]:
    """float32 [..., M, N] -> codes (uint8) and float32 factors, one per block of `block` rows and columns."""
    rows, columns = (-(-size // per) for size, per in zip(values.shape[-2:], block, strict=True))
    padded = np.zeros((*values.shape[:-2], rows * block[0], columns * block[1]), np.float32)
    padded[..., : values.shape[-2], : values.shape[-1]] = np.abs(values)
    blocks = padded.reshape(*values.shape[:-2], rows, block[0], columns, block[1])
    factors = np.maximum(blocks.max((-3, -1)) / LARGEST, 1e-9).astype(np.float32)
    scaled = (values / spread(factors, block, values.shape)).clip(-LARGEST, LARGEST)
    return scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), factors


def spread(factors: Array, block: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """The factor of every element of a tensor [..., M, N]."""
    each = factors.repeat(block[0], -2).repeat(block[1], -1)
    return each[..., : shape[-2], : shape[-1]]


def decode(codes: Array, factors: Array, block: tuple[int, int], dtype: Any = np.float32) -> Array:
    """The definition: numbers by ml_dtypes, times the factors of their blocks."""
    numbers = codes.view(ml_dtypes.float8_e4m3fn).astype(dtype)
    return numbers * spread(factors.astype(dtype), block, codes.shape)


def stored(name: str, values: Array, block: tuple[int, int], scale: str) -> Stored:
    """A tensor in FP8 under `name`, its factors under `scale`."""
    codes, factors = encode(values, block)
    return {name: ("F8_E4M3", codes), scale: ("F32", factors)}


def save(path: Path, tensors: Stored) -> Path:
    """A safetensors file, wide formats first so that each tensor is aligned."""
    header, position = {}, 0
    order = sorted(tensors, key=lambda name: -tensors[name][1].itemsize)
    for name in order:
        format, array = tensors[name]
        offsets = [position, position := position + array.nbytes]
        header[name] = {"dtype": format, "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors[name][1].tobytes() for name in order))
    return path


def load(path: Path) -> Stored:
    """What `save` wrote, or another file of formats that weights and scales have."""
    formats, content = FORMATS | SCALE_FORMATS, path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    tensors: Stored = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            array = np.frombuffer(content[begin:end], formats[entry["dtype"]][1]).reshape(entry["shape"])
            tensors[name] = (entry["dtype"], array)
    return tensors
