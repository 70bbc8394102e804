"""The divergence finder: where another engine's activations leave what a correct engine of its precision would compute."""
