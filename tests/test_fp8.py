"""FP8: codes and factors give the numbers that torch gives, in whatever part they are asked for; the rest is refused."""

import json
import logging
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import npllm
from npllm.arrays import Array
from npllm.checkpoint import Checkpoint
from npllm.errors import CheckpointError, ConfigError, NumericsError
from npllm.fp8 import TABLES, dequantise
from npllm.handles import Scale, Weight, fingerprint
from npllm.models import interpret
from npllm.quantised import BLOCK, Block, scaled
from tests import fp8
from tests.compare import agree
from tests.export import TRUTH
from tests.exported import FILES
from tests.models import PREFIX, make_checkpoint, make_config, make_tensors
from tests.refusals import refused

FILE = FILES["fp8"]
BLOCKED = [name for name in FILE.given if "block" in FILE.given[name]]


def weight(codes: Array, factors: Array, block: tuple[int, int], name: str = "x.weight") -> Weight:
    scale = Weight.of(f"{name}_scale_inv", factors)
    return scaled(Weight(name, codes.shape, "f8_e4m3", codes, "memory"), scale, Block(*block))


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["e4m3", "e8m0"])
def test_every_code_is_torchs_number(format: str) -> None:
    codes, y = FILE.tensors[format]["codes"], FILE.tensors[format]["y"]
    np.testing.assert_array_equal(TABLES[f"f8_{format}"][codes].view(np.uint32), y.view(np.uint32))
    assert np.flatnonzero(np.isnan(TABLES[f"f8_{format}"])).tolist() == sorted(set(range(256)) - set(codes.tolist()))


@pytest.mark.parametrize("name", BLOCKED)
def test_blocks_are_widened_as_torch_widens_them(name: str) -> None:
    given, tensors = FILE.given[name], FILE.tensors[name]
    held = weight(tensors["codes"], tensors["factors"], tuple(given["block"]))
    agree(held.array("float32"), tensors["y"], "exact")
    agree(held.array("float64"), tensors["y_f64"], "exact")
    assert held.nbytes == tensors["codes"].nbytes + tensors["factors"].nbytes


@pytest.mark.parametrize(
    ("format", "wide"), [("F32", np.float32), ("F64", np.float64), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)]
)
def test_factors_may_be_any_real_numbers(tmp_path: Path, format: str, wide: Any) -> None:
    codes, factors = fp8.encode(np.random.default_rng(0).standard_normal((20, 30), np.float32), (16, 8))
    rounded = factors.astype(wide)
    fp8.save(tmp_path / "model.safetensors", {"x.weight": ("F8_E4M3", codes), "x.weight_scale": (format, rounded)})
    held = Checkpoint(tmp_path, Block(16, 8)).weight("x.weight")
    agree(held.array("float32"), fp8.decode(codes, rounded, (16, 8)), "exact")


def test_factors_may_be_powers_of_two_in_e8m0(tmp_path: Path) -> None:
    codes, factors = fp8.encode(np.random.default_rng(0).standard_normal((20, 30), np.float32), (16, 8))
    powers = np.ceil(np.log2(factors))
    tensors = {"x.weight": ("F8_E4M3", codes), "x.weight_scale_inv": ("F8_E8M0", (powers + 127).astype(np.uint8))}
    fp8.save(tmp_path / "model.safetensors", tensors)
    held = Checkpoint(tmp_path, Block(16, 8)).weight("x.weight")
    agree(held.array("float32"), fp8.decode(codes, np.exp2(powers), (16, 8)), "exact")


def test_nan_codes_stay_nan() -> None:
    codes = np.array([[0x7F, 0x38], [0xFF, 0xB8]], np.uint8)
    got = weight(codes, np.full((1, 1), 0.5, np.float32), (2, 2)).array("float32")
    np.testing.assert_array_equal(got, np.array([[np.nan, 0.5], [np.nan, -0.5]], np.float32))


# -- parts ------------------------------------------------------------------------------------------------------------

SIZES = st.integers(1, 40)
BLOCK_SIZES = st.tuples(st.integers(1, 17), st.integers(1, 17))

