"""The weights, tokenizer and configuration of the small model that `npllm.load()` opens; README.md says what it is."""
