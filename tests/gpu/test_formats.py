"""Experts and latent attention in every storage format, few tokens and many, against the canon on the same weights."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from npllm import grouped
from npllm.arrays import Array
from npllm.backend import LN, RMS, Backend
from npllm.backends.cupy_gpu import products as cupy_products
from npllm.backends.cupy_gpu.latent import TILES, shared_bytes
from npllm.backends.cupy_gpu.sources import source
from npllm.blocks.dtypes import round_to_bfloat16
from npllm.blocks.masks import CAUSAL
from npllm.cache import Keys, Rows
from npllm.handles import Scale, Stack, Weight
from npllm.testing import compare
from npllm.weights import MLP, QKV, Experts, GatedFFN, Linear
from tests.compare import LIMITS
from tests.gpu.emulator import EmulatedBackend, checked, emulated
from tests.gpu.emulator.device import built

pytestmark = [emulated, checked]

# Queries, keys, values, the softmax's weights and kv_b's products are rounded to bf16, each by up to 2^-9.
COARSE = compare.Limit(1e-2, 3e-2, "five roundings of 2^-9 in sums of some ten terms")

FORMATS = ("f32", "f16", "bf16", "f8_e4m3", "q8", "q4")

some_formats = pytest.mark.parametrize(
    "format", [pytest.param(name, marks=[] if name in ("f8_e4m3", "q4") else pytest.mark.full) for name in FORMATS]
)


def agree(got: Array, want: Array, limit: compare.Limit = LIMITS["reordered"]) -> None:
    compare.agree(got.astype(np.float64), want, limit)


def stored(name: str, x_FD: Array, format: str, block: tuple[int, int] = (16, 32)) -> Weight:
    """Normal numbers in a format; FP8 in blocks, the last ones partial."""
    plain = Weight.of(name, x_FD.astype(np.float16 if format == "f16" else np.float32))
    if format in ("f32", "f16"):
        return plain
    if format == "bf16":
        return Weight(name, plain.shape, format, round_to_bfloat16(np, plain.data))
    if format in grouped.PACKED:
        return grouped.quantised(plain, format)
    dice = np.random.default_rng(len(name))
    codes = dice.integers(0, 0x78, x_FD.shape).astype(np.uint8) | np.where(x_FD < 0, 0x80, 0).astype(np.uint8)
    factors = dice.uniform(0.5, 2.0, tuple(-(-n // b) for n, b in zip(x_FD.shape, block, strict=True)))
    scale = Scale(Weight.of("factors", (factors * 2.0**-8).astype(np.float32)), block, (0, 0))
    return Weight(name, x_FD.shape, format, codes, scale=scale)


def prepared(be: Backend, bundle: Any) -> Any:
    return be.prepare(bundle)


def run(be: Backend, weights: Experts, x: Array, index: Array, weight: Array, weigh: str) -> Array:
    mixture = prepared(be, weights)
    x, weight = (be.asarray(each.astype(be.array_dtype)) for each in (x, weight))
    return be.to_numpy(be.moe(x, mixture, be.asarray(index), weight, "silu", weigh=weigh))


@pytest.mark.parametrize("tokens", [3, 20])
@some_formats
def test_experts(format: str, tokens: int) -> None:
    """Weighted on the output and on the input; a number that is no expert's takes part in nothing."""
    dice, E, F, D, C = np.random.default_rng(6), 5, 64, 96, 3
    parts = {
        name: [stored(f"{name}.{e}", dice.standard_normal(shape) / 8.0, format) for e in range(E)]
        for name, shape in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items()
    }
    weights = Experts(*(Linear(Stack(name, tuple(each))) for name, each in parts.items()))
    x, weight = dice.standard_normal((tokens, D)), dice.uniform(0.2, 1.0, (tokens, C))
    index = np.array([dice.permutation(E)[:C] for _ in range(tokens)])
    for weigh in ("output", "input"):
        want = run(Backend("float64"), weights, x, index, weight, weigh)
        agree(run(EmulatedBackend("float32"), weights, x, index, weight, weigh), want)
    strange = index.copy()
    strange[1, 0], strange[2, 1] = E, -1
    without = np.where((strange < 0) | (strange >= E), 0.0, weight)
    want = run(Backend("float64"), weights, x, np.clip(strange, 0, E - 1), without, "output")
    got = run(EmulatedBackend("float32"), weights, x, strange, weight, "output")
    agree(got, want)


