"""New queries, keys and latents on their way into caches, and what stands after a branch, against the canon in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npllm.arrays import Array
from npllm.backend import LN, RMS, Backend, HeadNorms, Norm
from npllm.blocks import CAUSAL, Rope, sliding
from npllm.cache import Cache, LayerSpec
from npllm.handles import Weight
from npllm.weights import LatentKV, LatentQ, Linear
from tests.compare import agree
from tests.gpu.emulator import EmulatedBackend, checked, emulated

pytestmark = [emulated, checked]


class Heads(NamedTuple):
    """Sizes and rules of the way to a cache."""

    heads: int
    kv_heads: int
    width: int
    value: int
    pairs: int
    interleaved: bool
    normed: str  # "", "head", "all heads" or "late": after RoPE
    gained: bool
    offset: float
    values_normed: bool
    scaled: bool
    window: int | None


HEADS = st.builds(
    lambda per, **fields: Heads(heads=per * fields["kv_heads"], **fields),
    per=st.sampled_from([1, 2, 3, 5]), kv_heads=st.sampled_from([1, 2, 5]), width=st.sampled_from([6, 16, 34, 128, 256]),
    value=st.sampled_from([6, 16, 33]), pairs=st.sampled_from([0, 1, 3]), interleaved=st.booleans(),
    normed=st.sampled_from(["", "head", "all heads", "late"]), gained=st.booleans(), offset=st.sampled_from([0.0, 1.0]),
    values_normed=st.booleans(), scaled=st.booleans(), window=st.sampled_from([None, 4]),
)  # fmt: skip

# New tokens of each row by step; of a window of 4, more than one at a time are gathered by the canon.
STEPS = st.sampled_from([[[3, 1, 2], [1, 1, 1], [1, 1, 1]], [[9, 2], [1, 1]], [[1]], [[20, 0, 3], [1, 1, 1]]])


def norm(be: Backend, dice: np.random.Generator, count: int, gained: bool, offset: float = 0.0) -> RMS:
    gain = dice.uniform(0.5, 1.5, count)
    params = Linear(be.asarray(gain.astype(be.array_dtype)), None) if gained else None
    return RMS(params, 1e-5, offset if gained else 0.0)


def placed(be: Backend, h: Heads, steps: list[list[int]], kv_dtype: str | None, seed: int) -> dict[str, Array]:
    """Queries of each step, and what the cache then holds of its rows."""
    dice, found = np.random.default_rng(seed), {}
    mask = CAUSAL if h.window is None else sliding(h.window)
    cache = be.new_cache([LayerSpec(h.kv_heads, h.width, h.value, mask)], 64, kv_dtype)
    slots = [cache.add() for _ in steps[0]]
    cache.reserve(32)
    widths = (h.heads * h.width, h.kv_heads * h.width) if h.normed == "all heads" else (h.width, h.width)
    q_norm, k_norm = (norm(be, dice, width, h.gained, h.offset) for width in widths)
    if not h.normed:
        q_norm = k_norm = None  # type: ignore[assignment]
    values = norm(be, dice, h.value, gained=False) if h.values_normed else None
    norms = HeadNorms(q_norm, k_norm, values, whole=h.normed == "all heads", turned=h.normed == "late")
    for number, counts in enumerate(steps):
        rows = cache.plan(slots, counts)
        x = [dice.standard_normal((sum(counts), n)) for n in ((h.heads + h.kv_heads) * h.width, h.kv_heads * h.value)]
        qk_MF, v_MF = (be.asarray(each.astype(be.array_dtype)) for each in x)
        scale_M = be.asarray(dice.uniform(0.5, 2.0, sum(counts)).astype(be.array_dtype)) if h.scaled else None
        # Queries and keys lie side by side, as one product gives them.
        qk_MHK = qk_MF.reshape(sum(counts), h.heads + h.kv_heads, h.width)
        angles = be.angles(Rope(2 * h.pairs), rows.positions_M) if h.pairs else None
        q_MHK, _ = be.append_heads(
            qk_MHK[:, : h.heads], qk_MHK[:, h.heads :], v_MF.reshape(sum(counts), h.kv_heads, h.value), cache.layers[0],
            rows, norms=norms, angles=angles, interleaved=h.interleaved, scale_M=scale_M,
        )  # fmt: skip
        cache.advance(rows)
        found |= {f"q of step {number}": be.to_numpy(q_MHK)} | contents(be, cache, slots, number)
    return found


def contents(be: Backend, cache: Cache, slots: list[int], step: int) -> dict[str, Array]:
    kept = {(slot, name): x for slot in slots for name, x in cache.layers[0].contents(slot, cache.lengths[slot]).items()}
    return {f"{name} of row {slot} after step {step}": be.to_numpy(x) for (slot, name), x in kept.items()}


def widened(bits: Array) -> Array:
    """bfloat16 as float64."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def same(got: dict[str, Array], want: dict[str, Array], kv_dtype: str | None) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        if x.size and (kv_dtype is None or name.startswith("q")):
            agree(got[name].astype(np.float64), x, "block", what=name)
        elif x.size:
            # The nearest number of bfloat16, or beside the middle between two either of them.
            half = np.exp2(np.floor(np.log2(np.maximum(np.abs(x), 2.0**-100))) - 8.0)
            np.testing.assert_array_less(np.abs(widened(got[name]) - x), half * (1.0 + 1e-3) + 1e-6, name)


