"""No launch asks for more than a GPU gives: shared memory of a block on Ampere, Ada and Hopper, and the sizes of grids."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import numpy as np
import pytest

from npllm.backend import Backend
from npllm.backends.cupy_gpu.attention import LANES, TILE_WIDTHS, shape_of
from npllm.backends.cupy_gpu.backend import CupyBackend
from npllm.backends.cupy_gpu.device import Argument, Device, Grid, Kernel
from npllm.blocks import CAUSAL
from npllm.cache import Keys, Rows
from npllm.handles import Stack, Weight
from npllm.weights import Experts, Linear
from tests.compare import agree
from tests.gpu.emulator import EmulatedBackend, Emulator, emulated
from tests.gpu.emulator.device import allowed

pytestmark = emulated

# Bytes of shared memory that a block may have: sm_86 and sm_89, sm_80, sm_90.
LIMITS = (99 * 1024, 163 * 1024, 227 * 1024)


# What kernels have besides as arrays, those that ask for much; the others have little.
ARRAYS = {"attend_tiles": 0, "attend_latents": 0}


class Refusing(Emulator):
    """Compiles and runs nothing: it notes what would be launched, and refuses what a GPU would."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.shared_limit, self.seen = limit, list[tuple[str, Grid, int]]()

    def kernel(self, file: str, name: str, defines: Any) -> Kernel:
        return Kernel(file, name, tuple(sorted(defines.items())), None)

    def launch(self, kernel: Kernel, grid: Grid, block: int, args: Iterable[Argument], shared: int = 0) -> None:
        macros, arrays = dict(kernel.defines), ARRAYS.get(kernel.name, 8192)
        if kernel.name == "attend":
            arrays = 4 * macros["LANES"] * (macros["KEYS"] + 5) + 16
        allowed(self, kernel, grid, block, shared + arrays)
        self.seen.append((kernel.name, grid, shared))


