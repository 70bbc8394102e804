"""What is known of an architecture without its weights: typed, immutable, comparable.

`Description` is made by `npllm.describe` from a config.json: its structure is read off a recorded run of the model's
`forward`, its parameters come from `weight_spec`, its cache from `cache_spec`. What depends on a context is a method.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from npllm.blocks.masks import Mask
from npllm.blocks.mla import absorbed_is_cheaper
from npllm.blocks.moe import Router
from npllm.blocks.rope import Rope
from npllm.cache import KV_BYTES, LayerSpec, cache_bytes


@dataclass(frozen=True)
class Norm:
    """kind    "RMSNorm" or "LayerNorm".
    width   numbers that it takes the mean over.
    gain    "w", "1 + w" (stored less 1), or None: it has no weight.
    eps     under the root.
    bias    LayerNorm's.
    """

    kind: str
    width: int
    gain: str | None
    eps: float
    bias: bool = False


@dataclass(frozen=True)
class HeadNorm:
    """A norm of queries or keys: `over` "head" (each head by itself), "all heads" (the whole projection at once) or
    "latent" (MLA: the compressed vector); `after_rope`."""

    norm: Norm
    over: str
    after_rope: bool = False


@dataclass(frozen=True)
class Attention:
    """One layer's attention.

    kind            "MHA" (as many key/value heads as heads), "GQA", "MQA" (one) or "MLA" (both from a latent vector).
    heads, kv_heads, head_dim, value_dim     of MLA, kv_heads is heads: that many keys are made.
    rope            None: no rotary embedding (NoPE, or learned positions); `interleaved` says which numbers are pairs.
    mask            `mask.window`, `mask.chunk`, or neither: everything.
    scale           of the scores; not compared, since it may differ from layer to layer (GPT-2).
    biases          the projections that have one, as the checkpoint calls them.
    query_rank, latent, rope_dim             of MLA: q_lora_rank, kv_lora_rank, qk_rope_head_dim.
    temperature     queries grow with the logarithm of their position.
    shares_keys_of  the layer whose keys and values this one reads, having none itself.
    """

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    mask: Mask
    rope: Rope | None
    interleaved: bool = False
    scale: float = field(default=1.0, compare=False)
    query_norm: HeadNorm | None = None
    key_norm: HeadNorm | None = None
    value_norm: HeadNorm | None = None
    biases: tuple[str, ...] = ()
    softcap: float | None = None
    sinks: bool = False
    temperature: bool = False
    shares_keys_of: int | None = None
    query_rank: int | None = None
    latent: int | None = None
    rope_dim: int | None = None


@dataclass(frozen=True)
class FFN:
    """One layer's feed-forward part.

    width         of the dense layer, or of one expert.
    gated         `down(act(gate x) * up x)`; else `down(act(up x))`.
    sparsity      the share of gate values that is cut off (Gemma 3n).
    experts       how many there are; 0: a dense layer. `chosen` of them serve a token.
    shared_width  of the expert that serves every token, 0: none; `shared_gate`: its output is weighed by a gate of its own.
    router        how they are chosen; `correction`: with a bias that counts for the choice only.
    weigh         whether the router's weight scales an expert's "output" or its "input".
    """

    activation: str
    width: int
    gated: bool
    bias: bool = False
    sparsity: float | None = None
    experts: int = 0
    chosen: int = 0
    shared_width: int = 0
    shared_gate: bool = False
    router: Router | None = None
    correction: bool = False
    weigh: str = "output"


@dataclass(frozen=True)
class Part:
    """What a layer, or the model before and after its layers, has besides attention and FFN (Gemma 3n: altup, laurel,
    per-layer): the spec's name of the part, and its sizes by the letters of npllm.arrays."""

    name: str
    sizes: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Layer:
    """One layer. Layers that do the same are equal.

    pre_attention, post_attention, pre_ffn, post_ffn    norms of the residual stream before a branch, of what a branch adds.
    """

    attention: Attention
    ffn: FFN
    pre_attention: Norm | None
    post_attention: Norm | None
    pre_ffn: Norm | None
    post_ffn: Norm | None
    parts: tuple[Part, ...] = ()


class Kind(NamedTuple):
    """A layer that occurs, and where: `indices` from 0."""

    layer: Layer
    indices: tuple[int, ...]


