"""The backend "cupy": the operations of this package over the canon."""

from __future__ import annotations

from npllm.backends.cupy_gpu.device import Device
from npllm.backends.cupy_gpu.products import Products


class CupyBackend(Products):
    """Models on an NVIDIA GPU: kernels of our own, decode steps as one graph."""

    @classmethod
    def open_device(cls) -> Device:
        from npllm.backends.cupy_gpu.cuda import gpu

        return gpu()
