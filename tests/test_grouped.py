"""q8 and q4: what codes stand for, how numbers become codes, and that kernels give the same bits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllm import grouped
from npllm.arrays import Array
from npllm.errors import ArgumentError, CheckpointError
from npllm.grouped import GROUP, LARGEST, PACKED, marked, quantise, quantised
from npllm.handles import Stack, Weight, fingerprint
from npllm.models import interpret
from npllm.registry import get_backend
from npllm.weights import random_weights
from tests.models import CONFIGS, make_config
from tests.refusals import refused

FORMATS = ["q8", "q4"]
every_format = pytest.mark.parametrize("format", FORMATS)


def drawn(seed: int, rows: int = 5, width: int = 96, spread: float = 0.0) -> Array:
    """Normal numbers; groups differ in size by up to ten to `spread`, either way."""
    dice = np.random.default_rng(seed)
    sizes = 10.0 ** dice.uniform(-spread, spread, (rows, width // GROUP))
    return (dice.standard_normal((rows, width)) * np.repeat(sizes, GROUP, axis=1)).astype(np.float32)


def handle(x: Array, format: str) -> Weight:
    return quantised(Weight.of("w", x), format)


def plain_error(x_NG: Array) -> Array:
    """The squared error of 4 bits with the factor that takes the largest number to -8, unrounded."""
    largest = x_NG[np.arange(len(x_NG)), np.abs(x_NG).argmax(1)][:, None] / -8.0
    codes = np.clip(np.rint(x_NG / largest), -8, 7)
    return ((x_NG - codes * largest) ** 2).sum(1)


# -- what codes stand for ---------------------------------------------------------------------------------------------


def test_the_layout_of_q4() -> None:
    """The first of two is in the low nibble; 8 is zero; each group of 32 has its factor."""
    codes = np.full((1, 32), 0x88, np.uint8)
    codes[0, 0], codes[0, 16] = 0x1F, 0x0A
    made = grouped.grouped(Weight.of("w", np.zeros((1, 64), np.float32)), "q4", codes, np.array([[0.5, -2.0]], np.float16))
    values = made.array("float32")
    assert values[0, [0, 1, 2, 32, 33]].tolist() == [3.5, -3.5, 0.0, -4.0, 16.0]
    assert np.count_nonzero(values) == 4
    assert (made.shape, made.data.shape, made.nbytes) == ((1, 64), (1, 32), 36)


def test_the_layout_of_q8() -> None:
    codes = np.arange(-64, 64, dtype=np.int8).reshape(2, 64)
    made = grouped.grouped(
        Weight.of("w", np.zeros((2, 64), np.float32)), "q8", codes, np.array([[1, 2], [3, -4]], np.float16)
    )
    want = codes * np.repeat([[1, 2], [3, -4]], GROUP, axis=1)
    np.testing.assert_array_equal(made.array("float64"), want)
    assert made.nbytes == 128 + 8


@every_format
def test_parts_of_a_matrix(format: str) -> None:
    made = handle(drawn(1), format)
    whole = made.array("float32")
    for part, want in (
        (made[1:4], whole[1:4]),
        (made[-1], whole[-1]),
        (made.rows(np.array([3, -1, 3])), whole[[3, -1, 3]]),
        (made.transposed(), whole.T),
        (made.transposed().transposed()[2], whole[2]),
        (made[2:2], whole[2:2]),
    ):
        assert part.shape == want.shape
        np.testing.assert_array_equal(part.array("float32"), want)
    with pytest.raises(ValueError, match="groups lie along"):
        made.transposed()[1:]
    with pytest.raises(ValueError, match="groups lie along"):
        made.transposed()[0]
    assert made.equals(handle(drawn(1), format))
    assert not made.equals(handle(drawn(2), format))
    assert made.widened().format == "f32"


@every_format
def test_experts_of_a_stack_of_three_axes(format: str) -> None:
    each = [handle(drawn(seed), format) for seed in range(3)]
    codes, factors = (np.stack([pick(one) for one in each]) for pick in (lambda w: w.data, lambda w: w.scale.weight.data))
    made = grouped.grouped(Weight.of("w", np.zeros((3, 5, 96), np.float32)), format, codes, factors)
    made = type(made)(**vars(made) | {"scale": type(made.scale)(made.scale.weight, (1, 1, GROUP), (0, 0, 0))})
    assert made[1].equals(each[1])
    np.testing.assert_array_equal(made.array("float32")[2], each[2].array("float32"))


@every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_factors_are_named(format: str, bad: float) -> None:
    made = handle(drawn(1), format)
    assert made.scale is not None
    made.scale.weight.data[1, 2] = bad
    refused(CheckpointError, lambda: made.array("float32"), "w_factors", str(bad))


def test_fingerprints_tell_formats_apart() -> None:
    assert len({fingerprint({"w": handle(drawn(1), format)}) for format in FORMATS}) == 2


# -- numbers to codes -------------------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 30), st.sampled_from([0.0, 3.0]))
def test_q8_is_better_than_taking_the_largest_to_the_end(seed: int, spread: float) -> None:
    """No number moves by a step, and all together by less than with the step that takes the largest to 127."""
    x = drawn(seed, rows=40, spread=spread)
    groups, got = x.reshape(-1, GROUP), handle(x, "q8").array("float64").reshape(-1, GROUP)
    largest = np.abs(groups).max(1, keepdims=True)
    assert np.all(np.abs(got - groups) <= largest / 123.5)
    plain = np.rint(groups / largest * 127) * largest / 127
    if not spread:
        assert ((got - groups) ** 2).sum() < 0.9 * ((plain - groups) ** 2).sum()


@given(st.integers(0, 1 << 30))
def test_q4_is_better_than_taking_the_largest_to_the_end(seed: int) -> None:
    x = drawn(seed, rows=40)
    groups, got = x.reshape(-1, GROUP), handle(x, "q4").array("float64").reshape(-1, GROUP)
    error, plain = ((got - groups) ** 2).sum(1), plain_error(groups)
    assert np.all(error <= plain * 1.02)
    assert error.sum() < 0.93 * plain.sum()


@every_format
def test_what_is_whole_stays_whole(format: str) -> None:
    """Numbers that codes of one factor hold come back as they were."""
    low, high = (-127, 127) if format == "q8" else (-8, 7)
    x = np.random.default_rng(3).integers(low, high + 1, (4, 64)).astype(np.float32)
    x[:, ::32] = low
    np.testing.assert_array_equal(handle(x * 0.25, format).array("float32"), x * 0.25)


@every_format
def test_zeros_and_the_smallest_numbers(format: str) -> None:
    x = np.zeros((4, 32), np.float32)
    x[1], x[2], x[3, 5] = 1e-9, 3e-7, -0.0
    made = handle(x, format)
    assert made.scale is not None
    factors = made.scale.weight.data
    assert np.array_equal(factors[[0, 3]].view(np.uint16), [[0], [0]])
    assert np.all(made.data[[0, 3]] == (0 if format == "q8" else 0x88))
    assert np.all(np.abs(made.array("float64") - x) <= 2.0**-24)
    assert np.all(np.abs(factors[1:3]) >= np.float16(2.0**-24))


@every_format
def test_the_largest_numbers(format: str) -> None:
    x = drawn(4)
    x *= LARGEST[format] / np.abs(x).max()
    assert np.all(np.isfinite(handle(x, format).array("float32")))
    refused(CheckpointError, lambda: handle(x * np.float32(1.1), format), "memory: tensor w holds", "beyond", format)


@every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_damaged_numbers_are_refused_by_name(format: str, bad: float) -> None:
    x = drawn(5)
    x[3, 70] = bad
    refused(CheckpointError, lambda: handle(x, format), "memory: tensor w holds", "cannot be quantised")


@every_format
def test_rows_do_not_depend_on_each_other(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(6, rows=9)
    whole = handle(x, format)
    monkeypatch.setattr(grouped, "PIECE", 200)
    assert handle(x, format).equals(whole)
    codes, factors = quantise(x[4:5], format)
    assert whole.scale is not None
    np.testing.assert_array_equal(codes, whole.data[4:5])
    np.testing.assert_array_equal(factors, whole.scale.weight.data[4:5])


# -- kernels ----------------------------------------------------------------------------------------------------------

STORED = {"f64": np.float64, "f32": np.float32, "f16": np.float16}


@every_format
@pytest.mark.parametrize("stored", ["f64", "f32", "f16", "bf16", "transposed"])
def test_kernels_give_the_same_bits(format: str, stored: str) -> None:
    pytest.importorskip("numba", reason="Numba is not installed")
    x = drawn(7, rows=70, width=160, spread=4.0)
    x[5], x[6, :32], x[7, ::2] = 0.0, -0.0, 1.0
    x = np.clip(x, -60000, 60000)
    if stored == "bf16":
        weight = Weight("w", x.shape, "bf16", (x.view(np.uint32) >> 16).astype(np.uint16))
    elif stored == "transposed":
        weight = Weight.of("w", np.ascontiguousarray(x.T)).transposed()
    else:
        weight = Weight.of("w", x.astype(STORED[stored]))
    assert get_backend("numba").quantised(weight, format).equals(quantised(weight, format))


@every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e9])
def test_kernels_refuse_what_the_canon_refuses(format: str, bad: float) -> None:
    pytest.importorskip("numba", reason="Numba is not installed")
    x = drawn(8)
    x[4, 95] = bad
    refused(CheckpointError, lambda: get_backend("numba").quantised(Weight.of("w", x), format), "tensor w holds")


# -- which tensors ----------------------------------------------------------------------------------------------------


def names(architecture: str, **changes: int) -> set[str]:
    """The tensors of a tiny model that are quantised, without the numbers of layers."""
    described = interpret(make_config(architecture, **changes))
    spec = described.architecture.weight_spec(described.config)
    handles = marked(spec, random_weights(spec), "q4")
    chosen = [
        name
        for name, each in handles.items()
        if (all(weight.quantisable for weight in each.weights) if isinstance(each, Stack) else each.quantisable)
    ]
    return {".".join(part for part in name.removesuffix(".weight").split(".") if not part.isdigit()) for name in chosen}


def test_the_matrices_of_a_dense_model() -> None:
    """Rows of 48 have no whole groups; the embedding is the head."""
    attention = {f"layers.self_attn.{each}_proj" for each in ("q", "k", "v", "o")}
    ffn = {"layers.mlp.gate_proj", "layers.mlp.up_proj"}
    assert names("qwen3") == attention | ffn | {"embed_tokens"}
    assert names("qwen3", tie_word_embeddings=False) == attention | ffn | {"lm_head"}
    assert names("qwen3", intermediate_size=64) == attention | ffn | {"layers.mlp.down_proj", "embed_tokens"}


def test_the_matrices_of_a_mixture() -> None:
    """No router, and no gate of a shared expert, which has one row."""
    chosen = names("qwen2_moe", moe_intermediate_size=64, shared_expert_intermediate_size=64)
    assert {"layers.mlp.experts.gate_proj", "layers.mlp.experts.down_proj", "layers.mlp.shared_expert.up_proj"} <= chosen
    assert not any("router" in name or name.endswith((".gate", "shared_expert_gate")) for name in chosen)


def test_kv_b_is_never_quantised() -> None:
    chosen = names("deepseek_v3", kv_lora_rank=32, v_head_dim=16, q_lora_rank=32, qk_nope_head_dim=16)
    assert {"layers.self_attn.q_b_proj", "layers.self_attn.o_proj", "layers.self_attn.kv_a_proj_with_mqa"} <= chosen
    assert "layers.self_attn.kv_b_proj" not in chosen


def test_inputs_of_conv1d_count() -> None:
    """GPT-2 stores [in, out]; positions are looked up, and no head."""
    assert names("gpt2") == {"h.attn.c_attn", "h.attn.c_proj", "h.mlp.c_fc", "h.mlp.c_proj", "wte"}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_only_matrices_of_known_parts(architecture: str) -> None:
    described = interpret(make_config(architecture))
    spec = described.architecture.weight_spec(described.config)
    assert any(tensor.part in grouped.PARTS for tensor in spec.values())
    assert not {name for name in names(architecture) if "norm" in name or "altup" in name}


def test_what_is_quantised_already() -> None:
    described = interpret(make_config("qwen3"))
    spec = described.architecture.weight_spec(described.config)
    handles = random_weights(spec)
    q_proj = handles["layers.0.self_attn.q_proj.weight"]
    assert isinstance(q_proj, Weight)
    handles["layers.0.self_attn.q_proj.weight"] = quantised(q_proj, "q8")
    kept = marked(spec, handles, "q8")["layers.0.self_attn.q_proj.weight"]
    assert isinstance(kept, Weight)
    assert not kept.quantisable
    refused(ArgumentError, lambda: marked(spec, handles, "q4"), "'q4'", "q8 already")


def test_bits() -> None:
    """8.5 and 4.5 bits per weight."""
    for format, bits in (("q8", 8.5), ("q4", 4.5)):
        assert handle(drawn(9, 64, 64), format).nbytes * 8 == bits * 64 * 64
        assert PACKED[format] == (1 if format == "q8" else 2)
