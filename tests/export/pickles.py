"""Writes tests/data/pickles/: small torch.save files in every layout, and the tensors they hold as safetensors.

Needs torch and safetensors; not run in CI. From the repository root:

    python -m tests.export.pickles
"""

import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parents[1] / "data" / "pickles"


def contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor with storage of its own: safetensors has no sharing and no strides."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def plain() -> dict[str, torch.Tensor]:
    """One tensor per dtype, a parameter, a scalar and an empty tensor."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(3, 5, generator=generator)
    return OrderedDict(
        f32=normal,
        f64=normal.double() / 3,
        f16=normal.half(),
        bf16=normal.bfloat16(),
        f8=normal.to(torch.float8_e4m3fn),
        i64=torch.arange(4) - 2,
        i32=torch.arange(4, dtype=torch.int32) * 7,
        i16=torch.tensor([-300, 300], dtype=torch.int16),
        i8=torch.tensor([-3, 3], dtype=torch.int8),
        u8=torch.tensor([0, 255], dtype=torch.uint8),
        bool=torch.tensor([True, False, True]),
        parameter=torch.nn.Parameter(normal[:2] * 2),
        scalar=torch.tensor(0.5),
        empty=torch.zeros(0, 4),
    )


def views() -> dict[str, torch.Tensor]:
    """Tensors that share storage: tied, transposed, sliced, stepped, expanded to one more axis."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return OrderedDict(
        {
            "embed.weight": base,
            "head.weight": base,
            "transposed": base.T,
            "sliced": base[1:3, 2:5],
            "stepped": base[::2, ::3],
            "expanded": base[2].expand(1, 6),
            "column": base[:, 4],
        }
    )


def module_state() -> dict[str, torch.Tensor]:
    """The state dict of a module: an OrderedDict that carries `_metadata`."""
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)).state_dict()


def write_sharded(folder: Path) -> None:
    state = module_state()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    weight_map = {}
    for number, name in enumerate(state):
        weight_map[name] = f"pytorch_model-{number % 2 + 1:05}-of-00002.bin"
        shards.setdefault(weight_map[name], {})[name] = state[name]
    folder.mkdir(exist_ok=True)
    for shard, tensors in shards.items():
        torch.save(tensors, folder / shard)
    index = {"metadata": {"total_size": 84}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text('{"model_type": "example"}\n')


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    made_by = {"made_by": "tests/export/pickles.py", "torch": torch.__version__}
    for name, state in {"plain": plain(), "views": views(), "module": module_state()}.items():
        save_file(contiguous(state), FOLDER / f"{name}.safetensors", metadata=made_by)
    torch.save(plain(), FOLDER / "plain_zip.bin")
    torch.save(plain(), FOLDER / "plain_protocol4.bin", pickle_protocol=4)
    torch.save(views(), FOLDER / "views_zip.bin")
    torch.save({"epoch": 3, "state_dict": module_state()}, FOLDER / "module_nested.pt")
    legacy = plain()
    del legacy["f8"]  # the legacy format has no float8
    torch.save(legacy, FOLDER / "plain_legacy.bin", _use_new_zipfile_serialization=False)
    torch.save(views(), FOLDER / "views_legacy.bin", _use_new_zipfile_serialization=False)
    write_sharded(FOLDER / "module_sharded")


if __name__ == "__main__":
    main()
