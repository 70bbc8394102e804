"""GPT-2 (Radford et al. 2019); truth: transformers 5.23.

| against Llama 3 | here                                                                               |
|-----------------|------------------------------------------------------------------------------------|
| norms           | LayerNorm with bias, before attention and FFN, and after the last block            |
| attention       | as many key/value as query heads; one fused projection c_attn = q, k, v; biases    |
| scale           | head_dim^-0.5; with scale_attn_by_inverse_layer_idx also 1 / (layer + 1)           |
| positions       | learned table wpe, added to the embedding; no RoPE                                 |
| FFN             | c_proj(gelu(c_fc x)) with biases, width 4 x n_embd unless n_inner says otherwise   |
| weights         | stored [in, out] (Conv1D)                                                          |
| output head     | tied to the embedding                                                              |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npllm.arrays import Array
from npllm.backend import LN, Backend, merge_heads
from npllm.blocks import ACTIVATIONS, CAUSAL
from npllm.cache import Cache, LayerCache, LayerSpec, Rows
from npllm.config import MOST_LAYERS, Reader, divide
from npllm.weights import MLP, Bundle, Spec, Tensor, head_spec, norm_spec, under

# Mask buffers that the published files carry beside the weights.
BUFFERS = r"h\.\d+\.attn\.(bias|masked_bias)"

# Names of every other architecture, which transformers reads here too and lets count before GPT-2's own.
NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

# Summaries and training aids, the old name of n_positions, and how the reference orders its arithmetic.
IGNORED = """n_ctx reorder_and_upcast_attn summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj""".split()


@dataclass(frozen=True)
class Config:
    """Names are those of config.json; `n_inner` and the per-head width are resolved."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    head_dim: int
    activation_function: str
    layer_norm_epsilon: float
    scales: tuple[float, ...]
    tie_word_embeddings: bool

    @classmethod
    def read(cls, reader: Reader) -> Config:
        reader = reader.seeing(**{own: reader.raw(name) for name, own in NAMES.items() if reader.raw(name) is not None})
        width, heads = reader.integer("n_embd", 768), reader.integer("n_head", 12)
        head_dim = divide(reader, "n_embd", width, "n_head", heads)
        layers = reader.integer("n_layer", 12, most=MOST_LAYERS)
        scale = head_dim**-0.5 if reader.flag("scale_attn_weights", True) else 1.0
        by_layer = reader.flag("scale_attn_by_inverse_layer_idx", False)
        return cls(
            vocab_size=reader.integer("vocab_size", 50257),
            n_positions=reader.integer("n_positions", 1024),
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            n_inner=reader.optional_integer("n_inner") or 4 * width,
            head_dim=head_dim,
            activation_function=reader.choice("activation_function", "gelu_new", ACTIVATIONS),
            layer_norm_epsilon=reader.real("layer_norm_epsilon", 1e-5),
            scales=tuple(scale / (i + 1) if by_layer else scale for i in range(layers)),
            tie_word_embeddings=reader.flag("tie_word_embeddings", True),
        )

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions


def weight_spec(c: Config) -> Spec:
    """Names and shapes of the checkpoint (Hugging Face's GPT2LMHeadModel)."""
    spec = {
        "wte.weight": Tensor((c.vocab_size, c.n_embd), "ND", "embedding"),
        "wpe.weight": Tensor((c.n_positions, c.n_embd), "TD", "embedding"),
    }
    for i in range(c.n_layer):
        spec |= under(f"h.{i}.", layer_spec(c))
    spec |= norm_spec("ln_f", c.n_embd, bias=True)
    return spec | head_spec(c.vocab_size, c.n_embd, "wte.weight" if c.tie_word_embeddings else None)


def layer_spec(c: Config) -> Spec:
    D, F = c.n_embd, c.n_inner
    return {
        **norm_spec("ln_1", D, bias=True),
        **conv1d_spec("attn.c_attn", D, 3 * D, "DH", "attention"),
        **conv1d_spec("attn.c_proj", D, D, "HD", "attention"),
        **norm_spec("ln_2", D, bias=True),
        **conv1d_spec("mlp.c_fc", D, F, "DF", "ffn", bundle=("mlp", MLP)),
        **conv1d_spec("mlp.c_proj", F, D, "FD", "ffn", bundle=("mlp", MLP)),
    }


def conv1d_spec(name: str, into: int, out: int, axes: str, part: str, bundle: tuple[str, type] | None = None) -> Spec:
    place = bundle and Bundle(*bundle, name.rpartition(".")[2])
    return {
        f"{name}.weight": Tensor((into, out), axes, part, place, stored="io"),
        f"{name}.bias": Tensor((out,), axes[1], part, place),
    }


def cache_spec(c: Config) -> list[LayerSpec]:
    return [LayerSpec(c.n_head, c.head_dim, c.head_dim)] * c.n_layer


def block(be: Backend, c: Config, w: Any, x_MD: Array, rows: Rows, memory: LayerCache, scale: float) -> Array:
    h_MD = be.mark("attention.input", be.layer_norm(x_MD, w.ln_1, c.layer_norm_epsilon))
    qkv_M3HK = be.linear(h_MD, w.attn.c_attn).reshape(len(x_MD), 3, c.n_head, c.head_dim)
    q_MHK, keys = be.append_heads(qkv_M3HK[:, 0], qkv_M3HK[:, 1], qkv_M3HK[:, 2], memory, rows)
    o_MHV = be.mark("attention.heads", be.attention(q_MHK, keys, rows, mask=CAUSAL, scale=scale))
    x_MD = be.mark("attention.output", be.linear(merge_heads(o_MHV), w.attn.c_proj, x_MD))
    norm = LN(w.ln_2, c.layer_norm_epsilon)
    return be.mark("output", be.mlp(x_MD, w.mlp, c.activation_function, norm=norm, residual_MD=x_MD))


def forward(be: Backend, c: Config, w: Any, tokens_M: Array, rows: Rows, cache: Cache) -> Array:
    """Token ids -> logits_WN of the rows' wanted tokens; keys and values go to `cache`."""
    x_MD = be.embed(tokens_M, w.wte) + be.embed(rows.positions_M, w.wpe)
    x_MD = be.mark("embedding", x_MD)
    for i, (layer, memory) in enumerate(zip(w.h, cache.layers, strict=True)):
        x_MD = block(be.layer(i), c, layer, x_MD, rows, memory, c.scales[i])
    x_WD = be.mark("norm", be.layer_norm(rows.wanted(x_MD), w.ln_f, c.layer_norm_epsilon))
    return be.mark("logits", be.linear(x_WD, w.lm_head))
