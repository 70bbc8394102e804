"""Reading `config.json` strictly: every value is checked, every key is accounted for, every error names its field.

A model's `Config.read(Reader)` asks for the keys it knows, with the defaults of transformers' configuration class; what
it neither reads nor lists as ignored is warned about once, by name. Both spellings of a key are accepted: those of
published checkpoints (`rope_theta` with `rope_scaling`, `torch_dtype`) and those that transformers 5 writes
(`rope_parameters`, `dtype`).
"""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from npllm.blocks.ffn import ACTIVATIONS
from npllm.blocks.masks import CAUSAL, Mask, sliding
from npllm.blocks.rope import Rope, frequencies, yarn_mscale
from npllm.errors import ConfigError

log = logging.getLogger("npllm")

T = TypeVar("T")

# Keys that say nothing about the forward pass, whatever the model.
IGNORED = frozenset(
    """_name_or_path architectures attn_implementation auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id
    finetuning_task id2label initializer_range is_decoder is_encoder_decoder label2id model_type output_attentions
    output_hidden_states pad_token_id pretraining_tp problem_type quantization_config return_dict sep_token_id
    task_specific_params
    tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers_version use_bfloat16
    use_cache cross_attention_hidden_size add_cross_attention decoder_start_token_id pruned_heads prefix
    attention_dropout mlp_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop""".split()
)

# No published model comes near; a larger number is a damaged or hostile file, and would only loop or overflow.
MOST_LAYERS = 4096
MOST_EXPERTS = 4096
MOST_UNITS = 1 << 31
DEEPEST = 64


def read_json(path: Path, error: type[Exception] = ConfigError, *, missing: str = "") -> dict[str, Any]:
    """The JSON object in `path`; anything else is an `error` of one line that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file{missing}") from None
    except (ValueError, RecursionError) as bad:
        raise error(f"{path}: not valid JSON ({bad})") from None
    except OSError as bad:
        raise error(f"{path}: cannot be read ({bad.strerror})") from None
    if not isinstance(value, dict):
        raise error(f"{path}: must hold a JSON object, not {type(value).__name__}")
    if _deeper(value, DEEPEST):
        raise error(f"{path}: nested more than {DEEPEST} levels deep")
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep."""
    layer = [value]
    for _ in range(levels):
        inner = (each.values() if isinstance(each, dict) else each for each in layer)
        layer = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not layer:
            return False
    return True


