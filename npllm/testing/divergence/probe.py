"""The canon in float64, feeding on a dump: each operation gets the dump's own inputs and is compared with its output.

`Probe` is a backend. It knows which module a weight belongs to, so `linear` with the weights of `layers.0.mlp.down_proj` is
compared with the dump's tensor of that name, in every architecture and without tables. What stands between two modules
(RoPE and attention, activations, residual sums) is compared where a module takes it in.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np

from npllm import blocks
from npllm.arrays import Array
from npllm.backend import Backend, Norm
from npllm.blocks.attention import softmax
from npllm.blocks.masks import Mask
from npllm.blocks.moe import Router, by_expert, eligible, top_k
from npllm.blocks.rope import Angles, Rope
from npllm.cache import Keys, Rows
from npllm.handles import Weight
from npllm.testing.divergence.book import WIRING, Book, Reached, Tie, distance, layer_of
from npllm.testing.estimate import summation
from npllm.testing.rounding import FORMATS
from npllm.weights import MLP, Experts, Gate, GatedFFN, LatentKV, Linear

# Sums that the model files write themselves, by the mark that follows them: roundings that an engine may make there.
SUMS = {"embedding": 1.0, "attention.output": 1.0, "output": 2.0, "moe.shared": 1.0, "logits": 1.0}

# The same where the largest numbers decide: streams are mixed, features cut at a threshold that they set (Gemma 3n).
MIXED = ("per_layer_inputs", "laurel.branch", "altup.predicted", "altup.corrected", "ffn.output")

# Names of a dump's cosines; their sines have ".1".
ANGLES = r"rotary_emb(_local)?(#\d+)?"

# Standard deviations of a rank within which experts cannot be told apart; ranks that are equal are moved by this, too.
SURE, EQUAL = 6.0, 1e-12

# Relative errors, in roundings of float32, of the frequencies that engines compute.
FREQUENCIES = 4.0

# The same of a root, an exponential, an activation.
ROOT = 2.0
UNIT = FORMATS["f32"].unit


class Probe(Backend):
    """`inner` is the backend that prepared the weights."""

    def __init__(self, inner: Backend, book: Book) -> None:
        super().__init__("float64")
        self.inner, self.book, self.scope = inner, book, ""

    def layer(self, index: int) -> Backend:
        inside = copy.copy(self)
        inside.scope = f"layers.{index}."
        return inside

    def dense(self, weight: Any) -> Array:
        """A weight as an engine of the dump's format has it."""
        values = np.asarray(self.inner.to_numpy(self.inner.dense(weight)), dtype=np.float64)
        return self.book.format.round(values) if self.book.format.bits < FORMATS["f32"].bits else values

    def mark(self, name: str, x: Array) -> Array:
        full = self.scope + name
        names = [full]
        if name == "output":
            names += [full.removesuffix(".output"), full.removesuffix(".output").replace("layers.", "h.")]
        if name == "embedding":
            x = self.scaled(x)
            names += ["layers.0.input", "layers.0.input_layernorm.input", "h.0.ln_1.input", "drop.input", "embed_tokens"]
        if name in ("norm", "moe.topk_index", "moe.topk_weight"):
            return x
        cut = name in ("ffn.gate", "ffn.hidden") and x is not self.book.latest and not self.book.since
        if cut or name in MIXED:
            x = self.book.rough(x, WIRING, np.full(x.shape, np.max(np.abs(x), initial=0.0)))
        step = {"output": "residual sum", "attention.output": "residual sum", "logits": "logits"}.get(name, "")
        x = self.book.rough(x, SUMS[name]) if name in SUMS else x
        compared = len(self.book.points)
        x = self.book.meet(x, *names, step=step)
        if name == "output":
            self.book.settle(compared)
        return x

    def scaled(self, x: Array) -> Array:
        """An embedding that was multiplied by a number: copies take that rounded, as transformers does."""
        plain = self.book.embedded
        if plain is None or plain.shape != x.shape:
            return x
        scale = distance(x, np.zeros_like(x)) / max(float(np.sum(x * plain)), 1e-300)
        if abs(scale - 1.0) > 1e-9 and distance(x, scale * plain) <= 1e-12 * distance(x, 0.0 * x):
            x = x.copy()
            x[self.book.exact :] *= float(self.book.format.round(np.array(scale))) / scale
        return x

    # -- fine operations ----------------------------------------------------------------------------------------------

    def embed(self, tokens_M: Array, w: Linear, /) -> Array:
        weight = w.weight
        rows = weight.rows(np.asarray(tokens_M)).array("float64") if isinstance(weight, Weight) else None
        x_MD = self.dense(weight)[tokens_M] if rows is None else self.book.format.round(rows)
        self.book.embedded = x_MD
        name = self.book.name(weight)
        names = () if name.startswith("embed_tokens") else (name,)
        return self.book.meet(x_MD, *names, step="embedding")

    def rms_norm(self, x_D: Array, w: Linear | None, /, eps: float, offset: float = 0.0) -> Array:
        name = "" if w is None else self.book.name(w.weight)
        x_D = self.book.given(x_D, name)
        gain = None if w is None else self.dense(w.weight) + offset
        return self.gained(x_D, self.book.rough(self.shared(self.unit(x_D, eps))), gain, name)

    def shared(self, unit_D: Array) -> Array:
        """The copies with an error of the root in float32, which a row shares."""
        return unit_D * self.book.spread(np.ones((*unit_D.shape[:-1], 1)), np.full((*unit_D.shape[:-1], 1), ROOT * UNIT))

    def unit(self, x_D: Array, eps: float) -> Array:
        """`x` divided by its root mean square."""
        return blocks.rms_norm(np, x_D, None, eps)

    def gained(self, x_D: Array, unit_D: Array, gain_D: Array | None, name: str) -> Array:
        y_D = unit_D if gain_D is None else self.book.rough(unit_D * gain_D)
        return self.book.meet(y_D, *([name] if name else []), demanded=True, step="RMS norm")

    def layer_norm(self, x_D: Array, w: Linear, /, eps: float) -> Array:
        name = self.book.name(w.weight)
        x_D = self.book.given(x_D, name)
        normed_D = self.unit(self.deviations(x_D), eps) * self.dense(w.weight) + self.dense(w.bias)
        y_D = self.book.rough(self.shared(normed_D), 2.0)
        mean = np.mean(np.abs(x_D), axis=-1, keepdims=True) / np.std(x_D, axis=-1, keepdims=True)
        y_D = self.book.spread(y_D, ROOT * UNIT * mean * np.abs(self.dense(w.weight)))
        return self.book.meet(y_D, name, demanded=True, step="LayerNorm")

    def deviations(self, x_D: Array) -> Array:
        """`x` less its mean."""
        return x_D - np.mean(x_D, axis=-1, keepdims=True)

    def linear(self, x_MD: Array, w: Linear, /, residual_MF: Array | None = None) -> Array:
        name = self.book.name(w.weight, head=True)
        x_MD = self.book.given(x_MD, name)
        y_MF = self.summed(x_MD, self.dense(self.serving(name, w.weight)))
        if w.bias is not None:
            y_MF = y_MF + self.dense(w.bias)
        y_MF = self.book.meet(self.book.rough(y_MF), *([name] if name else []), demanded=True, step="linear")
        if residual_MF is not None:
            y_MF = y_MF + residual_MF
            self.book.since.append("residual sum")
        return y_MF

    def serving(self, name: str, weight: Any) -> Any:
        """The weight that a linear layer takes."""
        return weight

    def summed(self, x_TD: Array, weight_FD: Array, token_T: Array | None = None) -> Array:
        """`x W^T`; the copies get the errors of sums in float32."""
        y_TF = x_TD @ weight_FD.T
        return self.book.spread(y_TF, self.deviation(y_TF, x_TD**2 @ (weight_FD**2).T, x_TD.shape[-1]), token_T)

    def deviation(self, sums: Array, squares: Array, terms: int) -> Array:
        """The standard deviation of sums in float32."""
        return np.sqrt(summation(sums, squares, terms, FORMATS["f32"]))

    def angles(self, rope: Rope, positions_M: Array, /) -> Angles:
        exact = blocks.angles(np, rope, positions_M, "float64")
        book = self.book
        inverse, _ = blocks.frequencies(rope, "float64")
        off = FREQUENCIES * UNIT * book.dice.standard_normal((book.copies + 1, 1, len(inverse)))
        off[0] = 0.0
        phase = np.asarray(positions_M, np.float64)[:, None] * inverse
        shift = (phase.reshape(book.copies + 1, book.exact, -1) * off).reshape(phase.shape)
        cos = exact.cos_MJ - shift * exact.sin_MJ
        sin = exact.sin_MJ + shift * exact.cos_MJ
        book.since.append("RoPE's angles")
        return self.met_angles(Angles(book.rough(cos), book.rough(sin)))

    def met_angles(self, angles: Angles) -> Angles:
        """The dump's cosines and sines, where it has them; of several, those that are nearest."""
        found, book = [], self.book
        for name in [each for each in book.dump.values if re.fullmatch(ANGLES, each)]:
            first, _, call = name.partition("#")
            other = f"{first}.1#{call}" if call else f"{first}.1"
            cos, sin = (turning(book, each, angles.cos_MJ) for each in (name, other))
            if cos is not None and sin is not None:
                off = distance(cos, angles.cos_MJ[: book.exact]) + distance(sin, angles.sin_MJ[: book.exact])
                found.append((off, name, other, cos, sin))
        if not found:
            return angles
        _, name, other, cos, sin = min(found, key=lambda each: each[0])
        book.dump.used |= {name, other}
        since = list(book.since)
        cos = book.compared(name, angles.cos_MJ, cos)
        book.since += since
        return Angles(cos, book.compared(other, angles.sin_MJ, sin))

    def rope(self, x_MHK: Array, angles: Angles, /, interleaved: bool = False) -> Array:
        y_MHK = super().rope(x_MHK, angles, interleaved)
        self.book.since.append("RoPE")
        return self.book.rough(y_MHK, 3.0, np.maximum(np.abs(x_MHK), np.abs(y_MHK)))

    def attention(
        self, q_MHK: Array, keys: Keys, rows: Rows, /, *,
        mask: Mask, scale: float, softcap: float | None = None, sinks: Linear | None = None,
    ) -> Array:  # fmt: skip
        self.book.since.append("attention")
        out_MHV = np.empty((*q_MHK.shape[:2], keys.v_BSGV.shape[-1]))
        for r, (_, start, begin, end) in enumerate(rows):
            k_SGK, v_SGV, first = keys.row(r)
            places = np.arange(start, start + end - begin), np.arange(first, first + len(k_SGK))
            out_MHV[begin:end] = self.row(
                q_MHK[begin:end], k_SGK, v_SGV, mask.allowed(np, *places), scale, softcap, begin >= self.book.exact
            )
        # What a token of a row sees may be in doubt.
        doubt_BT = self.book.doubt.reshape(self.book.rows, -1)
        np.logical_or.accumulate(doubt_BT, axis=1, out=doubt_BT)
        return self.book.rough(out_MHV)

    def row(
        self, q_THK: Array, k_SGK: Array, v_SGV: Array, allowed_TS: Array, scale: float, softcap: float | None, copied: bool
    ) -> Array:
        """Attention of one row; `copied`: scores and probabilities are disturbed."""
        repeats = q_THK.shape[1] // k_SGK.shape[1]
        k_SHK, v_SHV = (np.repeat(x, repeats, axis=1) for x in (k_SGK, v_SGV))
        scores, squares = (np.einsum("THK,SHK->HTS", q_THK**n, k_SHK**n) for n in (1, 2))
        token = np.full(len(scores), self.book.exact if copied else -1)
        scores = self.book.spread(scores, self.deviation(scores, squares, q_THK.shape[-1]), token)
        scores = self.book.rough(self.book.rough(scores, token_T=token) * scale, token_T=token)
        if softcap is not None:
            scores = self.book.rough(softcap * np.tanh(self.book.rough(scores / softcap, token_T=token)), 2.0, token_T=token)
        scores[:, ~allowed_TS] = -np.inf
        probs = softmax(np, scores)
        probs = self.book.spread(probs, ROOT * UNIT * probs, token)
        shared = self.book.spread(np.ones((*probs.shape[:2], 1)), np.full((*probs.shape[:2], 1), ROOT * UNIT), token)
        probs = np.where(allowed_TS, self.book.rough(probs * shared, token_T=token), 0.0)
        out, squares = (np.einsum("HTS,SHV->HTV", probs**n, v_SHV**n) for n in (1, 2))
        return self.book.spread(out, self.deviation(out, squares, len(k_SGK)), token).transpose(1, 0, 2)

    # -- coarse operations --------------------------------------------------------------------------------------------

    def gated_ffn(
        self, x_MD: Array, w: GatedFFN, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None
    ) -> Array:
        h_MD = self.mark("ffn.input", self.normed(x_MD, norm))
        gate_MF = self.mark("ffn.gate", self.linear(h_MD, w.gate_proj))
        up_MF = self.mark("ffn.up", self.linear(h_MD, w.up_proj))
        hidden_MF = self.mark("ffn.hidden", self.hidden(gate_MF, up_MF, act))
        return self.linear(hidden_MF, w.down_proj, residual_MD)

    def hidden(self, gate_TF: Array, up_TF: Array, act: str, token_T: Array | None = None) -> Array:
        """`act(gate) * up`."""
        self.book.since.append("activation")
        active = self.active(gate_TF, act, token_T)
        return self.book.rough(active * up_TF, token_T=token_T)

    def active(self, x_TF: Array, act: str, token_T: Array | None = None) -> Array:
        """An activation as a library of float32 computes it, rounded."""
        y_TF = self.book.spread(blocks.ACTIVATIONS[act](np, x_TF), ROOT * UNIT * np.abs(x_TF), token_T)
        return self.book.rough(y_TF, token_T=token_T)

    def mlp(self, x_MD: Array, w: MLP, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None) -> Array:
        h_MD = self.mark("ffn.input", self.normed(x_MD, norm))
        up_MF = self.mark("ffn.up", self.linear(h_MD, w.c_fc))
        self.book.since.append("activation")
        hidden_MF = self.mark("ffn.hidden", self.book.rough(self.active(up_MF, act), 4.0))
        return self.linear(hidden_MF, w.c_proj, residual_MD)

    def route(self, h_MD: Array, w: Gate, /, router: Router) -> tuple[Array, Array]:
        logits_ME = self.mark("moe.logits", self.linear(h_MD, w.gate))
        correction_E = None if w.correction is None else np.asarray(self.inner.dense(w.correction.weight), np.float64)
        scores_ME = self.scores(logits_ME, router)
        ranks_ME = self.ranks(logits_ME, scores_ME, correction_E, router)
        name = self.book.name(w.gate.weight)
        index_MC = self.chosen(name, ranks_ME, router)
        weight_MC = self.book.rough(self.weights(scores_ME, ranks_ME, index_MC, router), 3.0)
        self.book.since.append("router weights")
        names = (f"{name}.1", f"{name.rpartition('.')[0]}.experts.input.2", f"{self.scope}moe.topk_weight")
        return index_MC, self.book.meet(weight_MC, *names)

    def scores(self, logits_ME: Array, router: Router) -> Array:
        scores_ME = softmax(np, logits_ME.copy()) if router.scores == "softmax" else blocks.sigmoid(np, logits_ME)
        return self.book.rough(self.book.spread(scores_ME, ROOT * UNIT * scores_ME))

    def ranks(self, logits_ME: Array, scores_ME: Array, correction_E: Array | None, router: Router) -> Array:
        ranks_ME = logits_ME if router.by == "logits" else scores_ME
        return ranks_ME if correction_E is None else ranks_ME + correction_E

    def choice(self, ranks_ME: Array, router: Router) -> Array:
        return top_k(np, eligible(np, ranks_ME, router), router.experts_per_token)

    def weights(self, scores_ME: Array, ranks_ME: Array, index_MC: Array, router: Router) -> Array:
        weight_MC = np.take_along_axis(scores_ME, index_MC, axis=-1)
        if router.normalise:
            weight_MC = weight_MC / (np.sum(weight_MC, axis=-1, keepdims=True) + router.floor)
        return weight_MC * router.scale

    def chosen(self, name: str, ranks_ME: Array, router: Router) -> Array:
        """The experts of each token: those of the dump, where it tells them and whether or not they are right."""
        book = self.book
        index_MC = self.choice(ranks_ME, router)
        names = (f"{name}.2", f"{name.rpartition('.')[0]}.experts.input.1", f"{self.scope}moe.topk_index")
        book.asked.update(names)
        found = book.dump.find(*names)
        if found is None or book.dump.values[found].size % book.exact:
            self.doubt_choice(name, ranks_ME, index_MC, router)
            return index_MC
        theirs = book.dump.values[found].reshape(book.exact, -1)
        book.since.append("choice of experts")
        if found == book.stop:
            raise Reached(membership(index_MC[: book.exact], ranks_ME.shape[1]))
        self.judge_choice(found, ranks_ME, index_MC, theirs, router)
        return np.concatenate([theirs] * (book.copies + 1))

    def moved(self, ranks_ME: Array, towards_ME: Array) -> Array:
        """The exact ranks, each moved by its budget: up where `towards_ME` is true, down elsewhere."""
        n = self.book.exact
        noise_ME = np.sqrt(np.mean((ranks_ME.reshape(-1, n, ranks_ME.shape[1]) - ranks_ME[:n]) ** 2, axis=0))
        return ranks_ME[:n] + (SURE * noise_ME + EQUAL) * np.where(towards_ME, 1.0, -1.0)

    def doubt_choice(self, name: str, ranks_ME: Array, index_MC: Array, router: Router) -> None:
        """The dump does not tell its experts: tokens that might have others are in doubt, together with their numbers."""
        book, E = self.book, ranks_ME.shape[1]
        ours = membership(index_MC[: book.exact], E)
        other = membership(self.choice(self.moved(ranks_ME, ~ours), router), E)
        unsure = (other != ours).any(axis=1)
        for m in np.flatnonzero(unsure & ~book.doubt).tolist():
            book.ties.append(Tie(name, layer_of(name), m, tuple(np.flatnonzero(ours[m]).tolist()), ()))
        book.doubt |= unsure

    def judge_choice(self, name: str, ranks_ME: Array, index_MC: Array, theirs_MC: Array, router: Router) -> None:
        """Each token's experts are the canon's, or lie so near that no engine of this format can be sure."""
        book, E = self.book, ranks_ME.shape[1]
        n = book.exact
        ours, theirs = membership(index_MC[:n], E), membership(theirs_MC, E)
        # Every rank moves by its budget towards the dump's choice: what is chosen then could have been chosen.
        reachable = membership(self.choice(self.moved(ranks_ME, theirs), router), E)
        wrong = 0
        for m in np.flatnonzero((ours != theirs).any(axis=1)).tolist():
            near = bool((reachable[m] == theirs[m]).all())
            wrong += not near
            if near:
                spelled = book.dump.spelled[name]
                sets = (tuple(np.flatnonzero(x[m]).tolist()) for x in (ours, theirs))
                book.ties.append(Tie(spelled, layer_of(name), m, *sets))
        book.note(name, "choice" if wrong else "", float(wrong), float("inf") if wrong else 0.0)

    def moe(
        self, x_MD: Array, w: Experts, index_MC: Array, weight_MC: Array, /, act: str, *, weigh: str = "output"
    ) -> Array:
        book = self.book
        path = book.name(w.gate_proj.weight).rpartition(".")[0]
        x_MD = book.given(x_MD, path)
        out_MCD = np.zeros((*index_MC.shape, x_MD.shape[1]))
        for e, token_T, choice_T in by_expert(index_MC.tolist()):
            weight_T1 = weight_MC[token_T, choice_T][:, None]
            x_TD = x_MD[token_T]
            if weigh == "input":
                x_TD = book.rough(x_TD * weight_T1, token_T=token_T)
            gate_FD, up_FD, down_DF = (self.dense(part.weight[e]) for part in w)
            y_TD = self.rough_expert(x_TD, gate_FD, up_FD, down_DF, act, token_T)
            out_MCD[token_T, choice_T] = y_TD if weigh == "input" else book.rough(y_TD * weight_T1, token_T=token_T)
        y_MD = book.rough(np.sum(out_MCD, axis=1), index_MC.shape[1], np.max(np.abs(out_MCD), axis=1))
        book.since.clear()
        others = () if self.shares(path) else (path.rpartition(".")[0],)
        compared = len(book.points)
        y_MD = book.meet(y_MD, path, *others, step="experts")
        book.settle(compared)
        if len(book.points) == compared:
            book.pending.append("experts")
        return y_MD

    def shares(self, path: str) -> bool:
        """Whether the mixture has experts that every token shares, so that its output is more than the routed ones'."""
        near = path.rpartition(".")[0] + ".shared_expert"
        return any(name.startswith(near) for name in self.book.modules)

    def rough_expert(self, x_TD: Array, gate_FD: Array, up_FD: Array, down_DF: Array, act: str, token_T: Array) -> Array:
        gate_TF, up_TF = (self.book.rough(self.summed(x_TD, w, token_T), token_T=token_T) for w in (gate_FD, up_FD))
        hidden_TF = self.hidden(gate_TF, up_TF, act, token_T)
        return self.book.rough(self.summed(hidden_TF, down_DF, token_T), token_T=token_T)

    def latent_project(self, h_MD: Array, w: LatentKV, angles: Angles, /, eps: float, *, interleaved: bool = True) -> Array:
        down_MF = self.linear(h_MD, w.kv_a_proj_with_mqa)
        L = w.kv_a_layernorm.weight.shape[0]
        c_MGL = self.rms_norm(down_MF[:, :L], w.kv_a_layernorm, eps)[:, None]
        return np.concatenate([c_MGL, self.rope(down_MF[:, None, L:], angles, interleaved)], axis=-1)

    def latent_attention(self, q_MHF: Array, keys: Keys, rows: Rows, w: Linear, /, *, mask: Mask, scale: float) -> Array:
        """The expanded form: as engines that dump have it, keys and values of all rows from one product."""
        (_, L), (_, H, F) = w.weight.shape, q_MHF.shape
        latent_MGK = np.concatenate([keys.row(r)[0] for r in range(len(rows.counts))])
        nope = F - (latent_MGK.shape[-1] - L)
        k_MHK, v_MHV = self.latent_expand(latent_MGK, w, nope, H)
        k_BSHK, v_BSHV = (x.reshape(len(rows.counts), self.book.length, *x.shape[1:]) for x in (k_MHK, v_MHV))
        numbers = tuple(range(len(rows.counts)))
        whole = Keys(k_BSHK, v_BSHV, numbers, rows.counts, rows.starts, (0,) * len(numbers), np)
        return self.attention(q_MHF, whole, rows, mask=mask, scale=scale)


def turning(book: Book, name: str, like_MJ: Array) -> Array | None:
    """Cosines or sines of the dump, [.., T, 2J] or [.., T, J], as [M, J] of the dump's own rows."""
    value, J = book.dump.values.get(name), like_MJ.shape[1]
    if value is None or value.ndim < 2 or value.shape[-1] not in (J, 2 * J):
        return None
    flat = value.reshape(-1, value.shape[-1])
    if len(flat) == book.length:
        flat = np.tile(flat, (book.rows, 1))
    if len(flat) != book.exact:
        return None
    if flat.shape[1] == J:
        return flat
    return flat[:, ::2] if np.array_equal(flat[:, ::2], flat[:, 1::2]) else flat[:, :J]


def membership(index_MC: Array, experts: int) -> Array:
    """Booleans [M, E]: which experts a token has."""
    member_ME = np.zeros((len(index_MC), experts), dtype=bool)
    np.put_along_axis(member_ME, index_MC, True, axis=1)
    return member_ME
