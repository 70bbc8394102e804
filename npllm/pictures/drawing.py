"""A picture that is not yet a file."""

from __future__ import annotations

from typing import NamedTuple

from npllm.pictures.svg import Element


class Drawing(NamedTuple):
    """Elements in a field of `width` x `height`, from its top left corner on."""

    elements: list[Element]
    width: float
    height: float
