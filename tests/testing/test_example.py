"""The worked example of npllm/testing/README.md: somebody's attention in PyTorch, checked in five lines."""

from typing import Any

import pytest

from npllm.testing import Rounding, audit, cases, check

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

# -- five lines ---------------------------------------------------------------------------------------------------------

OTHERS = "window,chunk,softcap,sinks,ragged,paged,padded"


def attention(q: Any, k: Any, v: Any, *, scale: float) -> Any:
    """PyTorch's own, for [B, T, H, K]; bottom-right causal, which `is_causal=True` is not."""
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("case", cases("attention", without=OTHERS), ids=str)
def test_pytorch_attention(case: Any, dtype: str) -> None:
    check("attention", attention, case, policy=Rounding(dtype), framework="torch").raise_on_failure()


# -- and what they are worth --------------------------------------------------------------------------------------------


def top_left(q: Any, k: Any, v: Any, *, scale: float) -> Any:
    """The mistake that `is_causal=True` is with fewer queries than keys."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def test_the_mistake_is_found_and_named() -> None:
    reports = [check("attention", top_left, case, "bf16", framework="torch") for case in cases("attention", without=OTHERS)]
    assert any("top-left" in report.explanation for report in reports if not report.ok)


def test_a_tolerance_misses_what_the_kit_finds() -> None:
    """The usual check, `allclose` at 1e-2 on normal numbers, and the kit's, both audited with kernels for PyTorch."""

    def usual(kernel: Any) -> bool:
        dice = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 64, 4, 32, generator=dice).to(torch.bfloat16) for _ in range(3))
        got, want = kernel(q, k, v, scale=32**-0.5), attention(q, k, v, scale=32**-0.5)
        return bool(torch.allclose(got.float(), want.float(), rtol=1e-2, atol=1e-2))

    def with_the_kit(kernel: Any) -> bool:
        return all(
            check("rms_norm", kernel, case, "bf16", framework="torch", explain=False).ok for case in cases("rms_norm")
        )

    tolerant, exacting = audit(usual, "attention", show=None), audit(with_the_kit, "rms_norm", show=None)
    assert tolerant.accepts_correct
    assert tolerant.rate < 0.7
    assert exacting.rate == 1.0, str(exacting)
