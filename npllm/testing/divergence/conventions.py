"""Conventions in which engines differ: each is a changed configuration, or a mixin of the probe, to run the canon with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np

from npllm import blocks
from npllm.arrays import Array
from npllm.blocks.masks import CAUSAL, Mask
from npllm.blocks.moe import Router, top_k
from npllm.blocks.rope import Angles, Rope
from npllm.cache import Keys
from npllm.testing.divergence.probe import Probe

EPS = (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
THETAS = (1e4, 1e5, 1.5e5, 5e5, 1e6, 5e6, 1e7, 1e8)


class Convention(NamedTuple):
    """`name` says what the other engine does; the canon does it with `config`, on a probe with `mixin`."""

    name: str
    config: Any
    mixin: type[Any] | None = None

    def made_by(self, probe: type[Probe]) -> type[Probe]:
        """The probe that follows the convention."""
        return probe if self.mixin is None else type(self.mixin.__name__, (self.mixin, probe), {})


def overriding(method: str, how: Any) -> type[Any]:
    """A mixin whose `method` is `how(self, canonical method, *args, **kwargs)`."""

    def override(self: Any, *args: Any, **kwargs: Any) -> Any:
        return how(self, getattr(super(mixin, self), method), *args, **kwargs)

    mixin: type[Any] = type(f"Other_{method}", (), {method: override})
    return mixin


def conventions(config: Any, operation: str) -> Iterator[Convention]:
    """Those that could show in an operation (Point.operation), for a model of this configuration."""
    if "norm" in operation.lower():
        yield from of_norms(config)
    if "RoPE" in operation or "attention" in operation:
        yield from of_rope(config)
    if "attention" in operation:
        yield from of_attention(config)
        yield from of_norms(config)
    if "linear" in operation or "attention" in operation:
        yield from of_linear(config)
    if any(word in operation for word in ("activation", "experts", "residual")):
        yield from of_ffn(config)
    if any(word in operation for word in ("router", "choice", "experts")) and find_router(config) is not None:
        yield from of_routers(config)
    if any(word in operation for word in ("embedding", "residual", "wiring", "logits")):
        yield from of_wiring(config)


def changed(config: Any, name: str, **values: Any) -> Iterator[Convention]:
    """The configuration with other values, if it has such fields and they hold other values now."""
    have = {each.name for each in fields(config)}
    if set(values) <= have and any(getattr(config, key) != value for key, value in values.items()):
        yield Convention(name, replace(config, **values))


# -- norms ------------------------------------------------------------------------------------------------------------


def of_norms(c: Any) -> Iterator[Convention]:
    yield Convention("norms of q and k left out", c, overriding("gained", without_qk_norm))
    for eps in EPS:
        other = overriding("unit", lambda self, canon, x, _, eps=eps: canon(x, eps))
        yield Convention(f"eps {eps:g} in the norm", c, other)
    yield Convention("eps outside the root", c, overriding("unit", eps_outside))
    yield Convention("gain of the norm 1 + w", c, overriding("rms_norm", gain(1.0)))
    yield Convention("gain of the norm w, not 1 + w", c, overriding("rms_norm", gain(0.0)))
    yield Convention("gain of the norm left out", c, overriding("gained", lambda s, canon, x, u, g, n: canon(x, u, None, n)))
    yield Convention("mean subtracted in the norm", c, overriding("unit", centred))
    yield Convention("mean not subtracted in the norm", c, overriding("deviations", lambda self, canon, x: x))
    yield Convention("norm left out", c, overriding("gained", lambda s, canon, x, u, g, n: canon(x, x, None, n)))


def eps_outside(self: Any, canon: Any, x_D: Array, eps: float) -> Array:
    root = np.sqrt(np.mean(x_D**2, axis=-1, keepdims=True))
    return x_D / (root + eps)


def gain(offset: float) -> Any:
    return lambda self, canon, x, w, eps, _=0.0: canon(x, w, eps, offset)


def centred(self: Any, canon: Any, x_D: Array, eps: float) -> Array:
    return np.asarray(canon(x_D - np.mean(x_D, axis=-1, keepdims=True), eps))


def without_qk_norm(self: Any, canon: Any, x: Array, unit: Array, weight: Any, name: str) -> Array:
    qk = name.endswith((".q_norm", ".k_norm"))
    return np.asarray(canon(x, x, None, name) if qk else canon(x, unit, weight, name))


# -- RoPE -------------------------------------------------------------------------------------------------------------


def of_rope(c: Any) -> Iterator[Convention]:
    yield Convention("RoPE pairs the other way (interleaved or half-split)", c, overriding("rope", other_pairs))
    yield Convention("RoPE left out", c, overriding("rope", lambda self, canon, x, angles, interleaved=False: x))
    yield Convention("RoPE turns backwards", c, overriding("rope", backwards))
    yield Convention("RoPE by half as many pairs", c, overriding("rope", half_turned))
    yield Convention("positions from 1", c, overriding("angles", lambda self, canon, rope, m: canon(rope, m + 1)))
    yield Convention("RoPE scaling ignored", c, roped(lambda rope: Rope(rope.dim, rope.theta)))
    yield Convention("RoPE attention factor left out", c, roped(lambda rope: replace(rope, attention_factor=1.0)))
    for theta in THETAS:
        yield Convention(f"RoPE theta {theta:g}", c, roped(lambda rope, theta=theta: replace(rope, theta=theta)))
    if hasattr(c, "local_rope"):
        yield from changed(c, "RoPE of the sliding layers on all", rope=c.local_rope)
        yield from changed(c, "RoPE of the global layers on all", local_rope=c.rope)
        yield from changed(c, "RoPE of sliding and global layers exchanged", rope=c.local_rope, local_rope=c.rope)
    yield Convention("rows of q and k in the other order of RoPE", c, overriding("rope", permuted))


def roped(change: Any) -> type[Any]:
    return overriding("angles", lambda self, canon, rope, m: canon(change(rope), m))


def other_pairs(self: Any, canon: Any, x: Array, angles: Angles, interleaved: bool = False) -> Array:
    return np.asarray(canon(x, angles, not interleaved))


def backwards(self: Any, canon: Any, x: Array, angles: Angles, interleaved: bool = False) -> Array:
    return np.asarray(canon(x, Angles(angles.cos_MJ, -angles.sin_MJ), interleaved))


def half_turned(self: Any, canon: Any, x: Array, angles: Angles, interleaved: bool = False) -> Array:
    J = angles.cos_MJ.shape[1] // 2
    return np.asarray(canon(x, Angles(angles.cos_MJ[:, :J], angles.sin_MJ[:, :J]), interleaved))


def permuted(self: Any, canon: Any, x: Array, angles: Angles, interleaved: bool = False) -> Array:
    order = np.arange(x.shape[-1]).reshape(2, -1).T.reshape(-1)
    return np.asarray(canon(x[..., order if interleaved else np.argsort(order)], angles, interleaved))


# -- attention --------------------------------------------------------------------------------------------------------


def of_attention(c: Any) -> Iterator[Convention]:
    yield from scales(c)
    yield Convention("soft cap of the scores left out", c, attending(lambda self, a: a | {"softcap": None}))
    yield Convention("kv head h % G for query head h", c, overriding("row", modulo))
    yield Convention("query heads paired with kv heads in reverse", c, overriding("row", reversed_heads))
    window = next((m.window for m in masks_of(c) if m.window), None)
    chunk = next((m.chunk for m in masks_of(c) if m.chunk), None)
    if window:
        for off, how in ((1, "one key too wide"), (-1, "one key too narrow")):
            yield Convention(f"window {how}", c, masked(lambda m, off=off: m._replace(window=m.window and m.window + off)))
        yield Convention("window ignored", c, masked(lambda m: m._replace(window=None)))
        yield Convention("window on all layers", c, masked(lambda m: m._replace(window=window)))
        exchanged = masked(lambda m: m._replace(window=None if m.window else window))
        yield Convention("window on the other layers", c, exchanged)
    if chunk:
        yield Convention("chunks ignored", c, masked(lambda m: m._replace(chunk=None)))
        yield Convention("a window in the place of chunks", c, masked(lambda m: Mask(window=m.chunk)))
        yield Convention("chunks on all layers", c, masked(lambda m: m._replace(chunk=chunk)))
    yield Convention("attention is not causal", c, overriding("row", uncausal))


def scales(c: Any) -> Iterator[Convention]:
    width, heads = getattr(c, "hidden_size", 0), getattr(c, "num_attention_heads", 0)
    head = getattr(c, "head_dim", 0)
    found = {"1 / sqrt(head_dim)": head**-0.5, "1": 1.0, "1 / head_dim": 1.0 / head} if head else {"1": 1.0}
    if heads and width:
        found["1 / sqrt(hidden_size / heads)"] = (width / heads) ** -0.5
    if getattr(c, "v_head_dim", None):
        found["1 / sqrt(qk_nope_head_dim)"] = c.qk_nope_head_dim**-0.5
        found["1 / sqrt(v_head_dim)"] = c.v_head_dim**-0.5
    for name, scale in found.items():
        yield Convention(f"attention scale {name}", c, attending(lambda self, a, scale=scale: a | {"scale": scale}))
    yield Convention("attention scale squared", c, attending(lambda self, a: a | {"scale": a["scale"] ** 2}))


def attending(change: Any) -> type[Any]:
    """A mixin whose attention has other settings."""

    def how(self: Any, canon: Any, q: Array, keys: Keys, rows: Any, **settings: Any) -> Array:
        return np.asarray(canon(q, keys, rows, **change(self, settings)))

    return overriding("attention", how)


def masked(change: Any) -> type[Any]:
    return attending(lambda self, a: a | {"mask": change(a["mask"])})


def masks_of(c: Any) -> list[Mask]:
    found = [getattr(c, "mask", CAUSAL), *getattr(c, "masks", ()), *(each.mask for each in getattr(c, "layers", ()))]
    return [mask for mask in found if isinstance(mask, Mask)]


def modulo(self: Any, canon: Any, q: Array, k: Array, v: Array, *rest: Any) -> Array:
    G, H = k.shape[1], q.shape[1]
    order = np.arange(H) % G
    return np.asarray(canon(q, k[:, order], v[:, order], *rest))


def reversed_heads(self: Any, canon: Any, q: Array, k: Array, v: Array, *rest: Any) -> Array:
    return np.asarray(canon(q, k[:, ::-1], v[:, ::-1], *rest))


def uncausal(self: Any, canon: Any, q: Array, k: Array, v: Array, allowed: Array, *rest: Any) -> Array:
    return np.asarray(canon(q, k, v, np.ones_like(allowed), *rest))


# -- linear layers ----------------------------------------------------------------------------------------------------

EXCHANGED = {"k_proj": "v_proj", "v_proj": "k_proj", "gate_proj": "up_proj", "up_proj": "gate_proj"}


def of_linear(c: Any) -> Iterator[Convention]:
    yield Convention("bias left out", c, overriding("linear", unbiased))
    yield Convention("weight transposed", c, overriding("summed", lambda s, canon, x, w, t=None: canon(x, w.T, t)))
    yield Convention("head tied to the embedding", c, overriding("serving", tied))
    yield Convention("weights of k and v, or of gate and up, exchanged", c, overriding("serving", exchanged))


def unbiased(self: Any, canon: Any, x: Array, w: Any, residual: Array | None = None) -> Array:
    return np.asarray(canon(x, w._replace(bias=None), residual))


def tied(self: Any, canon: Any, name: str, weight: Any) -> Any:
    return self.book.modules.get("embed_tokens", weight) if name == "lm_head" else weight


def exchanged(self: Any, canon: Any, name: str, weight: Any) -> Any:
    path, _, leaf = name.rpartition(".")
    return self.book.modules.get(f"{path}.{EXCHANGED[leaf]}", weight) if leaf in EXCHANGED else weight


# -- feed-forward layers ----------------------------------------------------------------------------------------------


def of_ffn(c: Any) -> Iterator[Convention]:
    for act in blocks.ACTIVATIONS:
        how = overriding("active", lambda self, canon, x, _, t=None, act=act: canon(x, act, t))
        yield Convention(f"activation {act}", c, how)
    yield Convention("gate and up exchanged", c, overriding("hidden", up_first))
    yield Convention("no activation", c, overriding("active", lambda self, canon, x, act, t=None: x))


def up_first(self: Any, canon: Any, gate: Array, up: Array, act: str, token: Array | None = None) -> Array:
    return np.asarray(canon(up, gate, act, token))


# -- routers and experts ----------------------------------------------------------------------------------------------


def find_router(c: Any) -> Router | None:
    return getattr(c, "router", None)


def of_routers(c: Any) -> Iterator[Convention]:
    router = c.router
    others: dict[str, dict[str, Any]] = {
        "expert weights not renormalised": {"normalise": False},
        "expert weights renormalised": {"normalise": True},
        "softmax router": {"scores": "softmax"},
        "sigmoid router": {"scores": "sigmoid"},
        "routed scaling factor left out": {"scale": 1.0},
        "experts' groups ignored": {"groups": 1, "kept_groups": 1},
        "groups ranked by their best expert": {"ranking": "max"},
        "groups ranked by their two best experts": {"ranking": "pair"},
        "one expert too few": {"experts_per_token": router.experts_per_token - 1},
        "one expert too many": {"experts_per_token": router.experts_per_token + 1},
    }
    if router.scale != 1.0:
        others["expert weights not renormalised, scaling factor left out"] = {"normalise": False, "scale": 1.0}
    for name, values in others.items():
        yield from changed(c, name, router=router._replace(**values))
    yield Convention("router's correction in the weights", c, overriding("weights", corrected))
    yield Convention("router's correction left out", c, overriding("ranks", uncorrected))
    yield Convention("ties go to the highest expert", c, overriding("choice", highest))
    yield Convention("experts weighed equally", c, overriding("weights", equal))
    yield Convention("weights on the experts' inputs", c, weighed("input"))
    yield Convention("weights on the experts' outputs", c, weighed("output"))
    yield Convention("expert weights left out", c, overriding("moe", unweighed))


def equal(self: Any, canon: Any, scores: Array, ranks: Array, index: Array, router: Router) -> Array:
    return np.full(index.shape, router.scale / index.shape[1])


def weighed(where: str) -> type[Any]:
    return overriding("moe", lambda self, canon, *args, weigh="output": canon(*args, weigh=where))


def unweighed(self: Any, canon: Any, x: Array, w: Any, index: Array, weight: Array, act: str, *, weigh: str = "") -> Array:
    return np.asarray(canon(x, w, index, np.ones_like(weight), act, weigh=weigh or "output"))


def corrected(self: Any, canon: Any, scores: Array, ranks: Array, index: Array, router: Router) -> Array:
    return np.asarray(canon(ranks, ranks, index, router))


def uncorrected(self: Any, canon: Any, logits: Array, scores: Array, correction: Any, router: Router) -> Array:
    return np.asarray(canon(logits, scores, None, router))


def highest(self: Any, canon: Any, ranks: Array, router: Router) -> Array:
    E = ranks.shape[1]
    return E - 1 - top_k(np, blocks.moe.eligible(np, ranks, router)[:, ::-1], router.experts_per_token)


# -- between the layers -----------------------------------------------------------------------------------------------


def of_wiring(c: Any) -> Iterator[Convention]:
    root = math.sqrt(getattr(c, "hidden_size", 1))
    for name, factor in (("embedding not scaled", 1.0 / root), ("embedding scaled by sqrt(hidden_size)", root)):
        yield Convention(name, c, overriding("embed", lambda s, canon, t, w, factor=factor: canon(t, w) * factor))
    if hasattr(c, "n_positions"):
        yield Convention("learned positions from 1", c, overriding("embed", one_later))
    yield from changed(c, "soft cap of the logits left out", final_logit_softcapping=None)
    yield Convention("shared experts left out", c, overriding("gated_ffn", unshared))
    yield Convention("residual left out", c, overriding("linear", lambda s, canon, x, w, r=None: canon(x, w, None)))


def one_later(self: Any, canon: Any, tokens: Array, w: Any) -> Array:
    return np.asarray(canon(tokens + (self.book.name(w.weight) == "wpe"), w))


def unshared(self: Any, canon: Any, x: Array, w: Any, act: str, **settings: Any) -> Array:
    y = np.asarray(canon(x, w, act, **settings))
    return 0.0 * y if "shared_expert" in self.book.name(w.gate_proj.weight) else y
