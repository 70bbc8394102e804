"""Multi-head latent attention (npllm.blocks.mla): `latent_project`, `latent_expand`, `latent_attention`.

Rows of few queries attend to the latents themselves: `absorb` takes the queries there by the rows of kv_b_proj as they are
stored, `unabsorb` brings back what comes out. For other rows the keys and values of all heads are made first.
"""

from __future__ import annotations

from npllm.arrays import Array
from npllm.backend import RMS, accelerates
from npllm.backends.numba_cpu.attention_vectors import score, weigh
from npllm.backends.numba_cpu.base import at
from npllm.backends.numba_cpu.jit import inline, kernel
from npllm.backends.numba_cpu.matrix import BF16, COLUMNS, DATA, F32, FORMAT, ROW_BYTES, ROWS
from npllm.backends.numba_cpu.memory import f32, word
from npllm.backends.numba_cpu.panels import clear, pack, panel_bytes
from npllm.backends.numba_cpu.products import Products, unprepared
from npllm.backends.numba_cpu.rope import _turn_halves, _turn_interleaved
from npllm.backends.numba_cpu.rows import fill_rows
from npllm.backends.numba_cpu.source import COUNT, FORM, SOURCE_WORDS, WIDTH, read_row
from npllm.backends.numba_cpu.tape import entry
from npllm.backends.numba_cpu.team import next_chunk, scratch
from npllm.blocks.masks import Mask
from npllm.blocks.rope import Angles
from npllm.cache import Keys, Rows
from npllm.weights import LatentKV, Linear

# Tokens that a thread takes at a time, where each has little to do, and where they share a head's weights.
TOKENS, SHARING = 8, 32

# Bytes of weights that are widened at a time.
WIDENED = 1 << 19


@kernel(FORM + "6q")
def norm_and_turn(args, team, thread, threads):
    """Latents [norm(c) | rope(k)] from rows [c | k].

    Arguments: c as a source, k behind it; the width of k; cosines and sines [M, J], J; whether pairs are interleaved; where
    the latents go.
    """
    tail, cosines, sines, count, interleaved, out = (
        word(args, SOURCE_WORDS), word(args, SOURCE_WORDS + 1), word(args, SOURCE_WORDS + 2), word(args, SOURCE_WORDS + 3),
        word(args, SOURCE_WORDS + 4), word(args, SOURCE_WORDS + 5),
    )  # fmt: skip
    tokens, width = word(args, COUNT), word(args, WIDTH)
    while True:
        begin = next_chunk(team) * TOKENS
        if begin >= tokens:
            break
        for m in range(begin, min(tokens, begin + TOKENS)):
            place = out + m * (width + tail) * 4
            read_row(team, args, m, place)
            k, turned = f32(word(args, 0) + m * word(args, 1) + width * 4, tail), f32(place + width * 4, tail)
            cos, sin = f32(cosines + m * count * 4, count), f32(sines + m * count * 4, count)
            if interleaved:
                _turn_interleaved(k, cos, sin, turned)
            else:
                _turn_halves(k, cos, sin, turned)
            for j in range(2 * count, tail):
                turned[j] = k[j]


@kernel("9q")
def place_keys(args, team, thread, threads):
    """Keys [W_k c | k_rope] of all heads.

    Arguments: products [S, H, F], S, H, F, the width of W_k c; k_rope, how many bytes apart; its width; keys.
    """
    products, tokens, heads, width = word(args, 0), word(args, 1), word(args, 2), word(args, 3)
    nope, shared, shared_step, tail = word(args, 4), word(args, 5), word(args, 6), word(args, 7)
    while True:
        begin = next_chunk(team) * TOKENS
        if begin >= tokens:
            break
        for s in range(begin, min(tokens, begin + TOKENS)):
            turned = f32(shared + s * shared_step, tail)
            for h in range(heads):
                x = f32(products + (s * heads + h) * width * 4, nope)
                y = f32(word(args, 8) + (s * heads + h) * (nope + tail) * 4, nope + tail)
                for k in range(nope):
                    y[k] = x[k]
                for k in range(tail):
                    y[nope + k] = turned[k]


# A head's part of kv_b_proj and the tokens that meet it: the matrix, tokens, heads, the width of a key in it; what is read
# [M, H, ..] and written [M, H, ..], and the widths of both.
MATRIX, COUNT_OF, HEADS, NOPE, READ, READ_WIDTH, WRITTEN, WRITTEN_WIDTH = range(8)


