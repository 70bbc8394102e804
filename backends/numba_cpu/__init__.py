"""The backend "numba" for CPUs: kernels in Python, compiled by Numba."""
