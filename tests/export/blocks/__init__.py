"""Truth of single operations, from torch and from transformers' own modules. See `tests/truth/README.md`.

A file holds several cases. Tensor `<case>/<name>` is an input or an output; an output comes in float32 and, as
`<case>/<name>_f64`, computed in float64 from the same inputs. The header's metadata entry "about" is JSON: "cases" has the
parameters of each case, "provenance" what `provenance.json` has for a model.

Letters: T queries, S keys, H query heads, G key/value heads, K width of q and k, V width of v, D model, F ffn width,
E experts, C experts chosen for a token.
"""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file

from .. import command
from ..models import versions
from . import attention, ffn, fp8, mla, moe, norms, rope
from .case import SEED, Cases

LARGEST_FILE = 100_000

FILES: dict[str, Callable[[], Cases]] = {
    "rms_norm": norms.rms_norm_cases,
    "rms_norm_kinds": norms.rms_norm_kind_cases,
    "layer_norm": norms.layer_norm_cases,
    "rope_frequencies": rope.rope_frequency_cases,
    "rope_apply": rope.rope_apply_cases,
    "attention": lambda: attention.attention_cases(attention.CAUSAL),
    "attention_windowed": lambda: attention.attention_cases(attention.WINDOWED),
    "activations": ffn.activation_cases,
    "ffn": ffn.ffn_cases,
    "routers": moe.router_cases,
    "moe": lambda: moe.moe_cases(moe.ROUTED),
    "moe_shared": lambda: moe.moe_cases(moe.SHARED),
    "mla": mla.mla_cases,
    "fp8": fp8.fp8_cases,
}


def write_blocks(folder: Path) -> list[str]:
    """Writes every file of `folder`; returns a line of figures for each. ValueError for a case that proves nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write_file(folder / f"{name}.safetensors", make()) for name, make in FILES.items()]


def write_file(path: Path, cases: Cases) -> str:
    tensors = {f"{case}/{name}": value.contiguous() for case, (_, inside) in cases.items() for name, value in inside.items()}
    reals = {name: value for name, value in tensors.items() if value.is_floating_point()}
    useless = [name for name, x in reals.items() if not x.isfinite().all() or (x == x.flatten()[0]).all()]
    if useless:
        raise ValueError(f"{path.name}: not finite, or all the same: {', '.join(useless)}")
    provenance = versions() | {"command": command("blocks"), "seed": SEED}
    about = {"provenance": provenance, "cases": {case: given for case, (given, _) in cases.items()}}
    # One entry only: safetensors writes several in an order that changes from run to run.
    save_file(tensors, path, metadata={"about": json.dumps(about)})
    size = path.stat().st_size
    if size >= LARGEST_FILE:
        raise ValueError(f"{path.name}: {size} bytes, at most {LARGEST_FILE} are allowed")
    return f"blocks/{path.name:28} {size:7,d} bytes  {len(cases)} cases"
