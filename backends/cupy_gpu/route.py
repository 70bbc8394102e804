"""`route`: the experts of each token and their weights, npllm.blocks.route.

The router's logits are float32 products in every arithmetic: an expert that rounding swaps for another is no small error.
"""

from __future__ import annotations

from npllm.arrays import Array
from npllm.backend import accelerates
from npllm.backends.cupy_gpu.device import Fixed, Out
from npllm.backends.cupy_gpu.matrix import Matrix
from npllm.backends.cupy_gpu.products import Products, unprepared
from npllm.blocks.moe import Router
from npllm.weights import Gate

# Experts whose scores, ranks and keys fit into 48 KiB, what a block has without asking for more.
MOST = 4096 - 64


def not_a_router(be: Products, w: Gate) -> str | None:
    """Why kernels cannot choose by it."""
    if len(w.gate.weight) > MOST:
        return f"more than {MOST} experts"
    if w.correction is not None and isinstance(w.correction.weight, Matrix):
        return "a correction that was prepared as a matrix"
    return unprepared(be, w.gate)


class Routers(Products):
    """Routers of mixtures."""

    @accelerates(lambda self, h_MD, w, router: not_a_router(self, w))
    def route(self, h_MD: Array, w: Gate, /, router: Router) -> tuple[Array, Array]:
        logits_ME = self.product(h_MD, w.gate)
        M, E, C = len(h_MD), len(w.gate.weight), router.experts_per_token
        index_MC, weight_MC = self.empty(M, C, dtype="int64"), self.empty(M, C)
        correction = None if w.correction is None else Fixed(self.plain(w.correction.weight))
        defines = {
            "EXPERTS": E, "CHOICES": C, "SIGMOID": router.scores == "sigmoid", "BY_LOGITS": router.by == "logits",
            "CORRECTION": correction is not None, "GROUPS": router.groups, "KEPT": router.kept_groups,
            "PAIR": router.ranking == "pair", "NORMALISE": router.normalise,
        }  # fmt: skip
        numbers = {name: int(value) for name, value in defines.items()}
        args = (logits_ME, correction, Out(index_MC), Out(weight_MC), float(router.floor), float(router.scale))
        if M:
            self.launch("route.cu", "route", numbers, (M, 1, 1), 32, args)
        return index_MC, weight_MC
