"""The one table of tolerances; the comparator is npllm.testing's."""

from typing import Any

from npllm.testing import compare
from npllm.testing.compare import Limit

# A change here needs a reason, written in the third column.
LIMITS = {
    "exact": Limit(0.0, 0.0, "the same numbers must come out, to the last bit"),
    "truth": Limit(2e-5, 1e-4, "agreement asked of every float32 model with transformers' float32 (two float32 errors)"),
    "own float64": Limit(1e-5, 5e-5, "agreement asked of the float32 canon with its own float64 run"),
    "truth Gemma 3n": Limit(1e-4, 5e-4, "its streams amplify rounding by about 1.8 a layer: 6e-8 becomes 4e-5 in 11 layers"),
    "own float64 Gemma 3n": Limit(1e-4, 5e-4, "as above, of one float32 computation"),
    "reordered Gemma 3n": Limit(1e-4, 5e-4, "as above, of roundings in another order"),
    "truth float64": Limit(1e-13, 1e-12, "two float64 computations of a few layers: about 1e3 roundings of 1e-16"),
    "block": Limit(1e-6, 4e-6, "one operation in float32: sums of at most 52 terms, about 10 roundings of 6e-8"),
    "block float64": Limit(1e-14, 1e-13, "one operation in float64, as above with roundings of 1e-16"),
    "layer_norm": Limit(1e-4, 1e-4, "a constant row of 1.1: 2^-23 / sqrt(eps = 1e-5) = 4e-5 may be left of x - mean"),
    "layer_norm float64": Limit(1e-13, 1e-13, "as above with roundings of 1e-16"),
    "far block": Limit(1e-3, 3e-3, "RoPE at position 131071: angles are rounded by up to p 2^-24 = 8e-3 rad, most by less"),
    "far block float64": Limit(2e-11, 2e-11, "as above: p 2^-53 = 1.5e-11 rad"),
    "reordered": Limit(1e-5, 5e-5, "the same model, BLAS sums in another order: as near as float32 is to its own float64"),
    "turned keys": Limit(2e-3, 3e-3, "the same model with keys in bfloat16: some are rounded the other way, by 2^-8"),
    "reordered float64": Limit(1e-13, 1e-12, "as above, with roundings of 1e-16"),
}


def agree(got: Any, want: Any, limit: str, *, what: str = "", literal: bool = False) -> None:
    """npllm.testing.agree within `LIMITS[limit]`."""
    compare.agree(got, want, LIMITS[limit], what=what, literal=literal)
