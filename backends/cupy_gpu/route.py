"""`route`: the experts of each token and their weights, npllm.blocks.route.

The router's logits are float32 products in every arithmetic: an expert that rounding swaps for another is no small error.
"""

from __future__ import annotations

import struct

from npllm.arrays import Array
from npllm.backend import accelerates
from npllm.backends.cupy_gpu.device import Fixed, Out, Structure
from npllm.backends.cupy_gpu.matrix import Matrix
from npllm.backends.cupy_gpu.products import STAGED_BYTES, WARPS, Products, unprepared
from npllm.blocks.moe import Router
from npllm.weights import Gate


def not_a_router(be: Products, w: Gate) -> str | None:
    """Why kernels cannot choose by it."""
    if w.correction is not None and isinstance(w.correction.weight, Matrix):
        return "a correction that was prepared as a matrix"
    return unprepared(be, w.gate)


def _words(router: Router) -> tuple[int, ...]:
    """The rule as struct Rule of route.cu has it, after the sizes."""
    return (
        router.scores == "sigmoid", router.by == "logits", router.groups, router.kept_groups, router.ranking == "pair",
        router.normalise,
    )  # fmt: skip


class Routers(Products):
    """Routers of mixtures."""

    @accelerates(lambda self, h_MD, w, router: not_a_router(self, w))
    def route(self, h_MD: Array, w: Gate, /, router: Router) -> tuple[Array, Array]:
        M, E, C = len(h_MD), len(w.gate.weight), router.experts_per_token
        index_MC, weight_MC = self.empty(M, C, dtype="int64"), self.empty(M, C)
        correction = None if w.correction is None else Fixed(self.plain(w.correction.weight))
        rule = Structure(struct.pack("8q", E, C, *_words(router)), ())
        rest = (rule, float(router.floor), float(router.scale))
        room = 4 * (3 * E + router.groups)
        if self.are_few(h_MD, w.gate.weight) and WARPS * (room + 4 * E) <= STAGED_BYTES:
            h_MD, logits_ME = self.plain(h_MD), self.empty(M, E)
            args = (
                *self.source(h_MD), w.gate.weight.structure, self.vector(w.gate, "bias"), correction, *rest, Out(logits_ME),
                self.tickets(1), Out(index_MC), Out(weight_MC),
            )  # fmt: skip
            self.gemv("route_few", h_MD, w.gate.weight, [E], args, exact=True)
        elif M:
            logits_ME = self.product_in_float32(h_MD, w.gate)
            args = (logits_ME, correction, Out(index_MC), Out(weight_MC), *rest)
            self.launch("route.cu", "route", {}, (M, 1, 1), 32, args, room)
        return index_MC, weight_MC