VIEWS: dict[str, Callable[[Any], Any]] = {
    "a slice that begins within a block": lambda x: x[11:30],
    "a slice of a slice": lambda x: x[3:][9:20],
    "an entry of a slice": lambda x: x[5:][4],
    "the last entry": lambda x: x[-1],
    "entries": lambda x: taken(x, [0, 9, 16, 9, -1, -38]),
    "entries of a slice": lambda x: taken(x[7:], [0, 1, 20, -1, -2, -30]),
    "a slice of columns": lambda x: turned(turned(x)[6:25]),
    "a slice both ways": lambda x: turned(turned(x[5:])[6:25])[3:20],
    "entries of a slice of columns": lambda x: taken(turned(turned(x)[4:]), [1, 15, 8]),
    "entries both ways": lambda x: taken(turned(taken(x[7:], [20, 2, 9])), [-1, 3, 11]),
    "a column of a slice": lambda x: turned(x[7:])[13],
    "nothing": lambda x: x[12:12],
}


def taken(x: Any, index: list[int]) -> Any:
    return x.rows(np.array(index)) if isinstance(x, Weight) else x[index]


def turned(x: Any) -> Any:
    return x.transposed() if isinstance(x, Weight) else x.swapaxes(-1, -2)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("block", [(8, 5), (1, 29), (39, 1), (39, 29), (128, 128), (16, 4)])
def test_a_part_takes_the_factors_of_its_blocks(view: str, block: tuple[int, int]) -> None:
    values = np.random.default_rng(0).standard_normal((39, 29)) * np.linspace(0.1, 3, 39)[:, None] * np.linspace(1, 9, 29)
    codes, factors = fp8.encode(values.astype(np.float32), block)
    got, want = (VIEWS[view](each) for each in (weight(codes, factors, block), fp8.decode(codes, factors, block)))
    np.testing.assert_array_equal(got.array("float32"), want, strict=True)


def test_matrices_of_a_stack_may_share_factors_too() -> None:
    """Blocks of two matrices, cut within the first block: of three matrices, the second begins the next."""
    codes = np.full((3, 1, 1), 0x38, np.uint8)
    got = dequantise(codes, np.array([[[2.0]], [[4.0]]]), (2, 1, 1), (1, 0, 0), "float32")
    assert got.ravel().tolist() == [2.0, 4.0, 4.0]


@st.composite
def parts(draw: st.DrawFn) -> tuple[Weight, Array]:
    """A handle after a few views of it, and the array that the same views give."""
    shape = (*draw(st.lists(st.integers(1, 3), max_size=1)), draw(SIZES), draw(SIZES))
    block = draw(BLOCK_SIZES)
    codes, factors = fp8.encode(np.random.default_rng(draw(st.integers(0, 9))).standard_normal(shape, np.float32), block)
    held, want = weight(codes, factors, block), fp8.decode(codes, factors, block)
    for view in draw(st.lists(st.sampled_from(["slice", "entry", "rows", "transposed"]), min_size=1, max_size=4)):
        held, want = draw_view(draw, view, held, want)
    return held, want


def draw_view(draw: st.DrawFn, view: str, held: Weight, want: Array) -> tuple[Weight, Array]:
    size = len(want)
    if view in ("transposed", "entry"):
        assume(want.ndim > 1 and size)
    if view == "transposed":
        return turned(held), turned(want)
    if view == "entry":
        index = draw(st.integers(-size, size - 1))
        return held[index], want[index]
    if view == "rows":
        assume(size)
        index_M = draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=6))
        return taken(held, index_M), taken(want, index_M)
    begin, end = draw(st.integers(0, size)), draw(st.integers(0, size + 2))
    return held[begin:end], want[begin:end]