class Run(NamedTuple):
    """`times` times, one after the other: `kinds`, pairs of an index into `Description.kinds` and how many layers of it."""

    times: int
    kinds: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Embedding:
    """rows x width; `scale`: what the rows are multiplied by; `positions`: rows of a learned table of positions, or None."""

    rows: int
    width: int
    scale: float = 1.0
    positions: int | None = None
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Head:
    """The norm before it, whether its matrix is the embedding's, and the cap of the logits."""

    norm: Norm
    tied: bool
    softcap: float | None = None


class Count(NamedTuple):
    """Parameters of one part: all, and those that one token meets."""

    total: int
    active: int


@dataclass(frozen=True)
class Parameters:
    """Parameters by part, in the order of a forward pass: embedding, positions, lookup, attention, dense, shared, experts,
    router, norms, parts of the model's own, head. A tied head counts once, as the embedding; buffers not at all."""

    parts: tuple[tuple[str, Count], ...]

    def __getitem__(self, part: str) -> Count:
        return dict(self.parts).get(part, Count(0, 0))

    def __iter__(self) -> Iterator[tuple[str, Count]]:
        return iter(self.parts)

    @property
    def total(self) -> int:
        return sum(count.total for _, count in self.parts)

    @property
    def active(self) -> int:
        """All but the experts that a token does not go to; the embedding counts whole."""
        return sum(count.active for _, count in self.parts)

    def without(self, *parts: str) -> Count:
        """Total and active, these parts not counted."""
        left = [count for part, count in self.parts if part not in parts]
        return Count(sum(count.total for count in left), sum(count.active for count in left))


class Scores(NamedTuple):
    """What one layer's attention multiplies and reads for each query and visible key.

    Of MLA, `latent` L and `rope_dim` J are above 0: the absorbed form attends over L + J numbers, the expanded one over K.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    mask: Mask
    latent: int = 0
    rope_dim: int = 0

    def bytes(self, past: int, kv_dtype: str) -> int:
        """Keys and values that one new token after `past` others reads, its own among them."""
        low, high = self.mask.reach(past, past)
        numbers = self.latent + self.rope_dim if self.latent else self.kv_heads * (self.key_dim + self.value_dim)
        return (high - low) * numbers * KV_BYTES[kv_dtype]

    def products(self, tokens: int, past: int) -> int:
        """Multiply-adds for `tokens` new tokens of one row after `past` others, those with keys that they see."""
        pairs = self.mask.pairs(past, past + tokens)
        if not self.latent:
            return pairs * self.heads * (self.key_dim + self.value_dim)
        nope = self.key_dim - self.rope_dim
        per_key = nope + self.value_dim
        if absorbed_is_cheaper(tokens, self.latent, per_key):
            moved = tokens * self.heads * self.latent * per_key
            return moved + pairs * self.heads * (2 * self.latent + self.rope_dim)
        low, high = self.mask.reach(past, past + tokens - 1)
        expanded = (high - low) * self.heads * self.latent * per_key
        return expanded + pairs * self.heads * (self.key_dim + self.value_dim)


class Place(NamedTuple):
    """A line of npllm's source: the file, from the package's parent on, the line, and the function it is in."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Step:
    """One step of the forward pass.

    op          an operation of npllm.backend.Backend, a block of npllm.blocks, or "" for arithmetic in the model's own text.
    layer       its index; None before and after the layers.
    reads, gives   shapes of the activations without the axis of tokens.
    weights     names in the checkpoint; `parameters` they hold, `active` of which one token meets.
    details     how it is computed: eps, scale, mask, router, ...
    weight_bytes    what one token reads of them, by storage format (npllm.describing.weights).
    products    multiply-adds of its matrix products per token, but for those with keys and values: they are `scores`.
    wanted      it runs only for tokens whose logits are wanted.
    place       where the model's file asks for it; `block`, the function that defines it, and what its docstring says first,
                `meaning`. Of arithmetic, `block` is the line of a canonical body of the backend, or None.
    """

    op: str
    layer: int | None
    reads: tuple[tuple[int, ...], ...]
    gives: tuple[int, ...]
    weights: tuple[str, ...]
    parameters: int
    active: int
    weight_bytes: tuple[tuple[str, int], ...]
    details: tuple[tuple[str, Any], ...]
    products: int
    scores: Scores | None
    wanted: bool
    place: Place
    block: Place | None
    meaning: str

    def bytes(self, past: int, weights: str, kv_dtype: str) -> int:
        """What one new token after `past` others reads: weights in a storage format, keys and values in another."""
        return dict(self.weight_bytes)[weights] + (self.scores.bytes(past, kv_dtype) if self.scores else 0)

    def flops(self, tokens: int, past: int) -> int:
        """Floating-point operations, 2 to a multiply-add, for `tokens` new tokens after `past` others; logits
        are those of the last."""
        products = self.products * (1 if self.wanted else tokens)
        return 2 * (products + (self.scores.products(tokens, past) if self.scores else 0))