class Reader:
    """Typed access to one JSON object that remembers which keys were read.

    `name` stands at the head of every error: the file, or the file and the nested section. `warn` takes what is no error,
    as logging does: a format and its arguments.
    """

    def __init__(self, values: dict[str, Any], name: str = "config.json", warn: Callable[..., None] = log.warning) -> None:
        self.values, self.name, self.warn, self.seen = values, name, warn, set[str]()

    def fail(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.name}: {key} = {shown(self.values.get(key), _json)} {problem}")

    def raw(self, key: str) -> Any:
        self.seen.add(key)
        return self.values.get(key)

    def integer(self, key: str, default: int, *, least: int = 1, most: int = MOST_UNITS) -> int:
        value = self.raw(key)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fail(key, "must be an integer")
        if not least <= value <= most:
            raise self.fail(key, f"must lie between {least} and {most}")
        return value

    def optional_integer(self, key: str, default: int | None = None, *, least: int = 1) -> int | None:
        """A null is None; `default` is for an absent key."""
        if key not in self.values:
            return default
        return None if self.raw(key) is None else self.integer(key, 0, least=least)

    def real(self, key: str, default: float, *, positive: bool = True) -> float:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.fail(key, "must be a number")
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value) or (positive and value <= 0):
            raise self.fail(key, "must be a finite number" + (" above zero" if positive else ""))
        return value

    def optional_real(self, key: str, default: float | None = None) -> float | None:
        """A null is None; `default` is for an absent key."""
        if key not in self.values:
            return default
        return None if self.raw(key) is None else self.real(key, 0.0)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "must be true or false")
        return value

    def choice(self, key: str, default: str, allowed: Iterable[str]) -> str:
        value = default if self.raw(key) is None else self.values[key]
        names = list(allowed)
        if not isinstance(value, str):
            raise self.fail(key, f"must be a string; supported: {', '.join(names)}")
        if value not in names:
            raise self.fail(key, f"is not supported; supported: {nearest(value, names)}")
        return value

    def strings(self, key: str) -> list[str] | None:
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(key, "must be a list of strings")
        return value

    def integers(self, key: str) -> list[int] | None:
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, int) and item >= 0 for item in value):
            raise self.fail(key, "must be a list of integers from 0 on")
        return [int(item) for item in value]

    def section(self, key: str) -> Reader | None:
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, "must be an object")
        return Reader(value, f"{self.name}: {key}", self.warn)

    def only(self, key: str, value: Any) -> None:
        """Demand that `key` is absent, null or `value`: anything else would change the result and is not supported."""
        if self.raw(key) not in (None, value):
            raise self.fail(key, f"is not supported (only {json.dumps(value)})")

    def seeing(self, **values: Any) -> Reader:
        """A reader of the same object with other values under these keys; what it reads counts as read here too."""
        other = Reader(self.values | values, self.name, self.warn)
        other.seen = self.seen
        return other

    def unread(self, ignored: Iterable[str] = ()) -> list[str]:
        return sorted(set(self.values) - self.seen - IGNORED - set(ignored))

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Warn once about the keys that nobody read and nobody declared to be without effect."""
        unread = [printable(key) for key in self.unread(ignored) if not key.startswith("_")]
        if unread:
            self.warn("%s: these keys are unknown to npllm and have no effect: %s", self.name, ", ".join(unread))


def nearest(word: str, names: Iterable[str]) -> str:
    """All `names`, those most like `word` first, as text for an error."""
    names = list(names)
    close = difflib.get_close_matches(word[:100].lower(), names, n=len(names) or 1, cutoff=0.5)
    return ", ".join(close + sorted(set(names) - set(close)))


def printable(text: str, most: int = 200) -> str:
    """`text` on one line, without what would steer a terminal, cut to `most` characters."""
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text if text.isprintable() else ascii(text)[1:-1]


def shown(value: Any, write: Callable[[Any], str] = repr) -> str:
    """`value` as an error may show it: on one line, and short."""
    try:
        text = write(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a caller's own deep nesting
        text = f"<{type(value).__name__}>"
    return printable(text, 80)


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def read_rope(reader: Reader, dim: int, *, theta: float, positions: int) -> Rope:
    """RoPE from `rope_parameters`, or `rope_theta` with `rope_scaling`; `theta` is the class default.

    Where both are there, `rope_scaling` counts, as in transformers. `positions` (`max_position_embeddings`) stands in for a
    missing `original_max_position_embeddings`.
    """
    theta = reader.real("rope_theta", theta)
    scaling, parameters = reader.section("rope_scaling"), reader.section("rope_parameters")
    if scaling is not None and scaling.values:
        if parameters is not None:
            reader.warn("%s: rope_scaling takes the place of rope_parameters, its rope_theta included", reader.name)
        parameters = scaling
    reader.only("partial_rotary_factor", 1.0)
    if parameters is None:
        return _usable(Rope(dim=dim, theta=theta), reader)
    rope = _read_rope_section(parameters, dim, theta, positions, reader)
    parameters.finish({"type"})
    return _usable(rope, parameters)


def read_typed_ropes(reader: Reader, dim: int, defaults: dict[str, Any], positions: int) -> dict[str, Rope]:
    """RoPE per layer type, as Gemma 3 and 3n have it: `rope` of the global layers, `local_rope` of the sliding ones.

    From the sections `full_attention` and `sliding_attention` of `rope_parameters`; or rope_theta and rope_scaling of the
    global layers, rope_local_base_freq of the sliding ones. Where both are there, rope_scaling overrides the section and the
    section's rope_theta the outer one, as in transformers. `defaults` are those of `read_decoder`.
    """
    reader.only("partial_rotary_factor", 1.0)
    typed, scaling = reader.section("rope_parameters"), reader.section("rope_scaling")
    ropes = {}
    for field, kind, key in (
        ("rope", "full_attention", "rope_theta"),
        ("local_rope", "sliding_attention", "rope_local_base_freq"),
    ):
        section = (typed and typed.section(kind)) or Reader({}, reader.name, reader.warn)
        if scaling is not None and field == "rope":
            section = Reader(section.values | scaling.values, scaling.name, reader.warn)
        # transformers looks for it beside the sections, where no file has it.
        section.only("truncate", True)
        rope = _read_rope_section(section, dim, reader.real(key, defaults[key]), positions, section)
        section.finish({"type"})
        ropes[field] = _usable(rope, section)
    if typed is not None:
        typed.finish()
    return ropes


def _usable(rope: Rope, reader: Reader) -> Rope:
    """`rope`, if its frequencies and factors are positive numbers in float32; else ConfigError."""
    try:
        with np.errstate(all="ignore"):
            inverse_J, factor = frequencies(replace(rope, dim=min(rope.dim, 64)))
        temperature = yarn_mscale(rope.factor, rope.mscale_all_dim or 0.0) ** 2
        usable = bool(np.isfinite(inverse_J).all() and (inverse_J > 0).all()) and 0 < factor * temperature < math.inf
    except (ArithmeticError, ValueError):  # what Python's own floats raise for a power or a logarithm that there is not
        usable = False
    if not usable:
        raise ConfigError(f"{reader.name}: rope_theta = {rope.theta} with these RoPE parameters gives no usable frequencies")
    return rope


def _read_rope_section(section: Reader, dim: int, theta: float, positions: int, outer: Reader) -> Rope:
    key = "rope_type" if section.values.get("rope_type") is not None else "type"
    kind = section.choice(key, "default", ROPE_KINDS)
    theta = section.real("rope_theta", theta)
    section.only("partial_rotary_factor", 1.0)
    if kind == "default":
        return Rope(dim=dim, theta=theta)
    if section.raw("factor") is None:
        raise ConfigError(f"{section.name}: rope type {kind!r} needs a factor")
    original = section.integer("original_max_position_embeddings", positions)
    # An mscale of 0 counts as absent, as in transformers.
    mscale, mscale_all_dim = (
        None if section.raw(key) == 0 else section.optional_real(key) for key in ("mscale", "mscale_all_dim")
    )
    return Rope(
        dim=dim,
        theta=theta,
        kind=kind,
        factor=section.real("factor", 1.0),
        original=outer.integer("original_max_position_embeddings", original),
        low_freq_factor=section.real("low_freq_factor", 1.0),
        high_freq_factor=section.real("high_freq_factor", 4.0),
        beta_fast=section.real("beta_fast", 32.0),
        beta_slow=section.real("beta_slow", 1.0),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
        attention_factor=section.optional_real("attention_factor"),
        truncate=section.flag("truncate", True),
    )


@dataclass(frozen=True)
class DecoderConfig:
    """What every decoder-only transformer of the Llama lineage has; names are those of config.json.

    `max_position_embeddings` is the trained context in tokens; `rope` is read from the rope keys.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: Rope


