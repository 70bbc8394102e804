"""What a chat template may use up: the budget, and the meter that holds one rendering to it.

A template is a program by a stranger. Two measures keep it in bounds without signals or timers, so in any thread:

* Everything that repeats or produces (a loop's body, a call, a filter, an operator, an output) asks the meter first.
* No single operation of the interpreter can be interrupted half-way, so none may get large inputs: every value carries
  a *weight*, its size when written out in full (a string's length; for a container the weights of all that it holds,
  shared parts counted as often as they appear), and no value may weigh more than `Meter.limit`. Comparing, hashing,
  printing or sorting a value is then a matter of well under a second.
"""

import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T")

ENTRY_WEIGHT = 16  # of a number, of a container, and of each place in one, next to what lies there
LEAST_LIMIT = 1 << 20  # a small output budget must not forbid ordinary intermediate values
MAX_DEPTH = 200  # containers in containers; hashing a deep tuple would overflow the interpreter's own stack
MAX_INT_BITS = 1 << 16
MAX_PATTERN = 1 << 16  # characters given to code that scans text piece by piece in Python
MAX_PRODUCT = 1 << 28  # character comparisons of a naive search
MIN_TABLE = 1000  # keys; collisions among fewer do no harm
MAX_SORTED = 100_000  # items given to a sort, whose keys are made in Python

_MAPPINGS = (dict, MappingProxyType)
_VIEWS: Any = (type({}.keys()), type({}.values()), type({}.items()))
_CONTAINERS = (*_MAPPINGS, list, tuple, set, frozenset)
_HASHED = (dict, set, frozenset)
_SIZED = (*_CONTAINERS, str, bytes, int)
_CODECS = {"utf8", "utf16", "utf16le", "utf16be", "utf32", "utf32le", "utf32be", "ascii", "latin1", "iso88591"}
_PERCENT = re.compile(r"%(?:\([^()]*\))?[-#0 +]*(\*|\d+)?(?:\.(\*|\d+)?)?")


@dataclass(frozen=True)
class Budget:
    """What one rendering may use. The defaults are far above what a long conversation with many tools needs.

    iterations: rounds of all loops together; calls count too, and each item that a filter goes through.
    output: characters of the rendering; also what one intermediate value may weigh, next to the inputs' own weight.
    seconds: wall-clock time.
    memory: bytes of all values made on the way, whether or not they are still alive.
    """

    iterations: int = 1_000_000
    output: int = 16 << 20
    seconds: float = 10.0
    memory: int = 512 << 20


DEFAULT_BUDGET = Budget()


class OverBudgetError(Exception):
    """A template asked for more than its budget; the text completes a sentence that begins with 'it'."""