# Widths that are whole vectors of every format, and that no vector divides.
WIDE, ODD = 96, 75


def products(be: Backend, format: str, tokens: int, wide: int = WIDE) -> list[Array]:
    """All products of a dense layer, through norms, with biases and on top of a residual."""
    dice = np.random.default_rng(tokens)

    def linear(name: str, rows: int, columns: int) -> Linear:
        bias = Weight.of(f"{name}.bias", dice.standard_normal(rows).astype(np.float32))
        return Linear(stored(name, dice.standard_normal((rows, columns)) / 8.0, format), bias)

    heads = QKV(*(linear(name, rows, wide) for name, rows in (("q", 30), ("k", 10), ("v", 10))))
    gated = GatedFFN(linear("gate", WIDE, wide), linear("up", WIDE, wide), linear("down", ODD, WIDE))
    # Groups of 32 are whole.
    hidden = WIDE if format in grouped.PACKED else ODD
    mlp, gain = (
        MLP(linear("fc", hidden, wide), linear("proj", wide, hidden)),
        dice.uniform(0.5, 1.5, wide).astype(np.float32),
    )
    x, residual = dice.standard_normal((tokens, wide)), dice.standard_normal((tokens, ODD))
    x_MD, residual_MD = (be.asarray(each.astype(be.array_dtype)) for each in (x, residual))
    plain = RMS(be.prepare(Linear(Weight.of("gain", gain))), 1e-6)
    shifted = LN(be.prepare(Linear(Weight.of("gain", gain), Weight.of("shift", gain - 1.0))), 1e-5)
    results = (
        *be.project_heads(x_MD, be.prepare(heads), 10, norm=plain),
        be.gated_ffn(x_MD, be.prepare(gated), "gelu_pytorch_tanh", norm=plain, residual_MD=residual_MD),
        be.mlp(x_MD, be.prepare(mlp), "gelu", norm=shifted, residual_MD=x_MD),
        be.linear(x_MD, be.prepare(mlp.c_fc)),
    )
    return [be.to_numpy(each) for each in results]


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 70])
@pytest.mark.parametrize(
    "format", [pytest.param(name, marks=[] if name in ("bf16", "f8_e4m3", "q4") else pytest.mark.full) for name in FORMATS]
)
def test_products(format: str, tokens: int) -> None:
    wants = products(Backend("float64"), format, tokens)
    for got, want in zip(products(EmulatedBackend("float32"), format, tokens), wants, strict=True):
        agree(got, want)


# Numbers of tokens as sums of two of bf16.
IN_TWO = compare.Limit(3e-5, 1e-4, "each product is off by up to 2^-17 of itself, in sums of some hundred")


