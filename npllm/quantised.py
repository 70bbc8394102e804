"""Quantised checkpoints: published FP8 and what `npllm quantize` writes are read, everything else is refused by name.

An FP8 tensor `X.weight` has its factors beside it, under one of the names that DeepSeek (`X.weight_scale_inv`),
compressed-tensors (`X.weight_scale`) and Mistral (`X.qscale_weight`) give them; stacked experts `X.gate_up_proj` have
`X.gate_up_proj_scale_inv`. All are multiplied. How many elements a factor covers follows from its shape, and for blocks
from config.json. What quantises activations or the cache in the original runtime is no part of the model's mathematics.

What `npllm quantize` writes (npllm.grouped) is said by `quantization_config` of config.json: {"quant_method": "npllm",
"bits": 8 or 4, "group_size": 32}, and "weight_block_size" where tensors that stay in FP8 have other blocks than 128 x 128.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from npllm.config import MOST_UNITS, Reader, printable, shown
from npllm.errors import CheckpointError, ConfigError
from npllm.grouped import BITS, GROUP, PACKED, factors_name
from npllm.handles import REALS, Scale, Weight

if TYPE_CHECKING:
    from npllm.checkpoint import SafetensorsFile


class Block(NamedTuple):
    """Rows and columns that one factor covers; `only`: factors per tensor or per row are not expected besides."""

    rows: int
    columns: int
    only: bool = False


# Where config.json does not say.
BLOCK = Block(128, 128)

# What `npllm quantize` writes: its name in config.json, and its formats by their name in a safetensors header.
OWN = "npllm"
GROUPED = {"I8": ("q8", "|i1"), "U8": ("q4", "|u1")}

WHAT_WORKS = "use the model's BF16 release, or one in FP8 (quant_method fp8, or compressed-tensors of 8-bit floats)"

# -- config.json ------------------------------------------------------------------------------------------------------


def read_block(values: dict[str, Any], name: str) -> Block:
    """The block size that `quantization_config` of a config.json gives; ConfigError for a method that is not read."""
    raw = values.get("quantization_config")
    if not raw:
        return BLOCK
    reader = Reader(raw if isinstance(raw, dict) else {"quant_method": raw}, f"{name}: quantization_config")
    method = reader.raw("quant_method")
    if method == "fp8":
        return _read_fp8(reader)
    if method == "compressed-tensors":
        return _read_compressed_tensors(reader)
    if method == OWN:
        return _read_own(reader)
    raise ConfigError(f"{reader.name}: quant_method {shown(method)} is not supported; {WHAT_WORKS}")


def own_config(format: str, block: Block) -> dict[str, Any]:
    """`quantization_config` of a model in q8 or q4; `block` is that of its other tensors, should they be in FP8."""
    sizes = {} if block == BLOCK else {"weight_block_size": list(block[:2])}
    return {"quant_method": OWN, "bits": BITS[format], "group_size": GROUP} | sizes


def _read_own(reader: Reader) -> Block:
    if reader.raw("bits") not in BITS.values():
        raise reader.fail("bits", f"is not supported; npllm quantize writes {' or '.join(map(str, BITS.values()))}")
    if reader.raw("group_size") != GROUP:
        raise reader.fail("group_size", f"is not supported; npllm quantize writes {GROUP}")
    return _read_sizes(reader, "weight_block_size")


def _read_fp8(reader: Reader) -> Block:
    reader.choice("fmt", "e4m3", ("e4m3",))
    if reader.raw("expert_dtype") not in (None, "fp8"):
        raise reader.fail("expert_dtype", f"is not supported; {WHAT_WORKS}")
    block = _read_sizes(reader, "weight_block_size")
    return block._replace(only=reader.raw("weight_block_size") is not None)


def _read_compressed_tensors(reader: Reader) -> Block:
    form, groups = reader.raw("format"), reader.section("config_groups")
    if form not in (None, "float-quantized", "naive-quantized") or groups is None or not groups.values:
        raise ConfigError(f"{reader.name}: compressed-tensors of format {shown(form)} is not supported; {WHAT_WORKS}")
    weights = [_read_group(value, f"{groups.name}: {printable(key)}") for key, value in groups.values.items()]
    blocks = {_read_sizes(each, "block_structure") for each in weights if each.raw("strategy") == "block"}
    if len(blocks) > 1:
        raise ConfigError(f"{groups.name}: groups with different blocks, {shown(sorted(blocks))}, are not supported")
    return blocks.pop() if blocks else BLOCK


def _read_group(group: Any, name: str) -> Reader:
    """How a group of `config_groups` stores its weights, if npllm reads that."""
    weights = Reader(group, name).section("weights") if isinstance(group, dict) else None
    if weights is None:
        raise ConfigError(f"{name}: does not say how its weights are stored; {WHAT_WORKS}")
    kind, bits = weights.raw("type"), weights.raw("num_bits")
    if (kind, bits) != ("float", 8) or weights.raw("symmetric") is False:
        raise ConfigError(f"{weights.name}: {shown(kind, str)} of {shown(bits)} bits is not supported; {WHAT_WORKS}")
    weights.choice("strategy", "tensor", ("tensor", "channel", "block"))
    return weights


def _read_sizes(reader: Reader, key: str) -> Block:
    sizes = reader.raw(key)
    if sizes is None:
        return BLOCK
    whole = isinstance(sizes, list) and all(type(size) is int and 0 < size <= MOST_UNITS for size in sizes)
    if not whole or len(sizes) != 2:
        raise reader.fail(key, "must be two sizes above zero, of rows and of columns")
    return Block(*sizes)


# -- names ------------------------------------------------------------------------------------------------------------

# Names that only a quantised release has, and whose they are.
FOREIGN = {
    "GPTQ or AWQ": r"\.(qweight|qzeros|g_idx)",
    "bitsandbytes": r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB)|\.quant_state\..*",
    "compressed-tensors of few bits": r"\.weight_(packed|zero_point|g_idx)",
    "NVFP4": r"\.weight_scale_2",
    "MXFP4": r"_proj_blocks",
    "quanto": r"\.weight\._(data|scale|shift)",
    "HQQ": r"\.W_q",
    "AQLM": r"\.(codes|codebooks)",
}
# All in one, for a first look: a large checkpoint has a hundred thousand names.
FOREIGN_NAME = re.compile(f".*({'|'.join(FOREIGN.values())})")

# Scales of activations and of cached keys and values.
OF_ACTIVATIONS = re.compile(r".*(\.(input|output|prob|kv|[qkv])_scale|[._]activation_scale|\.qscale_act|\.input_scale_ub)")

FACTORS = factors_name(".weight")
SCALE = re.compile(rf"(.*)(\.weight_scale_inv|\.weight_scale|\.qscale_weight|_proj_scale_inv|{re.escape(FACTORS)})")


def refuse_foreign(files: Mapping[str, SafetensorsFile]) -> None:
    """CheckpointError if a name tells that the checkpoint is quantised in a way that is not read."""
    for name, file in files.items():
        if FOREIGN_NAME.fullmatch(name):
            who = next(who for who, pattern in FOREIGN.items() if re.fullmatch(f".*({pattern})", name))
            raise CheckpointError(f"{file.path}: tensor {name} is of a {who} release, not supported; {WHAT_WORKS}")


def find_scales(files: Mapping[str, SafetensorsFile]) -> dict[str, str]:
    """Tensor -> its scale (its factors, in q8 and q4), for every tensor stored as no real number that has one.

    CheckpointError for two scales of one tensor, and for a scale without its tensor.
    """
    scales: dict[str, str] = {}
    for name, file in files.items():
        if file.format(name) in REALS:
            continue
        found = [other for other in _scale_names(name) if other in files]
        if len(found) > 1:
            raise CheckpointError(
                f"{file.path}: tensor {name} has two scales, {found[0]} and {found[1]}; keep the right one"
            )
        if found:
            scales[name] = found[0]
    paired = set(scales.values())
    for name, file in files.items():
        if name not in paired and (scale := SCALE.fullmatch(name)):
            kind = "q8 or q4" if scale[2] == FACTORS else "FP8"
            raise CheckpointError(f"{file.path}: scale {name} belongs to no {kind} tensor; download the checkpoint again")
    return scales


def _scale_names(name: str) -> Iterator[str]:
    yield factors_name(name)
    yield f"{name}_scale_inv"
    yield f"{name}_scale"
    if name.endswith(".weight"):
        yield name.removesuffix("weight") + "qscale_weight"


# -- shapes -----------------------------------------------------------------------------------------------------------


def scaled(weight: Weight, scale: Weight, block: Block) -> Weight:
    """An FP8 `weight` with its factors; CheckpointError if their number fits none of the `layouts`."""
    for shape, covered in layouts(weight.shape, block):
        if scale.shape == shape:
            blocks = tuple(max(1, size) for size in covered)
            grid = tuple(-(-size // per) for size, per in zip(weight.shape, blocks, strict=True))
            factors = replace(scale, shape=grid, data=scale.data.reshape(grid))
            return replace(weight, scale=Scale(factors, blocks, (0,) * len(grid)))
    wanted = ", ".join(str(list(shape)) for shape, _ in layouts(weight.shape, block))
    raise CheckpointError(
        f"{scale.source}: scale {scale.name} has shape {list(scale.shape)}; tensor {weight.name} of shape "
        f"{list(weight.shape)}, in blocks of {block.rows} x {block.columns}, can have {wanted}"
    )


def layouts(shape: tuple[int, ...], block: Block) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes that the scale of a tensor [..., M, N] may have, each with the elements that a factor covers, per axis."""
    if len(shape) >= 2:
        *lead, rows, columns = shape
        ones = (1,) * len(lead)
        yield (*lead, -(-rows // block.rows), -(-columns // block.columns)), (*ones, block.rows, block.columns)
        if block.only:
            return
        yield (*lead, rows, 1), (*ones, 1, columns)
        if lead:  # stacked experts: a factor for each, or, where they lie transposed, for each of their outputs
            yield (*lead, 1, columns), (*ones, rows, 1)
            yield (*lead, 1, 1), (*ones, rows, columns)
            yield (*lead,), (*ones, rows, columns)
    yield (1,), shape
    yield (), shape


def with_factors(codes: Weight, factors: Weight) -> Weight:
    """A q8 or q4 tensor, of its codes and the factors of its groups; CheckpointError if their shapes do not fit."""
    *lead, width = codes.shape or (0,)
    shape = (*lead, width * PACKED[codes.format])
    wanted = (*lead, shape[-1] // GROUP)
    if len(shape) != 2 or shape[-1] % GROUP or factors.shape != wanted:
        raise CheckpointError(
            f"{factors.source}: {factors.name} has shape {list(factors.shape)}, which does not fit {codes.name} of shape "
            f"{list(codes.shape)}: a matrix in {codes.format} has a factor for every {GROUP} numbers of a row"
        )
    return replace(codes, shape=shape, scale=Scale(factors, (1, GROUP), (0, 0)))
