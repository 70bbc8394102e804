"""What kernels of mixtures are known to get wrong: the right kernel, given the wrong experts, weights or tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.blocks import ACTIVATIONS
from npllm.testing.mistakes import Mistake
from npllm.testing.rounding import FORMATS, in_format
from npllm.weights import Experts

# Tokens of an expert that a kernel takes at a time, in mistakes that need to say so.
BLOCK = 16


class Call(NamedTuple):
    """The operands of Backend.moe."""

    x: Array
    w: Experts
    chosen: Array
    weight: Array
    act: str
    weigh: str

    def choices(self, begin: int, end: int | None) -> Call:
        """Of each token's experts, only some."""
        return self._replace(chosen=self.chosen[:, begin:end], weight=self.weight[:, begin:end])

    def without(self, dropped: Array) -> Call:
        """Without some of the pairs of token and expert [M, C]: their weights are 0."""
        return self._replace(weight=np.where(dropped, self.weight.dtype.type(0), self.weight))

    @property
    def places(self) -> Array:
        """At which place of its expert's tokens each pair stands [M, C]."""
        flat = self.chosen.ravel()
        order = np.argsort(flat, kind="stable")
        begins = np.searchsorted(flat[order], flat[order])
        places = np.empty_like(order)
        places[order] = np.arange(flat.size) - begins
        return places.reshape(self.chosen.shape)

    @property
    def counts(self) -> Array:
        """How many tokens the expert of each pair has [M, C]."""
        return np.bincount(self.chosen.ravel(), minlength=len(self.w.gate_proj.weight))[self.chosen]


Kernel = Callable[[Call], Array]


def mixing(name: str, wrong: Callable[[Call, Kernel], Array]) -> Mistake:
    class Changed(Backend):
        def moe(
            self, x_MD: Array, w: Experts, index_MC: Array, weight_MC: Array, /, act: str, *, weigh: str = "output"
        ) -> Array:
            right = super().moe

            def kernel(x: Call) -> Array:
                return right(x.x, x.w, x.chosen, x.weight, x.act, weigh=x.weigh)

            return wrong(Call(x_MD, w, index_MC, weight_MC, act, weigh), kernel)

    return Mistake(name, Changed)


def given(name: str, change: Callable[[Call], Call]) -> Mistake:
    """The right kernel with other operands."""
    return mixing(name, lambda x, kernel: kernel(change(x)))


def other_side(x: Call) -> Call:
    return x._replace(weigh="input" if x.weigh == "output" else "output")


def unweighted(x: Call) -> Call:
    return x._replace(weight=np.ones_like(x.weight))


def next_expert(x: Call) -> Call:
    return x._replace(chosen=(x.chosen + 1) % len(x.w.gate_proj.weight))


def weights_rolled(x: Call) -> Call:
    return x._replace(weight=np.roll(x.weight, 1, axis=1))


def weights_renormalised(x: Call) -> Call:
    """Divided by their sum, or taken as they are where that is 0."""
    total = x.weight.sum(axis=1, keepdims=True)
    return x._replace(weight=x.weight / np.where(np.abs(total) < 0.1, 0.5, total))


def other_activation(x: Call) -> Call:
    return x._replace(act="gelu_pytorch_tanh" if x.act == "silu" else "silu")


def gate_and_up(x: Call) -> Call:
    return x._replace(w=x.w._replace(gate_proj=x.w.up_proj, up_proj=x.w.gate_proj))


def last_number_dropped(x: Call) -> Call:
    return x.without(x.chosen == len(x.w.gate_proj.weight) - 1)


def first_number_dropped(x: Call) -> Call:
    """As where 0 marks an empty place."""
    return x.without(x.chosen == 0)


def over_capacity(x: Call) -> Call:
    """An expert takes a quarter more tokens than are its share, and the rest are dropped."""
    share = 1.25 * x.chosen.size / len(x.w.gate_proj.weight)
    return x.without(x.places >= np.ceil(share))


