"""Weight files: what is accepted is read as the safetensors package reads it, what is damaged is refused by name."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save, save_file

from npllm.checkpoint import LONGEST_HEADER, Checkpoint, SafetensorsFile, find_weights
from npllm.errors import CheckpointError
from npllm.handles import Weight, fingerprint
from tests.refusals import refused

DATA = np.arange(6, dtype=np.float32).reshape(2, 3)
GOOD = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def write(path: Path, header: Any, data: bytes = DATA.tobytes(), length: int | None = None) -> Path:
    """A safetensors file with any header: an object for JSON, or bytes; `length` is what its first 8 bytes say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": GOOD["w"] | changes}


def pair(first: list[int], second: list[int]) -> dict[str, Any]:
    return {
        name: {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}
        for name, (begin, end) in (("a", first), ("b", second))
    }


HEADERS: list[tuple[str, Any, str]] = [
    ("not JSON", b"{nonsense", "JSON"),
    ("not UTF-8", b'{"\xff": 1}', "JSON"),
    ("empty", b"", "JSON"),
    ("a list", [1, 2], "JSON object"),
    ("a number", b"7", "JSON object"),
    ("deep nesting", b"[" * 100_000, "JSON"),
    ("a number of 5000 digits", b'{"w":' + b"9" * 5000 + b"}", "JSON"),
    ("a name twice", b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"w":{}}', "twice"),
    ("entry is no object", {"w": 3}, "tensor w"),
    ("entry is null", {"w": None}, "tensor w"),
    ("no dtype", {"w": {"shape": [2, 3], "data_offsets": [0, 24]}}, "tensor w: unknown dtype"),
    ("unknown dtype", entry(dtype="F31"), "tensor w: unknown dtype 'F31'"),
    ("dtype of another type", entry(dtype=[["F32"] * 1000]), "tensor w: unknown dtype"),
    ("no shape", {"w": {"dtype": "F32", "data_offsets": [0, 24]}}, "tensor w: shape"),
    ("negative size", entry(shape=[-2, -3]), "tensor w: shape"),
    ("fractional size", entry(shape=[2.0, 3]), "tensor w: shape"),
    ("boolean size", entry(shape=[True, 6]), "tensor w: shape"),
    ("huge size", entry(shape=[10**4000]), "tensor w: shape"),
    ("NaN size", b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,24]}}', "tensor w: shape"),
    ("sizes whose product overflows", entry(shape=[1 << 61] * 64), "tensor w: shape"),
    ("zero among huge sizes", {"w": {"dtype": "F32", "shape": [0, 1 << 61, 1 << 61], "data_offsets": [0, 0]}}, "tensor w"),
    ("too many axes", entry(shape=[1] * 65), "tensor w: shape"),
    ("no offsets", {"w": {"dtype": "F32", "shape": [2, 3]}}, "tensor w: data_offsets"),
    ("one offset", entry(data_offsets=[24]), "tensor w: data_offsets"),
    ("negative offset", entry(data_offsets=[-24, 0]), "tensor w: data_offsets"),
    ("offsets reversed", entry(data_offsets=[24, 0]), "tensor w: bytes 24..0"),
    ("beyond the file", entry(shape=[7], data_offsets=[0, 28]), "tensor w: bytes 0..28 lie outside"),
    ("far beyond the file", entry(data_offsets=[1 << 60, (1 << 60) + 24]), "tensor w: bytes"),
    ("shape against offsets", entry(shape=[2, 2]), "tensor w: shape [2, 2] of F32 needs 16 bytes"),
    ("overlap", pair([0, 16], [12, 24]), "tensor b overlaps"),
    ("the same bytes twice", pair([0, 24], [0, 24]), "overlaps"),
    ("a hole", pair([0, 8], [12, 24]), "tensor b leaves a hole of 4 bytes"),
    ("bytes at the end", pair([0, 8], [8, 20]), "4 bytes after the last tensor"),
    ("an empty tensor inside another", pair([0, 24], [12, 12]), "tensor b overlaps"),
    ("a name that steers the terminal", {"\x1b[2J\n" * 100: 3}, "tensor"),
    ("no tensor for the bytes", {}, "24 bytes"),
]


