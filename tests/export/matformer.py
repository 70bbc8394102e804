"""A smaller Gemma 3n out of a bigger one's weights: MatFormer (Devvrit et al. 2023, arXiv 2310.07707), in torch."""

import re
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

State = dict[str, Tensor]


def sliced(parent: State, child: PreTrainedModel, layers: Sequence[int]) -> State:
    """The `parent`'s weights cut to those of `child`, which has `layers` of it and FFNs of perhaps fewer features."""
    columns = [layer * child.config.hidden_size_per_layer_input for layer in layers]
    chosen = [column + p for column in columns for p in range(child.config.hidden_size_per_layer_input)]
    state = {}
    for name, weight in child.state_dict().items():
        stored = parent[re.sub(r"(?<=layers\.)\d+", lambda number: str(layers[int(number[0])]), name)]
        if "embed_tokens_per_layer" in name:
            stored = stored[:, chosen]
        elif "per_layer_model_projection" in name:
            stored = stored[chosen]
        elif ".mlp." in name:
            stored = stored[tuple(slice(size) for size in weight.shape)]
        state[name] = stored
    return state
