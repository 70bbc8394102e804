"""Pitfalls 1 to 6: Gemma 2, 3 and 3n."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.blocks import CAUSAL, sliding
from npllm.blocks.dtypes import round_to_bfloat16, widen_bfloat16
from npllm.models import interpret
from npllm.published import MODELS
from npllm.testing.compare import norm
from tests.models import ABSENT
from tests.pitfalls.case import RIGHT, WRONG, Case
from tests.steps import in_pieces


class Gains(Backend):
    """Plants a mistake: the gain of every norm that has one is w + `offset`, whatever the model says."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def rms_norm(self, x_D: Array, w: Any, /, eps: float, offset: float = 0.0) -> Array:
        return super().rms_norm(x_D, w, eps, offset if w is None else self.offset)


@pytest.mark.parametrize(("name", "mistake"), [("gemma2", 0.0), ("gemma3", 0.0), ("gemma3n", 1.0)])
def test_pitfall_01_gains_are_1_plus_w_in_gemma_2_and_3_only(case: Callable[[str], Case], name: str, mistake: float) -> None:
    gemma = case(name)
    assert gemma.error(Backend()) < RIGHT
    assert gemma.error(Gains(1.0 - mistake)) < RIGHT
    assert gemma.error(Gains(mistake)) > WRONG


class Scaled(Backend):
    """Plants a mistake: token embeddings, `width` wide, are multiplied by `factor` besides."""

    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.width, self.factor = width, factor

    def embed(self, tokens_M: Array, w: Any, /) -> Array:
        x_MD = super().embed(tokens_M, w)
        return x_MD * np.float32(self.factor) if x_MD.shape[1] == self.width else x_MD


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma3n", "gemma3-bf16"])
def test_pitfall_02_embeddings_grow_by_the_root_of_the_width(case: Callable[[str], Case], name: str) -> None:
    """Rounded to bfloat16 where a model runs in it (62 for 3840, 61.97); here, in float32, it is not, whatever is stored."""
    gemma = case(name)
    width = gemma.config["hidden_size"]
    root = np.array(math.sqrt(width), np.float32)
    assert gemma.error(Backend()) < RIGHT
    assert gemma.error(Scaled(width, 1 / root)) > WRONG
    rounded = widen_bfloat16(round_to_bfloat16(np, root), "float32")
    assert rounded == root or gemma.error(Scaled(width, rounded / root)) > 10 * RIGHT


def test_pitfall_03_queries_of_27b_are_not_scaled_by_their_width(case: Callable[[str], Case]) -> None:
    for name, scalar in (("Gemma 2 27B", 144), ("Gemma 3 27B", 168)):
        config = interpret(MODELS[name].config).config
        assert (config.query_pre_attn_scalar, config.head_dim) == (scalar, 128)
    for name in ("gemma2", "gemma3"):
        gemma = case(name)
        assert gemma.error() < RIGHT
        assert gemma.error(query_pre_attn_scalar=gemma.config["head_dim"]) > WRONG


def test_pitfall_04_only_global_layers_are_slowed_and_each_kind_has_its_base(case: Callable[[str], Case]) -> None:
    """At position 0 nothing turns, and nothing shows."""
    gemma = case("gemma3")
    ropes = gemma.config["rope_parameters"]
    slowed, local = ropes["full_attention"], ropes["sliding_attention"]
    spelled = {"rope_parameters": ABSENT, "rope_theta": slowed["rope_theta"], "rope_local_base_freq": local["rope_theta"]}
    factor = {"rope_type": "linear", "factor": slowed["factor"]}
    assert gemma.error() < RIGHT
    assert gemma.error(**spelled, rope_scaling=factor) < RIGHT
    for full, near in (
        (slowed, local | factor),
        (slowed | {"rope_theta": local["rope_theta"]}, local),
        (slowed, local | {"rope_theta": slowed["rope_theta"]}),
        (local, local),
    ):
        assert gemma.error(rope_parameters={"full_attention": full, "sliding_attention": near}) > WRONG
    gemma.config["rope_parameters"] = {"full_attention": local, "sliding_attention": slowed}
    np.testing.assert_allclose(gemma.logits()[:, 0], gemma.truth["logits"][:, 0], rtol=1e-4, atol=1e-4)


class OtherWindow(Backend):
    """Plants a mistake: windows have `more` keys."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.more = more

    def attention(self, q_MHK: Array, keys: Any, rows: Any, /, *, mask: Any, scale: float, softcap: Any = None) -> Array:
        mask = mask if mask.window is None else sliding(mask.window + self.more)
        return super().attention(q_MHK, keys, rows, mask=mask, scale=scale, softcap=softcap)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma3n", "mistral-window", "qwen3-window"])
def test_pitfall_05_a_window_counts_the_query_itself(case: Callable[[str], Case], name: str) -> None:
    """The mistake shows from the first query on whose window is full; through the cache's ring as without it."""
    windowed = case(name)
    want, window = windowed.truth["logits"], windowed.config["sliding_window"]
    for more, same in ((1, window), (-1, window - 1)):
        wrong = windowed.logits(OtherWindow(more))
        assert norm(wrong - want) / norm(want) > WRONG
        np.testing.assert_allclose(wrong[:, :same], want[:, :same], rtol=1e-3, atol=1e-4)
        assert norm(wrong[:, same] - want[:, same]) / norm(want[:, same]) > 10 * RIGHT
    assert windowed.error(Backend()) < RIGHT
    tokens_T = windowed.truth["tokens"][0]
    for cuts in (range(1, len(tokens_T)), [window - 1, window + 2]):
        assert norm(in_pieces(windowed.load(), tokens_T, cuts) - want[0]) / norm(want[0]) < RIGHT


def test_pitfall_06_what_gemma_3_4b_does_not_say_is_the_class_default() -> None:
    """Its text_config has no heads: hidden_size / 256 would be 10 of them, but there are 8, and a head is not 2560 / 8."""
    text = MODELS["Gemma 3 4B"].config["text_config"]
    assert not {"num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "rope_theta"} & text.keys()
    described = interpret(text)
    c = described.config
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.query_pre_attn_scalar) == (8, 4, 256, 256)
    assert (c.vocab_size, c.tie_word_embeddings, c.rms_norm_eps, c.max_position_embeddings) == (262208, True, 1e-6, 131072)
    assert (c.rope.theta, c.rope.kind, c.rope.factor, c.local_rope.theta, c.local_rope.kind) == (
        1e6, "linear", 8.0, 1e4, "default",
    )  # fmt: skip
    assert c.masks == ((sliding(1024),) * 5 + (CAUSAL,)) * 5 + (sliding(1024),) * 4
    spec = described.architecture.weight_spec(c)
    shapes = {name: spec[f"layers.0.self_attn.{name}_proj.weight"].shape for name in "qkvo"}
    assert shapes == {"q": (2048, 2560), "k": (1024, 2560), "v": (1024, 2560), "o": (2560, 2048)}