@pytest.mark.parametrize(("header", "problem"), [each[1:] for each in HEADERS], ids=[each[0] for each in HEADERS])
def test_a_damaged_header_is_refused_with_file_and_tensor(tmp_path: Path, header: Any, problem: str) -> None:
    path = write(tmp_path / "model.safetensors", header)
    refused(CheckpointError, lambda: SafetensorsFile(path), str(path), problem)


@pytest.mark.parametrize("size", range(8))
def test_a_file_too_short_for_its_length_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(size))
    refused(CheckpointError, lambda: SafetensorsFile(path), str(path), f"{size} bytes is too short")


@pytest.mark.parametrize(
    ("length", "problem"),
    [(1000, "longer than the file"), (LONGEST_HEADER + 1, "beyond the limit"), (2**64 - 1, "beyond the limit")],
)
def test_a_header_length_beyond_file_or_limit_is_refused(tmp_path: Path, length: int, problem: str) -> None:
    path = write(tmp_path / "model.safetensors", GOOD, length=length)
    refused(CheckpointError, lambda: SafetensorsFile(path), str(path), problem)


def test_a_pointer_of_git_lfs_is_refused_with_the_command_that_fetches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 988097824\n")
    refused(CheckpointError, lambda: SafetensorsFile(path), str(path), "git lfs pull")


def test_every_truncation_of_a_good_file_is_refused(tmp_path: Path) -> None:
    whole = save({"w": DATA})
    path = tmp_path / "model.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(CheckpointError, lambda: SafetensorsFile(path), str(path))


def test_a_folder_or_nothing_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    refused(CheckpointError, lambda: SafetensorsFile(tmp_path), str(tmp_path), "cannot be read")
    refused(CheckpointError, lambda: SafetensorsFile(tmp_path / "none.safetensors"), "none.safetensors", "cannot be read")


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "model.safetensors", GOOD)
    entries = SafetensorsFile(path)
    before = entries.entries, entries.start, 24
    path.write_bytes(path.read_bytes()[:-4])
    monkeypatch.setattr("npllm.checkpoint.read_header", lambda path: before)
    refused(CheckpointError, lambda: SafetensorsFile(path), str(path), "cannot be mapped")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "U8", "BOOL", "I64", "C64"])
def test_a_format_that_is_not_computed_with_is_refused_by_name(tmp_path: Path, dtype: str) -> None:
    itemsize = {"I64": 8, "C64": 8}.get(dtype, 1)
    header = {"w": {"dtype": dtype, "shape": [24 // itemsize], "data_offsets": [0, 24]}}
    file = SafetensorsFile(write(tmp_path / "model.safetensors", header))
    refused(CheckpointError, lambda: file.weight("w"), str(file.path), "tensor w", dtype, "F32")


# -- valid files --


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, np.ndarray[Any, Any]]:
    names = draw(st.lists(st.text(min_size=1, max_size=8), max_size=4, unique=True))
    dtypes = st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.uint8, np.int64, np.bool_])
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    allowed = [name for name in names if name != "__metadata__" and name.isprintable()]
    return {name: draw(hnp.arrays(draw(dtypes), draw(shapes))) for name in allowed}


@given(tensors(), st.one_of(st.none(), st.dictionaries(st.text(max_size=4), st.text(max_size=4), min_size=1, max_size=2)))
def test_a_valid_file_is_read_as_safetensors_reads_it(
    tmp_path_factory: pytest.TempPathFactory, stored: dict[str, Any], metadata: dict[str, str] | None
) -> None:
    path = tmp_path_factory.mktemp("valid") / "model.safetensors"
    save_file(stored, path, metadata=metadata)
    file, wanted = SafetensorsFile(path), load_file(path)
    assert set(file) == set(wanted)
    for name, values in wanted.items():
        assert file.shape(name) == values.shape
        if values.dtype.kind != "f":
            refused(CheckpointError, lambda name=name: file.weight(name), name)
            continue
        found = file.weight(name)
        np.testing.assert_array_equal(found.data, values, strict=True)
        for dtype in (np.float32, np.float64):
            with np.errstate(all="ignore"):
                np.testing.assert_array_equal(found.array(dtype), values.astype(dtype), strict=True)


