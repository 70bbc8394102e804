"""What a model case is, and what several families share. Needs neither torch nor transformers."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One checkpoint and its truth.

    model: `model_type` of config.json. config: fields given to the config class, JSON values only.
    notes: what the case is for. seed: draws weights and tokens. tokens: length of each of the two rows.
    storage: dtype of the stored weights; the truth is computed in float32 from the weights as stored.
    controls: config fields that switch the case's feature off. Each must change the logits of the same weights by at
    least one per cent, so a case cannot pass without its feature.
    zeroed: the same for weights: setting to 0 those whose names a regular expression matches must change the logits as much.
    old_rope_key: if given, `config.old.json` says the same in the spelling of before transformers 5, with this name for
    the key of the RoPE type ("rope_type" or the still older "type"); `old` are fields that this spelling has besides,
    `old_without` those that it lacks.
    shard_size: if given, the weights are split into files of at most this size, with an index.
    quantisation: `quantization_config` of config.json, if the linear weights are stored in FP8; `scales` is their scales'
    dtype, `storage` that of everything else.
    fused: store the experts of a layer as transformers 5 holds them in memory, not under the published names.
    sliced_from: another case, exported before, whose weights are cut (`matformer.sliced`) in place of drawing new ones;
    `kept_layers` are the layers that are left of it.
    """

    model: str
    config: dict[str, Any]
    notes: str
    seed: int = 0
    tokens: int = 37
    storage: str = "float32"
    controls: tuple[dict[str, Any], ...] = ()
    zeroed: tuple[str, ...] = ()
    old_rope_key: str | None = None
    old: dict[str, Any] = field(default_factory=dict)
    old_without: tuple[str, ...] = ()
    shard_size: str | None = None
    quantisation: dict[str, Any] = field(default_factory=dict)
    scales: str = "float32"
    fused: bool = False
    sliced_from: str | None = None
    kept_layers: tuple[int, ...] = ()


def digest(case: Case) -> str:
    """Identifies a declaration; its notes do not count, nor does what it leaves at the default."""
    plain = asdict(Case(case.model, case.config, ""))
    fields = {key: value for key, value in asdict(case).items() if key == "config" or value != plain[key]}
    fields |= {"model": case.model, "notes": None}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def rope(theta: float, rope_type: str = "default", **scaling: Any) -> dict[str, Any]:
    """Config fields for one RoPE setting, in the spelling of transformers 5."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **scaling}}


IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}

DENSE: dict[str, Any] = IDS | {
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
}
"""The shape of most dense models; each family adds its vocabulary, so that no two have the same."""

SCALED = {"head_dim": 12, "tie_word_embeddings": True}
"""Six frequencies instead of five, so that each band of a scaling rule holds some; tied, to stay small."""

SMALL = {"num_hidden_layers": 4, "num_key_value_heads": 2, "intermediate_size": 30}
"""Four layers within the size of a folder."""

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 28}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
RAMP = {"beta_fast": 2.0, "beta_slow": 0.25}
"""With 16 original positions, a ramp whose ends are 0.3 and 3.0 for theta 100 and head_dim 12."""