@given(parts())
def test_any_part_of_a_tensor_takes_the_factors_of_its_blocks(part: tuple[Weight, Array]) -> None:
    held, want = part
    for dtype in ("float32", "float64"):
        got = held.array(dtype)
        assert (got.dtype, got.shape) == (np.dtype(dtype), held.shape)
        np.testing.assert_allclose(got, want, rtol=1e-7 if dtype == "float64" else 0)
    if held.scale is not None and want.size:
        covered = zip(held.shape, held.scale.origin, held.scale.block, strict=True)
        assert held.scale.weight.shape == tuple(-(-(size + origin) // per) for size, origin, per in covered)


def test_a_slice_has_no_step() -> None:
    held = weight(np.zeros((4, 4), np.uint8), np.ones((1, 1), np.float32), BLOCK)
    with pytest.raises(ValueError, match="no step"):
        held[::2]
    with pytest.raises(IndexError):
        held[4]


@pytest.mark.parametrize("storage", ["f64", "f32", "f16", "bf16"])
def test_rows_are_gathered_before_they_are_widened(storage: str) -> None:
    values = np.random.default_rng(0).standard_normal((50, 8)).astype("float32")
    kinds = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
    narrow = values.astype(kinds[storage])
    table = Weight("t", narrow.shape, storage, narrow.view(np.uint16) if storage == "bf16" else narrow)
    index_M = np.array([3, 49, 3, 0])
    gathered = table.rows(index_M)
    assert (gathered.shape, gathered.format, gathered.data.base is None) == ((4, 8), storage, True)
    np.testing.assert_array_equal(gathered.array("float32"), narrow.astype(np.float32)[index_M], strict=True)


def test_widening_takes_no_more_than_the_result() -> None:
    """Looking codes up as they are would take eight bytes for each."""
    codes = np.random.default_rng(0).integers(0, 127, (2048, 1500), np.uint8)
    held = weight(codes, np.ones((16, 12), np.float32), BLOCK)
    for each in (held, held.transposed(), held[100:2000]):
        tracemalloc.start()
        values = each.array("float32")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < values.nbytes + (2 << 20)


def test_widening_keeps_the_layout_in_memory() -> None:
    held = weight(np.zeros((300, 200), np.uint8), np.ones((3, 2), np.float32), BLOCK)
    assert held.array("float32").flags.c_contiguous
    assert held.transposed().array("float32").flags.f_contiguous
    assert held.transposed().array("float32").base is None


# -- identity ---------------------------------------------------------------------------------------------------------


def test_equal_tensors_have_equal_factors() -> None:
    codes, factors = fp8.encode(np.random.default_rng(0).standard_normal((20, 30), np.float32), (16, 8))
    mine = weight(codes, factors, (16, 8))
    assert mine.equals(weight(codes.copy(), factors.copy(), (16, 8)))
    assert not mine.equals(weight(codes, factors * 2, (16, 8)))
    assert not mine.equals(weight(codes, np.ones((2, 4), np.float32), (10, 8)))
    assert not mine.equals(weight(codes ^ 1, factors, (16, 8)))
    assert not mine.equals(Weight.of("x", np.ones((20, 30), np.float32)))
    assert not mine.equals(Weight("x", codes.shape, "f8_e4m3", codes))


def test_fingerprints_cover_factors_and_copy_little() -> None:
    codes, factors = np.zeros((1000, 2000), np.uint8), np.ones((8, 16), np.float32)
    last = factors.copy()
    last[-1, -1] = 2
    held = weight(codes, factors, BLOCK)
    prints = {fingerprint({"x": each}) for each in (held, weight(codes, last, BLOCK), weight(codes | 1, factors, BLOCK))}
    assert len(prints) == 3
    tracemalloc.start()
    fingerprint({"x": held.transposed()})
    assert tracemalloc.get_traced_memory()[1] < 1 << 18
    tracemalloc.stop()


def test_releasing_lets_go_of_the_factors_file_too(tmp_path: Path) -> None:
    tensors = fp8.stored("x.weight", np.ones((20, 30), np.float32), (16, 8), "x.weight_scale_inv")
    for file, name in (("one", "x.weight"), ("two", "x.weight_scale_inv")):
        fp8.save(tmp_path / f"{file}.safetensors", {name: tensors[name]})
    shards = {"x.weight": "one.safetensors", "x.weight_scale_inv": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    held = Checkpoint(tmp_path, Block(16, 8)).weight("x.weight")
    assert isinstance(held.scale, Scale)
    assert held.mapping is not held.scale.weight.mapping
    before = held.array("float32")
    held.release()
    agree(held.array("float32"), before, "exact", literal=True)


# -- checkpoints ------------------------------------------------------------------------------------------------------

VALUES = np.random.default_rng(1).standard_normal((40, 50)).astype("float32")
STACK = np.random.default_rng(1).standard_normal((3, 40, 50)).astype("float32")


def opened(folder: Path, tensors: fp8.Stored, block: tuple[int, int] = (16, 8)) -> Checkpoint:
    fp8.save(folder / "model.safetensors", tensors)
    return Checkpoint(folder, Block(*block))


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("a.q_proj.weight", "a.q_proj.weight_scale_inv"), ("a.q_proj.weight", "a.q_proj.weight_scale"),
        ("a.wq.weight", "a.wq.qscale_weight"), ("a.experts.gate_up_proj", "a.experts.gate_up_proj_scale_inv"),
        ("a.experts.down_proj", "a.experts.down_proj_scale"),
    ],
)  # fmt: skip
def test_a_tensor_finds_its_factors_by_each_of_their_names(tmp_path: Path, name: str, scale: str) -> None:
    values = STACK if "experts" in name else VALUES
    stored = fp8.stored(name, values, (16, 8), scale)
    module = name.removesuffix(".weight")
    unused = [f"{module}.input_scale", f"{module}.qscale_act", f"{module}.activation_scale", f"{module}_activation_scale",
              "a.k_scale", "a.v_scale", "a.kv_scale"]  # fmt: skip
    checkpoint = opened(tmp_path, stored | {each: ("F32", np.ones(1, np.float32)) for each in unused})
    assert list(checkpoint) == [name]
    assert scale not in checkpoint
    assert (checkpoint.format(name), checkpoint.shape(name)) == ("F8_E4M3", values.shape)
    agree(checkpoint.weight(name).array("float32"), fp8.decode(stored[name][1], stored[scale][1], (16, 8)), "exact")


def test_a_scale_of_another_kind_is_a_tensor_like_others(tmp_path: Path) -> None:
    names = ["altup.correct_output_scale", "layer_scale", "self_attn.per_dim_scale"]
    assert sorted(opened(tmp_path, {name: ("F32", np.ones(3, np.float32)) for name in names})) == names


@pytest.mark.parametrize(
    ("shape", "block"),
    [((), (40, 50)), ((1,), (40, 50)), ((40, 1), (1, 50)), ((3, 7), (16, 8)), ((3,), (40, 50)), ((3, 1, 1), (40, 50)),
     ((3, 40, 1), (1, 50)), ((3, 1, 50), (40, 1)), ((3, 3, 7), (16, 8))],
)  # fmt: skip
def test_the_shape_of_a_scale_says_what_a_factor_covers(tmp_path: Path, shape: tuple[int, ...], block: Any) -> None:
    values = STACK if shape[:1] == (3,) and shape != (3, 7) else VALUES
    codes, _ = fp8.encode(values, (16, 8))
    factors = np.random.default_rng(0).uniform(0.5, 2, shape).astype(np.float32)
    checkpoint = opened(tmp_path, {"x.weight": ("F8_E4M3", codes), "x.weight_scale": ("F32", np.asarray(factors))})
    grid = tuple(-(-size // per) for size, per in zip(values.shape[-2:], block, strict=True))
    each = np.broadcast_to(factors.reshape((*shape[:1], *grid) if shape[:1] == (3,) and values is STACK else grid),
                           (*values.shape[:-2], *grid))  # fmt: skip
    agree(checkpoint.weight("x.weight").array("float32"), fp8.decode(codes, each, block), "exact")


WEIGHT, SCALE = "a.q_proj.weight", "a.q_proj.weight_scale_inv"
GOOD = fp8.stored(WEIGHT, VALUES, (16, 8), SCALE)


@pytest.mark.parametrize(
    "shape", [(2, 7), (3, 6), (2, 6), (7, 3), (4, 7), (3, 8), (21,), (1, 50), (50, 1), (1, 1), (3, 7, 1)]
)
def test_a_wrong_number_of_factors_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = GOOD | {SCALE: ("F32", np.ones(shape, np.float32))}
    words = ("model.safetensors", SCALE, WEIGHT, str(list(shape)), "16 x 8", "[3, 7]")
    refused(CheckpointError, lambda: opened(tmp_path, tensors).weight(WEIGHT), *words)


def test_a_scale_counted_in_other_blocks_is_refused(tmp_path: Path) -> None:
    refused(CheckpointError, lambda: opened(tmp_path, GOOD, BLOCK).weight(WEIGHT), SCALE, "128 x 128", "[1, 1]")


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, -np.inf])
def test_factors_that_are_no_positive_numbers_are_refused(tmp_path: Path, value: float) -> None:
    factors = GOOD[SCALE][1].copy()
    factors[2, 6] = value
    held = opened(tmp_path, GOOD | {SCALE: ("F32", factors)}).weight(WEIGHT)
    refused(CheckpointError, lambda: held.array("float32"), "model.safetensors", SCALE, str(np.float32(value)))
    held[:32].array("float32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({SCALE: None}, [WEIGHT, "F8_E4M3", "without its scale", "BF16"]),
        ({WEIGHT: None}, [SCALE, "belongs to no FP8 tensor"]),
        ({"b.weight_scale": GOOD[SCALE]}, ["b.weight_scale", "belongs to no FP8 tensor"]),
        ({"b.qscale_weight": GOOD[SCALE]}, ["b.qscale_weight", "belongs to no FP8 tensor"]),
        ({"b.up_proj_scale_inv": GOOD[SCALE]}, ["b.up_proj_scale_inv", "belongs to no FP8 tensor"]),
        ({WEIGHT: ("BF16", VALUES.astype(ml_dtypes.bfloat16))}, [SCALE, "belongs to no FP8 tensor"]),
        ({"a.q_proj.weight_scale": GOOD[SCALE]}, [WEIGHT, SCALE, "two scales", "a.q_proj.weight_scale"]),
        ({"a.q_proj.qscale_weight": GOOD[SCALE]}, [WEIGHT, SCALE, "two scales", "a.q_proj.qscale_weight"]),
        ({SCALE: ("U8", np.ones((3, 7), np.uint8))}, [SCALE, "U8", "F8_E8M0"]),
        ({SCALE: ("F8_E4M3", np.ones((3, 7), np.uint8))}, [SCALE, "F8_E4M3"]),
        ({WEIGHT: ("F8_E5M2", GOOD[WEIGHT][1])}, [WEIGHT, "F8_E5M2", "BF16"]),
        ({WEIGHT: ("F8_E8M0", GOOD[WEIGHT][1])}, [WEIGHT, "F8_E8M0", "BF16"]),
        ({WEIGHT: ("I8", GOOD[WEIGHT][1])}, [WEIGHT, "I8", "BF16"]),
        ({WEIGHT: ("U8", GOOD[WEIGHT][1])}, [WEIGHT, "U8", "BF16"]),
        ({WEIGHT: ("I32", VALUES.astype(np.int32))}, [WEIGHT, "I32", "BF16"]),
    ],
)  # fmt: skip
def test_tensors_and_scales_that_do_not_pair_are_refused(tmp_path: Path, change: Any, words: list[str]) -> None:
    tensors = {name: value for name, value in (GOOD | change).items() if value is not None}
    refused(CheckpointError, lambda: opened(tmp_path, tensors).weight(WEIGHT), "model.safetensors", *words)


