"""`moe`: each token's chosen experts, gated feed-forward layers of one shape, and the weighted sum of what they say.

Nothing outside the kernels depends on what was chosen, so a step with experts can be captured.
"""

from __future__ import annotations

from npllm.arrays import Array
from npllm.backend import accelerates
from npllm.backends.cupy_gpu.base import ACTIVATIONS, THREADS, groups
from npllm.backends.cupy_gpu.device import Argument, Out
from npllm.backends.cupy_gpu.matrix import FORMATS, Matrix
from npllm.backends.cupy_gpu.products import FEW, STAGED_BYTES, TILE, WARPS, WIDE_TILE, Products
from npllm.weights import Experts, GatedFFN

# Rows that a warp computes: of gate and up together, and of down.
HIDDEN_ROWS, SAID_ROWS = 2, 2

# What experts say of so many tokens, in bytes, is in memory at a time.
SLAB_BYTES = 1 << 28

# Blocks that a launch has at most along its second and third axis.
MOST_BLOCKS = 65535


def not_experts(be: Products, w: Experts) -> str | None:
    """Why kernels cannot compute with these."""
    if be.dtype == "float64":
        return "kernels compute in float32 and bfloat16"
    if not all(isinstance(part.weight, Matrix) and part.bias is None for part in w):
        return "the experts were not prepared by this backend, or have biases"
    if not w.gate_proj.weight.alike(w.up_proj.weight):
        return "gate and up are stored in different ways"
    hidden, said = w.gate_proj.weight.shape[1], w.down_proj.weight.shape[1]
    if hidden > MOST_BLOCKS * WARPS * HIDDEN_ROWS // 2 or said > MOST_BLOCKS * SAID_ROWS:
        return "the experts are too wide"
    return None


