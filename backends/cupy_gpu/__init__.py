"""The backend "cupy": npllm's models on an NVIDIA GPU."""
