"""Makes torch code that asks for float32 by name compute in float64 instead.

transformers casts to float32 in its norms, in softmax and for the RoPE angles whatever the model's dtype, so a model in
float64 is exact only to float32. Inside this mode those casts widen too, and the result is a float64 truth.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class _Widening(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        named = {key: _widen(value) for key, value in (kwargs or {}).items()}
        return func(*map(_widen, args), **named)


@contextmanager
def float64() -> Iterator[None]:
    """Within it, float32 named as a dtype means float64, and float64 is torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widening():
            yield
    finally:
        torch.set_default_dtype(before)
