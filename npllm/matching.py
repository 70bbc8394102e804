"""Matching a checkpoint with what a model asks for: every tensor is found, or the error names it as the file spells it."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from npllm import mistral_native
from npllm.checkpoint import Checkpoint
from npllm.errors import CheckpointError
from npllm.handles import Handle, Stack, Weight
from npllm.models import Described
from npllm.weights import Form, Spec, Tensor

log = logging.getLogger("npllm")

# Of experts, in all layers together: several times those of any published model. More would fill the memory with names.
MOST_MATRICES = 1 << 18

# What to add to an error about these tensors.
Hint = Callable[[list[str]], str]

# Wrappers' prefixes, longest first; a tensor's own name is what follows.
PREFIXES = ("language_model.model.", "model.language_model.", "language_model.", "model.", "transformer.")

# Towers of multimodal wrappers, which the text model does without.
TOWERS = re.compile(r"(model\.)?(vision_tower|vision_model|multi_modal_projector|audio_tower|embed_vision|embed_audio)\.")
BUFFERS = re.compile(r"(.*\.)?rotary_emb\.inv_freq$")


def own_name(name: str) -> str | None:
    """The model's name of a tensor that Hugging Face's files call `name`; None for another tower's."""
    if TOWERS.match(name):
        return None
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def match(described: Described, checkpoint: Checkpoint) -> dict[str, Handle]:
    """The checkpoint's handle for every tensor of the model's spec (aliases may be absent), by the model's own names.

    A model file may say more of names: BUFFERS, a regular expression of own names that carry no weights; RENAMED, parts of
    names that some files spell otherwise, with its own spelling; its Config's `skipped`, regular expressions of tensors that
    it does without, each with what they are, which one line tells of.

    Missing, unexpected, doubled and misshaped tensors raise CheckpointError naming the tensor as the file spells it.
    """
    spec = described.architecture.weight_spec(described.config)
    stored = _stored_names(checkpoint, described)
    forms = _forms(spec, stored, checkpoint)
    used = {each for name, tensor in spec.items() for each in _names(name, tensor, forms[name])}
    # Formats first: a file of another kind would otherwise be refused for what it holds besides.
    for name in spec.keys() & stored.keys():
        checkpoint.weight(stored[name])
    hint = _experts_hint(spec)
    _refuse_unexpected(used, stored, checkpoint, hint)
    missing = [name for name in used - set(stored) if name not in spec or spec[name].alias is None]
    if missing:
        raise CheckpointError(_missing(_in_order(missing, spec), stored, checkpoint, hint))
    handles: dict[str, Handle] = {}
    for name, tensor in spec.items():
        if (form := forms[name]) is not None:
            handles[name] = _experts(name, tensor, form, stored, checkpoint)
        elif name in stored:
            handle = _found(checkpoint, stored[name], tensor)
            # Some checkpoints store a tied head beside the embedding: the same numbers are kept once.
            tied = None if tensor.alias is None else handles[tensor.alias]
            if not (isinstance(tied, Weight) and handle.equals(tied)):
                handles[name] = replace(handle, axes=tensor.axes, part=tensor.part)
    return handles


def _forms(spec: Spec, stored: Mapping[str, str], checkpoint: Checkpoint) -> dict[str, Form | None]:
    """For each tensor the form in which the checkpoint holds the experts of its layer: the first of which it has a part,
    else the first. None for a tensor under its own name."""
    matrices = sum(tensor.shape[0] for tensor in spec.values() if tensor.forms)
    if matrices > MOST_MATRICES:
        raise CheckpointError(f"{checkpoint.folder}: the config asks for {matrices} matrices of experts; is it damaged?")
    held: dict[str | None, int] = {}
    for tensor in spec.values():
        for i, form in enumerate(tensor.forms):
            if any(form.name.format(e) in stored for e in range(tensor.shape[0])):
                place = _layer(tensor)
                held[place] = min(i, held.get(place, i))
    return {name: tensor.forms[held.get(_layer(tensor), 0)] if tensor.forms else None for name, tensor in spec.items()}


def _layer(tensor: Tensor) -> str | None:
    return tensor.bundle and tensor.bundle.path


def _names(name: str, tensor: Tensor, form: Form | None) -> list[str]:
    """The stored tensors that make up one tensor of the spec."""
    if form is None:
        return [name]
    return [form.name.format(e) for e in range(tensor.shape[0])] if "{}" in form.name else [form.name]


