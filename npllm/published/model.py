"""What is known of a published model."""

from typing import Any, NamedTuple


class Published(NamedTuple):
    """A config.json and the numbers that it stands for.

    parameters   of the text model: every number of its weights, a tied head once; buffers and skipped layers not.
    kv_bytes     bytes per token of a bfloat16 cache, all layers counted.
    active       billions of parameters that one token uses (all but the experts not chosen), as printed: its digits count.
    growing      the bytes per token that still grow when all windows are full; None where every layer sees everything.
    """

    config: dict[str, Any]
    parameters: int
    kv_bytes: int
    active: str | None = None
    growing: int | None = None


def sizes(width: int, layers: int, heads: int, inner: int, kv_heads: int) -> dict[str, int]:
    """The five fields that differ from size to size in every family of the Llama lineage."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "num_key_value_heads": kv_heads,
    }
