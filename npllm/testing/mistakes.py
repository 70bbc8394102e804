"""Known mistakes: each is a backend that makes it, so the canon itself can be run with the mistake in it.

The same list serves three ends: a failed check names the mistake that explains it best, `audit` seeds them into a correct
kernel to see whether somebody's test notices, and `diff` finds by them which convention another engine follows.
"""

from __future__ import annotations

from dataclasses import dataclass

from npllm.backend import Backend


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    name      a few words, unique in its operation: "window one key too wide".
    mixin     a subclass of Backend that overrides the operation, calling `super()` for the rest: combined with any backend
              it gives that backend with the mistake.
    """

    name: str
    mixin: type[Backend]

    def made_by(self, backend: type[Backend]) -> type[Backend]:
        """`backend` with the mistake in it."""
        return type(self.mixin.__name__, (self.mixin, backend), {})
