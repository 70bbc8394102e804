"""A device on the CPU for the backend "cupy": the same .cu text compiled by g++, arrays that behave like CuPy's."""

from tests.gpu.emulator.device import EmulatedBackend, Emulator

__all__ = ["EmulatedBackend", "Emulator"]
