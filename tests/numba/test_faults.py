"""What goes wrong outside of kernels: no tokens, NaN and infinity, arrays that lie oddly, more threads than cores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from npllm import blocks
from npllm.arrays import Array
from npllm.backend import RMS, Backend
from npllm.backends.numba_cpu.backend import NumbaBackend
from npllm.backends.numba_cpu.jit import Called, Compiled
from npllm.backends.numba_cpu.team import CALLED
from npllm.cache import LayerSpec
from npllm.handles import Weight
from npllm.machine import cores
from npllm.testing.compare import unmodified
from npllm.weights import MLP, QKV, Experts, GatedFFN, Linear
from tests.compare import agree
from tests.exported import prepared

DICE = np.random.default_rng(7)
D, F = 37, 50

every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "stored"])
# On either side of the numbers of tokens at which kernels change.
every_count = pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 16, 17, 65])


def normal(*shape: int) -> Array:
    return DICE.standard_normal(shape).astype(np.float32)


def weight(rows: int, columns: int) -> Linear:
    return Linear(Weight.of("w", normal(rows, columns) / np.float32(columns**0.5)), Weight.of("b", normal(rows)))


def no_bias(rows: int, columns: int) -> Linear:
    return weight(rows, columns)._replace(bias=None)


BUNDLES: dict[str, Any] = {
    "linear": weight(F, D),
    "project_heads": QKV(no_bias(40, D), no_bias(20, D), no_bias(20, D)),
    "gated_ffn": GatedFFN(no_bias(F, D), no_bias(F, D), no_bias(D, F)),
    "mlp": MLP(weight(F, D), weight(D, F)),
}
every_product = pytest.mark.parametrize("name", BUNDLES)


def run(be: Backend, name: str, x_MD: Array) -> Array:
    """The operation `name` on the bundle of that name; all of its outputs side by side."""
    w = be.prepare(BUNDLES[name])
    if name == "linear":
        return be.linear(x_MD, w)
    if name == "project_heads":
        return np.concatenate(be.project_heads(x_MD, w, 10), axis=1)
    return be.gated_ffn(x_MD, w, "silu") if name == "gated_ffn" else be.mlp(x_MD, w, "gelu_new")


@every_dtype
@every_product
def test_no_tokens(name: str, dtype: str) -> None:
    assert run(NumbaBackend(dtype), name, normal(0, D)).shape == run(Backend(), name, normal(0, D)).shape


@every_dtype
@every_count
@every_product
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(value: float, name: str, M: int, dtype: str) -> None:
    """And all else keeps its bits."""
    be, x_MD = NumbaBackend(dtype), normal(M, D)
    before = run(be, name, x_MD)
    x_MD[M // 2, 5] = value
    after = run(be, name, x_MD)
    others = np.arange(M) != M // 2
    agree(after[others], before[others], "exact", literal=True)
    assert not np.isfinite(after[M // 2]).all()


LAYOUTS = {
    "misaligned": lambda x: misaligned(x),
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "every other column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "backwards": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "the same row": lambda x: np.broadcast_to(x[:1], x.shape),
    "read only": lambda x: read_only(x),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def misaligned(x: Array) -> Array:
    room = np.empty(x.nbytes + 1, np.uint8)
    there = room[1:].view(x.dtype).reshape(x.shape)
    there[...] = x
    assert not there.flags.aligned
    return there


def read_only(x: Array) -> Array:
    x = x.copy()
    x.flags.writeable = False
    return x


@every_dtype
@every_layout
@pytest.mark.parametrize("M", [2, 21])
@every_product
def test_inputs_that_lie_oddly(name: str, M: int, layout: str, dtype: str) -> None:
    be, x_MD = NumbaBackend(dtype), LAYOUTS[layout](normal(M, D))
    with unmodified(x_MD):
        got = run(be, name, x_MD)
    agree(got, run(be, name, np.array(x_MD, order="C")), "exact")


@every_layout
@pytest.mark.parametrize("M", [2, 21])
def test_residuals_that_lie_oddly(M: int, layout: str) -> None:
    be, x_MD, residual_MF = NumbaBackend("float32"), normal(M, D), LAYOUTS[layout](normal(M, F))
    w = be.prepare(BUNDLES["linear"])
    agree(be.linear(x_MD, w, residual_MF), be.linear(x_MD, w, np.array(residual_MF, order="C")), "exact")


def test_gains_that_lie_oddly() -> None:
    be, x_MD, gain_D = NumbaBackend("float32"), normal(21, D), np.repeat(normal(D), 2)[::2]
    gains = (be.prepare(Linear(Weight.of("gain", each))) for each in (gain_D, gain_D.copy()))
    w = be.prepare(BUNDLES["project_heads"])
    ours, theirs = (be.project_heads(x_MD, w, 10, norm=RMS(gain, 1e-6))[0] for gain in gains)
    agree(ours, theirs, "exact")


@every_dtype
@every_layout
@pytest.mark.parametrize("M", [2, 21])
def test_weights_that_lie_oddly(M: int, layout: str, dtype: str) -> None:
    be, x_MD, handle = NumbaBackend(dtype), normal(M, D), BUNDLES["linear"].weight
    odd = replace(handle, data=LAYOUTS[layout](handle.data))
    plain = replace(handle, data=np.array(odd.data, order="C"))
    ours, theirs = (be.linear(x_MD, be.prepare(Linear(each))) for each in (odd, plain))
    agree(ours, theirs, "exact")


@every_layout
@pytest.mark.parametrize("M", [2, 21])
def test_heads_that_lie_oddly(M: int, layout: str) -> None:
    """What the operations on heads are given: norms, rotations, the cache and attention."""
    be, odd = NumbaBackend("float32"), [LAYOUTS[layout](normal(M, heads, 16)) for heads in (4, 2, 2)]
    angles = blocks.angles(np, blocks.Rope(16), np.arange(M), "float32")

    def attended(q_MHK: Array, k_MGK: Array, v_MGK: Array) -> Array:
        cache = be.new_cache([LayerSpec(2, 16, 16)], M)
        rows = cache.plan([cache.add()], [M])
        keys = cache.layers[0].append(be.rope(k_MGK, angles), v_MGK, rows)
        return be.attention(be.rms_norm(q_MHK, None, 1e-6), keys, rows, mask=blocks.CAUSAL, scale=0.25)

    with unmodified(*odd):
        got = attended(*odd)
    agree(got, attended(*(np.array(each, order="C") for each in odd)), "exact")


@every_layout
@pytest.mark.parametrize("M", [2, 21])
def test_choices_that_lie_oddly(M: int, layout: str) -> None:
    """What a mixture is given: tokens, experts and their weights."""
    be, x_MD, weight_MC = NumbaBackend("float32"), LAYOUTS[layout](normal(M, D)), LAYOUTS[layout](normal(M, 3))
    index_MC = LAYOUTS[layout](np.argsort(normal(M, 5), axis=1)[:, :3])
    shapes = (F, D), (F, D), (D, F)
    w = prepared(be, Experts(*(Linear([normal(*shape) for _ in range(5)]) for shape in shapes)))
    with unmodified(x_MD, weight_MC, index_MC):
        got = be.moe(x_MD, w, index_MC, weight_MC, "silu")
    plain = [np.array(each, order="C") for each in (x_MD, index_MC, weight_MC)]
    agree(got, be.moe(plain[0], w, *plain[1:], "silu"), "exact")


@pytest.mark.parametrize("dtype", ["float32", "stored"])
def test_weights_stay_where_they_are(dtype: str) -> None:
    handle = BUNDLES["linear"].weight
    assert np.shares_memory(NumbaBackend(dtype).prepare(handle)._data, handle.data)


def test_no_shape_is_compiled_for() -> None:
    """What one model has compiled serves any other."""
    be = NumbaBackend("float32")
    for M in (1, 3, 30):
        be.linear(normal(M, D), be.prepare(BUNDLES["linear"]))
    before = {name for name, each in Compiled.known.items() if "address" in vars(each)}
    for M, rows, columns in ((1, 7, 64), (2, 300, 5), (40, 64, 129)):
        be.linear(normal(M, columns), be.prepare(weight(rows, columns)))
    assert {name for name, each in Compiled.known.items() if "address" in vars(each)} == before


def test_functions_that_kernels_call_have_their_places_in_any_process() -> None:
    """Kernels that are kept call them by these, whatever is imported first."""
    assert sorted(each.name for each in Called.all) == sorted(CALLED)


def test_inputs_of_another_type() -> None:
    """float64 inputs are taken as float32."""
    be, x_MD = NumbaBackend("float32"), normal(4, D)
    agree(run(be, "linear", x_MD.astype(np.float64)), run(be, "linear", x_MD), "exact")


@pytest.mark.parametrize("threads", [1, cores(), cores() + 1, 500])
@every_product
def test_any_number_of_threads(name: str, threads: int) -> None:
    x_MD = normal(30, D)
    agree(run(NumbaBackend(threads=threads), name, x_MD), run(NumbaBackend(threads=1), name, x_MD), "exact")


def test_threads_of_the_interpreter_share_the_team() -> None:
    """Calls from several at once take turns."""
    from concurrent.futures import ThreadPoolExecutor

    be, inputs = NumbaBackend("float32"), [normal(9, D) for _ in range(64)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda x_MD: run(be, "gated_ffn", x_MD), inputs))
    for ours, x_MD in zip(got, inputs, strict=True):
        agree(ours, run(be, "gated_ffn", x_MD), "exact")
