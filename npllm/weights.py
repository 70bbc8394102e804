"""The weight spec and what is made of it: checks, counts, random weights, the tree that a model's `forward` reads.

`weight_spec(config)` of a model maps tensor names to `Tensor`s. Names are those of the checkpoint without the wrapper's
prefix: `layers.3.self_attn.q_proj.weight`. The tree has the same names as attributes, `w.layers[3].self_attn.q_proj`.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from npllm.checkpoint import Checkpoint
from npllm.config import DecoderConfig
from npllm.errors import CheckpointError
from npllm.handles import Weight

log = logging.getLogger("npllm")


class Bundle(NamedTuple):
    """Where a module's handles go: to `field` of one tuple `kind` at `path`, handles that a backend may want together."""

    path: str
    kind: type[Any]
    field: str


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model.

    shape    as stored in the checkpoint.
    axes     one letter per axis (npllm.arrays): what sharding and quantisation go by.
    part     embedding, attention, ffn, norm or head: what parameter counts are grouped by.
    bundle   the tuple that this tensor's module joins (q, k and v; gate, up and down), or None if it stands alone.
    alias    the tensor that serves when the checkpoint lacks this one (a tied head); an alias is not counted.
    stored   "oi" as Hugging Face's Linear [out, in], or "io" as GPT-2's Conv1D; backends always see [out, in].
    """

    shape: tuple[int, ...]
    axes: str
    part: str
    bundle: Bundle | None = None
    alias: str | None = None
    stored: str = "oi"

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Spec = dict[str, Tensor]


class Linear(NamedTuple):
    """A matrix [out, in] with its bias [out], or a norm's gain [D] with its bias: handles, or a backend's own arrays."""

    weight: Any
    bias: Any = None


class QKV(NamedTuple):
    """The projections of one attention layer that read the same input."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear


