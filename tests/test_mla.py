"""Multi-head latent attention: its two forms against each other, and both against transformers' attention modules."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from npllm import blocks
from npllm.arrays import Array
from npllm.backend import Backend
from npllm.backends.numba_cpu.backend import NumbaBackend
from npllm.numpy_backend import NumpyBackend
from npllm.testing.compare import norm, unmodified
from tests import strategies as our
from tests.compare import agree
from tests.exported import Parameters, Tensors, both_dtypes, cases_of, latent_attention, latent_spec, lookup
from tests.strict import StrictBackend

pytestmark = pytest.mark.usefixtures("checked_shapes")

every_backend = pytest.mark.parametrize(
    "make", [Backend, StrictBackend, NumpyBackend, NumbaBackend], ids=lambda each: each.__name__
)
either_form = pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "expanded"])


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_only_the_compressed_vector_is_normed_and_only_the_rest_turns() -> None:
    """A quarter turn takes the pair (5, 6) to (-6, 5); 3 and 4 have a mean square of 12.5."""
    quarter = blocks.Angles(np.zeros((1, 1)), np.ones((1, 1)))
    got = blocks.latent(np, np.array([[3.0, 4, 5, 6]]), np.array([1.0, 2]), quarter, 0.0)
    agree(got, np.array([[[3 / 12.5**0.5, 8 / 12.5**0.5, -6, 5]]]), "block float64")


def test_expanding_splits_each_head_into_key_and_value() -> None:
    """Two heads of one key number and two value numbers, and a shared key of one number."""
    up_SHF, rope_SGJ = np.arange(6.0).reshape(1, 2, 3), np.array([[[9.0]]])
    k_SHK, v_SHV = blocks.expand(np, up_SHF, rope_SGJ, 1)
    agree(k_SHK, np.array([[[0.0, 9], [3, 9]]]), "exact")
    agree(v_SHV, np.array([[[1.0, 2], [4, 5]]]), "exact")


@drawn(data=st.data(), nope=st.integers(1, 5))
def test_absorbed_is_expanded(data: st.DataObject, nope: int) -> None:
    """For any widths: queries in the latent space over latents, against queries over keys and values made of these."""
    (c_SGL, rope_SGJ), H = data.draw(our.arrays("c_SGV", "rope_SGJ", G=1)), data.draw(st.integers(1, 4))
    L, J = c_SGL.shape[2], rope_SGJ.shape[2]
    (up_HFL,) = data.draw(our.arrays("up_HFV", G=H, R=1, F=nope + 3, V=L))
    (q_THK,) = data.draw(our.arrays("q_THK", G=H, R=1, K=nope + J))
    allowed_TS = blocks.CAUSAL.allowed(np, np.arange(len(q_THK)), np.arange(len(c_SGL)))
    k_SHK, v_SHV = blocks.expand(np, np.einsum("sgl,hfl->shf", c_SGL, up_HFL), rope_SGJ, nope)
    want = blocks.softmax_attention(np, q_THK, k_SHK, v_SHV, allowed_TS, scale=0.5)
    latent_SGK, q_THF = np.concatenate([c_SGL, rope_SGJ], axis=2), blocks.absorb(np, q_THK, up_HFL, nope)
    o_THL = blocks.softmax_attention(np, q_THF, latent_SGK, c_SGL, allowed_TS, scale=0.5)
    agree(blocks.unabsorb(o_THL, up_HFL, nope), want, "reordered float64")


def test_decoding_takes_the_absorbed_form_and_a_prompt_the_expanded_one() -> None:
    """With the published widths: latent 512, and 128 + 128 numbers of kv_b_proj per head."""
    assert [blocks.absorbed_is_cheaper(queries, 512, 256) for queries in (1, 16, 170, 171, 4096)] == [True] * 3 + [False] * 2


# -- truth files ------------------------------------------------------------------------------------------------------


def attend(be: Backend, given: Parameters, t: Tensors) -> Array:
    """The whole row of a case in one step."""
    cache = be.new_cache([latent_spec(given)], 64)
    rows = cache.plan([cache.add()], [len(t["x"])])
    return latent_attention(be, given, t, t["x"], rows, cache.layers[0])


@every_backend
@either_form
@both_dtypes
@cases_of("mla")
def test_both_forms_give_what_transformers_gives(
    make: type[Backend], absorbed: bool, file: str, case: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, t, limit = lookup(file, case, dtype)
    monkeypatch.setattr("npllm.blocks.absorbed_is_cheaper", lambda *_: absorbed)
    monkeypatch.setattr("npllm.numpy_backend.SPLIT", 1)
    with unmodified(*t.values()):
        y_MD = attend(make(dtype), given, t)
    agree(y_MD, t["y"], limit)


@pytest.mark.parametrize("case", ["v3", "v2-no-q-lora", "mistral4"])
@pytest.mark.parametrize("mistake", ["half-split", "eps", "norm over all"])
def test_the_truth_tells_a_mistake(case: str, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs taken half-split; rms_norm_eps (here 0.01) in the place of 1e-6; the key normed with the latent vector."""
    given, t, _ = lookup("mla", case, "float64")
    if mistake == "half-split":
        monkeypatch.setattr(Backend, "rope", lambda be, x, angles, interleaved: blocks.rotate_halves(np, x, angles))
        monkeypatch.setattr("npllm.blocks.mla.rotate_interleaved", blocks.rotate_halves)
    elif mistake == "eps":
        monkeypatch.setattr("tests.exported.LATENT_EPS", given["rms_norm_eps"])
    else:
        monkeypatch.setattr("npllm.blocks.latent", norm_over_all)
    assert norm(attend(Backend("float64"), given, t) - t["y"]) > 1e-4 * norm(t["y"])


def norm_over_all(xp: Any, down_MF: Array, norm_L: Array, angles: blocks.Angles, eps: float, interleaved: bool) -> Array:
    gain_F = np.concatenate([norm_L, np.ones(down_MF.shape[1] - len(norm_L))])
    both_MGF, L = blocks.rms_norm(xp, down_MF, gain_F, eps)[:, None], len(norm_L)
    return np.concatenate([both_MGF[..., :L], blocks.rotate_interleaved(xp, both_MGF[..., L:], angles)], axis=-1)
