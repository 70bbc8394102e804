"""The weight spec and what is made of it: checks, counts, random weights, the tree that a model's `forward` reads.

`weight_spec(config)` of a model maps tensor names to `Tensor`s. Names are those of the checkpoint without the wrapper's
prefix: `layers.3.self_attn.q_proj.weight`. The tree has the same names as attributes, `w.layers[3].self_attn.q_proj`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from npllm.config import DecoderConfig
from npllm.handles import Handle, Stack, Weight


class Bundle(NamedTuple):
    """Where a module's handles go: to `field` of one tuple `kind` at `path`, handles that a backend may want together."""

    path: str
    kind: type[Any]
    field: str


class Form(NamedTuple):
    """How a checkpoint may store the experts' matrices [E, F, D] of one tensor.

    name        of the stored tensor; with "{}" for the expert's number, there is one per expert.
    half        of a fused tensor [E, 2F, D]: 0 or 1; None if it is not fused.
    transposed  the last two axes are exchanged.
    """

    name: str
    half: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model.

    shape    as stored in the checkpoint; of experts, all of a layer stacked.
    axes     one letter per axis (npllm.arrays): what sharding and quantisation go by.
    part     embedding, attention, ffn, experts, router, norm, head, or a name of the model's own: what parameter counts are
             grouped by; "lookup" is a table that is read row by row and never multiplied with, "buffer" is no parameter.
    bundle   the tuple that this tensor's module joins (q, k and v; gate, up and down), or None if it stands alone.
    alias    the tensor that serves when the checkpoint lacks this one (a tied head); an alias is not counted.
    stored   "oi" as Hugging Face's Linear [out, in], or "io" as GPT-2's Conv1D; backends always see [out, in].
    forms    how checkpoints store the experts of a layer; none for a tensor that they store under its own name.
    """

    shape: tuple[int, ...]
    axes: str
    part: str
    bundle: Bundle | None = None
    alias: str | None = None
    stored: str = "oi"
    forms: tuple[Form, ...] = ()

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


class Gate(NamedTuple):
    """The router of a mixture: its matrix [E, D], and what is added to the scores [E] when experts are chosen."""

    gate: Linear
    correction: Linear | None = None


class Experts(NamedTuple):
    """The experts of a layer; each field's weight holds E matrices, `weight[e]` being [F, D], of `down_proj` [D, F]."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear


class LatentQ(NamedTuple):
    """MLA's way to queries through a latent vector, and the norm of that vector."""

    q_a_proj: Linear
    q_a_layernorm: Linear
    q_b_proj: Linear


class LatentKV(NamedTuple):
    """MLA's projection to the latent vector and the shared key, and the norm of the latent vector."""

    kv_a_proj_with_mqa: Linear
    kv_a_layernorm: Linear


def under(prefix: str, spec: Spec) -> Spec:
    """The same tensors with `prefix` before their names, bundles and aliases."""
    moved = {}
    for name, tensor in spec.items():
        bundle = tensor.bundle and tensor.bundle._replace(path=prefix + tensor.bundle.path)
        alias = tensor.alias and prefix + tensor.alias
        forms = tuple(form._replace(name=prefix + form.name) for form in tensor.forms)
        moved[prefix + name] = replace(tensor, bundle=bundle, alias=alias, forms=forms)
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


def attention_spec(
    width: int, heads: int, kv_heads: int, head_dim: int, *, bias: bool = False, o_bias: bool | None = None
) -> Spec:
    """q, k, v (one bundle) and o of a grouped-heads attention layer, under `self_attn`; `o_bias` of None is `bias`.

    With `kv_heads` 0, the layer reads another's keys and values: q and o alone.
    """
    into: dict[str, Any] = {"bias": bias, "bundle": ("self_attn.qkv", QKV) if kv_heads else None}
    spec = linear_spec("self_attn.q_proj", heads * head_dim, width, "HD", "attention", **into)
    if kv_heads:
        spec |= linear_spec("self_attn.k_proj", kv_heads * head_dim, width, "GD", "attention", **into)
        spec |= linear_spec("self_attn.v_proj", kv_heads * head_dim, width, "GD", "attention", **into)
    o_bias = bias if o_bias is None else o_bias
    return spec | linear_spec("self_attn.o_proj", width, heads * head_dim, "DH", "attention", bias=o_bias)


def gated_ffn_spec(name: str, width: int, inner: int, *, bias: bool = False) -> Spec:
    """gate, up and down of a gated feed-forward layer (one bundle)."""
    return {
        **linear_spec(f"{name}.gate_proj", inner, width, "FD", "ffn", bias=bias, bundle=(name, GatedFFN)),
        **linear_spec(f"{name}.up_proj", inner, width, "FD", "ffn", bias=bias, bundle=(name, GatedFFN)),
        **linear_spec(f"{name}.down_proj", width, inner, "DF", "ffn", bias=bias, bundle=(name, GatedFFN)),
    }


