"""`npllm doctor`: what a bug report needs. Secrets are only said to be set.

With `--json`, one document:

    schema           "npllm.doctor/1"
    versions         {name: str or null}: npllm, python and packages; null where a package is not installed
    platform         {system: str, machine: str, python: str (path of the interpreter)}
    cpu              {name: str, cores: int (that this process may use), features: [str] (those that NumPy found)}
    memory           {total_bytes: int or null, available_bytes: int or null}
    blas             [{library: str, version: str or null, threads: int, path: str}]; thread pools that are loaded
    backends         {name: {loads: bool, dtype: str or null (its default), reason: str or null (why it does not load),
                     facts: {what it says of itself; empty where that is nothing}}}
    auto             {small: str, large: str}; the backends that "auto" takes for small and for large models
    models           {shipped: bool (the model of the wheel is there), folder: str}
    cache            {hub: str or null (folder of downloaded models), exists: bool, writable: bool (it or, until it
                     exists, where it would be), free_bytes: int or null}
    environment      {variable: str or null}: those that change what npllm does; "set" in place of a secret
Facts of the backend "numba":

  path, paths         str: the instructions that kernels are compiled for; [str]: those that this CPU runs
  vector_bits         int
  bf16_instructions   bool: dot products of bf16
  int8_instructions   str or null: what multiplies bytes (npllm.backends.numba_cpu.features)
  threads             int
  dtypes              [str]: arithmetic that can be asked for; "stored" goes by the format of each matrix
  quantizations       [str]
  arithmetic          {format: str}; what dtype "stored" computes products of few tokens in, by the weights' format
  kernels             {folder: str or null, bytes: int, compiled: int (kept there), all: int (that there are)}

Facts of the backend "cupy":

  gpu, architecture   str: its name; sm_90 and the like
  compiler            str: NVRTC's version and the newest CUDA that the driver knows
  memory_bytes        int
  looks_ahead         bool: the next step is launched before a token is read
  dtypes, quantizations, kernels as above; there is no number of all kernels
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from npllm.cli import output

HELP = "what a bug report needs: versions, CPU, BLAS, backends"
OPERANDS = ""

EXAMPLES = """\
examples:
  npllm doctor
  npllm doctor --json > doctor.json
"""

PACKAGES = (
    "numpy safetensors tokenizers huggingface_hub ml_dtypes jinja2 threadpoolctl tqdm numba llvmlite cupy cupy-cuda12x "
    "cupy-cuda13x"
).split()

VARIABLES = (
    "HF_HOME HF_HUB_CACHE HF_ENDPOINT HF_HUB_OFFLINE HF_TOKEN HF_TOKEN_PATH HTTP_PROXY HTTPS_PROXY NO_PROXY OMP_NUM_THREADS "
    "OPENBLAS_NUM_THREADS MKL_NUM_THREADS NUMBA_NUM_THREADS NPLLM_CACHE NPLLM_CPU_FEATURES XDG_CACHE_HOME CUDA_PATH "
    "CUDA_VISIBLE_DEVICES NO_COLOR"
).split()

# Their values are, or may hold, secrets.
SECRET = ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document (python -m pydoc npllm.cli.doctor)")


def run(args: argparse.Namespace) -> int:
    found = examine()
    if args.json:
        output.write_json(found)
    else:
        output.write(report(found))
    return 0


def examine() -> dict[str, Any]:
    """The JSON document described above."""
    return {
        "schema": "npllm.doctor/1",
        "versions": versions(),
        "platform": {"system": platform.platform(), "machine": platform.machine(), "python": sys.executable},
        "cpu": cpu(),
        "memory": memory(),
        "blas": blas(),
        "backends": backends(),
        "auto": auto(),
        "models": models(),
        "cache": cache(),
        "environment": {name: _shown(name) for name in VARIABLES},
    }


def versions() -> dict[str, str | None]:
    from npllm import __version__

    return {"npllm": __version__, "python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    from npllm.machine import cores, cpu_name

    return {"name": cpu_name(), "cores": cores(), "features": _features()}


def _features() -> list[str]:
    """What NumPy found when it was imported; its place is private, so it may be missing."""
    try:
        features: dict[str, bool] = import_module("numpy._core._multiarray_umath").__cpu_features__
    except (ImportError, AttributeError):
        return []
    return sorted(name for name, present in features.items() if present)


def memory() -> dict[str, int | None]:
    from npllm.machine import available_memory, total_memory

    available = available_memory()
    return {"total_bytes": total_memory(), "available_bytes": None if available == sys.maxsize else available}


def blas() -> list[dict[str, Any]]:
    import numpy  # noqa: F401 (loads its BLAS)
    from threadpoolctl import threadpool_info

    return [
        {
            "library": pool["internal_api"],
            "version": pool.get("version"),
            "threads": pool["num_threads"],
            "path": pool["filepath"],
        }
        for pool in threadpool_info()
    ]


def backends() -> dict[str, dict[str, Any]]:
    from npllm.registry import available_backends, get_backend

    found = {}
    for name, reason in available_backends().items():
        be = None if reason else get_backend(name)
        facts = be.facts() if be else {}
        found[name] = {"loads": not reason, "dtype": be and be.dtype, "reason": reason or None, "facts": facts}
    return found


def auto() -> dict[str, str]:
    from npllm.registry import get_backend

    return {"small": get_backend(parameters=0).name, "large": get_backend().name}


def models() -> dict[str, Any]:
    from npllm.loading import locate

    folder = locate(None)
    return {"shipped": (folder / "config.json").is_file(), "folder": str(folder)}


def cache() -> dict[str, Any]:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return {"hub": None, "exists": False, "writable": False, "free_bytes": None}
    folder = Path(HF_HUB_CACHE)
    return {"hub": str(folder), "exists": folder.is_dir(), "writable": _writable(folder), "free_bytes": _free(folder)}


def _writable(folder: Path) -> bool:
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _free(folder: Path) -> int | None:
    """Free bytes of the disk that `folder` is, or will be, on."""
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def _shown(name: str) -> str | None:
    """A variable's value, "set" in place of a secret, None where it is not set."""
    value = os.environ.get(name)
    if not value:
        return None
    return "set" if name in SECRET or _has_password(value) else value