class Mixtures(Products):
    """Mixtures of experts."""

    @accelerates(lambda self, x_MD, w, index_MC, weight_MC, act, weigh="output": not_experts(self, w))
    def moe(
        self, x_MD: Array, w: Experts, index_MC: Array, weight_MC: Array, /, act: str, *, weigh: str = "output"
    ) -> Array:
        return self._mixture(x_MD, w, index_MC, weight_MC, act, weigh, None)

    @accelerates(
        lambda self, h_MD, w, index_MC, weight_MC, act, residual_MD, weigh="output", shared=None: not_experts(self, w)
    )
    def expert_ffn(
        self, h_MD: Array, w: Experts, index_MC: Array, weight_MC: Array, /, act: str, *,
        residual_MD: Array, weigh: str = "output", shared: GatedFFN | None = None,
    ) -> Array:  # fmt: skip
        y_MD = self._mixture(h_MD, w, index_MC, weight_MC, act, weigh, self.plain(residual_MD))
        return y_MD if shared is None else self.gated_ffn(h_MD, shared, act, residual_MD=y_MD)

    def _mixture(
        self, x_MD: Array, w: Experts, index_MC: Array, weight_MC: Array, act: str, weigh: str, residual_MD: Array | None
    ) -> Array:
        """The chosen experts' weighted sum, and the residual."""
        x_MD, weight_MC, index_MC = self.plain(x_MD), self.plain(weight_MC), self.integers(index_MC)
        y_MD, (M, C) = self.empty(*x_MD.shape), index_MC.shape
        few = M <= FEW
        per = FEW if few else max(1, SLAB_BYTES // (4 * C * x_MD.shape[1]))
        for begin in range(0, M, per):
            part = slice(begin, begin + per)
            mix = self._mix_few if few else self._mix_many
            rest_MD = None if residual_MD is None else residual_MD[part]
            mix(x_MD[part], w, index_MC[part], weight_MC[part], rest_MD, y_MD[part], ACTIVATIONS[act], weigh == "input")
        return y_MD

    def _mix_few(
        self, x_MD: Array, w: Experts, index_MC: Array, weight_MC: Array, residual_MD: Array | None, y_MD: Array, act: int,
        on_input: bool,
    ) -> None:  # fmt: skip
        """The experts of at most FEW tokens, each where it was chosen."""
        (M, C), (E, F, D) = index_MC.shape, w.gate_proj.weight.shape
        gate, up, down = (part.weight for part in w)
        hidden_NF = self.empty(M * C, F)
        before, after = (weight_MC, None) if on_input else (None, weight_MC)
        defines = {"FORMAT": FORMATS[gate.format], "TOKENS": 1, "ROWS": HIDDEN_ROWS}
        grid = (M * C, groups(F, WARPS * HIDDEN_ROWS // 2), 1)
        args: tuple[Argument, ...] = (x_MD, D, C, E, index_MC, before, gate.structure, up.structure, act, Out(hidden_NF))
        self.launch("moe_few.cu", "moe_hidden_few", defines, grid, WARPS * 32, args, STAGED_BYTES)
        defines = {"FORMAT": FORMATS[down.format], "TOKENS": 1, "ROWS": SAID_ROWS}
        args = (hidden_NF, C, E, index_MC, after, down.structure, residual_MD, Out(y_MD))
        grid = (M, groups(D, SAID_ROWS), 1)
        self.launch("moe_few.cu", "moe_say_few", defines, grid, WARPS * 32, args, 4 * C * SAID_ROWS)

    def _mix_many(
        self, x_MD: Array, w: Experts, index_MC: Array, weight_MC: Array, residual_MD: Array | None, y_MD: Array, act: int,
        on_input: bool,
    ) -> None:  # fmt: skip
        """The experts of many tokens, in tiles of one expert each."""
        (M, C), (E, F, D) = index_MC.shape, w.gate_proj.weight.shape
        gate, up, down = (part.weight for part in w)
        tensor = self.on_tensor_cores(gate), self.on_tensor_cores(down)
        tile = WIDE_TILE if all(tensor) and M * C >= WIDE_TILE * E else TILE
        # Every expert may have a tile that is not full.
        tiles = M * C // tile + min(E, M * C)
        order, owners = self._places(index_MC, E, tile, tiles)
        before, after = (weight_MC, None) if on_input else (None, weight_MC)
        hidden_NF, said_ND = self.empty(tiles * tile, F), self.empty(M * C, D)
        defines = {"FORMAT": FORMATS[gate.format], "TILE": tile, "TENSOR": int(tensor[0])}
        args: tuple[Argument, ...] = (x_MD, D, C, order, owners, before, gate.structure, up.structure, act, Out(hidden_NF))
        self.launch("moe_many.cu", "moe_hidden_many", defines, (groups(2 * F, tile), tiles, 1), 2 * tile, args)
        defines = {"FORMAT": FORMATS[down.format], "TILE": tile, "TENSOR": int(tensor[1])}
        args = (hidden_NF, order, owners, down.structure, Out(said_ND))
        self.launch("moe_many.cu", "moe_say_many", defines, (groups(D, tile), tiles, 1), 2 * tile, args)
        args = (said_ND, M, C, D, E, index_MC, after, residual_MD, Out(y_MD))
        self.launch("moe_plan.cu", "moe_sum", {}, (groups(M * D, THREADS), 1, 1), THREADS, args)

    def _places(self, index_MC: Array, experts: int, tile: int, tiles: int) -> tuple[Array, Array]:
        """Choices by their place in tiles [tiles x tile], -1 for none, and the expert of each tile, -1 for none."""
        counts, count = self.empty(experts, dtype="int64"), index_MC.size
        order, owners = self.empty(tiles * tile, dtype="int64"), self.empty(tiles, dtype="int64")
        self.launch("moe_plan.cu", "moe_count", {}, (experts, 1, 1), THREADS, (index_MC, count, Out(counts)))
        args = (index_MC, count, counts, experts, tile, tiles, Out(order), Out(owners))
        self.launch("moe_plan.cu", "moe_place", {}, (experts, 1, 1), THREADS, args)
        return order, owners
