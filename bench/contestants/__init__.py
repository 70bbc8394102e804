"""Who takes part in `python -m bench peers` and `numba`: each a process that loads a model and does what it is asked to.

What runs in a peer's own Python imports only what is installed there: no module here imports npllm but npllm's own.
"""