def test_bf16_is_widened_exactly_for_every_pattern_of_bits(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint32)
    header = {"w": {"dtype": "BF16", "shape": [256, 256], "data_offsets": [0, 1 << 17]}}
    weight = SafetensorsFile(write(tmp_path / "m", header, bits.astype(np.uint16).tobytes())).weight("w")
    np.testing.assert_array_equal(weight.array("float32").view(np.uint32).ravel(), bits << 16)
    with np.errstate(invalid="ignore"):  # among the patterns are signalling NaNs
        wide = (bits << 16).view(np.float32).reshape(256, 256).astype(np.float64)
    np.testing.assert_array_equal(weight.array("float64"), wide, strict=True)


@pytest.mark.parametrize("padding", range(1, 8))
def test_tensors_at_odd_addresses_are_read(tmp_path: Path, padding: int) -> None:
    path = write(tmp_path / "model.safetensors", json.dumps(GOOD).encode() + b" " * padding)
    np.testing.assert_array_equal(SafetensorsFile(path).weight("w").array("float32"), DATA, strict=True)


def test_float32_is_mapped_and_not_copied(tmp_path: Path) -> None:
    save_file({"w": DATA}, tmp_path / "model.safetensors")
    values = SafetensorsFile(tmp_path / "model.safetensors").weight("w").array("float32")
    assert values.base is not None
    assert not values.flags.writeable


def test_too_large_float64_becomes_infinity_without_a_warning() -> None:
    assert Weight.of("w", np.array([1e300, -1e300, 1.0])).array("float32").tolist() == [math.inf, -math.inf, 1.0]


def test_fingerprints_differ_where_weights_do() -> None:
    def of(values: np.ndarray[Any, Any], name: str = "w") -> str:
        return fingerprint({name: Weight.of(name, values)})

    changed = DATA.copy()
    changed[-1, -1] += 1
    assert of(DATA) == of(DATA.copy())
    assert len({of(DATA), of(changed), of(DATA.reshape(3, 2)), of(DATA, "v"), of(DATA.astype(np.float64))}) == 5


# -- fuzz --


def reads_or_refuses(path: Path, content: bytes) -> None:
    """Loading `content` gives arrays within the file, or CheckpointError of one line; quickly in either case."""
    path.write_bytes(content)
    start = time.process_time()
    file = result_or_refusal(lambda: SafetensorsFile(path))
    for name in file or ():
        weight = result_or_refusal(lambda name=name: file.weight(name))
        if weight is not None:
            assert weight.array("float32").shape == weight.data.shape == file.shape(name)
            assert weight.data.tobytes() in content
    assert time.process_time() - start < 1.0


def result_or_refusal(read: Callable[[], Any]) -> Any:
    """What `read` gives, or None after a CheckpointError of one line."""
    try:
        return read()
    except CheckpointError as refusal:
        problem = str(refusal)
    assert problem.isprintable()
    return None


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_read_or_refused(scratch: Path, content: bytes) -> None:
    reads_or_refuses(scratch, content)


@given(st.binary(max_size=200), st.binary(max_size=40))
@example(b"{}", b"")
@example(b'{"__metadata__": 5}', b"")
def test_arbitrary_headers_are_read_or_refused(scratch: Path, header: bytes, data: bytes) -> None:
    reads_or_refuses(scratch, len(header).to_bytes(8, "little") + header + data)


@given(st.data())
def test_valid_files_with_bytes_changed_are_read_or_refused(scratch: Path, data: st.DataObject) -> None:
    content = bytearray(save({"a": DATA, "b.weight": DATA.astype(np.float16), "c": np.zeros((0, 4), np.float32)}))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789{}[]",:-eN')))
    reads_or_refuses(scratch, bytes(content))


SIZES = st.one_of(st.integers(-2, 30), st.integers(), st.floats(), st.booleans(), st.none())
JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "F16", "BF16", "F64", "F8_E4M3", "I64", "X"]), JSON_VALUES),
        "shape": st.one_of(st.lists(SIZES, max_size=4), JSON_VALUES),
        "data_offsets": st.one_of(st.lists(SIZES, min_size=2, max_size=2), JSON_VALUES),
        "more": JSON_VALUES,
    },
)