@pytest.mark.parametrize(("tokens", "wide", "rows"), [(3, WIDE, 2), (8, ODD, 4), (5, 1024 + 40, 8), (8, 2 * 1024, 8)])
def test_products_of_few_tokens_on_tensor_cores(tokens: int, wide: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more numbers than are staged at a time, too, and of more rows of a warp."""
    monkeypatch.setattr(cupy_products, "MORE_ROWS", (rows,))
    monkeypatch.setattr(cupy_products, "LEAST_BLOCKS", 0)
    wants = products(Backend("float64"), "bf16", tokens, wide)
    for dtype in ("stored", "bfloat16"):
        for got, want in zip(products(EmulatedBackend(dtype), "bf16", tokens, wide), wants, strict=True):
            agree(got, want, IN_TWO)


@pytest.mark.parametrize("tokens", [3, 20])
def test_gate_and_up_in_blocks_of_different_widths(tokens: int) -> None:
    dice, F, D = np.random.default_rng(7), 48, 192
    sizes = {"gate": (F, D, (16, 32)), "up": (F, D, (16, 128)), "down": (D, F, (16, 32))}
    w = GatedFFN(
        *(Linear(stored(name, dice.standard_normal(shape), "f8_e4m3", block)) for name, (*shape, block) in sizes.items())
    )
    x = dice.standard_normal((tokens, D))

    def computed(be: Backend) -> Array:
        return be.to_numpy(be.gated_ffn(be.asarray(x.astype(be.array_dtype)), prepared(be, w), "silu"))

    agree(computed(EmulatedBackend("float32")), computed(Backend("float64")))


def test_the_bytes_that_are_asked_for_are_those_that_are_taken() -> None:
    """Also where kernels do not read what is stored: FP8 in blocks across their vectors, experts in two formats, float64."""
    dice, be = np.random.default_rng(3), EmulatedBackend("stored")
    narrow = Scale(Weight.of("factors", np.ones((4, 3), np.float16)), (16, 32), (0, 0))
    each = {name: stored(name, dice.standard_normal((50, 96)), name) for name in FORMATS}
    each["of blocks across vectors"] = stored("odd", dice.standard_normal((50, 96)), "f8_e4m3", (16, 24))
    each["of short rows"] = stored("short", dice.standard_normal((50, 3)), "bf16")
    each["of factors that are widened"] = replace(each["f8_e4m3"], scale=narrow)
    each["of doubles"] = Weight.of("f64", dice.standard_normal((50, 96)))
    handles: dict[str, Any] = dict(each)
    for first, second in (("bf16", "bf16"), ("bf16", "f8_e4m3"), ("f8_e4m3", "of blocks across vectors"), ("f64", "bf16")):
        handles[f"{first}, {second}"] = Stack("experts", (each.get(first) or each["of doubles"], each[second]))
    for name, handle in handles.items():
        assert be.bytes_needed([handle]) == be.prepare(Linear(handle)).weight.nbytes, name


@pytest.mark.parametrize("stored_keys", ["float32", "bfloat16"])
@some_formats
def test_absorbed_latents(format: str, stored_keys: str) -> None:
    """kv_b_proj in every format, keys in both types and in pages, rows of different lengths."""
    dice, H, nope, J, V, L = np.random.default_rng(8), 4, 16, 8, 12, 64
    w = stored("kv_b", dice.standard_normal((H * (nope + V), L)) / 8.0, format)
    x_BSGK = dice.standard_normal((5, 8, 1, L + J)).astype(np.float32)
    if stored_keys == "bfloat16":
        x_BSGK = (x_BSGK.view(np.uint32) & 0xFFFF0000).view(np.float32)
    pages, counts = ((3, 1, 4), (0, 2, 2)), (19, 9)
    q_MHF = dice.standard_normal((3, H, nope + J)).astype(np.float32)

    def attended(be: Backend) -> Array:
        real = be.array_dtype
        storage: Any = x_BSGK.astype(real)
        widen = None
        if stored_keys == "bfloat16" and real == "float32":
            storage, widen = round_to_bfloat16(np, x_BSGK), "float32"
        storage = be.asarray(storage)
        keys = Keys(storage, storage[..., :L], (0, 0), counts, (0, 0), (0, 0), be.xp, widen, pages)
        rows = Rows((0, 1), (17, 8), (2, 1), be.asarray(np.array([17, 18, 8])))
        linear = Linear(*prepared(be, Linear(w)))
        scale = (nope + J) ** -0.5
        return be.to_numpy(be.latent_attention(be.asarray(q_MHF.astype(real)), keys, rows, linear, mask=CAUSAL, scale=scale))

    want = attended(Backend("float64"))
    agree(attended(EmulatedBackend("float32")), want)
    agree(attended(EmulatedBackend("stored")), want, COARSE)


def test_the_same_bits_every_time() -> None:
    """Blocks and threads take turns in another order at each launch."""
    dice = np.random.default_rng(9)
    parts = [
        [stored(f"{i}.{e}", dice.standard_normal(s), "bf16") for e in range(6)]
        for i, s in enumerate(((32, 48), (32, 48), (48, 32)))
    ]
    weights = Experts(*(Linear(Stack("experts", tuple(each))) for each in parts))
    for tokens in (4, 30):
        x, weight = dice.standard_normal((tokens, 48)), dice.uniform(0.2, 1.0, (tokens, 4))
        index = np.array([dice.permutation(6)[:4] for _ in range(tokens)])
        first, *others = (run(EmulatedBackend("stored"), weights, x, index, weight, "output") for _ in range(3))
        for other in others:
            np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("tiles", TILES)
def test_shared_memory_is_what_the_kernel_lays_out(tiles: int) -> None:
    device = EmulatedBackend("stored").device
    macros = {"STORED": 2, "WIDTH": 576, "LATENT": 512, "HEAD_TILES": tiles}
    text = device.header + "".join(f"#define {name} {value}\n" for name, value in macros.items())
    text += source("latent_attention.cu") + 'extern "C" int size() { return sizeof(Shared); }\n'
    assert ctypes.CDLL(str(built("size", text, str(device.runtime)))).size() == shared_bytes(576, tiles)
