"""Errors that a user can act on: one line that says what is wrong, where, and what to do.

Each class derives from `NpllmError` and from the built-in exception that a Python caller would expect.
"""


class NpllmError(Exception):
    """Base of every error that npllm raises on purpose; its text is one line."""


class ConfigError(NpllmError, ValueError):
    """`config.json` (or `generation_config.json`) is missing, malformed, or asks for something unsupported."""


class CheckpointError(NpllmError, ValueError):
    """A weight file or its index is missing, malformed, or disagrees with the configuration."""


class TokenizerError(NpllmError, ValueError):
    """`tokenizer.json` or `tokenizer_config.json` is missing, malformed, or disagrees with the model."""


class TemplateError(NpllmError, ValueError):
    """A chat template is missing, malformed, unsafe, over its budget, or raised an exception of its own."""


class HubError(NpllmError, OSError):
    """A model could not be fetched from the hub."""


class MemoryLimitError(NpllmError, MemoryError):
    """Something would need more memory than the machine has; raised before it is allocated."""


class ArgumentError(NpllmError, ValueError):
    """An argument is out of its range, or arguments contradict each other."""


class ContextError(ArgumentError):
    """A prompt is empty, or does not fit into the model's context."""


class NumericsError(NpllmError, ArithmeticError):
    """NaN or infinity where a finite number is needed."""


class BackendError(NpllmError, RuntimeError):
    """A backend is unknown, cannot load, or (under `strict=True`) declines an operation."""
