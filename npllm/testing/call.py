"""Calling somebody's kernel: its arguments, its faults before any number is looked at, and its results as NumPy arrays."""

from __future__ import annotations

import contextvars
import functools
import inspect
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import Array
from npllm.config import printable
from npllm.testing.case import Case
from npllm.testing.frameworks import Framework, address, first_line, framework, is_unwritten, plain_function, unwritten
from npllm.testing.operation import Arrays, Operation
from npllm.testing.operation import operation as find
from npllm.testing.rounding import FORMATS, Format

Kernel = Callable[..., Any]

# A second filling of `out`: numbers that fit into every format, since maxima and sums may step over NaN.
FILLING = 1e4


class KernelError(Exception):
    """The call itself failed; `problem` is one of the PROBLEMS of `report`."""

    def __init__(self, problem: str, message: str) -> None:
        super().__init__(message)
        self.problem = problem


class Form(NamedTuple):
    """What an output must look like: its axes in words, its shape, and its format; None: integers."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    format: Format | None

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.format.dtype if self.format else np.dtype(np.int32)


def called(
    op: Operation, kernel: Kernel, case: Case, inputs: Arrays, forms: Mapping[str, Form], library: str | None,
    device: str | None, limit_s: float,
) -> dict[str, Array]:  # fmt: skip
    """The kernel's outputs by name: float64 where they are real; KernelError for whatever is wrong with them.

    A kernel with a parameter `out` is called twice, with NaN and with numbers in it: neither may show.
    """
    home = framework(kernel, library, device)
    names = signature_of(kernel)
    first = once(op, kernel, names, case, inputs, forms, home, limit_s, np.nan)
    if "out" not in (names or {}) or not all(np.isfinite(x).all() for x in first.values()):
        return first
    return once(op, kernel, names, case, inputs, forms, home, limit_s, FILLING)


def once(
    op: Operation, kernel: Kernel, names: Mapping[str, inspect.Parameter] | None, case: Case, inputs: Arrays,
    forms: Mapping[str, Form], home: Framework, limit_s: float, filling: float,
) -> dict[str, Array]:  # fmt: skip
    """One call, with `filling` in what the kernel is to write."""
    passed = {name: home.put(x) for name, x in inputs.items()}
    out = [home.put(filled(form, filling)) for form in forms.values()]
    args, keywords = arguments(op, names, case, passed, out[0] if len(out) == 1 else tuple(out))
    blanks = [np.empty(form.shape, form.dtype) for form in forms.values()]
    result = limited(kernel, args, keywords, home, limit_s, blanks)
    results = by_name(forms, tuple(out) if result is None and names and "out" in names else result)
    outputs = {name: converted(name, x, forms[name], home) for name, x in results.items()}
    refuse_views(results, passed, home)
    refuse_changes(inputs, passed, home)
    for x in results.values():
        home.spoil(x)
    return outputs


def filled(form: Form, filling: float) -> Array:
    """An output before the call: unwritten memory, or numbers of both signs."""
    if np.isnan(filling):
        return unwritten(form.shape, form.dtype)
    signs = np.where(np.arange(int(np.prod(form.shape))) % 2, -filling, filling)
    return signs.reshape(form.shape).astype(form.dtype)


# -- arguments --------------------------------------------------------------------------------------------------------


def signature_of(kernel: Kernel) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a callable; None if it does not tell them."""
    try:
        return inspect.signature(getattr(kernel, "py_func", kernel)).parameters
    except (ValueError, TypeError):
        return None


