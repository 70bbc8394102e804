"""Hypothesis strategies around the corpus: more cases than anybody names, for kernels that pass all that are named.

    from hypothesis import given
    from npllm.testing import check, strategies

    @given(strategies.cases("attention", tags="window"))
    def test_my_kernel(case):
        check("attention", my_kernel, case, "bf16").raise_on_failure()

    @given(strategies.sized_cases("attention"), strategies.roundings())
    def test_my_kernel_at_any_size(case, policy): ...

Numbers come from a seed, not one by one: a counterexample shrinks in case, size and seed, and `variant` or `sized` with what
its name says makes it again. Hypothesis is imported when a strategy is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from npllm.config import nearest
from npllm.errors import ArgumentError
from npllm.testing import case as corpus
from npllm.testing.case import Case, Draw
from npllm.testing.ops import attention_cases, linear, norms_cases
from npllm.testing.rounding import Rounding

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

# Seeds of variants; a case's own numbers come from its name, so these are other numbers in any case.
SEEDS = 2**16


class Sized(NamedTuple):
    """How to make a case of any size: the least and the largest of each size, and (sizes) -> draw, settings."""

    sizes: Mapping[str, tuple[int, int]]
    make: Callable[..., tuple[Draw, dict[str, Any]]]


def sized_attention(
    batch: int, queries: int, keys: int, kv_heads: int, group: int, width: int, value_width: int, window: int
) -> tuple[Draw, dict[str, Any]]:
    """Dense causal attention; window 0 is none."""
    drawn = attention_cases.dense(batch, queries, keys, (kv_heads * group, kv_heads), (width, value_width))
    return drawn, {"scale": width**-0.5} | ({"window": window} if window else {})


def sized_norm(tokens: int, features: int) -> tuple[Draw, dict[str, Any]]:
    return norms_cases.rows((tokens, features)), {"eps": 1e-6}


def sized_linear(tokens: int, inputs: int, outputs: int) -> tuple[Draw, dict[str, Any]]:
    return linear.product(tokens, inputs, outputs), {}


SIZED = {
    "attention": Sized(
        {
            "batch": (1, 3), "queries": (0, 40), "keys": (0, 80), "kv_heads": (1, 3), "group": (1, 4), "width": (1, 130),
            "value_width": (1, 130), "window": (0, 50),
        },
        sized_attention,
    ),
    "rms_norm": Sized({"tokens": (0, 40), "features": (1, 300)}, sized_norm),
    "linear": Sized({"tokens": (0, 40), "inputs": (1, 200), "outputs": (1, 200)}, sized_linear),
}  # fmt: skip


def variant(operation: str, case: str | Case, seed: int, scale: float) -> Case:
    """A case of the corpus with other numbers, at one scale; it is called `window-edge@7x0.5`."""
    one = corpus.find_case(operation, case)
    return replace(one, name=f"{one.name}@{seed}x{scale!r}", scales=(scale,))


def sized(operation: str, seed: int, scale: float = 1.0, **sizes: int) -> Case:
    """A plain case of any size, for the operations in SIZED; ArgumentError lists those, and their sizes."""
    if operation not in SIZED:
        raise ArgumentError(f"{operation!r} has no cases of any size; those that have: {nearest(str(operation), SIZED)}")
    if set(sizes) != set(SIZED[operation].sizes):
        wanted, got = ", ".join(SIZED[operation].sizes), ", ".join(sizes) or "none"
        raise ArgumentError(f"{operation} needs the sizes {wanted}; got {got}")
    drawn, settings = SIZED[operation].make(**sizes)
    told = ", ".join(f"{name}={size}" for name, size in sizes.items())
    return Case(operation, f"sized({told})@{seed}x{scale!r}", drawn, settings, frozenset({"sized"}), (scale,))


def cases(operation: str, tags: Iterable[str] = (), without: Iterable[str] = ()) -> SearchStrategy[Case]:
    """Variants of the corpus' cases with these tags: other numbers, and scales between a case's smallest and largest."""
    st = _strategies()
    chosen = corpus.cases(operation, tags, without)
    if not chosen:
        raise ArgumentError(f"{operation} has no case with tags {', '.join(tags)!r} and without {', '.join(without)!r}")

    def around(one: Case) -> SearchStrategy[Case]:
        return st.builds(lambda seed, scale: variant(operation, one, seed, scale), _seeds(), scales(one))

    return st.sampled_from(chosen).flatmap(around)


def sized_cases(operation: str) -> SearchStrategy[Case]:
    """Plain cases of all sizes, zero and odd ones too, for the operations in SIZED."""
    st = _strategies()
    if operation not in SIZED:
        sized(operation, 0)
    sizes = {name: st.integers(least, most) for name, (least, most) in SIZED[operation].sizes.items()}
    return st.builds(lambda seed, scale, sizes: sized(operation, seed, scale, **sizes),
                     _seeds(), st.sampled_from([1.0, 0.25, 4.0]), st.fixed_dictionaries(sizes))  # fmt: skip


def scales(case: Case) -> SearchStrategy[float]:
    """A case's own scales, and those between them to three digits."""
    st = _strategies()
    least, most = min(case.scales), max(case.scales)
    own = st.sampled_from(case.scales)
    between = st.floats(math.log(least), math.log(most)).map(lambda x: float(f"{min(max(math.exp(x), least), most):.3g}"))
    return own | between if least < most else own


def roundings(inputs: Iterable[str] = ("bf16", "f16", "f32"), points: Iterable[str] = ()) -> SearchStrategy[Rounding]:
    """Policies: an input format, and at each of the rounding `points` named either the default, or f32, or the inputs'."""
    st = _strategies()

    def of(given: str) -> SearchStrategy[Rounding]:
        return st.builds(Rounding, st.just(given), **{point: st.sampled_from([None, "f32", given]) for point in points})

    return st.sampled_from(list(inputs)).flatmap(of)


def _seeds() -> SearchStrategy[int]:
    return _strategies().integers(0, SEEDS - 1)


def _strategies() -> Any:
    """hypothesis.strategies; ArgumentError says how to get it."""
    try:
        from hypothesis import strategies
    except ImportError:
        raise ArgumentError("npllm.testing.strategies needs Hypothesis: pip install hypothesis") from None
    return strategies