@given(st.dictionaries(st.text(max_size=5), st.one_of(ENTRIES, JSON_VALUES), max_size=3), st.integers(0, 30))
def test_headers_of_the_right_form_with_any_values_are_read_or_refused(
    scratch: Path, header: dict[str, Any], size: int
) -> None:
    text = json.dumps(header).encode()
    reads_or_refuses(scratch, len(text).to_bytes(8, "little") + text + bytes(size))


# -- folders --


def write_index(folder: Path, weight_map: Any) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    save_file({"a": DATA}, tmp_path / "one.safetensors")
    (tmp_path / "sub").mkdir()
    save_file({"b": DATA + 1, "unlisted": DATA}, tmp_path / "sub" / "two.safetensors")
    save_file({"single": DATA}, tmp_path / "model.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "sub/two.safetensors"})
    checkpoint = Checkpoint(tmp_path)
    assert sorted(checkpoint) == ["a", "b"]
    np.testing.assert_array_equal(checkpoint.weight("b").array("float32"), DATA + 1)
    assert (checkpoint.shape("a"), checkpoint.format("a"), "unlisted" in checkpoint) == ((2, 3), "F32", False)


@pytest.mark.parametrize(
    "shard",
    ["/etc/passwd", "/model.safetensors", "../model.safetensors", "a/../../model.safetensors", "..\\model.safetensors",
     "C:\\model.safetensors", "C:model.safetensors", "", "model.bin", "model", ".", "x" * 5000 + ".safetensors",
     "\ud800.safetensors", "a\0.safetensors", "a\n.safetensors"],
)  # fmt: skip
def test_an_index_cannot_name_a_file_outside_the_folder(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": DATA}, tmp_path / "model.safetensors")
    index = write_index(folder, {"a": shard})
    refused(CheckpointError, lambda: find_weights(folder), str(index))


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path: Path) -> None:
    save_file({"a": DATA}, tmp_path / "one.safetensors")
    index = write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    refused(CheckpointError, lambda: Checkpoint(tmp_path), str(index), "two.safetensors", "missing")


def test_an_index_that_places_a_tensor_wrongly_is_refused(tmp_path: Path) -> None:
    save_file({"a": DATA}, tmp_path / "one.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    refused(CheckpointError, lambda: Checkpoint(tmp_path), "one.safetensors", "tensor b")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", {"a": 1}, {"a": None}, {"a": ["one.safetensors"]}])
def test_an_index_without_a_map_of_names_is_refused(tmp_path: Path, weight_map: Any) -> None:
    index = write_index(tmp_path, weight_map)
    refused(CheckpointError, lambda: find_weights(tmp_path), str(index), "weight_map")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"9" * 5000, b"[" * 100_000])
def test_an_index_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text)
    refused(CheckpointError, lambda: find_weights(tmp_path), str(index))


@given(JSON_VALUES)
def test_any_index_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, weight_map: Any) -> None:
    folder = tmp_path_factory.mktemp("index")
    write_index(folder, weight_map)
    refused(CheckpointError, lambda: Checkpoint(folder), "model.safetensors.index.json")


def test_names_with_control_characters_are_refused(tmp_path: Path) -> None:
    save_file({"a\nb\x1b[2J": DATA}, tmp_path / "model.safetensors")
    refused(CheckpointError, lambda: Checkpoint(tmp_path), "model.safetensors", "control characters", r"a\nb\x1b[2J")


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_link_to_weights_that_are_gone_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(tmp_path / "blobs" / "f00d")
    refused(CheckpointError, lambda: find_weights(tmp_path), str(tmp_path / name), "f00d, which is missing")


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", fail)
    refused(CheckpointError, lambda: find_weights(tmp_path), f"{tmp_path}: cannot be listed (Permission denied)")


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "a.pt", "pytorch_model-00001-of-00002.bin"],
)
def test_a_folder_of_pickles_is_refused_with_the_command_that_converts_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    refused(CheckpointError, lambda: find_weights(tmp_path), name, f"npllm convert {tmp_path} OUT")


def test_a_folder_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    refused(CheckpointError, lambda: find_weights(tmp_path), str(tmp_path), "model.safetensors")
    save_file({"a": DATA}, tmp_path / "model-00001-of-00002.safetensors")
    words = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
    refused(CheckpointError, lambda: find_weights(tmp_path), *words)
