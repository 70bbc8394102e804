"""The backend "numba": the operations of this package over the canon."""

from __future__ import annotations

from npllm.backends.numba_cpu.attention import Attention
from npllm.backends.numba_cpu.ffn import FeedForward
from npllm.backends.numba_cpu.latent import Latents
from npllm.backends.numba_cpu.moe import Mixtures
from npllm.backends.numba_cpu.norms import Norms
from npllm.backends.numba_cpu.products import Products
from npllm.backends.numba_cpu.rope import Ropes
from npllm.backends.numba_cpu.rounding import Declared
from npllm.backends.numba_cpu.route import Routers
from npllm.backends.numba_cpu.service import Service
from npllm.backends.numba_cpu.steps import Steps


class NumbaBackend(Attention, Latents, FeedForward, Mixtures, Routers, Norms, Ropes, Products, Declared, Steps, Service):
    """Models on CPUs at the machine's limit: kernels compiled by Numba, threads of our own, weights where they lie."""