@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("a.q_proj.qweight", "GPTQ or AWQ"), ("a.q_proj.qzeros", "GPTQ or AWQ"), ("a.q_proj.g_idx", "GPTQ or AWQ"),
        ("a.q_proj.weight.absmax", "bitsandbytes"), ("a.q_proj.weight.quant_map", "bitsandbytes"),
        ("a.q_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"), ("a.q_proj.SCB", "bitsandbytes"),
        ("a.q_proj.weight_packed", "compressed-tensors"), ("a.q_proj.weight_zero_point", "compressed-tensors"),
        ("a.q_proj.weight_scale_2", "NVFP4"), ("a.experts.gate_up_proj_blocks", "MXFP4"),
        ("a.q_proj.weight._data", "quanto"), ("a.q_proj.W_q", "HQQ"), ("a.q_proj.codebooks", "AQLM"),
    ],
)  # fmt: skip
def test_releases_quantised_otherwise_are_known_by_their_names(tmp_path: Path, name: str, who: str) -> None:
    tensors = {name: ("U8", np.ones(4, np.uint8)), "a.norm.weight": ("F32", np.ones(4, np.float32))}
    refused(CheckpointError, lambda: opened(tmp_path, tensors), "model.safetensors", name, who, "BF16")


# -- config.json ------------------------------------------------------------------------------------------------------


