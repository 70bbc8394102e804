"""Pickles to safetensors: the right numbers from every layout of torch.save, and no code run from any file.

tests/export/pickles.py made the files of tests/data/pickles with torch; the hostile ones are assembled here.
"""

import contextlib
import copyreg
import json
import logging
import os
import pickle
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from npllm import convert as convert_module
from npllm.convert import convert, find_pickles
from npllm.errors import ArgumentError, CheckpointError
from npllm.torch_files import read_torch_file

DATA = Path(__file__).parent / "data" / "pickles"

# file -> (safetensors with its contents, names that the format cannot hold)
EXPECTED = {
    "plain_zip.bin": ("plain", set()),
    "plain_protocol4.bin": ("plain", set()),
    "plain_legacy.bin": ("plain", {"f8"}),
    "views_zip.bin": ("views", set()),
    "views_legacy.bin": ("views", set()),
    "module_nested.pt": ("module", set()),
    "module_sharded": ("module", set()),
}


Contents = dict[str, tuple[str, list[int], bytes]]


def read(*paths: Path) -> Contents:
    """name -> (dtype, shape, bytes), as the reference implementation of safetensors reads them."""
    tensors = [entry for path in paths for entry in deserialize(path.read_bytes())]
    return {name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"])) for name, tensor in tensors}


# ---------------------------------------------------------------------------------------------------------------------
# Good files


@pytest.mark.parametrize("file", EXPECTED)
def test_every_layout_gives_the_numbers_that_torch_wrote(file: str) -> None:
    contents, lacking = EXPECTED[file]
    found: Contents = {}
    for path in find_pickles(DATA / file):
        for name, tensor in read_torch_file(path).tensors.items():
            found[name] = (tensor.dtype, list(tensor.shape), tensor.array().tobytes())
    expected = {name: entry for name, entry in read(DATA / f"{contents}.safetensors").items() if name not in lacking}
    assert found == expected
    assert sum(any(data) for _, _, data in found.values()) >= 3


@pytest.mark.parametrize("file", ["plain_zip.bin", "module_sharded"])
def test_conversion_keeps_every_bit(file: str, tmp_path: Path) -> None:
    out = convert(DATA / file, tmp_path / "out")
    assert read(out / "model.safetensors") == read(DATA / f"{EXPECTED[file][0]}.safetensors")


def test_what_is_not_a_tensor_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "npllm"):
        convert(DATA / "module_nested.pt", tmp_path / "out")
    assert caplog.messages == ["module_nested.pt: left out what is not a tensor of the model: epoch"]


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_dtype_casts_floats_alone(dtype: str, kind: str, tmp_path: Path) -> None:
    types = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    expected = read(DATA / "plain.safetensors")
    for name, (stored, shape, data) in expected.items():
        if stored in types:
            expected[name] = (kind, shape, np.frombuffer(data, types[stored]).astype(types[kind]).tobytes())
    assert read(convert(DATA / "plain_zip.bin", tmp_path / "out", dtype=dtype) / "model.safetensors") == expected