def read_decoder(reader: Reader, defaults: dict[str, Any]) -> dict[str, Any]:
    """The fields of `DecoderConfig` from a config.json, with a model's class `defaults`; rms_norm_eps, rope_theta,
    tie_word_embeddings and hidden_activation (read in the place of hidden_act) may be among them. With a default for
    rope_local_base_freq, RoPE is read per layer type, and `local_rope` is among the fields.

    A default of None for `head_dim` means hidden_size / num_attention_heads, for `num_key_value_heads` all heads, as does
    null in the file.
    """
    hidden = reader.integer("hidden_size", defaults["hidden_size"])
    heads = reader.integer("num_attention_heads", defaults["num_attention_heads"])
    said_null = "num_key_value_heads" in reader.values
    kv_heads = reader.integer("num_key_value_heads", heads if said_null else defaults["num_key_value_heads"] or heads)
    head_dim = reader.optional_integer("head_dim") or defaults["head_dim"]
    if head_dim is None:
        head_dim = divide(reader, "hidden_size", hidden, "num_attention_heads", heads)
    divide(reader, "num_attention_heads", heads, "num_key_value_heads", kv_heads)
    if head_dim % 2:
        raise ConfigError(f"{reader.name}: head_dim = {head_dim} must be even, RoPE turns pairs")
    positions = reader.integer("max_position_embeddings", defaults["max_position_embeddings"])
    activation = "hidden_activation" if "hidden_activation" in defaults else "hidden_act"
    if "rope_local_base_freq" in defaults:
        ropes = read_typed_ropes(reader, head_dim, defaults, positions)
    else:
        ropes = {"rope": read_rope(reader, head_dim, theta=defaults.get("rope_theta", 10000.0), positions=positions)}
    return {
        **ropes,
        "vocab_size": reader.integer("vocab_size", defaults["vocab_size"]),
        "hidden_size": hidden,
        "intermediate_size": reader.integer("intermediate_size", defaults["intermediate_size"]),
        "num_hidden_layers": reader.integer("num_hidden_layers", defaults["num_hidden_layers"], most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": reader.choice(activation, defaults.get(activation, "silu"), ACTIVATIONS),
        "rms_norm_eps": reader.real("rms_norm_eps", defaults.get("rms_norm_eps", 1e-6)),
        "max_position_embeddings": positions,
        "tie_word_embeddings": reader.flag("tie_word_embeddings", defaults.get("tie_word_embeddings", False)),
    }


def read_layer_types(reader: Reader, pattern: list[str], allowed: Iterable[str]) -> list[str]:
    """`layer_types`, one kind per layer; `pattern` is what the older keys or the class default say."""
    types = reader.strings("layer_types")
    if types is None:
        types = pattern
    if len(types) != len(pattern):
        raise ConfigError(f"{reader.name}: layer_types names {len(types)} layers, num_hidden_layers is {len(pattern)}")
    unknown = sorted(set(types) - set(allowed))
    if unknown:
        raise ConfigError(f"{reader.name}: layer type {shown(unknown[0])} is not supported; supported: {', '.join(allowed)}")
    return types


def read_per_layer(
    reader: Reader, key: str, layers: int, read: Callable[[Reader, str], T], default: list[T] | None = None
) -> tuple[T, ...]:
    """A value for each layer: `key` holds a list of them, or one for all; `read` takes one from a Reader."""
    values = default if reader.raw(key) is None else reader.raw(key)
    if not isinstance(values, list):
        return (read(reader, key),) * layers
    if len(values) != layers:
        raise ConfigError(f"{reader.name}: {key} names {len(values)} layers, num_hidden_layers is {layers}")
    return tuple(read(reader.seeing(**{key: value}), key) for value in values)


def read_window_masks(reader: Reader, layers: int) -> tuple[Mask, ...]:
    """Each layer's rule as Qwen 2 and 3 say it: with use_sliding_window, layers from max_window_layers on see a window.

    `layer_types`, where it is there, says which layers instead. A sliding_window of null is none.
    """
    window = reader.optional_integer("sliding_window", 4096)
    if not reader.flag("use_sliding_window", False):
        window = None
    full_layers = reader.integer("max_window_layers", 28, least=0)
    pattern = ["full_attention" if window is None or i < full_layers else "sliding_attention" for i in range(layers)]
    types = read_layer_types(reader, pattern, ("full_attention", "sliding_attention"))
    return tuple(CAUSAL if kind == "full_attention" else sliding(window) for kind in types)


def read_gemma_masks(reader: Reader, layers: int, *, full_every: int, window: int) -> tuple[Mask, ...]:
    """Each layer's rule as Gemma 2, 3 and 3n say it: `layer_types`, else every layer whose number, counted from 1, is a
    multiple of `full_every` attends to everything and the others to `sliding_window` (class default `window`)."""
    pattern = ["sliding_attention" if (i + 1) % full_every else "full_attention" for i in range(layers)]
    types = read_layer_types(reader, pattern, ("full_attention", "sliding_attention"))
    width = reader.optional_integer("sliding_window", window)
    if width is None and "sliding_attention" in types:
        raise reader.fail("sliding_window", "must be an integer: some layers are sliding_attention")
    return tuple(CAUSAL if kind == "full_attention" else sliding(width) for kind in types)


def read_experts(reader: Reader, *, default: int, per_token: int, least: int = 0) -> tuple[int, int]:
    """The number of experts (`num_experts`, or `num_local_experts` as transformers 5 writes it) and `num_experts_per_tok`.

    Both names may be there with one number; `default` and `per_token` are the class defaults. Without experts, 0, no layer
    is a mixture.
    """
    experts = reader.integer("num_experts", default, least=least, most=MOST_EXPERTS)
    local = reader.integer("num_local_experts", experts, least=least, most=MOST_EXPERTS)
    if reader.raw("num_experts") is not None and experts != local:
        raise reader.fail("num_experts", f"and num_local_experts = {local} disagree")
    return local, reader.integer("num_experts_per_tok", min(per_token, local or 1), most=local or MOST_EXPERTS)


def read_moe_layers(reader: Reader, layers: int, experts: int) -> tuple[bool, ...]:
    """For each layer whether it is a mixture: where decoder_sparse_step divides its number, counted from 1, unless
    mlp_only_layers names it (counted from 0)."""
    step = reader.integer("decoder_sparse_step", 1)
    dense = reader.integers("mlp_only_layers") or []
    return tuple(experts > 0 and (i + 1) % step == 0 and i not in dense for i in range(layers))


def divide(reader: Reader, whole_key: str, whole: int, parts_key: str, parts: int) -> int:
    """`whole / parts`, or an error that names both fields when it leaves a remainder."""
    if whole % parts:
        raise ConfigError(f"{reader.name}: {whole_key} = {whole} is not divisible by {parts_key} = {parts}")
    return whole // parts