class GatedFFN(NamedTuple):
    """`down(act(gate x) * up x)`."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear


class MLP(NamedTuple):
    """`c_proj(act(c_fc x))`."""

    c_fc: Linear
    c_proj: Linear


def under(prefix: str, spec: Spec) -> Spec:
    """The same tensors with `prefix` before their names, bundles and aliases."""
    moved = {}
    for name, tensor in spec.items():
        bundle = tensor.bundle and tensor.bundle._replace(path=prefix + tensor.bundle.path)
        alias = tensor.alias and prefix + tensor.alias
        moved[prefix + name] = replace(tensor, bundle=bundle, alias=alias)
    return moved


def linear_spec(
    name: str, out: int, into: int, axes: str, part: str, *, bias: bool = False, bundle: tuple[str, type] | None = None
) -> Spec:
    """A Linear module: `name.weight` [out, into] and, when `bias`, `name.bias` [out]; `bundle` is (path, kind)."""
    place = bundle and Bundle(*bundle, name.rpartition(".")[2])
    spec = {f"{name}.weight": Tensor((out, into), axes, part, place)}
    if bias:
        spec[f"{name}.bias"] = Tensor((out,), axes[0], part, place)
    return spec


def norm_spec(name: str, width: int, *, axes: str = "D", bias: bool = False) -> Spec:
    """A norm: `name.weight` [width] and, when `bias`, `name.bias`."""
    leaves = ("weight", "bias") if bias else ("weight",)
    return {f"{name}.{leaf}": Tensor((width,), axes, "norm") for leaf in leaves}


def head_spec(vocabulary: int, width: int, tied_to: str | None) -> Spec:
    """The output head; when tied and absent from the checkpoint, the embedding serves."""
    return {"lm_head.weight": Tensor((vocabulary, width), "ND", "head", alias=tied_to)}


def attention_spec(width: int, heads: int, kv_heads: int, head_dim: int, *, bias: bool = False) -> Spec:
    """q, k, v (one bundle) and o of a grouped-heads attention layer, under `self_attn`."""
    into: dict[str, Any] = {"bias": bias, "bundle": ("self_attn.qkv", QKV)}
    return {
        **linear_spec("self_attn.q_proj", heads * head_dim, width, "HD", "attention", **into),
        **linear_spec("self_attn.k_proj", kv_heads * head_dim, width, "GD", "attention", **into),
        **linear_spec("self_attn.v_proj", kv_heads * head_dim, width, "GD", "attention", **into),
        **linear_spec("self_attn.o_proj", width, heads * head_dim, "DH", "attention", bias=bias),
    }


def gated_ffn_spec(name: str, width: int, inner: int, *, bias: bool = False) -> Spec:
    """gate, up and down of a gated feed-forward layer (one bundle)."""
    return {
        **linear_spec(f"{name}.gate_proj", inner, width, "FD", "ffn", bias=bias, bundle=(name, GatedFFN)),
        **linear_spec(f"{name}.up_proj", inner, width, "FD", "ffn", bias=bias, bundle=(name, GatedFFN)),
        **linear_spec(f"{name}.down_proj", width, inner, "DF", "ffn", bias=bias, bundle=(name, GatedFFN)),
    }


def decoder_spec(c: DecoderConfig, layers: Iterable[Spec]) -> Spec:
    """Embedding, the given layers, final norm and output head of a model of the Llama lineage."""
    spec = {"embed_tokens.weight": Tensor((c.vocab_size, c.hidden_size), "ND", "embedding")}
    for i, layer in enumerate(layers):
        spec |= under(f"layers.{i}.", layer)
    spec |= norm_spec("norm", c.hidden_size)
    return spec | head_spec(c.vocab_size, c.hidden_size, "embed_tokens.weight" if c.tie_word_embeddings else None)


def count_parameters(spec: Spec) -> int:
    """Parameters of the model; a tied head counts once."""
    return sum(tensor.size for tensor in spec.values() if tensor.alias is None)


# -- matching a checkpoint --------------------------------------------------------------------------------------------

# Wrappers' prefixes, longest first; a tensor's own name is what follows.
PREFIXES = ("language_model.model.", "model.language_model.", "language_model.", "model.", "transformer.")

# Towers of multimodal wrappers, which the text model does without.
TOWERS = re.compile(r"(model\.)?(vision_tower|vision_model|multi_modal_projector|audio_tower|embed_vision|embed_audio)\.")
BUFFERS = re.compile(r"(.*\.)?rotary_emb\.inv_freq$")


def own_name(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def match(spec: Spec, checkpoint: Checkpoint, buffers: str | None = None) -> dict[str, Weight]:
    """The checkpoint's handle for every tensor of the spec (aliases may be absent).

    `buffers`: a regular expression of the model's own names that carry no weights. Missing, unexpected, doubled and
    misshaped tensors raise CheckpointError naming the tensor as the file spells it.
    """
    stored = _stored_names(checkpoint, buffers)
    # Formats first: a quantised file would otherwise be refused for the scales that it holds besides.
    found = {name: checkpoint.weight(stored[name]) for name in spec if name in stored}
    _refuse_unexpected(spec, stored, checkpoint)
    handles: dict[str, Weight] = {}
    for name, tensor in spec.items():
        if name not in stored:
            if tensor.alias is None:
                raise CheckpointError(_missing(name, spec, stored, checkpoint))
            continue
        shape = checkpoint.shape(stored[name])
        if shape != tensor.shape:
            wanted = f"the config asks for {list(tensor.shape)}"
            raise CheckpointError(f"{checkpoint.folder}: tensor {stored[name]} has shape {list(shape)}, {wanted}")
        handle = found[name]
        # Some checkpoints store a tied head beside the embedding: the same numbers are kept once.
        if tensor.alias is not None and handle.equals(handles[tensor.alias]):
            continue
        handles[name] = replace(handle, axes=tensor.axes, part=tensor.part)
    return handles


def _stored_names(checkpoint: Checkpoint, buffers: str | None) -> dict[str, str]:
    stored: dict[str, str] = {}
    skipped = Counter[str]()
    for name in checkpoint:
        if tower := TOWERS.match(name):
            skipped[tower[2]] += 1
            continue
        own = own_name(name)
        if BUFFERS.match(own) or (buffers and re.fullmatch(buffers, own)):
            continue
        if own in stored:
            raise CheckpointError(f"{checkpoint.folder}: {stored[own]} and {name} are two spellings of one tensor")
        stored[own] = name
    if skipped:
        towers = ", ".join(f"{tower} ({count})" for tower, count in skipped.items())
        log.warning("%s: text only; tensors of other towers are skipped: %s", checkpoint.folder, towers)
    return stored


def _refuse_unexpected(spec: Spec, stored: Mapping[str, str], checkpoint: Checkpoint) -> None:
    unexpected = sorted(stored[name] for name in set(stored) - set(spec))
    if unexpected:
        raise CheckpointError(f"{checkpoint.folder}: {_some(unexpected)} not expected by this architecture and config")


def _missing(name: str, spec: Spec, stored: Mapping[str, str], checkpoint: Checkpoint) -> str:
    prefixes = Counter(full[: len(full) - len(own)] for own, full in stored.items())
    prefix = prefixes.most_common(1)[0][0] if prefixes and name != "lm_head.weight" else ""
    absent = [prefix + other for other, tensor in spec.items() if other not in stored and tensor.alias is None]
    hint = "; the config says tie_word_embeddings = false" if name == "lm_head.weight" else ""
    return f"{checkpoint.folder}: {_some(absent)} missing from the checkpoint{hint}"


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"tensor{'s' * (len(names) > 1)} {', '.join(names[:most])}{more} {'are' if len(names) > 1 else 'is'}"


# -- random weights ---------------------------------------------------------------------------------------------------


def random_weights(spec: Spec, seed: int = 0) -> dict[str, Weight]:
    """Float32 weights for tests and benchmarks: gains about 1, biases not 0, matrices that keep the activations' scale."""
    generator = np.random.default_rng(seed)
    return {
        name: replace(Weight.of(name, _draw(generator, tensor)), axes=tensor.axes, part=tensor.part)
        for name, tensor in spec.items()
        if tensor.alias is None
    }


