"""The checker of the emulated device: what it tells of small kernels, and that no wait, barrier or fence of ours is idle."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from npllm.backends.cupy_gpu import sources
from npllm.backends.cupy_gpu.device import Fixed, InOut, Out
from npllm.handles import Weight
from npllm.testing.conformance import conformity, trials
from npllm.testing.report import CheckError
from npllm.weights import Linear
from tests.gpu import test_adjust, test_formats, test_sampling
from tests.gpu.emulator import EmulatedBackend, Emulator, emulated
from tests.gpu.emulator import device as emulator
from tests.gpu.planted import plant
from tests.gpu.test_bfloat16_keys import Twice

pytestmark = emulated

THREADS, BLOCKS = 64, 3

PARAMETERS = "const float *given, const float *fixed, float *made, float *kept, u32 *ticket"

# Numbers of each block's own, and the first of them.
VARIABLES = "int t = threadIdx.x, at = blockIdx.x * 64 + t; bool first = t == 0; __shared__ float room[64];"


def launched(body: str) -> None:
    """A kernel with this body, on arrays of a number per thread and a ticket."""
    text = f'{sources.source("common.cuh")}extern "C" __global__ void small({PARAMETERS}) {{ {VARIABLES}\n{body}\n}}\n'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator, "source", lambda file: text)
        patch.setattr(emulator, "kernels", lambda file: ["small"])
        device = Emulator(checked=True)
        given, fixed, kept = (device.upload(np.zeros(THREADS * BLOCKS, np.float32)) for _ in range(3))
        made, ticket = device.empty((THREADS * BLOCKS,), np.float32), device.upload(np.zeros(1, np.uint32))
        args = (given, Fixed(fixed), Out(made), InOut(kept), InOut(ticket))
        device.launch(device.kernel("small.cu", "small", {}), (BLOCKS, 1, 1), THREADS, args)


def ticketed(before: str, after: str) -> str:
    """The block that is last adds up what all have written."""
    return f"""wait_for_inputs(); kept[at] = 1; __syncthreads(); __shared__ u32 drawn;
        if (first) {{ {before} drawn = atomicInc(ticket, gridDim.x - 1); {after} }}
        __syncthreads(); if (drawn == gridDim.x - 1) made[t] = kept[t] + kept[64 + t] + kept[128 + t];"""


FENCE = "__threadfence();"

WRONG = {
    "made[at] = given[at]; wait_for_inputs();": "an access before the kernels ahead were waited for",
    "made[at] = fixed[at]; wait_for_inputs();": "an access before the kernels ahead were waited for",
    "wait_for_inputs(); made[at + 1] = 0;": "a write outside of every array",
    "wait_for_inputs(); made[at] = given[at - 1];": "a read outside of every array",
    "wait_for_inputs(); ((float *)given)[at] = 0;": "a write to an array that is read",
    "wait_for_inputs(); uint4 v = load_once((const uint4 *)given); made[at] = v.x;": "a read by the path of constants",
    "if (first) room[0] = 0; __syncthreads(); room[1] = room[t];": "a read of shared memory that nobody wrote",
    "wait_for_inputs(); made[at] += 1;": "a read of a result that nobody wrote",
    "wait_for_inputs(); made[t] = 0;": "one of another block",
    "wait_for_inputs(); made[blockIdx.x] = 0;": "two writes race",
    "room[t] = 0; __shfl_sync(FULL, t, 0); room[t] += room[t ^ 1];": "and another one of its block",
    "room[t] = 0; __syncwarp(); room[t] += room[t ^ 32];": "a read",
    "room[t] = 0; __syncthreads(); float x = room[t ^ 1]; __shfl_sync(FULL, t, 0); room[t] = x;": "a write races",
    "atomicAdd((u32 *)room + t / 64, 1u);": "a read of shared memory",
    "wait_for_inputs(); atomicAdd(ticket, 1u); made[at] = *ticket;": "a read races with a write",
    ticketed("", FENCE): "a read races with a write",
    ticketed(FENCE, ""): "a read races with a write",
}

RIGHT = [
    "float x = fixed[at]; wait_for_inputs(); made[at] = x + given[at];",
    "wait_for_inputs(); kept[at] += 1;",
    "float4 v = *(const float4 *)fixed; wait_for_inputs(); uint4 w = load_once((const uint4 *)fixed); made[at] = v.x + w.x;",
    "room[t] = 0; __syncwarp(); float x = room[t ^ 1]; __syncwarp(); room[t] = x;",
    "room[t] = 0; __syncthreads(); float x = room[63 - t]; __syncthreads(); room[t] = x;",
    "if (first) room[0] = 0; __syncthreads(); atomicAdd((u32 *)room, 1u); __syncthreads(); room[t] = 0;",
    ticketed(FENCE, FENCE),
    "wait_for_inputs(); kept[at] = 1; if (is_last(ticket, gridDim.x, (u32 *)room)) made[t] = kept[t] + kept[64 + t];",
]


@pytest.mark.parametrize("body", WRONG)
def test_what_is_undefined_is_told(body: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(WRONG[body])) as caught:
        launched(body)
    assert body.splitlines()[-1].strip() in str(caught.value), "the line that does it"


@pytest.mark.parametrize("body", RIGHT)
def test_what_is_in_order_is_not(body: str) -> None:
    for _ in range(3):
        launched(body)


# -- what our kernels wait for ------------------------------------------------------------------------------------------

WAIT = re.compile(r"(__syncthreads|__syncwarp|__threadfence|(?<!void )wait_for_inputs|copy_async_wait<\d>)\(\);")


def kit(dtype: str, *operations: str) -> Callable[[], None]:
    """Cases of these operations, to the first that fails."""

    def run() -> None:
        for trial in trials(Twice, operations, storages=["bf16"], dtypes=[dtype]):
            conformity(Twice, trial, 120.0).raise_on_failure()

    return run


def products_of_prompts() -> None:
    """What numbers go through on their way to cuBLASLt."""
    be = EmulatedBackend("float32")
    be.widened(be.prepare(Linear(Weight.of("w", np.ones((5, 32), np.float32)))).weight)
    be._halved(be.asarray(np.ones((5, 32), np.float32)))


def products_of_few() -> None:
    test_formats.products(EmulatedBackend("stored"), "bf16", 8, 2048)


def elementwise() -> None:
    be = EmulatedBackend("float32")
    be.altup_predict(be.asarray(np.ones((2, 3, 8), np.float32)), be.asarray(np.ones((2, 3, 3), np.float32)))
    products_of_prompts()
    kit("bfloat16", "gated_ffn")()


def draws() -> None:
    test_sampling.test_the_host_draws_the_same("plain", test_sampling.SIZES[0])
    test_sampling.test_few_of_many("plain")


# What shows that something is missing of a file.
SHOWN_BY: dict[str, Callable[[], None]] = {
    "absorb.cu": kit("float32", "latent_attention"),
    "adjust.cu": functools.partial(test_adjust.test_the_canons_bits, "plain", test_adjust.SIZES[0]),
    "attention.cu": kit("float32", "attention"),
    "attention_tiles.cu": kit("bfloat16", "attention"),
    "common.cuh": kit("float32", "route", "layer_norm", "step"),
    "elementwise.cu": elementwise,
    "embed.cu": kit("float32", "embed"),
    "gemm.cu": kit("float32", "linear"),
    "gemv.cuh": kit("float32", "step"),
    "gemv_tensor.cuh": products_of_few,
    "heads.cu": kit("float32", "latent_project", "step"),
    "latent.cu": kit("float32", "latent_expand"),
    "latent_attention.cu": kit("bfloat16", "latent_attention"),
    "moe_few.cu": kit("float32", "moe"),
    "moe_many.cu": kit("float32", "moe"),
    "moe_plan.cu": kit("float32", "moe"),
    "norms.cu": kit("float32", "rms_norm", "layer_norm", "step"),
    "rope.cu": kit("float32", "rope", "latent_project"),
    "route.cu": kit("float32", "route"),
    "route.cuh": kit("float32", "route"),
    "sample.cu": draws,
    "tiles.cuh": kit("float32", "linear"),
    "widen.cu": products_of_prompts,
}


class Taken(NamedTuple):
    """The wait number `index` of a file."""

    file: str
    index: int

    def __str__(self) -> str:
        return f"{self.file}-{self.index}"

    def __call__(self, text: str) -> str:
        """The file without it."""
        wait = list(WAIT.finditer(text))[self.index]
        return text[: wait.start()] + ";" + text[wait.end() :]


WAITS = [Taken(file, i) for file in SHOWN_BY for i, _ in enumerate(WAIT.finditer(sources.text(file)))]


def is_missed(taken: Taken) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, taken.file, taken)
        try:
            SHOWN_BY[taken.file]()
        except (RuntimeError, CheckError, AssertionError):
            return True
    return False


def test_all_files_that_wait_are_here() -> None:
    waiting = {file.name for file in sources.FOLDER.iterdir() if WAIT.search(sources.text(file.name))}
    assert waiting == set(SHOWN_BY)


# The order within a warp, a copy, and what the kernels ahead write.
OFTEN = [Taken("attention.cu", 4), Taken("attention.cu", 1), Taken("gemv.cuh", 0)]


@pytest.mark.parametrize("taken", [pytest.param(w, marks=[] if w in OFTEN else pytest.mark.full) for w in WAITS], ids=str)
def test_no_wait_is_idle(taken: Taken) -> None:
    """Without it, something is undefined, and is told."""
    assert is_missed(taken)
