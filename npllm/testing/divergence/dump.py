"""A dump of activations: its names in npllm's spelling, its tensors as float64, and the format they were computed in.

Names are those of transformers' modules (`model.layers.0.self_attn.q_proj`; `.input` for what a module was given, `.1` for
its second result), with any wrapper's prefix, or those of `LLM.trace()`. `tokens` holds the token ids, [T] or [B, T].
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from npllm.arrays import Array
from npllm.checkpoint import SafetensorsFile
from npllm.errors import ArgumentError
from npllm.handles import REALS
from npllm.matching import own_name
from npllm.testing.rounding import FORMATS, Format, format_of

INTEGERS = {"I64": ("i64", "<i8"), "I32": ("i32", "<i4")}
OF_DTYPES = {"BF16": "bf16", "F16": "f16", "F32": "f32", "F64": "f64"}

# A dump counts as computed in a format that holds every number of this share of its tensors.
MOST = 0.7

# Numbers of each tensor that are looked at to find the format.
SAMPLE = 4096

# Where the first name is missing, the second holds the same numbers.
SAME = (
    (r"(.*\.self_attn)", r"\1.o_proj"),
    (r"(.*\.attn)", r"\1.c_proj"),
    (r"(.*\.mlp)\.act", r"\1.c_proj.input"),
    (r"(.*\.(?:mlp|feed_forward))", r"\1.down_proj"),
    (r"(.*\.feed_forward\.router)\.1", r"\1"),
)


class Dump:
    """`values` by npllm's names: float64 arrays, int64 where they were integers; `stored` is the format of each.

    `others` are names of tensors that hold no real numbers (masks, complex angles).
    """

    def __init__(self, tensors: Mapping[str, tuple[Array, str]], source: str, others: Iterable[str] = ()) -> None:
        self.source, self.others = source, set(others)
        self.spelled: dict[str, str] = {}
        self.values: dict[str, Array] = {}
        self.stored: dict[str, str] = {}
        for name, (x, stored) in tensors.items():
            if (own := own_name(name)) is not None:
                self.spelled[own], self.values[own], self.stored[own] = name, x, stored
        self.used: set[str] = set()
        self._add_aliases()

    def _add_aliases(self) -> None:
        for pattern, other in SAME:
            for name in list(self.values):
                target = re.sub(pattern, other, name) if re.fullmatch(pattern, name) else None
                if target is not None and (target not in self.values or target == name[:-2]):
                    self.spelled[target] = self.spelled[name]
                    self.values[target], self.stored[target] = self.values[name], self.stored[name]

    def rename(self, parts: Mapping[str, str]) -> None:
        """Spell parts of names as the model does (RENAMED of its file)."""
        for theirs, ours in parts.items():

            def spell(name: str, theirs: str = theirs, ours: str = ours) -> str:
                return f"{name}.".replace(theirs, ours)[:-1]

            self.spelled = {spell(name): each for name, each in self.spelled.items()}
            self.values = {spell(name): x for name, x in self.values.items()}
            self.stored = {spell(name): each for name, each in self.stored.items()}

    def find(self, *names: str) -> str | None:
        """The first of these names that the dump has."""
        found = next((name for name in names if name in self.values), None)
        if found is not None:
            self.used.add(found)
        return found

    def format(self, name: str) -> Format:
        """The format that a tensor is stored in."""
        return FORMATS[self.stored[name]]

    @property
    def unused(self) -> list[str]:
        """Names, as the dump spells them, that nothing was compared with."""
        used = {self.spelled[name] for name in self.used}
        return sorted((set(self.spelled.values()) | self.others) - used - {"tokens"})

    def computed_in(self) -> Format:
        """The narrowest format that holds the numbers of nearly all tensors, whatever type they were saved as."""
        samples = [x.reshape(-1)[:SAMPLE] for name, x in self.values.items() if self.stored[name] in FORMATS and x.size > 1]
        for name in ("bf16", "f16", "f32"):
            held = [bool(np.array_equal(FORMATS[name].round(x), x, equal_nan=True)) for x in samples]
            if samples and sum(held) >= MOST * len(held):
                return FORMATS[name]
        return FORMATS["f64"]

    def tokens(self, given: Any, vocabulary: int) -> Array:
        """Token ids [B, T], `given` or the dump's own; ArgumentError if there are none that the model knows."""
        if given is None and "tokens" not in self.values:
            raise ArgumentError(f"{self.source}: has no tensor `tokens`; save the token ids, or give them as tokens=")
        tokens = np.atleast_2d(np.asarray(self.values["tokens"] if given is None else given))
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or tokens.size == 0:
            shown = f"{list(tokens.shape)} of {tokens.dtype}"
            raise ArgumentError(f"{self.source}: tokens must be integers of shape [T] or [B, T], not {shown}")
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            worst = int(tokens.max() if tokens.max() >= vocabulary else tokens.min())
            raise ArgumentError(f"{self.source}: token {worst} is not in this model's vocabulary of {vocabulary}")
        return tokens.astype(np.int64)

    def refuse_strange(self, known: Iterable[str]) -> None:
        """ArgumentError: not one name was compared."""
        known = list(known)
        name = next((each for each in self.spelled if each != "tokens"), None)
        if name is None:
            raise ArgumentError(f"{self.source}: holds no activations")
        near = difflib.get_close_matches(own_name(name) or name, known, n=3, cutoff=0.0)
        raise ArgumentError(f"{self.source}: no name matches this model ({name}, ...); nearest: {', '.join(near)}")


def read_dump(source: str | Path | Mapping[str, Any]) -> Dump:
    """A safetensors file, or arrays by name (a Trace with `tokens`, NumPy or ml_dtypes arrays)."""
    if isinstance(source, Mapping):
        return Dump({name: of_array(np.asarray(x)) for name, x in source.items()}, "the dump")
    path = Path(source)
    if not path.is_file():
        raise ArgumentError(f"{path}: is not a file; give the dump as a safetensors file")
    file = SafetensorsFile(path)
    tensors, others = {}, []
    for name in file:
        dtype = file.format(name)
        if dtype in INTEGERS:
            tensors[name] = (file.weight(name, REALS | INTEGERS).data.astype(np.int64), "i64")
        elif dtype in REALS:
            tensors[name] = (file.weight(name, REALS).array("float64"), OF_DTYPES[dtype])
        else:
            others.append(name)
    return Dump(tensors, str(path), others)


def of_array(x: Array) -> tuple[Array, str]:
    """An array as float64 or int64, and the name of its format."""
    if x.dtype.kind in "iub":
        return x.astype(np.int64), "i64"
    return x.astype(np.float64), format_of(x.dtype.name).name
