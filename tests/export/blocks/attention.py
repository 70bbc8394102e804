"""Softmax attention with grouped heads, by torch's own kernel and, for the soft cap, written out."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .case import Cases, Parameters, Tensors, both, normal, seeded

MASKS: dict[str, Callable[[Tensor, Tensor, Parameters], Tensor]] = {
    "causal": lambda i, j, given: j <= i,
    "window": lambda i, j, given: (j <= i) & (i - j < given["window"]),
    "chunk": lambda i, j, given: (j <= i) & (i // given["chunk"] == j // given["chunk"]),
}

CAUSAL: dict[str, Parameters] = {
    "causal": {"mask": "causal", "T": 11, "S": 11},
    "causal-bottom-right": {"mask": "causal", "T": 5, "S": 13},
    "one-query": {"mask": "causal", "T": 1, "S": 19},
    "equal-heads": {"mask": "causal", "T": 9, "S": 9, "H": 4, "G": 4},
    "one-kv-head": {"mask": "causal", "T": 9, "S": 9, "G": 1},
    "wide-values": {"mask": "causal", "T": 9, "S": 9, "V": 14},
    "own-scale": {"mask": "causal", "T": 9, "S": 9, "scale": 0.5},
    "saturated": {"mask": "causal", "T": 9, "S": 9, "q_times": 40.0},
    "softcap": {"mask": "causal", "T": 9, "S": 9, "softcap": 3.0, "q_times": 4.0},
    "nothing-to-see": {"mask": "causal", "T": 5, "S": 6, "first_query": -2, "first_key": 0},
}
WINDOWED: dict[str, Parameters] = {
    "window": {"mask": "window", "window": 5, "T": 17, "S": 17},
    "window-bottom-right": {"mask": "window", "window": 5, "T": 4, "S": 17},
    "window-ring": {"mask": "window", "window": 5, "T": 3, "S": 7, "first_key": 9, "turned_by": 3},
    "chunk": {"mask": "chunk", "chunk": 4, "T": 13, "S": 13},
    "chunk-bottom-right": {"mask": "chunk", "chunk": 4, "T": 5, "S": 14},
    "softcap-window": {"mask": "window", "window": 3, "T": 9, "S": 9, "softcap": 3.0, "q_times": 4.0},
}
"""Shapes (default H 6, G 2, K 8, V 8) and rules. `first_query`: queries lie at consecutive positions from there, by
default so that the last query and the last key share a position. `turned_by`: keys are stored as in a ring buffer.
Queries that see no key at all (`nothing-to-see`: positions -2 and -1) give 0."""


def attention_cases(declared: dict[str, Parameters]) -> Cases:
    dice = seeded()
    cases: Cases = {}
    for name, own in declared.items():
        given = {"H": 6, "G": 2, "K": 8, "V": 8, "q_times": 1.0, "softcap": None, "first_key": 0, "turned_by": 0} | own
        given.setdefault("scale", given["K"] ** -0.5)
        given.setdefault("first_query", given["first_key"] + given["S"] - given["T"])
        inputs = {
            "q": given["q_times"] * normal(dice, given["T"], given["H"], given["K"]),
            "k": normal(dice, given["S"], given["G"], given["K"]),
            "v": normal(dice, given["S"], given["G"], given["V"]),
        }
        i_T = given["first_query"] + torch.arange(given["T"])
        j_S = torch.roll(given["first_key"] + torch.arange(given["S"]), given["turned_by"])
        mask_TS = MASKS[given["mask"]](i_T[:, None], j_S[None], given)
        outputs = both(lambda q, k, v, mask=mask_TS, given=given: attend(q, k, v, mask, given), inputs)
        cases[name] = (given, outputs | {"q_positions": i_T, "k_positions": j_S, "mask": mask_TS})
    return cases


def attend(q: Tensor, k: Tensor, v: Tensor, mask_TS: Tensor, given: Parameters) -> Tensors:
    """q [T,H,K], k [S,G,K], v [S,G,V] -> y [T,H,V]; query head h reads key/value head h // (H / G)."""
    if given["softcap"] is None:
        y = fused_attention(q, k, v, mask_TS, given["scale"])
    else:
        y = capped_attention(q, k, v, mask_TS, given["scale"], given["softcap"])
    return {"y": y.masked_fill(~mask_TS.any(1)[:, None, None], 0.0)}


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask_TS: Tensor, scale: float) -> Tensor:
    """torch's own."""
    q_HTK, k_GSK, v_GSV = (x.transpose(0, 1)[None] for x in (q, k, v))
    y_HTV = F.scaled_dot_product_attention(q_HTK, k_GSK, v_GSV, attn_mask=mask_TS, scale=scale, enable_gqa=True)
    return y_HTV[0].transpose(0, 1)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask_TS: Tensor, scale: float, softcap: float) -> Tensor:
    """cap * tanh(score / cap), before the mask."""
    repeats = q.shape[1] // k.shape[1]
    k_SHK, v_SHV = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores_HTS = softcap * torch.tanh(torch.einsum("thk,shk->hts", q, k_SHK) * scale / softcap)
    return torch.einsum("hts,shv->thv", scores_HTS.masked_fill(~mask_TS, -math.inf).softmax(-1), v_SHV)