def _checked(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Weight:
    """The handle, if it has the shape that the config asks for."""
    found = checkpoint.shape(name)
    if found != shape:
        wanted = f"the config asks for {list(shape)}"
        raise CheckpointError(f"{checkpoint.folder}: tensor {name} has shape {list(found)}, {wanted}")
    return checkpoint.weight(name)


def _found(checkpoint: Checkpoint, name: str, tensor: Tensor) -> Weight:
    """The handle of a tensor under its own name; groups of q8 and q4 always lie along a matrix's inputs."""
    if tensor.stored == "io" and checkpoint.grouped(name):
        return _checked(checkpoint, name, tensor.shape[::-1]).transposed()
    return _checked(checkpoint, name, tensor.shape)


def _experts(name: str, tensor: Tensor, form: Form, stored: Mapping[str, str], checkpoint: Checkpoint) -> Stack:
    E, rows, columns = tensor.shape
    if "{}" in form.name:
        each = (_checked(checkpoint, stored[form.name.format(e)], (rows, columns)) for e in range(E))
        return Stack(name, tuple(each), tensor.axes, tensor.part)
    halves = 1 if form.half is None else 2
    shape = (E, columns, halves * rows) if form.transposed else (E, halves * rows, columns)
    fused = _checked(checkpoint, stored[form.name], shape)
    begin = rows * (form.half or 0)
    matrices = ((fused[e].transposed() if form.transposed else fused[e])[begin : begin + rows] for e in range(E))
    return Stack(name, tuple(matrices), tensor.axes, tensor.part)


def _stored_names(checkpoint: Checkpoint, described: Described) -> dict[str, str]:
    """The checkpoint's names by the model's own, without what the model does without."""
    rename = mistral_native.own_name if checkpoint.native else own_name
    buffers, renamed = (getattr(described.architecture, each, None) for each in ("BUFFERS", "RENAMED"))
    skipped: Mapping[str, str] = getattr(described.config, "skipped", {})
    stored: dict[str, str] = {}
    towers, left_out = Counter[str](), Counter[str]()
    for name in checkpoint:
        own = rename(name)
        if own is None:
            towers[name.removeprefix("model.").partition(".")[0]] += 1
            continue
        for theirs, ours in (renamed or {}).items():
            own = own.replace(theirs, ours)
        if BUFFERS.match(own) or (buffers and re.fullmatch(buffers, own)):
            continue
        if why := next((what for pattern, what in skipped.items() if re.fullmatch(pattern, own)), None):
            left_out[why] += 1
            continue
        if own in stored:
            raise CheckpointError(f"{checkpoint.folder}: {stored[own]} and {name} are two spellings of one tensor")
        stored[own] = name
    for what, counts in (("text only; tensors of other towers", towers), ("tensors that it does without", left_out)):
        if counts:
            skips = ", ".join(f"{each} ({count})" for each, count in counts.items())
            log.warning("%s: %s are skipped: %s", checkpoint.folder, what, skips)
    return stored


def _in_order(names: Iterable[str], spec: Spec) -> list[str]:
    """`names` in the order of the spec; those of experts, by number, at the end."""
    place = {name: i for i, name in enumerate(spec)}
    numbers = re.compile(r"\d+")
    return sorted(names, key=lambda name: (place.get(name, len(place)), [int(n) for n in numbers.findall(name)], name))


def _experts_hint(spec: Spec) -> Hint:
    """What to say besides where the tensors in question are those of numbered experts."""
    numbers = {tensor.shape[0] for tensor in spec.values() if tensor.forms}

    def hint(names: list[str]) -> str:
        numbered = numbers and all(re.search(r"\.experts\.\d+\.", name) for name in names)
        return f"; the config says {min(numbers)} experts" if numbered else ""

    return hint


def _refuse_unexpected(used: set[str], stored: Mapping[str, str], checkpoint: Checkpoint, hint: Hint) -> None:
    unexpected = sorted(stored[name] for name in set(stored) - used)
    if unexpected:
        what = f"{_some(unexpected)} not expected by this architecture and config{hint(unexpected)}"
        raise CheckpointError(f"{checkpoint.folder}: {what}")


def _missing(missing: list[str], stored: Mapping[str, str], checkpoint: Checkpoint, hint: Hint) -> str:
    prefixes = Counter(full[: len(full) - len(own)] for own, full in stored.items() if full.endswith(own))
    head = missing[0] == "lm_head.weight"
    prefix = prefixes.most_common(1)[0][0] if prefixes and not head else ""
    advice = "; the config says tie_word_embeddings = false" if head else hint(missing)
    spelled = " (in Hugging Face's spelling)" if checkpoint.native else ""
    return f"{checkpoint.folder}: {_some([prefix + name for name in missing])} missing from the checkpoint{spelled}{advice}"


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"tensor{'s' * (len(names) > 1)} {', '.join(names[:most])}{more} {'are' if len(names) > 1 else 'is'}"