def test_a_model_said_to_be_in_blocks_has_no_factors_of_another_kind(tmp_path: Path) -> None:
    shutil.copytree(TRUTH / "models" / "qwen3-fp8", tmp_path, dirs_exist_ok=True)
    tensors = fp8.load(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight_scale_inv"))
    for shape in ((1,), (), (len(tensors[name.removesuffix("_scale_inv")][1]), 1)):
        fp8.save(tmp_path / "model.safetensors", tensors | {name: ("F32", np.ones(shape, np.float32))})
        refused(CheckpointError, lambda: npllm.load(tmp_path), name, "in blocks of")


def compressed(**weights: Any) -> dict[str, Any]:
    told = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": told}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 8], "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    ("told", "block"),
    [
        (FP8, Block(16, 8, only=True)), ({"quant_method": "fp8"}, BLOCK), (FP8 | {"weight_block_size": None}, BLOCK),
        (FP8 | {"scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head"]}, Block(16, 8, only=True)),
        (compressed(), BLOCK), (compressed(strategy="channel"), BLOCK),
        (compressed(strategy="block", block_structure=[64, 32]), Block(64, 32)),
        (compressed() | {"format": "naive-quantized", "ignore": ["lm_head"], "kv_cache_scheme": None}, BLOCK),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["model", "wrapper", "text part"])
