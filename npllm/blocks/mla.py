"""Multi-head latent attention (DeepSeek V2, arXiv 2405.04434, section 2.1): keys and values of all heads from one vector.

Per token the cache holds `[c | k_rope]`: a compressed vector c of L numbers and one rotated key that all heads share. The
key of a head is `[W_k c | k_rope]`, its value `W_v c`; `kv_b_proj` [H x F, L] stacks W_k and W_v of each head.
Two forms give the same output. Expanded: keys and values of every cached token are made, then attention runs as usual.
Absorbed: since `q (W_k c) = (q W_k) c`, the queries go to the latent space instead, all heads attend to the same
`[c | k_rope]`, and W_v is applied to what comes out.
"""

from __future__ import annotations

from npllm.arrays import Array, Namespace
from npllm.blocks.norms import rms_norm
from npllm.blocks.rope import Angles, rotate_halves, rotate_interleaved


def latent(xp: Namespace, down_MF: Array, norm_L: Array, angles: Angles, eps: float, interleaved: bool = True) -> Array:
    """`[norm(c) | rope(k)]` from the projection `[c | k]` -> latent_MGK of one head: only c is normed, only k turns."""
    L = norm_L.shape[0]
    rotate = rotate_interleaved if interleaved else rotate_halves
    c_MGL = rms_norm(xp, down_MF[:, None, :L], norm_L, eps)
    return xp.concatenate([c_MGL, rotate(xp, down_MF[:, None, L:], angles)], axis=-1)


def expand(xp: Namespace, up_SHF: Array, rope_SGJ: Array, nope: int) -> tuple[Array, Array]:
    """Keys and values of all heads -> k_SHK, v_SHV, from `kv_b_proj(c)`, whose first `nope` numbers per head are key."""
    S, H, _ = up_SHF.shape
    shared = xp.broadcast_to(rope_SGJ, (S, H, rope_SGJ.shape[2]))
    return xp.concatenate([up_SHF[..., :nope], shared], axis=-1), up_SHF[..., nope:]


def absorb(xp: Namespace, q_MHK: Array, up_HFL: Array, nope: int) -> Array:
    """Queries `[nope | rope]` in the latent space: `[q_nope W_k | q_rope]` per head, [M, H, L + J]."""
    q_HML = q_MHK[..., :nope].transpose(1, 0, 2) @ up_HFL[:, :nope]
    return xp.concatenate([q_HML.transpose(1, 0, 2), q_MHK[..., nope:]], axis=-1)


def unabsorb(o_MHL: Array, up_HFL: Array, nope: int) -> Array:
    """What attention over latents gave, as values: `W_v o` per head -> o_MHV."""
    o_HMV = o_MHL.transpose(1, 0, 2) @ up_HFL[:, nope:].transpose(0, 2, 1)
    return o_HMV.transpose(1, 0, 2)


def absorbed_is_cheaper(queries: int, latent: int, per_head: int) -> bool:
    """Whether the absorbed form takes fewer multiplications for so many queries of one row.

    Per head and cached token, expanding costs `latent x per_head` once (`per_head` = widths of key without rope and value)
    and saves `2 latent - per_head` for each query.
    """
    return queries * (2 * latent - per_head) < latent * per_head