def test_a_cast_that_overflows_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "big.bin", state(w=tensor()), {"0": np.array([1, 2, 3, 1e30], "<f4").tobytes()})
    with pytest.raises(CheckpointError, match="tensor w: a value is too large for F16"):
        convert(path, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_large_models_are_written_in_shards_with_an_index(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    out = convert(DATA / "views_zip.bin", tmp_path / "out", shard_bytes=200, progress=lambda *step: steps.append(step))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert index["weight_map"] == {name: shard for shard in shards for name in read(out / shard)}
    assert read(*(out / shard for shard in shards)) == read(DATA / "views.safetensors")
    assert steps[-1] == (index["metadata"]["total_size"], index["metadata"]["total_size"])


def test_configuration_and_tokenizer_go_along_but_no_code(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(DATA / "module_sharded", source)
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt", "LICENSE", "modeling.py", "optimizer.pt"):
        (source / name).write_text("{}")
    out = convert(source, tmp_path / "out")
    copied = {"config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", "LICENSE"}
    assert {path.name for path in out.iterdir()} == {"model.safetensors", *copied}


def test_conversion_in_place_and_overwriting(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DATA / "module_sharded", folder)
    before = {path.name for path in folder.iterdir()}
    convert(folder, folder, shard_bytes=20)
    assert (folder / "model-00001-of-00004.safetensors").is_file()
    with pytest.raises(CheckpointError, match=r"already holds model-00001-of-00004.safetensors.*--overwrite"):
        convert(folder, folder)
    convert(folder, folder, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {*before, "model.safetensors"}


def test_a_folder_with_files_and_a_file_are_no_targets(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="already holds files"):
        convert(DATA / "views_zip.bin", tmp_path)
    with pytest.raises(CheckpointError, match="is a file; name a folder"):
        convert(DATA / "views_zip.bin", tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(DATA / "views_zip.bin", tmp_path / "file" / "out")


def test_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="dtype 'int8' is not one of float32, float16, bfloat16"):
        convert(DATA / "views_zip.bin", tmp_path / "out", dtype="int8")


# ---------------------------------------------------------------------------------------------------------------------
# What a source may be


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "neither pytorch_model.bin nor another"),
        (["model.safetensors"], "safetensors already; there is nothing to convert"),
        (["a.pt", "b.pth"], "name one of its files: a.pt, b.pth"),
    ],
)
def test_folders_that_hold_nothing_to_convert(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError, match=message):
        find_pickles(tmp_path)


def test_what_a_folder_stands_for(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_text("")
    assert find_pickles(tmp_path) == [tmp_path / "consolidated.00.pth"]
    (tmp_path / "pytorch_model.bin").write_text("")
    assert find_pickles(tmp_path) == [tmp_path / "pytorch_model.bin"]
    with pytest.raises(CheckpointError, match="no such file or folder"):
        find_pickles(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "must hold a JSON object"),
        ("{}", "weight_map must map"),
        ('{"weight_map": {"w": "../other.bin"}}', "is not the name of a file in its folder"),
        ('{"weight_map": {"w": "/other.bin"}}', "is not the name of a file in its folder"),
        ('{"weight_map": {"w": "lost.bin"}}', r"names the shard lost.bin, which is missing"),
    ],
)
def test_an_index_that_misleads(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        find_pickles(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for name in ("a.bin", "b.bin"):
        shutil.copy(DATA / "views_zip.bin", tmp_path / name)
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"v": "a.bin", "w": "b.bin"}}')
    with pytest.raises(CheckpointError, match=r"b.bin: tensor .* also stands in a.bin"):
        convert(tmp_path, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Files made by hand: the pickle instructions that torch.save writes, and others


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def pack(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def storage(key: str = "0", numel: int = 4, kind: str = "FloatStorage") -> bytes:
    return pack(text("storage"), name("torch", kind), text(key), text("cpu"), integer(numel)) + b"Q"


def tensor(offset: int = 0, shape: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,), of: bytes | None = None) -> bytes:
    arguments = pack(
        of if of is not None else storage(),
        integer(offset),
        pack(*map(integer, shape)),
        pack(*map(integer, stride)),
        b"\x89",
        name("collections", "OrderedDict") + b")R",
    )
    return name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def state(**tensors: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in tensors.items()) + b"u."


FOUR = np.arange(1, 5, dtype="<f4").tobytes()


def archive(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, **more: bytes) -> Path:
    """A zip as torch.save writes it, and `more` members of model/, with _ for a dot."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr("model/data.pkl", pickled)
        for key, content in ({"0": FOUR} if storages is None else storages).items():
            file.writestr(f"model/data/{key}", content)
        for member, content in more.items():
            file.writestr(f"model/{member.replace('_', '.')}", content)
    return path


def legacy(path: Path, pickled: bytes, keys: bytes = b"](X\x01\x00\x00\x000e.", tail: bytes | None = None) -> Path:
    system = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + system
    path.write_bytes(head + pickled + keys + (struct.pack("<q", 4) + FOUR if tail is None else tail))
    return path


LAYOUTS = {"zip": archive, "legacy": legacy}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_made_by_hand_are_read_when_they_are_right(layout: str, tmp_path: Path) -> None:
    """Without this, a mistake in the helpers above would pass every refusal below."""
    path = LAYOUTS[layout](tmp_path / "model.bin", state(w=tensor(shape=(2, 2), stride=(1, 2))))
    np.testing.assert_array_equal(read_torch_file(path).tensors["w"].array(), np.array([[1, 3], [2, 4]], np.float32))


class Evil:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def touch(sentinel: Path) -> str:
    return f"open({str(sentinel)!r}, 'w').close()"


def hostile(sentinel: Path) -> dict[str, bytes]:
    """Pickles that create `sentinel` when Python's own unpickler loads them."""
    code, command = touch(sentinel), f"touch {sentinel}"
    call = text(code) + b"\x85R"
    payloads = {
        f"os.system, protocol {protocol}": pickle.dumps({"w": Evil(os.system, command)}, protocol)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    }
    return payloads | {
        "builtins.exec": pickle.dumps({"w": Evil(exec, code)}, 2),
        "builtins.eval in a list in a dict": pickle.dumps({"w": {"v": [1, Evil(eval, code)]}}, 2),
        "name taken from the stack": b"\x80\x04" + b"\x8c\x08builtins\x8c\x04exec\x93" + call + b".",
        "nested attribute": b"\x80\x04" + text("shutil") + text("os.system") + b"\x93" + text(command) + b"\x85R.",
        "instance by INST": b"(" + text(code) + b"ibuiltins\nexec\n.",
        "instance by OBJ": b"(" + name("builtins", "exec") + text(code) + b"o.",
        "called and dropped": name("builtins", "exec") + call + b"0" + state(w=b"K\x01")[2:],
        "behind a tensor's back": b"\x80\x02}(" + text("w") + name("builtins", "exec") + call + b"u.",
        "by a name in the memo": name("builtins", "exec") + b"q\x00" + b"0h\x00" + call + b".",
    }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trick", hostile(Path("sentinel")))
def test_no_code_is_run(trick: str, layout: str, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    payload = hostile(sentinel)[trick]
    pickle.loads(payload)
    assert sentinel.exists(), "the payload does not work, so the test would prove nothing"
    sentinel.unlink()
    path = LAYOUTS[layout](tmp_path / "model.bin", payload)
    with pytest.raises(CheckpointError, match=r"refused|malformed") as caught:
        read_torch_file(path)
    assert not sentinel.exists()
    assert str(caught.value).isprintable()


def test_no_code_is_run_from_the_first_pickles_of_a_legacy_file(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(pickle.dumps(Evil(os.system, f"touch {tmp_path}/sentinel"), 2))
    with pytest.raises(CheckpointError, match=r"refers to posix.system|refers to nt.system"):
        read_torch_file(tmp_path / "model.bin")
    assert not (tmp_path / "sentinel").exists()


def test_extension_codes_are_refused(tmp_path: Path) -> None:
    copyreg.add_extension("builtins", "exec", 240)
    try:
        payload = b"\x80\x02\x82\xf0" + text(touch(tmp_path / "sentinel")) + b"\x85R."
        pickle.loads(payload)
        (tmp_path / "sentinel").unlink()
        with pytest.raises(CheckpointError, match="instruction EXT1, which no state dict needs; refused"):
            read_torch_file(archive(tmp_path / "model.bin", payload))
    finally:
        copyreg.remove_extension("builtins", "exec", 240)
    assert not (tmp_path / "sentinel").exists()


def test_convert_relays_the_refusal_and_leaves_nothing(tmp_path: Path) -> None:
    payload = hostile(tmp_path / "sentinel")["builtins.exec"]
    path = archive(tmp_path / "model.bin", payload)
    with pytest.raises(CheckpointError, match=r"model.bin: refers to (__builtin__|builtins).exec.* without running it"):
        convert(path, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["model.bin"]


ORDERED = name("collections", "OrderedDict") + b")R"

MALFORMED = {
    "attributes of a dict": (b"}}b.", "sets attributes of an object other"),
    "attributes of a name": (name("torch", "FloatStorage") + b"}b.", "sets attributes"),
    "attributes of a tensor": (tensor() + b"}b.", "sets attributes"),
    "call of a marker": (name("torch", "FloatStorage") + b")R.", "which is not a constructor"),
    "call of a string": (text("w") + b")R.", "what is called is a str"),
    "arguments of a dict": (name("collections", "OrderedDict") + b"](K\x01K\x02e\x85R.", "OrderedDict with arguments"),
    "new object": (name("collections", "OrderedDict") + b")\x81.", "instruction NEWOBJ"),
    "text reference": (b"Pstorage\n.", "instruction PERSID"),
    "reference that is no storage": (text("w") + b"Q.", "a reference that is not a storage"),
    "storage of an unknown class": (storage(kind="Size"), "storage class torch.Size is not supported"),
    "storage of a tensor": (tensor(of=text("w")) + b".", "a tensor's storage is a str"),
    "name with a line break": (text("a\nb") + text("c\rd") + b"\x93.", "refers to a[?]b.c[?]d"),
    "items on a list": (b"](K\x01K\x02u.", "items are set on what is not a dict"),
    "odd items": (b"}(K\x01u.", "items are set on"),
    "key of nested tuples": (b"})" + b"\x85" * 200_000 + b"K\x01s.", "a dict key is a tuple"),
    "appending to a tuple": (b")K\x01a.", "what is appended to is a tuple"),
    "empty stack": (b"0.", "instruction POP"),
    "pop of nothing": (b"R.", "malformed"),
    "mark that is missing": (b"K\x01t.", "malformed"),
    "memo that is missing": (b"h\x07.", "malformed"),
    "huge memo index": (b"K\x01r\xff\xff\xff\xff.", "holds no state dict"),
    "string without an end": (b"\x8d" + b"\xff" * 8 + b"w.", "malformed"),
    "no end": (b"K\x01", "malformed"),
    "unknown instruction": (b"\xff.", "malformed"),
    "doubling": (b"](" + b"q\x00h\x00h\x00e0](" * 40 + b"e.", "instruction POP"),
    "no dict": (b"K\x01.", "holds no state dict"),
    "dict without tensors": (state(w=b"K\x01"), "holds no state dict"),
    "name of the metadata": (state(__metadata__=tensor()), "cannot be the name of a tensor"),
    "name of control characters": (state(**{"a\x00b": tensor()}), "cannot be the name of a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_pickles(case: str, tmp_path: Path) -> None:
    payload, message = MALFORMED[case]
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_file(archive(tmp_path / "model.bin", payload))
    assert str(caught.value).isprintable()
    assert time.monotonic() - started < 10


HUGE = 1 << 60
SIZES = {
    "reaches beyond": (tensor(shape=(5,)), "reaches element 4 of a storage of 4"),
    "offset beyond": (tensor(offset=1), "reaches element 4"),
    "stride beyond": (tensor(shape=(2, 2), stride=(3, 1)), "reaches element 4"),
    "negative offset": (tensor(offset=-1), "a tensor's offset is negative"),
    "negative size": (tensor(shape=(-4,)), "a tensor's shape is negative"),
    "negative stride": (tensor(offset=3, stride=(-1,)), "a tensor's stride is negative"),
    "absurd size": (tensor(shape=(HUGE,)), "absurdly large"),
    "absurd product": (tensor(shape=(1 << 40, 1 << 40), stride=(0, 0)), "more than its storage"),
    "absurd stride": (tensor(shape=(1,), stride=(HUGE,)), "absurdly large"),
    "too many axes": (tensor(shape=(1,) * 40, stride=(1,) * 40), "has 40 axes"),
    "repeated without end": (tensor(shape=(1000, 4), stride=(0, 1)), "4000 elements, more than its storage"),
    "shape and stride differ": (tensor(shape=(2, 2), stride=(1,)), "2 axes has 1 strides"),
    "storage of nothing": (tensor(of=storage(key="9")), r"storage 9|storages names '0'"),
    "storage larger than its bytes": (tensor(of=storage(numel=5)), r"needs 20 bytes|should have 5 elements"),
    "storage of absurd size": (tensor(of=storage(numel=HUGE)), "storage size is negative or absurdly large"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SIZES)
def test_tensors_outside_their_storage(case: str, layout: str, tmp_path: Path) -> None:
    payload, message = SIZES[case]
    with pytest.raises(CheckpointError, match=message):
        read_torch_file(LAYOUTS[layout](tmp_path / "model.bin", state(w=payload)))


def test_a_size_that_is_not_an_integer(tmp_path: Path) -> None:
    payload = state(w=tensor().replace(pack(integer(4)), pack(b"\x88")))
    with pytest.raises(CheckpointError, match="a tensor's shape is a bool"):
        read_torch_file(archive(tmp_path / "model.bin", payload))


def test_one_storage_described_in_two_ways(tmp_path: Path) -> None:
    payload = state(v=tensor(), w=tensor(of=storage(kind="IntStorage")))
    with pytest.raises(CheckpointError, match="storage 0 is described in two ways"):
        read_torch_file(archive(tmp_path / "model.bin", payload))


def test_sharing_that_would_fill_the_disk(tmp_path: Path) -> None:
    shared = storage(numel=1 << 20)
    payload = state(**{f"w{number}": tensor(shape=(1 << 20,), of=shared) for number in range(40)})
    path = archive(tmp_path / "model.bin", payload, {"0": bytes(4 << 20)})
    with pytest.raises(CheckpointError, match=r"become 167772160; refused"):
        convert(path, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Damaged archives


GOOD = state(w=tensor())


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model/data.pkl", b" " * 1000)


def truncated(path: Path) -> None:
    path.write_bytes(archive(path, GOOD).read_bytes()[:-30])


def without_storage(path: Path) -> None:
    archive(path, GOOD, {})


def short_storage(path: Path) -> None:
    archive(path, GOOD, {"0": FOUR[:-1]})


def path_as_key(path: Path) -> None:
    archive(path, state(w=tensor(of=storage("../../../../etc/passwd"))))


def two_pickles(path: Path) -> None:
    archive(path, GOOD, other_data_pkl=b"").write_bytes(path.read_bytes().replace(b"model/other.data", b"model.other/data"))


def one_name_twice(path: Path) -> None:
    archive(path, GOOD, {"0": FOUR, "1": FOUR}).write_bytes(path.read_bytes().replace(b"model/data/1", b"model/data/0"))


def header_beyond_the_end(path: Path) -> None:
    content = bytearray(archive(path, GOOD).read_bytes())
    content[26:28] = b"\xff\xff"
    path.write_bytes(content)


def no_local_header(path: Path) -> None:
    content = bytearray(archive(path, GOOD).read_bytes())
    second = content.index(b"PK\x03\x04", 4)
    content[second : second + 4] = b"PKPK"
    path.write_bytes(content)


def raw(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (raw(b""), "cannot be read"),
    "git-lfs": (raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git-lfs pointer"),
    "web page": (raw(b"<!DOCTYPE html><html></html>"), "is text, not a file of torch.save"),
    "something else": (raw(b"\x00" * 64), "is not a file of torch.save"),
    "other pickle": (raw(pickle.dumps({"a": 1}, 2)), "a pickle, but not of torch.save"),
    "head of a zip": (raw(b"PK\x03\x04"), "not a readable zip archive"),
    "truncated": (truncated, r"not a readable zip archive .*download it again"),
    "compressed": (compressed, "is compressed or encrypted"),
    "other zip": (lambda path: zipfile.ZipFile(path, "w").writestr("a", "b"), "not of torch.save"),
    "TorchScript": (lambda path: archive(path, GOOD, constants_pkl=b""), "TorchScript program"),
    "big-endian": (lambda path: archive(path, GOOD, byteorder=b"big"), "big-endian"),
    "storage missing": (without_storage, "storage 0 is missing"),
    "storage too short": (short_storage, "needs 16 bytes, the file holds 15"),
    "key is a path": (path_as_key, "storage ../../../../etc/passwd is missing from the zip"),
    "two pickles": (two_pickles, r"one member \*/data.pkl"),
    "one name twice": (one_name_twice, "two members of one name"),
    "header beyond the end": (header_beyond_the_end, "reaches beyond the end of the file"),
    "header missing": (no_local_header, "has no local header"),
    "legacy, wrong count": (lambda path: legacy(path, GOOD, tail=struct.pack("<q", 3) + FOUR), "and states 3"),
    "legacy, truncated": (lambda path: legacy(path, GOOD, tail=struct.pack("<q", 4) + FOUR[:-1]), "truncated download"),
    "legacy, unknown storage": (lambda path: legacy(path, GOOD, keys=b"]X\x01\x00\x00\x001a."), "unknown or stands twice"),
    "legacy, no list": (lambda path: legacy(path, GOOD, keys=b"}."), "the list of storages is a dict"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_damaged_files(case: str, tmp_path: Path) -> None:
    damage, message = ARCHIVES[case]
    path = tmp_path / "model.bin"
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_file(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["plain_zip.bin", "views_legacy.bin"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_do_more_than_raise(
    file: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray((DATA / file).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))] if data.draw(st.booleans()) else content)
    with contextlib.suppress(CheckpointError):
        for stored in read_torch_file(path).tensors.values():
            assert stored.array().size == stored.elements


# ---------------------------------------------------------------------------------------------------------------------
# The process


def replaced(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The error that convert raises when its process runs `code` instead."""
    monkeypatch.setattr(convert_module, "BOOTSTRAP", code)
    with pytest.raises(CheckpointError) as caught:
        convert(DATA / "views_zip.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_the_process_gets_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    code = "import json, os, sys; print(json.dumps({'error': [dict(os.environ), sys.flags.isolated]}))"
    error = replaced(code, tmp_path, monkeypatch)
    assert "OMP_NUM_THREADS" in error
    assert "secret" not in error
    assert error.endswith("1]")


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_process_that_is_killed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = replaced("import os; os.kill(os.getpid(), 9)", tmp_path, monkeypatch)
    assert "the conversion stopped (killed by signal 9, perhaps for want of memory)" in error


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce these limits")
def test_the_process_has_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter = convert_module.BOOTSTRAP.partition("sys.exit")[0] + "import npllm.convert; npllm.convert._limit_resources(0); "
    error = replaced(enter + "bytes(3 << 30)", tmp_path, monkeypatch)
    assert "the conversion stopped (MemoryError)" in error


def test_output_that_is_not_safetensors_is_not_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import json, sys; from pathlib import Path; "
        "Path(json.loads(sys.argv[1])['out'], 'model.safetensors').write_bytes(b'no'); print('{\"done\": \"done\"}')"
    )
    assert "too short for a safetensors file" in replaced(code, tmp_path, monkeypatch)


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(DATA / "views_zip.bin", tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()


def test_the_machine_pickles_and_imports_nothing() -> None:
    source = Path(convert_module.__file__).with_name("torch_files.py").read_text()
    imports = [line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert not {"pickle", "importlib", "torch", "sys"} & set(imports)
    assert "getattr" not in source
    assert "import_module" not in source
