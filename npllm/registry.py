"""The backends by name: npllm's own, and those that other packages bring."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from npllm.backend import Backend, log_once
from npllm.config import nearest
from npllm.errors import BackendError


class Candidate(NamedTuple):
    """A backend that "auto" may take.

    least_parameters  a smaller model runs on "numpy" about as fast, and begins at once: there is nothing to compile.
    slow              dtypes that it computes in no faster than "numpy".
    package           one that it needs and that few have: where it is not installed, "auto" passes by in silence.
    """

    name: str
    least_parameters: int = 0
    slow: tuple[str, ...] = ()
    package: str = ""

    @property
    def installed(self) -> bool:
        return not self.package or importlib.util.find_spec(self.package) is not None

    def unsuited(self, dtype: str | None, parameters: int | None) -> str:
        """Why "numpy" does as well for a model of so many parameters (None: unknown); "" where it does not."""
        if dtype in self.slow:
            return f"{self.name} is no faster in {dtype}"
        if parameters is not None and parameters < self.least_parameters:
            return f"{self.name} gains nothing below {self.least_parameters:,} parameters"
        return ""


# "auto" takes the first of these that is installed, loads and suits, else "numpy".
PREFERENCE = (
    Candidate("cupy", 50_000_000, ("float64",), package="cupy"),
    Candidate("numba", 50_000_000, ("float64",)),
)


def available_backends() -> dict[str, str]:
    """Every registered backend by name -> "" if it loads, else the reason why not."""
    found = {}
    for name in _registered():
        try:
            _load(name)
            found[name] = ""
        except BackendError as error:
            found[name] = str(error)
    return found


def get_backend(
    name: str = "auto",
    *,
    dtype: str | None = None,
    strict: bool = False,
    threads: int | None = None,
    quantize: str | None = None,
    parameters: int | None = None,
    check: Callable[[Backend], None] | None = None,
) -> Backend:
    """The backend `name`, computing in `dtype`; its `why` says why it was taken.

    "auto" is the fastest that loads, or "numpy" where that does as well for a model of so many `parameters`. It passes over
    one of which `check` says, by a BackendError, why it cannot have the model. BackendError says what to install.
    """
    make = functools.partial(_make, dtype=dtype, strict=strict, threads=threads, quantize=quantize)
    if name != "auto":
        return make(name)
    make = functools.partial(make, check=check)
    registered = _registered()
    there = [each for each in PREFERENCE if each.name in registered and each.installed]
    candidates = {each.name: each.unsuited(dtype, parameters) for each in there}
    problems = []
    for candidate in (name for name, unsuited in candidates.items() if not unsuited):
        try:
            return make(candidate, "auto: the fastest that loads")
        except BackendError as error:
            log_once(f"backend auto: {error}", logging.WARNING)
            problems.append(str(error))
    passed = [unsuited for unsuited in candidates.values() if unsuited]
    try:
        return make("numpy", f"auto: {'; '.join(problems + passed) or 'nothing faster is installed'}")
    except BackendError as error:
        problems.append(str(error))
    for candidate in (name for name, unsuited in candidates.items() if unsuited):
        try:
            return make(candidate, f"auto: {problems[-1]}")
        except BackendError as error:
            problems.append(str(error))
    raise BackendError("; ".join(problems))


def _make(name: str, why: str = Backend.why, check: Callable[[Backend], None] | None = None, **settings: Any) -> Backend:
    backend = _load(name)(**settings)
    backend.why = why
    if check is not None:
        check(backend)
    return backend


def _registered() -> dict[str, Any]:
    from importlib.metadata import entry_points  # slow to import, and no part of `import npllm`

    return {"numpy": None} | {point.name: point for point in entry_points(group="npllm.backends")}


def _load(name: str) -> type[Backend]:
    registered = _registered()
    if name == "numpy":
        from npllm.numpy_backend import NumpyBackend

        return NumpyBackend
    if name not in registered:
        raise BackendError(
            f"backend {name!r} is not installed; installed: {nearest(str(name), registered)}; "
            "others come with packages that name it in the entry-point group npllm.backends"
        )
    try:
        backend = registered[name].load()
    except Exception as error:
        raise BackendError(f"backend {name!r} cannot load: {error}") from error
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        raise BackendError(f"backend {name!r}: its entry point must name a subclass of npllm.backend.Backend")
    try:
        backend.check()
    except BackendError as error:
        raise BackendError(f"backend {name!r} cannot run here: {error}") from error
    return backend