@kernel("8q")
def absorb(args, team, thread, threads):
    """Queries in the latent space: `[q_nope W_k | q_rope]` per head."""
    matrix, nope = word(args, MATRIX), word(args, NOPE)
    latent, space = word(matrix, COLUMNS), scratch(team, thread)
    while True:
        head, begin, end = _share(args, next_chunk(team))
        if head < 0:
            break
        _carry(args, head, begin, end, latent)
        step = max(1, WIDENED // (latent * 4))
        for row in range(0, nope, step):
            stop = min(nope, row + step)
            weights, apart, halves = _rows(team, args, head, row, stop, space)
            q, out = _read(args, begin, head) + row * 4, _written(args, begin, head)
            q_step, out_step = _step(args, READ_WIDTH), _step(args, WRITTEN_WIDTH)
            weigh(team, halves, weights, apart, stop - row, q, q_step, end - begin, out, out_step, latent)


@kernel("8q")
def unabsorb(args, team, thread, threads):
    """Values of what attention over latents gave: `W_v o` per head."""
    matrix, nope, width = word(args, MATRIX), word(args, NOPE), word(args, WRITTEN_WIDTH)
    latent, space = word(matrix, COLUMNS), scratch(team, thread)
    step = max(1, WIDENED // (max(latent, SHARING) * 4))
    room, row_bytes = space + WIDENED + latent * 4, step * 4
    while True:
        head, begin, end = _share(args, next_chunk(team))
        if head < 0:
            break
        for row in range(0, width, step):
            stop = min(width, row + step)
            weights, apart, halves = _rows(team, args, head, nope + row, nope + stop, space)
            o, o_step = _read(args, begin, head), _step(args, READ_WIDTH)
            score(team, halves, weights, apart, stop - row, o, o_step, end - begin, room, row_bytes, latent)
            for m in range(begin, end):
                x, y = f32(room + (m - begin) * row_bytes, stop - row), f32(_written(args, m, head) + row * 4, stop - row)
                for v in range(stop - row):
                    y[v] = x[v]


@inline
def _share(args, chunk):
    """The head and the tokens of a chunk; head -1: there are no more."""
    heads, tokens = word(args, HEADS), word(args, COUNT_OF)
    begin = chunk // heads * SHARING
    return (chunk % heads if begin < tokens else -1), begin, min(tokens, begin + SHARING)


@inline
def _step(args, width):
    """Bytes between two tokens of what is read or written."""
    return word(args, HEADS) * word(args, width) * 4


@inline
def _read(args, m, head):
    return word(args, READ) + m * _step(args, READ_WIDTH) + head * word(args, READ_WIDTH) * 4


@inline
def _written(args, m, head):
    return word(args, WRITTEN) + m * _step(args, WRITTEN_WIDTH) + head * word(args, WRITTEN_WIDTH) * 4


@inline
def _rows(team, args, head, begin, end, room):
    """Rows of a head's part of the matrix, how many bytes apart, and whether they are bf16 bits, else float32."""
    matrix = word(args, MATRIX)
    first, apart = head * (word(matrix, ROWS) // word(args, HEADS)), word(matrix, ROW_BYTES)
    kind, width = word(matrix, FORMAT), word(matrix, COLUMNS)
    if kind in (F32, BF16):
        return word(matrix, DATA) + (first + begin) * apart, apart, kind == BF16
    fill_rows(team, matrix, first + begin, first + end, 0, width, False, room, width * 4)
    return room, width * 4, False


@inline
def _carry(args, head, begin, end, latent):
    """Absorbed queries begin as `[0 | q_rope]`."""
    nope, width = word(args, NOPE), word(args, READ_WIDTH)
    for m in range(begin, end):
        place = _written(args, m, head)
        clear(place, latent)
        x, y = f32(_read(args, m, head) + nope * 4, width - nope), f32(place + latent * 4, width - nope)
        for k in range(width - nope):
            y[k] = x[k]


class Latents(Products):
    """Latent attention."""

    @accelerates(lambda self, h_MD, w, angles, eps, interleaved=True: unprepared(self, w.kv_a_proj_with_mqa))
    def latent_project(self, h_MD: Array, w: LatentKV, angles: Angles, /, eps: float, *, interleaved: bool = True) -> Array:
        (down_MF,) = self.multiply(h_MD, [w.kv_a_proj_with_mqa])
        L, cos_MJ, sin_MJ = len(w.kv_a_layernorm.weight), self.plain(angles.cos_MJ), self.plain(angles.sin_MJ)
        latent_MGK = self.empty(len(down_MF), 1, down_MF.shape[1])
        source = self.source(down_MF[:, :L], RMS(w.kv_a_layernorm, eps))
        turned = down_MF.shape[1] - L, at(cos_MJ), at(sin_MJ), cos_MJ.shape[1], int(interleaved), at(latent_MGK)
        self.run(entry(norm_and_turn, *source, *turned), numbers=latent_MGK.size)
        return latent_MGK

    @accelerates(lambda self, latent_SGF, w, nope, heads: unprepared(self, w))
    def latent_expand(self, latent_SGF: Array, w: Linear, /, nope: int, heads: int) -> tuple[Array, Array]:
        (S, _, width), (rows, L) = latent_SGF.shape, w.weight.shape
        if latent_SGF.dtype != "float32" or latent_SGF.strides[2] != 4 or not latent_SGF.flags.aligned:
            latent_SGF = self.plain(latent_SGF)
        panels, arithmetic = self.room(panel_bytes(S, L)), self.arithmetic(w.weight)
        self.run(entry(pack, *self.source(latent_SGF[:, 0, :L]), at(panels), arithmetic))
        (up_SF,) = self.multiply_panels(panels, S, [w], None, arithmetic)
        k_SHK = self.empty(S, heads, nope + width - L)
        shared = latent_SGF[:, 0, L:]
        placed = (at(up_SF), S, heads, rows // heads, nope, at(shared), shared.strides[0], width - L, at(k_SHK))
        self.run(entry(place_keys, *placed))
        return k_SHK, up_SF.reshape(S, heads, rows // heads)[:, :, nope:]

    @accelerates(lambda self, q_MHF, keys, rows, w, nope, mask, scale: unprepared(self, w))
    def latent_absorbed(self, q_MHF: Array, keys: Keys, rows: Rows, w: Linear, nope: int, mask: Mask, scale: float) -> Array:
        q_MHF, matrix = self.plain(q_MHF), w.weight
        (M, H, F), L, width = q_MHF.shape, matrix.shape[1], keys.k_BSGK.shape[-1]
        q_MHK, out_MHV = self.empty(M, H, width), self.empty(M, H, matrix.shape[0] // H - nope)
        self.run(entry(absorb, matrix.address, M, H, nope, at(q_MHF), F, at(q_MHK), width))
        o_MHL = self.plain(self.attention(q_MHK, keys, rows, mask=mask, scale=scale))
        self.run(entry(unabsorb, matrix.address, M, H, nope, at(o_MHL), L, at(out_MHV), out_MHV.shape[2]))
        return out_MHV