class Meter:
    """Counts what one rendering uses, and raises `OverBudgetError` at the first excess."""

    def __init__(self, budget: Budget, inputs: object) -> None:
        self.budget = budget
        self.deadline = time.monotonic() + budget.seconds
        self.iterations = self.memory = self.output = 0
        # The values stay referenced here, so that no other value can get the same id during the rendering.
        self._measured: dict[int, tuple[object, tuple[int, int]]] = {}
        self.limit = sys.maxsize
        self.limit = max(budget.output, LEAST_LIMIT) + self.weigh(inputs)

    def check(self) -> None:
        """Raise if the time is up."""
        if time.monotonic() > self.deadline:
            raise OverBudgetError(f"runs longer than its budget of {self.budget.seconds:g} seconds")

    def tick(self) -> None:
        """Count one round of a loop."""
        self.iterations += 1
        if self.iterations > self.budget.iterations:
            raise OverBudgetError(f"exceeds its budget of {self.budget.iterations} loop iterations")
        self.check()

    def counted(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each counted as one round of a loop."""
        for item in items:
            self.tick()
            yield item if isinstance(item, str) else self.admit(item)

    def emit(self, text: str) -> str:
        """Count a piece of the rendering."""
        self.output += len(text)
        if self.output > self.budget.output:
            raise OverBudgetError(f"exceeds its budget of {self.budget.output} characters of output")
        self.check()
        return text

    def room(self, weight: int) -> None:
        """Raise if a value of this weight, not made yet, would be too large."""
        if weight > self.limit:
            raise OverBudgetError(f"builds a value of more than {self.limit} characters")

    def admit(self, value: T) -> T:
        """Return a value that an operation has just made, once its weight, depth and memory are found in bounds."""
        self.check()
        self.room(self.weigh(value))
        if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise OverBudgetError(f"computes an integer of more than {MAX_INT_BITS} bits")
        if isinstance(value, _SIZED):
            self.memory += sys.getsizeof(value)
            if self.memory > self.budget.memory:
                raise OverBudgetError(f"exceeds its budget of {self.budget.memory} bytes of intermediate values")
        return value

    def text(self, value: object) -> str:
        """`str(value)`, in bounds."""
        if isinstance(value, str):
            self.check()
            return value
        self.room(self.weigh(value))
        return self.admit(str(value))

    def weigh(self, value: object) -> int:
        """The weight of a value; raises if it is nested too deep."""
        return self._measure(value)[0]

    def _measure(self, value: object) -> tuple[int, int]:
        """(weight, depth of nesting) of a value."""
        if isinstance(value, str | bytes):
            return len(value), 0
        if isinstance(value, int):
            return ENTRY_WEIGHT + value.bit_length() // 3, 0
        if isinstance(value, _VIEWS):
            return self._measure_items(value.mapping)
        if not isinstance(value, _CONTAINERS):
            return ENTRY_WEIGHT, 0
        known = self._measured.get(id(value))
        if known is None:
            known = self._measured[id(value)] = (value, self._measure_items(value))
        return known[1]

    def _measure_items(self, value: Any) -> tuple[int, int]:
        weight, depth = ENTRY_WEIGHT, 0
        for item in chain.from_iterable(value.items()) if isinstance(value, _MAPPINGS) else value:
            item_weight, item_depth = self._measure(item)
            weight += ENTRY_WEIGHT + item_weight
            depth = max(depth, item_depth)
            self.room(weight)
        if isinstance(value, _HASHED):
            check_hashes(value)
        if depth >= MAX_DEPTH:
            raise OverBudgetError(f"nests containers more than {MAX_DEPTH} deep")
        return weight, depth + 1


_meter: ContextVar[Meter] = ContextVar("npllm chat template meter")
current = _meter.get
enter = _meter.set
leave = _meter.reset


# -- What an operation would make, found out before it is done. Where the types are wrong Python's own error follows. --


def check_operator(meter: Meter, operator: str, left: object, right: object) -> None:
    """Raise if `left operator right` would be too large; operators are those that jinja2 lets a sandbox intercept."""
    if operator == "*":
        _check_product(meter, left, right)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(right, 0))
    elif operator == "%" and isinstance(left, str | bytes):
        check_percent(meter, left, right)


def _check_product(meter: Meter, left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    elif isinstance(right, int):
        meter.room(meter.weigh(left) * right)
    elif isinstance(left, int):
        meter.room(meter.weigh(right) * left)


def _check_bits(bits: int) -> None:
    if bits > 2 * MAX_INT_BITS:
        raise OverBudgetError(f"computes an integer of more than {MAX_INT_BITS} bits")


def check_percent(meter: Meter, pattern: str | bytes, values: object) -> None:
    """Raise if `pattern % values` would be too large: widths and precisions count, and so does each use of a value."""
    text = pattern if isinstance(pattern, str) else pattern.decode("latin-1")
    check_pattern(text)
    if re.search(r"%\([^()]*\(", text):
        raise OverBudgetError("nests parentheses in a % format")
    widths = [match.groups() for match in _PERCENT.finditer(text)]
    given = [width for pair in widths for width in pair if width]
    size = len(text) + sum(_number(width) for width in given if width != "*")
    fields = len(widths)
    if isinstance(values, tuple):
        size += given.count("*") * max((abs(value) for value in values if isinstance(value, int)), default=0)
        fields = 1  # each value is used once
    meter.room(size + fields * meter.weigh(values))


def check_spec(meter: Meter, spec: str) -> None:
    """Raise if the width or precision of a `str.format` field is too large."""
    check_pattern(spec)
    meter.room(sum(_number(digits) for digits in re.findall(r"\d+", spec)))


def _number(digits: str) -> int:
    return int(digits) if len(digits) < 10 else sys.maxsize


def check_hashes(keys: Collection[Any]) -> None:
    """Raise if many keys of a table share their hash, as chosen integers can: each access would try them all."""
    if len(keys) > MIN_TABLE and 2 * len(set(map(hash, keys))) < len(keys):
        raise OverBudgetError("builds a table of keys that collide")


def check_pattern(text: object) -> None:
    """Raise if a text is too long for code that goes through it piece by piece."""
    if isinstance(text, str) and len(text) > MAX_PATTERN:
        raise OverBudgetError(f"hands more than {MAX_PATTERN} characters to a slow text operation")


def check_search(text: object, pattern: object) -> None:
    """Raise if looking for a pattern (or one of its characters) everywhere in a text might take too long."""
    if isinstance(text, str | bytes) and isinstance(pattern, str | bytes):
        least = min(len(pattern), max(len(text) - len(pattern), 1))
        if len(text) * least > MAX_PRODUCT:
            raise OverBudgetError("searches a long text for a long pattern")


def check_strip(text: object, characters: object) -> None:
    """Raise if stripping characters from a text might take too long."""
    texts = isinstance(text, str | bytes) and isinstance(characters, str | bytes)
    if texts and len(text) * len(characters) > MAX_PRODUCT:  # type: ignore[arg-type]
        raise OverBudgetError("strips many characters from a long text")


def check_replace(meter: Meter, text: str | bytes, old: Any, new: Any, count: Any = -1) -> None:
    """Raise if `text.replace(old, new, count)` would be too large."""
    found = text.count(old)
    if isinstance(count, int) and count >= 0:
        found = min(found, count)
    meter.room(len(text) + found * max(len(new) - len(old), 0))


def joinable(meter: Meter, separator: object, items: Iterable[Any]) -> list[Any]:
    """The items as a list, if `separator.join` of them is in bounds."""
    listed = list(meter.counted(items))
    meter.room(sum(map(meter.weigh, listed)) + meter.weigh(separator) * max(len(listed) - 1, 0))
    return listed


def sortable(meter: Meter, items: Iterable[Any]) -> list[Any]:
    """The items as a list, if they are few enough to sort."""
    listed: list[Any] = []
    for item in meter.counted(items):
        if len(listed) == MAX_SORTED:
            raise OverBudgetError(f"sorts more than {MAX_SORTED} items")
        listed.append(item)
    return listed


# -- Methods of built-in values: each check takes what the method is called with. --


def check_method(meter: Meter, owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Raise if a built-in method would make too much or take too long; return the arguments to call it with."""
    if isinstance(owner, str | bytes):
        if name == "join" and len(args) == 1:
            return (joinable(meter, owner, args[0]),)
        check = _TEXT_METHODS.get(name)
        if check:
            check(meter, owner, *args, **kwargs)
    if isinstance(owner, int) and name == "to_bytes":
        meter.room(max((value for value in (*args, *kwargs.values()) if isinstance(value, int)), default=0))
    if isinstance(owner, set | frozenset):
        return tuple(meter.counted(value) for value in args)
    if owner is dict and name == "fromkeys" and args:
        return (meter.counted(args[0]), *args[1:])
    return args


def _check_pad(meter: Meter, owner: str | bytes, width: Any = 0, *fill: Any) -> None:
    meter.room(width if isinstance(width, int) else 0)


def _check_expand(meter: Meter, owner: Any, tabsize: Any = 8) -> None:
    tabs = owner.count("\t" if isinstance(owner, str) else b"\t")
    meter.room(len(owner) + (tabs * tabsize if isinstance(tabsize, int) else 0))


def _check_translate(meter: Meter, owner: Any, table: Any = "", *delete: Any, **kwargs: Any) -> None:
    values = table.values() if isinstance(table, Mapping) else table if isinstance(table, list | tuple) else ()
    meter.room(len(owner) * max((len(value) for value in values if isinstance(value, str)), default=1))


def _check_search(meter: Meter, owner: Any, sep: Any = None, *rest: Any, **kwargs: Any) -> None:
    check_search(owner, sep)


def _check_strip(meter: Meter, owner: Any, characters: Any = None) -> None:
    check_strip(owner, characters)


def _check_codec(meter: Meter, owner: Any, encoding: Any = "utf-8", *rest: Any, **kwargs: Any) -> None:
    if isinstance(encoding, str) and re.sub(r"[-_ ]", "", encoding[:20].lower()) not in _CODECS:
        raise OverBudgetError(f"uses the codec {encoding[:20]!r}, which is not known to be fast")


def _check_slow(meter: Meter, owner: Any) -> None:
    check_pattern(owner)


_TEXT_METHODS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _check_pad),
    **dict.fromkeys(("rfind", "rindex", "rsplit", "rpartition"), _check_search),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), _check_strip),
    **dict.fromkeys(("encode", "decode"), _check_codec),
    **dict.fromkeys(("striptags", "unescape"), _check_slow),
    "expandtabs": _check_expand,
    "replace": check_replace,
    "translate": _check_translate,
}
