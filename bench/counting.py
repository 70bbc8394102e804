"""What a model must compute and read per token: the numerators of every ratio to a limit."""

from __future__ import annotations

from typing import Any

from npllm.weights import Spec, active_parameters, leaves

# Parts whose parameters are not multiplied with every token of a prompt.
APART = ("embedding", "lookup", "head", "norm")


def layer_parameters(spec: Spec, experts_per_token: int = 0) -> int:
    """Elements of the matrices that every token of a prompt meets: all but embedding, head and norms."""
    within = {name: tensor for name, tensor in spec.items() if tensor.alias is None and tensor.part not in APART}
    return active_parameters(within, experts_per_token)


def attention_flops(c: Any, tokens: int) -> int:
    """Products and sums of causal attention over a prompt: each query meets the keys up to its own position."""
    pairs = tokens * (tokens + 1) // 2
    return 4 * c.num_attention_heads * c.head_dim * pairs * c.num_hidden_layers


def prompt_flops(c: Any, spec: Spec, tokens: int, experts_per_token: int = 0) -> int:
    """Products and sums of a prompt: matrices, attention, and the head for the last token."""
    head = 2 * c.vocab_size * c.hidden_size
    return 2 * layer_parameters(spec, experts_per_token) * tokens + attention_flops(c, tokens) + head


def latent_flops(c: Any, keys: int) -> int:
    """Products and sums of absorbed latent attention for one token: scores over the latent vector and the shared key,
    values from the latent vector (DeepSeek V2, arXiv 2405.04434, section 2.1)."""
    per_key = c.kv_lora_rank + c.qk_rope_head_dim + c.kv_lora_rank
    return 2 * c.num_attention_heads * keys * per_key * c.num_hidden_layers


def weight_bytes(tree: Any) -> int:
    """Bytes of the matrices, as they are kept, that a token reads; an embedding that is not the head is only looked up."""
    embedding = tree.embed_tokens.weight
    looked_up = embedding is not tree.lm_head.weight
    matrices = (leaf for leaf in distinct(tree) if len(leaf.shape) == 2)
    return sum(stored(leaf) for leaf in matrices if not (looked_up and leaf is embedding))


def distinct(tree: Any) -> list[Any]:
    """Every prepared weight of a model's tree, a tied head once."""
    return list({id(leaf): leaf for _, leaf in leaves(tree)}.values())


def active_bytes(c: Any, spec: Spec, experts_per_token: int = 0) -> int:
    """The same of a model in bfloat16 of which a token meets so many experts in each layer."""
    return 2 * (layer_parameters(spec, experts_per_token) + c.vocab_size * c.hidden_size)


def stored(leaf: Any) -> int:
    """Bytes of a prepared weight: an array's, or those of the handle that it was made of."""
    return int(getattr(leaf, "weight", leaf).nbytes)