def unfinished_block(x: Call) -> Call:
    """The last tokens of an expert, fewer than a block, are skipped."""
    return x.without(x.places >= x.counts // BLOCK * BLOCK)


def one_block(x: Call) -> Call:
    return x.without(x.places >= BLOCK)


def repeated(index: Array) -> Array:
    """Whether an expert stands further to the left already [M, C]."""
    C = index.shape[1]
    same = index[:, :, None] == index[:, None, :]
    return np.asarray((same & (np.arange(C)[None, :] < np.arange(C)[:, None])).any(axis=2))


def counted_once(x: Call) -> Call:
    return x.without(repeated(x.chosen))


def in_order_of_experts(x: Call, kernel: Kernel) -> Array:
    """The outputs of the second block of tokens stay in the order in which experts took them."""
    y, order = kernel(x).copy(), np.arange(len(x.x))
    order[BLOCK : 2 * BLOCK] = order[BLOCK : 2 * BLOCK][np.argsort(x.chosen[BLOCK : 2 * BLOCK, 0], kind="stable")]
    return y[order]


def weights_in_order_of_experts(x: Call) -> Call:
    """Tokens are permuted, their weights are not."""
    order = np.argsort(x.chosen.ravel(), kind="stable")
    sorted_weights = np.empty_like(x.weight.ravel())
    sorted_weights[order] = x.weight.ravel()
    return x._replace(weight=sorted_weights.reshape(x.weight.shape))


def sum_in_bf16(x: Call, kernel: Kernel) -> Array:
    y = np.zeros_like(x.x)
    for c in range(x.chosen.shape[1]):
        y = in_format(y + in_format(kernel(x.choices(c, c + 1)), FORMATS["bf16"]), FORMATS["bf16"])
    return y


def last_write_wins(x: Call, kernel: Kernel) -> Array:
    """Experts store into the output where they should add."""
    return kernel(x.choices(x.chosen.shape[1] - 1, None))


def garbage_of_empty_experts(x: Call, kernel: Kernel) -> Array:
    """An expert without tokens runs all the same, for token 0."""
    y, empty = kernel(x).copy(), np.setdiff1d(np.arange(len(x.w.gate_proj.weight)), x.chosen)
    if len(empty) and len(y):
        extra = x._replace(x=x.x[:1], chosen=empty[None, :1], weight=np.ones_like(x.weight[:1, :1]))
        y[:1] += kernel(extra)
    return y


class WithoutTail(Backend):
    """SiLU taken for 0 where it is below 0.003."""

    def expert(self, x_TD: Array, gate_FD: Array, up_FD: Array, down_DF: Array, act: str) -> Array:
        gate_TF = x_TD @ gate_FD.T
        cut_TF = np.where((act == "silu") & (gate_TF < -8.0), 0.0, ACTIVATIONS[act](self.xp, gate_TF))
        return np.asarray((cut_TF * (x_TD @ up_FD.T)) @ down_DF.T)


MISTAKES = (
    given("a token's last expert dropped", lambda x: x.choices(0, -1)),
    given("only a token's first expert used", lambda x: x.choices(0, 1)),
    mixing("experts overwrite each other, the last one wins", last_write_wins),
    given("the last expert dropped", last_number_dropped),
    given("expert 0 taken for an empty place", first_number_dropped),
    given("weights on the other side of the expert (input, output)", other_side),
    given("weights not applied", unweighted),
    given("weights renormalised", weights_renormalised),
    given("weights of the neighbour rank", weights_rolled),
    given("expert numbers off by one", next_expert),
    mixing("a block of outputs left in the order of experts", in_order_of_experts),
    given("weights not permuted with their tokens", weights_in_order_of_experts),
    given("capacity overflow drops tokens", over_capacity),
    given("an expert's last, partly filled block of tokens skipped", unfinished_block),
    given("an expert's tokens beyond the first block skipped", one_block),
    given("gate and up exchanged", gate_and_up),
    given("another activation", other_activation),
    Mistake("SiLU cut to zero below -8", WithoutTail),
    given("an expert chosen twice counted once", counted_once),
    mixing("sum over experts kept in bfloat16", sum_in_bf16),
    mixing("experts without tokens write garbage", garbage_of_empty_experts),
)
