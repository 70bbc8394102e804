"""Checks the capital letters that end array names against the arrays' shapes, on every call.

`q_MHK` has three axes; a letter stands for one size throughout a call: its arguments, the suffixed fields of its tuples
and dataclasses (`Angles.cos_MJ`, `Keys.k_BSGK`, `Rows.positions_M`) and what it returns, where the docstring names that
(`-> o_MHV`). A digit is a size itself (`key_1S`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import pytest

import npllm.numpy_backend  # noqa: F401 (so that its overrides are found)
from npllm import blocks
from npllm.backend import OPERATIONS, Backend
from npllm.cache import Keys, LayerCache, Rows

SUFFIX = re.compile(r"[a-z][a-z0-9_]*_([A-Z0-9]*[A-Z][A-Z0-9]*)")
RETURNS = re.compile(r"-> ((?:[a-z]+_[A-Z0-9]+(?:, )?)+)")

# Functions whose docstring says "any leading axes" bind their suffixes to the last axes.
LEADING = "any leading axes"


class ShapeError(AssertionError):
    """An array does not have the shape that its name says."""


@functools.cache
def letters(name: str) -> str | None:
    found = SUFFIX.fullmatch(name)
    return found and found[1]


@functools.cache
def fields(kind: type) -> tuple[str, ...]:
    """The names of what a named tuple or a dataclass holds; of another type, none."""
    if issubclass(kind, tuple):
        return getattr(kind, "_fields", ())
    return tuple(each.name for each in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else ()


class Sizes:
    """The sizes of the letters within one call of the function `name`."""

    def __init__(self, name: str, leading: bool) -> None:
        self.name, self.leading = name, leading
        self.bound: dict[str, int] = {}

    def check(self, name: str, x: Any) -> None:
        """Bind the letters of `name` to the shape of `x`, or of every suffixed field within."""
        if held := fields(type(x)):
            for field in held:
                self.check(field, getattr(x, field))
        elif (axes := letters(name)) and hasattr(x, "shape"):
            self.bind(name, axes, x.shape)

    def bind(self, name: str, axes: str, shape: tuple[int, ...]) -> None:
        sizes = shape[-len(axes) :] if self.leading else shape
        if len(sizes) != len(axes):
            raise ShapeError(f"{self.name}: {name} has shape {list(shape)}")
        for axis, size in zip(axes, sizes, strict=True):
            wanted = int(axis) if axis.isdigit() else self.bound.setdefault(axis, size)
            if size != wanted:
                raise ShapeError(f"{self.name}: {name} has shape {list(shape)}, but {axis} = {wanted}")


def returned_names(function: Callable[..., Any]) -> list[str]:
    """The names behind the first `->` of the docstring: ["o_MHV"], or several for a tuple."""
    found = RETURNS.search(function.__doc__ or "")
    return found[1].rstrip(", ").split(", ") if found else []


def checked(function: Callable[..., Any], canon: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """`function`, raising ShapeError where a suffix does not fit; an override goes by the docstring of its `canon`."""
    # Not bound to the signature, which would take longer than what is checked.
    parameters, names = list(inspect.signature(function).parameters), returned_names(canon or function)
    leading = LEADING in ((canon or function).__doc__ or "")

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        sizes = Sizes(function.__qualname__, leading)
        for name, x in (*zip(parameters, args, strict=False), *kwargs.items()):
            sizes.check(name, x)
        result = function(*args, **kwargs)
        several = isinstance(result, tuple) and not hasattr(result, "_fields")
        for name, x in zip(names or ["result"], result if several else [result], strict=False):
            sizes.check(name, x)
        return result

    return wrapper


def block_functions() -> dict[str, Callable[..., Any]]:
    """Every function that a module of npllm.blocks defines, by its full name."""
    # By the modules' own names: CuPy puts an object among them that has none.
    return {
        f"{module.__name__}.{name}": value
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith(blocks.__name__ + ".")
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and value.__module__ == module.__name__
    }


def operations() -> Iterator[tuple[type, str, Callable[..., Any]]]:
    """Class, name and canon of every Backend operation and of its overrides within npllm."""
    classes = [Backend]
    for owner in classes:
        classes += [each for each in owner.__subclasses__() if each.__module__.partition(".")[0] == "npllm"]
        for name in (*OPERATIONS, "angles", "normed"):
            if name in vars(owner):
                yield owner, name, getattr(Backend, name)


METHODS: list[tuple[type, str]] = [(blocks.Mask, "allowed"), (LayerCache, "append"), (Keys, "row"), (Rows, "wanted")]


@contextlib.contextmanager
def shapes_checked() -> Iterator[None]:
    """Within it, every function of npllm.blocks, Backend operation, override and cache access checks its suffixes.

    Functions are replaced in every module of npllm that holds them, and in the table of activations; a name that a test
    module imported for itself stays as it was.
    """
    replaced = {id(function): checked(function) for function in block_functions().values()}
    with pytest.MonkeyPatch.context() as patch:
        for module in [m for name, m in sys.modules.items() if name.partition(".")[0] == "npllm"]:
            for name, value in list(vars(module).items()):
                if id(value) in replaced:
                    patch.setattr(module, name, replaced[id(value)])
        for name, value in blocks.ACTIVATIONS.items():
            patch.setitem(blocks.ACTIVATIONS, name, replaced[id(value)])
        for owner, name, canon in [*operations(), *((owner, name, getattr(owner, name)) for owner, name in METHODS)]:
            patch.setattr(owner, name, checked(vars(owner)[name], canon))
        yield