def router_spec(name: str, experts: int, width: int, *, correction: bool = False) -> Spec:
    """The router's matrix `name.weight` [E, D] and, with a `correction`, its bias on the choice [E].

    Both are a Gate called `router` in the module that holds `name`: beside experts, a `gate` is no gate projection.
    """
    place = f"{name.rpartition('.')[0]}.router"
    spec = {f"{name}.weight": Tensor((experts, width), "ED", "router", Bundle(place, Gate, "gate"))}
    if correction:
        bias = Tensor((experts,), "E", "buffer", Bundle(place, Gate, "correction"))
        spec[f"{name}.e_score_correction_bias"] = bias
    return spec


def experts_spec(
    name: str,
    experts: int,
    width: int,
    inner: int,
    *,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    transposed: bool = False,
) -> Spec:
    """The experts of a layer (one bundle at `name`): per expert, under its number, or fused as transformers 5 writes them.

    `names` are those of gate, up and down within an expert. `transposed`: the fused tensors are stored [E, D, 2F] and
    [E, F, D], as in Llama 4.
    """
    spec = {}
    for field, own, half in zip(Experts._fields, names, (0, 1, None), strict=True):
        fused = Form(f"{name}.{'down_proj' if half is None else 'gate_up_proj'}", half, transposed)
        forms = (Form(f"{name}.{{}}.{own}.weight"), fused)
        shape, axes = ((experts, width, inner), "EDF") if field == "down_proj" else ((experts, inner, width), "EFD")
        spec[f"{name}.{field}.weight"] = Tensor(shape, axes, "experts", Bundle(name, Experts, field), forms=forms)
    return spec


def decoder_spec(c: DecoderConfig, layers: Iterable[Spec]) -> Spec:
    """Embedding, the given layers, final norm and output head of a model of the Llama lineage."""
    spec = {"embed_tokens.weight": Tensor((c.vocab_size, c.hidden_size), "ND", "embedding")}
    for i, layer in enumerate(layers):
        spec |= under(f"layers.{i}.", layer)
    spec |= norm_spec("norm", c.hidden_size)
    return spec | head_spec(c.vocab_size, c.hidden_size, "embed_tokens.weight" if c.tie_word_embeddings else None)


def count_parameters(spec: Spec) -> int:
    """Parameters of the model; a tied head counts once, a buffer not at all."""
    return sum(tensor.size for tensor in spec.values() if tensor.alias is None and tensor.part != "buffer")


def active_parameters(spec: Spec, experts_per_token: int) -> int:
    """Parameters that one token meets: of each layer's experts, those it is sent to."""
    experts = [tensor for tensor in spec.values() if tensor.part == "experts"]
    return count_parameters(spec) - sum(each.size // each.shape[0] * (each.shape[0] - experts_per_token) for each in experts)


# -- random weights ---------------------------------------------------------------------------------------------------


def random_weights(spec: Spec, seed: int = 0) -> dict[str, Handle]:
    """Float32 weights for tests and benchmarks: gains about 1, biases not 0, matrices that keep the activations' scale."""
    generator = np.random.default_rng(seed)
    return {name: _random(generator, name, tensor) for name, tensor in spec.items() if tensor.alias is None}


def _random(generator: np.random.Generator, name: str, tensor: Tensor) -> Handle:
    weight = replace(Weight.of(name, _draw(generator, tensor)), axes=tensor.axes, part=tensor.part)
    return Stack(name, tuple(weight[e] for e in range(len(weight))), tensor.axes, tensor.part) if tensor.forms else weight


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
    handles: Mapping[str, Handle],
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
        progress(sum(map(_stored_bytes, filter(None, bundled))))
    for name, tensor in spec.items():
        if tensor.alias is not None and name not in handles:
            tree[name.rpartition(".")[0]] = tree[tensor.alias.rpartition(".")[0]]
    return _nest(tree)


def _modules(spec: Spec, handles: Mapping[str, Handle]) -> dict[str, tuple[Linear, Bundle | None]]:
    """Handles grouped by module: `x.weight` and `x.bias` are one Linear at `x`; any other tensor is one at its own name."""
    modules: dict[str, dict[str, Handle]] = {}
    places: dict[str, Bundle | None] = {}
    for name, handle in handles.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in Linear._fields:
            path, leaf = name, "weight"
        if isinstance(handle, Weight) and spec[name].stored == "io" and len(handle.shape) == 2:
            handle = handle.transposed()
        modules.setdefault(path, {})[leaf] = handle
        places[path] = spec[name].bundle
    return {path: (Linear(**fields), places[path]) for path, fields in modules.items()}


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
    elif isinstance(tree, list | Stack):
        children = [(str(i), child) for i, child in enumerate(tree.weights if isinstance(tree, Stack) else tree)]
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        children = list(zip(tree._fields, tree, strict=True))
    else:
        if tree is not None:
            yield path, tree
        return
    for name, child in children:
        yield from leaves(child, f"{path}.{name}" if path else name)
