"""The backends by name: npllm's own, and those that other packages bring."""

from __future__ import annotations

import logging
from typing import Any

from npllm.backend import Backend, log_once
from npllm.config import nearest
from npllm.errors import BackendError

# "auto" takes the first of these that is installed and loads, else "numpy".
PREFERENCE = ("cupy", "numba")


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
) -> Backend:
    """The backend `name` ("auto": the fastest that loads), computing in `dtype`. BackendError says what to install."""
    if name != "auto":
        return _load(name)(dtype, strict=strict, threads=threads, quantize=quantize)
    registered = _registered()
    for candidate in PREFERENCE:
        if candidate not in registered:
            continue
        try:
            return _load(candidate)(dtype, strict=strict, threads=threads, quantize=quantize)
        except BackendError as error:
            log_once(f"backend auto: {error}", logging.WARNING)
    return _load("numpy")(dtype, strict=strict, threads=threads, quantize=quantize)


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
    return backend