def on(limit: int, dtype: str) -> CupyBackend:
    class Limited(EmulatedBackend):
        @classmethod
        def open_device(cls) -> Device:
            return Refusing(limit)

    return Limited(dtype)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("stored", ["float32", "uint16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_of_any_width(dtype: str, stored: str, limit: int) -> None:
    be = on(limit, dtype)
    sizes = [(n, n) for n in (1, 8, 40, 64, 72, 80, 96, 112, 128, 160, 192, 250, 256, 320, 512)]
    sizes += [(192, 128), (576, 512), (640, 512), (1024, 512), (24, 512)]
    for (K, V), per, counts in product(sizes, (1, 4, 8, 16), ((1, 1), (3, 40))):
        k, v = (be.empty(2, 64, 1, n, dtype=stored) for n in (K, V))
        firsts = (0, 0)
        keys = Keys(k, v, (0, 1), (50, 60), firsts, firsts, be.xp, None if stored == "float32" else "float32")
        rows = Rows((0, 1), (50 - counts[0], 60 - counts[1]), counts, be.asarray(np.arange(sum(counts))))
        be.attention(be.empty(sum(counts), per, K), keys, rows, mask=CAUSAL, scale=1.0)
    assert {name for name, *_ in be.device.seen} >= {"attend"}  # type: ignore[attr-defined]


def test_a_long_prompt_of_many_heads() -> None:
    """Keys and values of 128 heads, as latents in float32 give them, for 9,000 tokens at once."""
    be, M, H = on(min(LIMITS), "float32"), 9000, 128
    k, v = (be.empty(1, M, H, n) for n in (24, 16))
    keys = Keys(k, v, (0,), (M,), (0,), (0,), be.xp)
    rows = Rows((0,), (0,), (M,), be.asarray(np.arange(M)))
    be.attention(be.empty(M, H, 24), keys, rows, mask=CAUSAL, scale=1.0)
    assert len(be.device.seen) == 1  # type: ignore[attr-defined]


def test_the_widest_tiles_fit_the_least_gpu() -> None:
    """Of attend_tiles, whose sizes are fixed: all of what sm_86 has, and not a byte more."""
    from npllm.backends.cupy_gpu.attention import QUERIES

    width = TILE_WIDTHS[-1]
    assert 2 * QUERIES * (2 * (width + 8) + width + 8) <= min(LIMITS)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("dtype", ["float32", "stored"])
@pytest.mark.parametrize(("L", "J"), [(512, 64), (500, 64), (256, 64), (12, 6)])
def test_latent_attention_of_any_width(L: int, J: int, dtype: str, limit: int) -> None:
    be, nope, value = on(limit, dtype), 16, 8
    for H, stored, format in product((1, 16, 128), ("float32", "uint16"), ("f32", "bf16")):
        data = np.zeros((H * (nope + value), L), np.float32 if format == "f32" else np.uint16)
        w = Linear(*be.prepare(Linear(Weight("kv_b", data.shape, format, data))))
        k = be.empty(1, 64, 1, L + J, dtype=stored)
        keys = Keys(k, k[..., :L], (0,), (33,), (0,), (0,), be.xp, None if stored == "float32" else "float32")
        rows = Rows((0,), (32,), (1,), be.asarray(np.arange(1)))
        be.latent_attention(be.empty(1, H, nope + J), keys, rows, w, mask=CAUSAL, scale=1.0)
    assert {name for name, *_ in be.device.seen} & {"attend", "attend_latents"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("F", "D", "taken"), [(8, 131_070, True), (8, 131_071, False), (262_140, 8, True), (262_141, 8, False)]
)
def test_experts_of_any_width(F: int, D: int, taken: bool) -> None:
    """Where a grid would be too large, the inherited definition takes them."""
    be = on(max(LIMITS), "float32")
    shapes = ((F, D), (F, D), (D, F))
    w = Experts(*(Linear(Stack("e", (Weight("e", s, "bf16", np.zeros(s, np.uint16)),))) for s in shapes))
    index, weight = be.asarray(np.zeros((1, 1), np.int64)), be.asarray(np.ones((1, 1), np.float32))
    be.moe(be.asarray(np.zeros((1, D), np.float32)), be.prepare(w), index, weight, "silu")
    assert ("moe_say_few" in {name for name, *_ in be.device.seen}) == taken  # type: ignore[attr-defined]


def test_what_the_arrays_of_attention_take() -> None:
    """The formula of `shape_of` against what the compiler laid out."""
    device = EmulatedBackend("float32").device
    for lanes in LANES:
        shape = shape_of((128, 128), 2, lanes, max(LIMITS))
        macros = {"STORED": 2, "LANES": lanes, "KEYS": shape.tile, "VALUES": 1}
        device.kernel("attention.cu", "attend", macros)
        laid = device.arrays["attention.cu", "attend", *sorted(macros.items())]  # type: ignore[attr-defined]
        # Rounded up to 8 where a library ends.
        assert laid - 8 < shape.arrays <= laid + 64


@pytest.mark.parametrize("dtype", ["float32"])
def test_latents_where_a_block_has_little_room(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek's widths in float32 on a GPU of 99 KiB: 107 KiB would be the largest block."""
    monkeypatch.setattr(Emulator, "shared_limit", min(LIMITS))
    dice = np.random.default_rng(4)
    q, x = dice.standard_normal((1, 16, 576)), dice.standard_normal((1, 9, 1, 576))

    def run(be: Backend) -> Any:
        k = be.asarray(x.astype(be.array_dtype))
        keys = Keys(k, k[..., :512], (0,), (9,), (0,), (0,), be.xp)
        rows = Rows((0,), (8,), (1,), be.asarray(np.array([8])))
        return be.to_numpy(be.attention(be.asarray(q.astype(be.array_dtype)), keys, rows, mask=CAUSAL, scale=0.05))

    agree(run(EmulatedBackend(dtype)).astype(np.float64), run(Backend("float64")), "reordered")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_keys_at_any_address(tokens: int, dtype: str) -> None:
    """Vectors are read where keys begin at multiples of 16 bytes, and single numbers elsewhere: the same comes out."""
    be, S, G, K = EmulatedBackend(dtype), 40, 2, 32
    dice = np.random.default_rng(5)
    q, flat = (
        dice.standard_normal((tokens, 4, K)).astype(np.float32),
        dice.standard_normal(2 * S * G * K + 1).astype(np.float32),
    )
    rows = Rows((0,), (S - tokens,), (tokens,), be.asarray(np.arange(tokens)))

    def attended(offset: int) -> Any:
        room = be.empty(len(flat) - 1 + offset)[offset:]
        room[...] = be.asarray(flat[1:])
        k, v = (room[part * S * G * K :][: S * G * K].reshape(1, S, G, K) for part in range(2))
        assert be.device.address(k) % 16 == 4 * offset
        keys = Keys(k, v, (0,), (S,), (0,), (0,), be.xp)
        return be.to_numpy(be.attention(be.asarray(q), keys, rows, mask=CAUSAL, scale=0.2))

    np.testing.assert_array_equal(attended(1), attended(0))
