"""Fast backends, installed as `npllm.backends`. They import npllm; npllm never imports them."""
