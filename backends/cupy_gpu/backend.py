"""The backend "cupy": the operations of this package over the canon."""

from __future__ import annotations

from npllm.backends.cupy_gpu.altup import Streams
from npllm.backends.cupy_gpu.attention import Attention
from npllm.backends.cupy_gpu.embedding import Embeddings
from npllm.backends.cupy_gpu.ffn import FeedForward
from npllm.backends.cupy_gpu.heads import Placed
from npllm.backends.cupy_gpu.latent import Latents
from npllm.backends.cupy_gpu.moe import Mixtures
from npllm.backends.cupy_gpu.norms import Norms
from npllm.backends.cupy_gpu.products import Products
from npllm.backends.cupy_gpu.rope import Ropes
from npllm.backends.cupy_gpu.rounding import Declared
from npllm.backends.cupy_gpu.route import Routers
from npllm.backends.cupy_gpu.service import Service
from npllm.backends.cupy_gpu.steps import Steps


class CupyBackend(
    Latents, Attention, FeedForward, Norms, Ropes, Placed, Embeddings, Streams, Mixtures, Routers, Declared, Steps, Service,
    Products,
):  # fmt: skip
    """Models on an NVIDIA GPU: kernels of our own, decode steps as one graph."""
