"""`gated_ffn`: `residual + down(act(gate h) * up h)` with `h = norm(x)`; and `mlp`, the same without `up`."""

from __future__ import annotations

from npllm.arrays import Array
from npllm.backend import Norm, accelerates
from npllm.backends.cupy_gpu.base import ACTIVATIONS, THREADS, groups
from npllm.backends.cupy_gpu.device import Out
from npllm.backends.cupy_gpu.products import Products, unprepared
from npllm.weights import MLP, GatedFFN, Linear


class FeedForward(Products):
    """Feed-forward layers."""

    @accelerates(lambda self, x_MD, w, act, norm=None, residual_MD=None: unprepared(self, *w))
    def gated_ffn(
        self, x_MD: Array, w: GatedFFN, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None
    ) -> Array:
        hidden_MF = self._hidden(self.plain(x_MD), w.gate_proj, w.up_proj, act, norm)
        return self.product(hidden_MF, w.down_proj, residual_MF=residual_MD)

    @accelerates(lambda self, x_MD, w, act, norm=None, residual_MD=None: unprepared(self, *w))
    def mlp(self, x_MD: Array, w: MLP, /, act: str, *, norm: Norm | None = None, residual_MD: Array | None = None) -> Array:
        hidden_MF = self._hidden(self.plain(x_MD), w.c_fc, None, act, norm)
        return self.product(hidden_MF, w.c_proj, residual_MF=residual_MD)

    def _hidden(self, x_MD: Array, gate: Linear, up: Linear | None, act: str, norm: Norm | None) -> Array:
        """`act(gate h) * up h` with `h = norm(x)`, or `act(gate h)`."""
        alike = up is None or gate.weight.alike(up.weight)
        if self.are_few(x_MD, gate.weight) and alike:
            return self._few_hidden(x_MD, gate, up, act, norm)
        gate_MF, *up_MF = self.products(x_MD, (gate,) if up is None else (gate, up), norm)
        out_MF = self.empty(*gate_MF.shape)
        if out_MF.size:
            blocks = min(groups(out_MF.size, THREADS), 16 * self.device.multiprocessors)
            arguments = (gate_MF, up_MF[0] if up_MF else None, ACTIVATIONS[act], out_MF.size, Out(out_MF))
            self.launch("elementwise.cu", "gated", {}, (blocks, 1, 1), THREADS, arguments)
        return out_MF

    def _few_hidden(self, x_MD: Array, gate: Linear, up: Linear | None, act: str, norm: Norm | None) -> Array:
        F, source = len(gate.weight), self.source(x_MD, norm)
        out_MF = self.empty(len(x_MD), F)
        first = (gate.weight.structure, self.vector(gate, "bias"))
        if up is None:
            self.gemv("gemv_activated", x_MD, gate.weight, [F], (*source, *first, ACTIVATIONS[act], Out(out_MF)))
        else:
            arguments = (*source, *first, up.weight.structure, self.vector(up, "bias"), ACTIVATIONS[act], Out(out_MF))
            self.gemv("gemv_gated", x_MD, gate.weight, [F], arguments, rows_each=2)
        return out_MF