def test_fp8_is_accepted_with_its_blocks(told: Any, block: Block, place: str, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config()
    if place == "model":
        values = config | {"quantization_config": told}
    elif place == "wrapper":
        values = {"model_type": "some_vl", "text_config": config, "quantization_config": told}
    else:
        values = {"model_type": "some_vl", "text_config": config | {"quantization_config": told}}
    with caplog.at_level(logging.WARNING, "npllm"):
        assert interpret(values).block == block
    assert not [record for record in caplog.records if "quantization" in record.getMessage()]


OTHERS = ["awq", "gptq", "bitsandbytes", "mxfp4", "quanto", "hqq", "aqlm", "fbgemm_fp8", "modelopt", "torchao", "bitnet"]


@pytest.mark.parametrize("nested", [False, True], ids=["model", "wrapper"])
@pytest.mark.parametrize(
    ("told", "words"),
    [
        *(({"quant_method": method, "bits": 4}, [method, "BF16"]) for method in OTHERS),
        (compressed(type="int", num_bits=4), ["int of 4 bits", "BF16"]),
        (compressed(type="int"), ["int of 8 bits", "BF16"]),
        (compressed(num_bits=4), ["float of 4 bits", "BF16"]),
        (compressed(symmetric=False), ["BF16"]),
        (compressed(strategy="group"), ["strategy", "group", "channel"]),
        (compressed(strategy="block", block_structure=[0, 8]), ["block_structure", "[0, 8]"]),
        (compressed() | {"format": "pack-quantized"}, ["compressed-tensors", "pack-quantized", "BF16"]),
        (compressed() | {"config_groups": {}}, ["compressed-tensors", "BF16"]),
        (compressed() | {"config_groups": {"a\n": {}}}, ["config_groups", "BF16"]),
        (compressed() | {"config_groups": {"group_0": 5}}, ["config_groups", "group_0", "BF16"]),
        (FP8 | {"fmt": "e5m2"}, ["fmt", "e5m2", "e4m3"]),
        (FP8 | {"expert_dtype": "fp4"}, ["expert_dtype", "fp4", "BF16"]),
        *((FP8 | {"weight_block_size": size}, ["weight_block_size"]) for size in ([128], [128, 0], 128, [1.5, 2], ["a", 1])),
    ],
)
def test_other_methods_are_refused_by_name(told: Any, words: list[str], nested: bool) -> None:
    values: dict[str, Any] = make_config() if not nested else {"model_type": "some_vl", "text_config": make_config()}
    refused(ConfigError, lambda: interpret(values | {"quantization_config": told}), "quantization_config", *words)


def test_groups_in_different_blocks_are_refused() -> None:
    sizes = ([8, 8], [16, 8])
    first, second = (compressed(strategy="block", block_structure=each)["config_groups"]["group_0"] for each in sizes)
    told = compressed() | {"config_groups": {"a": first, "b": second}}
    refused(ConfigError, lambda: interpret(make_config(quantization_config=told)), "different blocks")


# -- whole models -----------------------------------------------------------------------------------------------------


def is_linear(name: str, values: Array) -> bool:
    return values.ndim == 2 and "proj" in name


@pytest.mark.parametrize("architecture", [name for name in sorted(PREFIX) if name != "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_checkpoint_in_fp8_gives_what_its_widened_weights_give(tmp_path: Path, architecture: str, dtype: str) -> None:
    tensors = make_tensors(make_config(architecture))
    narrow: fp8.Stored = {}
    wide: fp8.Stored = {}
    for name, values in tensors.items():
        narrow[name] = wide[name] = ("F32", values)
        if is_linear(name, values):
            narrow |= fp8.stored(name, values, (16, 24), f"{name}_scale_inv")
            decoded = fp8.decode(narrow[name][1], narrow[f"{name}_scale_inv"][1], (16, 24), dtype)
            wide[name] = ("F64" if dtype == "float64" else "F32", decoded)
    quantised = make_checkpoint(
        tmp_path / "fp8", architecture, quantization_config=FP8 | {"weight_block_size": [16, 24]}, with_tokenizer=False
    )
    plain = make_checkpoint(tmp_path / "plain", architecture, with_tokenizer=False)
    fp8.save(quantised / "model.safetensors", narrow)
    fp8.save(plain / "model.safetensors", wide)
    logits = [npllm.load(folder, backend="numpy", dtype=dtype).forward([[5, 250, 17, 3]]) for folder in (quantised, plain)]
    agree(logits[0], logits[1], "exact")


@pytest.fixture
def qwen3(tmp_path: Path) -> Callable[[Callable[[fp8.Stored], Any]], Path]:
    """The truth case in FP8, with its tensors changed."""

    def changed(change: Callable[[fp8.Stored], Any]) -> Path:
        source = TRUTH / "models" / "qwen3-fp8"
        tensors = fp8.load(source / "model.safetensors")
        change(tensors)
        fp8.save(tmp_path / "model.safetensors", tensors)
        (tmp_path / "config.json").write_text((source / "config.json").read_text())
        return tmp_path

    return changed


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def test_a_damaged_scale_is_named_when_a_model_is_loaded(qwen3: Callable[..., Path]) -> None:
    def damage(tensors: fp8.Stored) -> None:
        format, factors = tensors[f"{Q_PROJ}_scale_inv"]
        tensors[f"{Q_PROJ}_scale_inv"] = (format, np.zeros_like(factors))

    folder = qwen3(damage)
    refused(CheckpointError, lambda: npllm.load(folder), "model.safetensors", f"{Q_PROJ}_scale_inv", "above zero")


def test_a_missing_scale_is_named_when_a_model_is_loaded(qwen3: Callable[..., Path]) -> None:
    folder = qwen3(lambda tensors: tensors.pop(f"{Q_PROJ}_scale_inv"))
    refused(CheckpointError, lambda: npllm.load(folder), "model.safetensors", Q_PROJ, "F8_E4M3", "without its scale")


def test_codes_that_are_nan_stop_generation(qwen3: Callable[..., Path]) -> None:
    folder = qwen3(lambda tensors: tensors.update({Q_PROJ: ("F8_E4M3", np.full_like(tensors[Q_PROJ][1], 0x7F))}))
    refused(NumericsError, lambda: npllm.load(folder).generate([5, 6], max_tokens=2), "finite")
