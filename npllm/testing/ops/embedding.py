"""The embedding: rows of a table. Nothing is computed, so nothing may be rounded either."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from npllm.arrays import Array
from npllm.backend import Backend
from npllm.testing.case import Case, Draw
from npllm.testing.estimate import Estimate, handed_on
from npllm.testing.mistakes import Mistake
from npllm.testing.operation import Arrays, Operation, Settings
from npllm.testing.ops import feed
from npllm.testing.rounding import FORMATS, Rounding
from npllm.weights import Linear


def run(be: Backend, inputs: Arrays, settings: Settings) -> tuple[Array, ...]:
    return (be.embed(feed.activation(be, inputs["tokens"]), feed.linear(be, inputs, "weight")),)


def estimate(inputs: Arrays, settings: Settings, rounding: Rounding, got: Arrays | None) -> tuple[Estimate, ...]:
    return (handed_on(inputs["weight"][inputs["tokens"]], rounding.format("inputs"), rounding.format("output")),)


def table(rows: int, width: int, tokens: int) -> Draw:
    """Tokens drawn with repetitions from all of a table; the first and the last row are always among four or more."""

    def draw(dice: np.random.Generator, scale: float) -> dict[str, Array]:
        drawn = dice.integers(rows, size=tokens).astype(np.int32)
        if tokens >= 4:
            drawn[[1, -2]] = 0, rows - 1
        return {"tokens": drawn, "weight": scale * dice.standard_normal((rows, width))}

    return draw


def looking_up(name: str, change: Callable[[Array, Array], Array]) -> Mistake:
    """`change(tokens, table)` -> what is returned."""

    class Changed(Backend):
        def embed(self, tokens_M: Array, w: Linear, /) -> Array:
            return self.asarray(change(self.to_numpy(tokens_M), self.to_numpy(self.dense(w.weight))))

    return Mistake(name, Changed)


CASES = (
    Case("embed", "plain", table(1000, 128, 64), tags=frozenset({"basic"})),
    Case("embed", "rows-of-all-sizes", table(300, 64, 128), tags=frozenset({"tiny", "huge"}), scales=(1e-4, 1e3)),
    Case("embed", "past-16-bits", table(70_001, 8, 600), tags=frozenset({"large"})),
    Case("embed", "odd", table(31, 37, 13), tags=frozenset({"odd"})),
    Case("embed", "one-token", table(500, 64, 1), tags=frozenset({"decode"})),
    Case("embed", "no-tokens", table(20, 16, 0), tags=frozenset({"empty"})),
)

MISTAKES = (
    looking_up("rows off by one", lambda tokens, table: np.roll(table, 1, axis=0)[tokens]),
    looking_up("tokens cut to 16 bits", lambda tokens, table: table[tokens.astype(np.int64) & 0xFFFF]),
    looking_up("every row that of the first token", lambda tokens, table: table[np.repeat(tokens[:1], len(tokens))]),
    looking_up("rows times the root of the width", lambda tokens, table: table[tokens] * table.shape[1] ** 0.5),
    looking_up(
        "rows rounded to seven bits",
        lambda tokens, table: FORMATS["bf16"]._replace(bits=7).round(table[tokens].astype(np.float64)).astype(table.dtype),
    ),
)

OPERATIONS = (
    Operation(
        name="embed",
        about="rows of a table by number",
        inputs={"tokens": ("token",), "weight": ("row", "feature")},
        outputs={"y": ("token", "feature")},
        run=run,
        estimate=estimate,
        cases=CASES,
        mistakes=MISTAKES,
    ),
)
