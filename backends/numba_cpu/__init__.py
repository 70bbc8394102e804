"""The backend "numba" for CPUs: kernels in Python, compiled by Numba."""

from npllm.backends.numba_cpu.features import check_numba

# Before any module of this package imports Numba: the error then says what to install.
check_numba()