@dataclass(frozen=True)
class Description:
    """An architecture with its sizes.

    name         a published model's, or what `describe` was given.
    model_type   that of config.json (of its text part); `file`, npllm's model file.
    context      the longest that it was made for, in tokens (max_position_embeddings).
    layers       one entry per layer; `kinds` the distinct ones, `pattern` how they follow each other.
    parameters, weight_bytes    the second in all, by storage format (npllm.describing.weights).
    cache        what the layers that have keys and values of their own keep per token.
    steps        the forward pass.
    stored       the storage format of the published file, where config.json says it.
    claim        what the publisher says of the size, and what is counted differently there.
    """

    name: str
    model_type: str
    file: str
    hidden_size: int
    vocab_size: int
    context: int
    embedding: Embedding
    layers: tuple[Layer, ...]
    kinds: tuple[Kind, ...]
    pattern: tuple[Run, ...]
    head: Head
    parameters: Parameters
    weight_bytes: tuple[tuple[str, int], ...]
    cache: tuple[LayerSpec, ...]
    steps: tuple[Step, ...] = field(repr=False)
    stored: str = "bf16"
    claim: str = ""

    # -- keys and values: bytes of one row -----------------------------------------------------------------------------

    def kv_bytes_per_token(self, kv_dtype: str = "bfloat16") -> int:
        """Of all layers, as long as no window is full."""
        return sum(spec.bytes_per_token(kv_dtype) for spec in self.cache)

    def kv_growth_per_token(self, kv_dtype: str = "bfloat16") -> int:
        """What still grows when all windows are full."""
        return sum(spec.bytes_per_token(kv_dtype) for spec in self.cache if spec.mask.span is None)

    def kv_bytes(self, context: int, kv_dtype: str = "bfloat16") -> int:
        """At a context, as the math says: a layer with a window keeps no more than that."""
        return sum(spec.kept(context) * spec.bytes_per_token(kv_dtype) for spec in self.cache)

    def kv_allocated(self, context: int, kv_dtype: str = "bfloat16") -> int:
        """At a context, as this library allocates (npllm.cache.capacity: room for 256, 512, 1024, ... tokens)."""
        return cache_bytes(self.cache, kv_dtype, context, max(context, self.context))

    def kv_without_windows(self, context: int, kv_dtype: str = "bfloat16") -> int:
        """At a context, for an engine that keeps every token in every layer."""
        return context * self.kv_bytes_per_token(kv_dtype)

    def kv_bytes_as(self, kv_heads: int | None, context: int, kv_dtype: str = "bfloat16") -> int:
        """What the same heads would cost with so many key/value heads (None: as many as heads), windows kept.

        MLA's latent vectors become keys and values of head_dim and value_dim numbers.
        """
        owners = [layer.attention for layer in self.layers if layer.attention.shares_keys_of is None]
        numbers = sum(
            spec.kept(context) * min(kv_heads or each.heads, each.heads) * (each.head_dim + each.value_dim)
            for spec, each in zip(self.cache, owners, strict=True)
        )
        return numbers * KV_BYTES[kv_dtype]

    # -- arithmetic ----------------------------------------------------------------------------------------------------

    def decode_flops(self, context: int) -> int:
        """Of one new token that sees `context` tokens, itself included."""
        return sum(step.flops(1, context - 1) for step in self.steps)

    def prefill_flops(self, context: int) -> int:
        """Of a prompt of `context` tokens in one step, with the logits of the last."""
        return sum(step.flops(context, 0) for step in self.steps)

    def decode_bytes(self, context: int, weights: str | None = None, kv_dtype: str = "bfloat16") -> int:
        """Read for one new token that sees `context` tokens: weights in a format (None: as published), keys and values.

        A layer that shares another's keys reads them once more.
        """
        keys = sum(step.scores.bytes(context - 1, kv_dtype) for step in self.steps if step.scores)
        return self.weights_read(weights or self.stored) + keys

    def weights_read(self, format: str) -> int:
        """Bytes of weights that one decoded token reads: of a mixture the chosen experts, of a table a row.

        What several steps read counts once.
        """
        read: dict[tuple[str, ...], int] = {}
        for step in self.steps:
            read[step.weights] = max(read.get(step.weights, 0), dict(step.weight_bytes)[format])
        return sum(read.values())