def _has_password(value: str) -> bool:
    try:
        return "@" in urlsplit(value).netloc
    except ValueError:
        return True


def report(found: dict[str, Any]) -> str:
    """The document as text for people."""
    from npllm.machine import gibibytes

    def size(count: int | None) -> str:
        return "unknown" if count is None else gibibytes(count)

    writable = "" if found["cache"]["writable"] else ", not writable"
    sections = {
        "versions": [f"{name} {value or 'not installed'}" for name, value in found["versions"].items()],
        "platform": [f"{found['platform']['system']}, {found['platform']['machine']}", found["platform"]["python"]],
        "cpu": [f"{found['cpu']['name']}, {found['cpu']['cores']} cores", " ".join(found["cpu"]["features"])],
        "memory": [f"{size(found['memory'][f'{kind}_bytes'])} {kind}" for kind in ("total", "available")],
        "blas": [f"{b['library']} {b['version'] or ''}, {b['threads']} threads, {b['path']}" for b in found["blas"]],
        "backends": [
            f"{name}: {'loads, computes in ' + b['dtype'] if b['loads'] else b['reason']}"
            for name, b in found["backends"].items()
        ],
        **{
            name: [f"{key}: {_said(value)}" for key, value in b["facts"].items()]
            for name, b in found["backends"].items()
            if b["facts"]
        },
        "auto": [f"takes {found['auto']['small']} for small models, {found['auto']['large']} for large ones"],
        "models": [f"shipped model {'present' if found['models']['shipped'] else 'missing'}: {found['models']['folder']}"],
        "cache": [f"{found['cache']['hub']}, {size(found['cache']['free_bytes'])} free on its disk{writable}"],
        "environment": [f"{name}={value}" for name, value in found["environment"].items() if value is not None],
    }
    return "".join(f"{title:<12}{line}\n" for name, lines in sections.items() for title, line in _labelled(name, lines))


def _said(value: Any) -> str:
    """A fact as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(each)}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join(map(_said, value)) or "none"
    return "none" if value is None else ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _labelled(name: str, lines: list[str]) -> list[tuple[str, str]]:
    """The section's name before its first line only."""
    return [("" if i else name, output.one_line(line)) for i, line in enumerate(lines or ["-"])]