def _draw(generator: np.random.Generator, tensor: Tensor) -> np.ndarray[Any, Any]:
    values = generator.standard_normal(tensor.shape, dtype=np.float32)
    if tensor.part == "norm":
        values *= np.float32(0.2)
        values += np.float32(len(tensor.shape) == 1)
        return values
    if len(tensor.shape) > 1:
        values *= np.float32((tensor.shape[0] if tensor.stored == "io" else tensor.shape[-1]) ** -0.5)
    else:
        values *= np.float32(0.1)
    return values


# -- the tree ---------------------------------------------------------------------------------------------------------


def build_tree(
    spec: Spec,
    handles: Mapping[str, Weight],
    prepare: Callable[[Any], Any],
    progress: Callable[[int], None] = lambda size: None,
) -> Any:
    """The weight tree of a model, each bundle of handles passed once through a backend's `prepare`.

    `progress` is called with the stored bytes of each bundle done. Tied modules are one object.
    """
    modules = _modules(spec, handles)
    tree: dict[str, Any] = {}
    bundles: dict[tuple[str, type[Any]], dict[str, Linear]] = {}
    for path, (module, bundle) in modules.items():
        if bundle is None:
            tree[path] = prepare(module)
            progress(_stored_bytes(module))
        else:
            bundles.setdefault((bundle.path, bundle.kind), {})[bundle.field] = module
    for (path, kind), fields in bundles.items():
        bundled = kind(**fields)
        tree[path] = prepare(bundled)
        progress(sum(map(_stored_bytes, bundled)))
    for name, tensor in spec.items():
        if tensor.alias is not None and name not in handles:
            tree[name.rpartition(".")[0]] = tree[tensor.alias.rpartition(".")[0]]
    return _nest(tree)


def _modules(spec: Spec, handles: Mapping[str, Weight]) -> dict[str, tuple[Linear, Bundle | None]]:
    """Handles grouped by module: `x.weight` and `x.bias` are one Linear at `x`; any other tensor is one at its own name."""
    leaves: dict[str, dict[str, Weight]] = {}
    places: dict[str, Bundle | None] = {}
    for name, handle in handles.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in Linear._fields:
            path, leaf = name, "weight"
        transposed = spec[name].stored == "io" and len(handle.shape) == 2
        leaves.setdefault(path, {})[leaf] = handle.transposed() if transposed else handle
        places[path] = spec[name].bundle
    return {path: (Linear(**fields), places[path]) for path, fields in leaves.items()}


def _stored_bytes(module: Linear) -> int:
    return sum(handle.nbytes for handle in module if handle is not None)


def _nest(flat: Mapping[str, Any]) -> Any:
    """Dotted paths to attributes; numbered children become a list."""
    children: dict[str, dict[str, Any]] = {}
    values = {}
    for path, value in flat.items():
        head, _, rest = path.partition(".")
        if rest:
            children.setdefault(head, {})[rest] = value
        else:
            values[head] = value
    values |= {head: _nest(rest) for head, rest in children.items()}
    if values and all(key.isdigit() for key in values):
        return [values[str(i)] for i in range(len(values))]
    return SimpleNamespace(**values)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every prepared weight of a tree with its path, `layers.3.self_attn.qkv.q_proj.weight`."""
    if isinstance(tree, SimpleNamespace):
        children = list(vars(tree).items())
    elif isinstance(tree, list):
        children = [(str(i), child) for i, child in enumerate(tree)]
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        children = list(zip(tree._fields, tree, strict=True))
    else:
        if tree is not None:
            yield path, tree
        return
    for name, child in children:
        yield from leaves(child, f"{path}.{name}" if path else name)