def arguments(
    op: Operation, names: Mapping[str, inspect.Parameter] | None, case: Case, arrays: Mapping[str, Any], out: Any
) -> tuple[list[Any], dict[str, Any]]:
    """What the kernel is called with, in order and by keyword; KernelError("signature") if it cannot take it.

    Parameters with the operation's names get what they name. Other parameters stand for the other arrays in the operation's
    order, but for those with a default that is not None, which are the kernel's own.
    """
    if names is None:
        return [x for name, x in arrays.items() if name not in op.derived], dict(case.settings)
    given = {**arrays, **case.settings}
    meant = meanings(op, names)
    args: list[Any] = []
    keywords: dict[str, Any] = {}
    for parameter in names.values():
        meaning = meant.get(parameter.name, parameter.name)
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name == "out":
            keywords["out"] = out
        elif meaning not in given:
            require_default(op, case, parameter, meaning)
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            args.append(given.pop(meaning))
        else:
            keywords[parameter.name] = given.pop(meaning)
    kinds = {parameter.kind for parameter in names.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return args, keywords | given
    if inspect.Parameter.VAR_POSITIONAL in kinds and not args and not any(name in arrays for name in keywords):
        args = [given.pop(name) for name in arrays if name not in op.derived]
    for name in given:
        if name not in op.derived:
            raise KernelError("signature", f"it does not take `{name}`, which the case has: {advice(op, case, name)}")
    return args, keywords


def meanings(op: Operation, names: Mapping[str, inspect.Parameter]) -> dict[str, str]:
    """Parameter -> array of the operation, for parameters that have names of their own."""
    settings = {name for case in op.cases for name in case.settings}
    own = [
        each.name
        for each in names.values()
        if each.name not in op.inputs and each.name not in settings and each.name != "out"
        and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) and each.default in (each.empty, None)
    ]  # fmt: skip
    waiting = [name for name in op.inputs if name not in names and name not in op.derived]
    return dict(zip(own, waiting, strict=False))


def require_default(op: Operation, case: Case, parameter: inspect.Parameter, meaning: str) -> None:
    """A parameter that the case has nothing for must have a default."""
    if parameter.default is not parameter.empty:
        return
    stands = "" if meaning == parameter.name else f" (which would be `{meaning}`)"
    known = meaning in op.inputs or any(meaning in case.settings for case in op.cases)
    settings = sorted({name for each in op.cases for name in each.settings})
    has = f"{op.name} has {', '.join(op.inputs)}; {', '.join(settings)}"
    told = "give it a default" if known else f"{has}: rename it to what it stands for, or give it a default"
    raise KernelError("signature", f"it requires `{parameter.name}`{stands}, which the case does not have: {told}")


def advice(op: Operation, case: Case, name: str) -> str:
    """What to do about an argument that a kernel does not take."""
    told = "give it a parameter of that name"
    tags = case.tags & tags_that_need(op.name, name)
    # Of tags that say the same, the one with the most cases: it is the argument's own.
    tag = max(sorted(tags), key=lambda tag: sum(tag in each.tags for each in op.cases), default="")
    return f"{told}, or leave such cases out with without={tag!r}" if tag else told


@functools.cache
def tags_that_need(operation: str, argument: str) -> frozenset[str]:
    """The tags of which every case has this argument."""

    def needs(case: Case) -> bool:
        return argument in case.settings or argument in case.inputs(0, case.scales[0], FORMATS["f32"])

    corpus = find(operation).cases
    lacking = [case for case in corpus if not needs(case)]
    return frozenset[str]().union(*(case.tags for case in corpus)).difference(*(case.tags for case in lacking))


# -- the call ---------------------------------------------------------------------------------------------------------


