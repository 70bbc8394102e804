"""`weights="disk"`: a model larger than the memory it may take runs, and of its file only what is used is read."""

import ctypes
import json
import math
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import npllm
from npllm.backend import Backend
from npllm.checkpoint import read_header
from npllm.errors import CheckpointError, NumericsError
from npllm.models import interpret
from tests.compare import agree
from tests.export import TRUTH
from tests.refusals import refused

MIB = 1 << 20

# Two layers of 160 experts: 396 MB in bfloat16 for the experts, of which a token meets 4 of 160.
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 160,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 640,
}

# What the process may allocate besides what Python, NumPy and BLAS hold when npllm is imported. The file is six times that.
ROOM = 64 * MIB

RUN = """
import json, resource, sys
import numpy as np
import npllm
from npllm.backend import Backend
npllm.load  # the first use imports the rest

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

np.ones((256, 256), np.float32) @ np.ones((256, 256), np.float32)  # BLAS takes its buffers
limit = status("VmData") + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
llm = npllm.load(sys.argv[1], backend="numpy", weights=sys.argv[3], max_context=256)
with llm.trace() as trace:
    tokens = llm.generate([1, 2, 3], max_tokens=5, temperature=0).tokens
chosen = [sorted({e for index in trace.every(f"layers.{i}.moe.topk_index") for e in index.ravel().tolist()}) for i in (0, 1)]
print(json.dumps({"tokens": tokens, "chosen": chosen, "limit": limit}))
"""


def stored_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a published checkpoint, experts one by one."""
    described = interpret(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in described.architecture.weight_spec(described.config).items():
        full = name if name == "lm_head.weight" else f"model.{name}"
        if tensor.forms:
            each = "model." + tensor.forms[0].name
            shapes |= dict.fromkeys([each.format(e) for e in range(tensor.shape[0])], tensor.shape[1:])
        elif tensor.alias is None:
            shapes[full] = tensor.shape
    return shapes


def write_large(folder: Path, config: dict[str, Any]) -> Path:
    """Weights in bfloat16 cut out of one pool of normal numbers, each from another place of it -> the weight file."""
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in (shapes := stored_shapes(config)).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    dice = np.random.default_rng(0)
    pool = dice.standard_normal(1 << 20).astype(np.float32)
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            scale = np.float32(1.0 if len(shape) == 1 else shape[-1] ** -0.5)
            for done in range(0, math.prod(shape), 1 << 19):
                begin = int(dice.integers(1 << 19))
                values = pool[begin : begin + min(1 << 19, math.prod(shape) - done)] * scale
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        file.flush()
        os.fsync(file.fileno())
        # Written pages stay in memory; the tests want to see which ones are read.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def resident(path: Path) -> np.ndarray[Any, Any]:
    """For each page of a file whether it is in memory, as mincore(2) tells."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapping:
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        mincore.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
        assert mincore(address, size, pages.ctypes.data) == 0
        return pages & 1 == 1


def run(folder: Path, weights: str, room: int = ROOM) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", RUN, str(folder), str(room), weights], capture_output=True, text=True)


def pages_of(path: Path, names: str) -> list[slice]:
    """The pages that lie wholly within the bytes of each tensor whose name holds `names`."""
    entries, start, _ = read_header(path)
    places = [(start + begin, start + end) for name, (_, _, begin, end) in entries.items() if names in name]
    return [slice(-(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE) for begin, end in places]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    write_large(folder, {"model_type": "qwen3_moe"} | SIZES)
    return folder


def test_a_model_larger_than_the_memory_it_may_take(folder: Path) -> None:
    """It runs within ROOM, unasked, and reads of its file no page of an expert that no token chose."""
    path = folder / "model.safetensors"
    if resident(path).any():
        pytest.skip("this file system keeps written pages in memory: nothing shows which are read")
    done = run(folder, "auto")
    assert done.returncode == 0, done.stderr
    assert "they stay on disk" in done.stderr
    found = json.loads(done.stdout)
    assert path.stat().st_size > found["limit"]
    seen = resident(path)
    for layer, chosen in enumerate(found["chosen"]):
        for e in range(SIZES["num_experts"]):
            pages = np.concatenate([seen[each] for each in pages_of(path, f"layers.{layer}.mlp.experts.{e}.")])
            assert pages.all() if e in chosen else not pages.any(), (layer, e)
    assert found["tokens"] == npllm.load(folder).generate([1, 2, 3], max_tokens=5, temperature=0).tokens


def test_a_model_that_must_be_in_memory_is_refused(folder: Path) -> None:
    done = run(folder, "memory")
    assert "MemoryLimitError" in done.stderr
    assert "or use weights='disk'" in done.stderr


# A table of 134 MB of per-layer embeddings, on a model of less than one.
TABLE: dict[str, Any] = {
    "model_type": "gemma3n_text", "vocab_size": 512, "vocab_size_per_layer_input": 262144, "hidden_size": 48,
    "hidden_size_per_layer_input": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "num_kv_shared_layers": 0, "laurel_rank": 4, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": 0.0,
}  # fmt: skip

LOOK_UP = """
import json, sys
import npllm
npllm.load

def resident():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmRSS"))

before = resident()
llm = npllm.load(sys.argv[1], backend="numpy", max_context=256)
llm.generate(list(range(1, 101)), max_tokens=28, temperature=0, ignore_eos=True)
print(resident() - before)
"""


def test_a_table_of_per_layer_embeddings_is_read_row_by_row(tmp_path: Path) -> None:
    """Loading and 128 tokens take less resident memory than an eighth of the table; hardly more of its file is read."""
    path = write_large(tmp_path, TABLE)
    table = 2 * TABLE["vocab_size_per_layer_input"] * TABLE["hidden_size_per_layer_input"] * TABLE["num_hidden_layers"]
    cold = not resident(path).any()
    done = subprocess.run([sys.executable, "-c", LOOK_UP, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < table / 8
    assert not cold or resident(path).sum() * mmap.PAGESIZE < table / 8


@pytest.mark.parametrize("name", ["llama3-bf16", "qwen3-fp8", "deepseek-v3-fp8", "qwen3-moe", "llama4-bf16", "gpt2"])
def test_weights_on_disk_give_what_weights_in_memory_give(name: str) -> None:
    memory, disk = (npllm.load(TRUTH / "models" / name, backend="numpy", weights=where) for where in ("memory", "disk"))
    tokens = np.arange(76).reshape(2, 38) % memory.config.vocab_size
    for backend in (Backend(), memory.backend):
        memory.backend = disk.backend = backend
        agree(disk.forward(tokens), memory.forward(tokens), "reordered")
    assert disk.generate([3, 1, 4], max_tokens=5).tokens == memory.generate([3, 1, 4], max_tokens=5).tokens


def test_a_file_that_becomes_shorter_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    shutil.copytree(TRUTH / "models" / "qwen3-moe", tmp_path / "model")
    llm = npllm.load(tmp_path / "model", backend="numpy", weights="disk")
    os.truncate(tmp_path / "model" / "model.safetensors", 20_000)
    refused(CheckpointError, lambda: llm.forward([[1, 2, 3]]), "model.safetensors", "shorter")


def test_a_damaged_expert_on_disk_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TRUTH / "models" / "qwen3-moe", folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if ".experts." in name:
            tensors[name][0, 0] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    llm = npllm.load(folder, backend="numpy", weights="disk")
    refused(NumericsError, lambda: llm.generate([1, 2, 3]), "experts.gate_proj.weight.0")