@pytest.mark.parametrize("kv_dtype", [None, "bfloat16"])
@settings(max_examples=40)
@given(h=HEADS, steps=STEPS, seed=st.integers(0, 1 << 20))
def test_heads_go_to_the_cache(kv_dtype: str | None, h: Heads, steps: list[list[int]], seed: int) -> None:
    want = placed(Backend("float64"), h, steps, None, seed)
    same(placed(EmulatedBackend("float32", strict=True), h, steps, kv_dtype, seed), want, kv_dtype)


def projected(
    be: Backend, direct: bool, interleaved: bool, scaled: bool, pairs: int, kv_dtype: str | None
) -> dict[str, Array]:
    """MLA's queries and latents of a prompt and of two steps after it."""
    dice, H, nope, L, D = np.random.default_rng(3), 6, 10, 36, 24
    width, found = nope + 2 * pairs, {}

    def made(name: str, *shape: int) -> Linear:
        return be.prepare(Linear(Weight.of(name, (dice.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32))))

    def gain(count: int) -> Linear:
        return Linear(be.asarray(dice.uniform(0.5, 1.5, count).astype(be.array_dtype)), None)

    q = made("q", H * width, D) if direct else LatentQ(made("a", 20, D), gain(20), made("b", H * width, 20))
    kv, before = LatentKV(made("kv", L + 2 * pairs, D), gain(L)), RMS(gain(D), 1e-5)
    cache = be.new_cache([LayerSpec(1, L + 2 * pairs, 0, latent=L)], 64, kv_dtype)
    slots = [cache.add(), cache.add()]
    cache.reserve(32)
    for number, counts in enumerate(([9, 2], [1, 1], [1, 1])):
        rows = cache.plan(slots, counts)
        x_MD = be.asarray(dice.standard_normal((sum(counts), D)).astype(be.array_dtype))
        scale_M = be.asarray(dice.uniform(0.5, 2.0, sum(counts)).astype(be.array_dtype)) if scaled else None
        of = (q, kv, cache.layers[0], rows, be.angles(Rope(2 * pairs), rows.positions_M), width, 1e-6)
        q_MHK, _ = be.append_latents(x_MD, *of, norm=before, interleaved=interleaved, scale_M=scale_M)
        cache.advance(rows)
        found |= {f"q of step {number}": be.to_numpy(q_MHK)} | contents(be, cache, slots, number)
    return found


@pytest.mark.parametrize("kv_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(("interleaved", "scaled", "pairs"), [(True, False, 3), (False, True, 3), (True, True, 40)])
def test_latents_go_to_the_cache(direct: bool, interleaved: bool, scaled: bool, pairs: int, kv_dtype: str | None) -> None:
    want = projected(Backend("float64"), direct, interleaved, scaled, pairs, None)
    same(projected(EmulatedBackend("float32", strict=True), direct, interleaved, scaled, pairs, kv_dtype), want, kv_dtype)


@pytest.mark.parametrize("width", [5, 96, 1100])
@pytest.mark.parametrize("kind", ["rms", "unit", "layer"])
def test_a_norm_after_a_branch(kind: str, width: int) -> None:
    def run(be: Backend) -> Array:
        dice = np.random.default_rng(width)
        x, y, gain, bias = (
            be.asarray(dice.standard_normal(n).astype(be.array_dtype)) for n in ((3, width),) * 2 + (width,) * 2
        )
        of: Norm = LN(Linear(gain, bias), 1e-5) if kind == "layer" else RMS(Linear(gain, None), 1e-5, 1.0)
        return be.to_numpy(be.add_normed(x, y, RMS(None, 1e-5) if kind == "unit" else of))

    agree(run(EmulatedBackend("float32")).astype(np.float64), run(Backend("float64")), "block")


@pytest.mark.parametrize(("tokens", "streams", "width"), [(1, 4, 300), (3, 2, 5), (40, 3, 64)])
def test_streams_are_predicted_from_all_of_them(tokens: int, streams: int, width: int) -> None:
    dice = np.random.default_rng(streams)
    x_MAD, mixing_MAA = (dice.standard_normal((tokens, streams, n)) for n in (width, streams))

    def run(be: Backend) -> Array:
        return be.to_numpy(be.altup_predict(*(be.asarray(each.astype(be.array_dtype)) for each in (x_MAD, mixing_MAA))))

    agree(run(EmulatedBackend("float32", strict=True)).astype(np.float64), run(Backend("float64")), "block")