def limited(
    kernel: Kernel, args: list[Any], keywords: dict[str, Any], home: Framework, limit_s: float, blanks: list[Array]
) -> Any:
    """The kernel's result; KernelError if it raises, or takes longer than `limit_s` seconds.

    It runs in a thread of its own, which is left behind if it does not end. Memory for results like `blanks` is poisoned in
    that thread, since allocators keep memory by thread. NumPy's warnings about NaN are off: the inputs
    hold NaN on purpose, where nothing may be read.
    """
    outcome: list[Any] = []
    scope = home.scope()

    def work() -> None:
        try:
            with scope, np.errstate(all="ignore"):
                guards = [home.poison(blank) for blank in blanks]
                result = kernel(*args, **keywords)
                home.wait(result)
            guards.clear()
            outcome.append((result, None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True, name="npllm kernel")
    thread.start()
    thread.join(limit_s)
    if not outcome:
        raise KernelError("hangs", f"it did not return within {limit_s:g} s")
    result, error = outcome[0]
    if error is not None:
        raise KernelError("raised", f"it raised {type(error).__name__}: {told(error)}{place_of(error, kernel)}") from error
    return result


def told(error: BaseException) -> str:
    return printable(first_line(error), 300)


def place_of(error: BaseException, kernel: Kernel) -> str:
    """` (file.py, line 12: y = x @ w)`: the innermost line of the kernel's own file, else of any; "" if it is not known."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    code = getattr(plain_function(kernel), "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename] or frames
    if not own:
        return ""
    file = own[-1].filename.replace("\\", "/").rpartition("/")[2]
    line = f": {printable(own[-1].line, 80)}" if own[-1].line else ""
    return f" ({file}, line {own[-1].lineno}{line})"


# -- results ----------------------------------------------------------------------------------------------------------


def by_name(forms: Mapping[str, Form], result: Any) -> dict[str, Any]:
    """The outputs by name, from an array, a tuple, a list, a named tuple, or a dict by output names."""
    want = " and ".join(f"`{name}`" for name in forms) + (" in this order" if len(forms) > 1 else " alone")
    if isinstance(result, Mapping):
        if missing := [name for name in forms if name not in result]:
            has = ", ".join(map(repr, list(result)[:8]))
            raise KernelError("returned", f"it returned a dict of {has or 'nothing'}, without `{missing[0]}`")
        return {name: result[name] for name in forms}
    fields = getattr(result, "_fields", ())
    if set(forms) <= set(fields):
        return {name: getattr(result, name) for name in forms}
    several = tuple(result) if isinstance(result, tuple | list) else (result,)
    if len(several) != len(forms):
        wrap = ": wrap it in a function that returns nothing else" if len(several) > len(forms) else ""
        raise KernelError("returned", f"it returned {kind_of(result)}; want {want}{wrap}")
    return dict(zip(forms, several, strict=True))


def kind_of(result: Any) -> str:
    """What was returned, in a few words."""
    if isinstance(result, tuple | list):
        return f"a {type(result).__name__} of {len(result)}"
    return "None" if result is None else f"a {type(result).__name__}"


def converted(name: str, x: Any, form: Form, home: Framework) -> Array:
    """An output as a new NumPy array, float64 if it is real, after its shape, type and memory were looked at."""
    try:
        got = home.get(x)
    except TypeError as error:
        problem = kind_of(x) if "is no array" in str(error) else f"{kind_of(x)}: {told(error)}"
        raise KernelError("returned", f"`{name}` is {problem}; want an array") from None
    if got.shape != form.shape:
        axes = " x ".join(form.axes)
        raise KernelError("shape", f"`{name}` has shape {list(got.shape)}, want {list(form.shape)} ({axes})")
    got = typed(name, got, form)
    refuse_unwritten(name, got, form)
    return got if form.format is None else got.astype(np.float64)


def typed(name: str, got: Array, form: Form) -> Array:
    """`got` in the type it must have; bfloat16 may come as its bits."""
    if form.format is None:
        if got.dtype.kind not in "iu":
            raise KernelError("dtype", f"`{name}` is {got.dtype}, want integers")
        return got
    if got.dtype == np.uint16 and form.format.name == "bf16":
        return got.view(form.dtype)
    if got.dtype != form.dtype:
        want = f"the policy says {form.format.name}"
        told = "change what the kernel returns, or declare it: Rounding(..., output=...)"
        raise KernelError("dtype", f"`{name}` is {got.dtype}, {want}: {told}")
    return got


def refuse_unwritten(name: str, got: Array, form: Form) -> None:
    """NaN of the very bits that the memory was filled with before the call: no kernel computes those."""
    left = is_unwritten(got)
    if form.format is not None and left.any():
        from npllm.testing.wording import coordinate

        first = coordinate(form.axes, tuple(int(i) for i in np.argwhere(left)[0]))
        counted = f"{int(left.sum()):,} of {left.size:,} elements"
        raise KernelError("non-finite", f"`{name}`: memory that was never written in {counted}, the first at {first}")


def refuse_views(results: Mapping[str, Any], passed: Mapping[str, Any], home: Framework) -> None:
    """No output may lie in the memory of an input."""
    for name, x in results.items():
        begins = address(x) if home.name != "jax" else None  # nobody can write to an array of JAX's
        for given, array in passed.items():
            start = address(array)
            if begins is not None and start is not None and start <= begins < start + array.nbytes:
                raise KernelError("view", f"`{name}` shares memory with the input `{given}`: return an array of its own")


def refuse_changes(inputs: Arrays, passed: Mapping[str, Any], home: Framework) -> None:
    """Every input must hold the bytes that it held before."""
    for name, x in inputs.items():
        if home.name != "jax" and home.get(passed[name]).tobytes() != x.tobytes():
            raise KernelError("modified", f"the input `{name}` was changed by the call")
