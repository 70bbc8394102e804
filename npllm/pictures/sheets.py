"""From a description to what its column shows: kinds of layers with names that tell them apart, branches, facts."""

from __future__ import annotations

import re
from dataclasses import replace

from npllm.describing.description import Description, Layer
from npllm.describing.kinds import kind_names, pattern
from npllm.describing.units import binary, decimal
from npllm.pictures import wording
from npllm.pictures.parts import Branch, Kind, Part, Sheet

# Of more kinds than these, those that differ in numbers alone share a frame; what is left beyond MOST_FRAMES is counted.
MOST_KINDS, MOST_FRAMES = 6, 8
MOST_WHOLE = 3

# A longer pattern is left to the strip of layers.
MOST_WORDS = 150


def sheet(d: Description, name: str) -> Sheet:
    """What a figure shows of a model, under this name."""
    names = kind_names([kind.layer for kind in d.kinds])
    rotates = any(layer.attention.rope is not None for layer in d.layers)
    kinds = [
        Kind(title, kind.indices, branches(kind.layer, rotates), *_around(kind.layer))
        for title, kind in zip(names, d.kinds, strict=True)
    ]
    return Sheet(
        name=name,
        facts=_facts(d, names),
        depth=len(d.layers),
        embedding=wording.embedding(d.embedding),
        kinds=told_once(kinds if len(kinds) <= MOST_KINDS else _cut(merged(kinds))),
        norm=wording.norm(d.head.norm),
        head=wording.head(d.head),
    )


# -- one layer --------------------------------------------------------------------------------------------------------


def branches(layer: Layer, rotates: bool) -> tuple[Branch, Branch]:
    """Attention and FFN, each with the norms that the layer has before and after it."""
    attention, parts = wording.attention(layer.attention, rotates), {part.name: dict(part.sizes) for part in layer.parts}
    beside = None
    if "laurel" in parts:
        beside = Part("plain", "LAuReL", (f"rank {parts['laurel'].get('F', 0):,}",))
        attention = replace(attention, glyphs=attention.glyphs[-1:])
    places = layer.pre_attention, layer.post_attention, layer.pre_ffn, layer.post_ffn
    before, after, pre_ffn, post_ffn = (None if norm is None else wording.norm(norm) for norm in places)
    return Branch(before, attention, after, beside), Branch(pre_ffn, wording.ffn(layer.ffn), post_ffn)


def _around(layer: Layer) -> tuple[Part | None, Part | None]:
    """What a layer does before attention and after its FFN: AltUp, per-layer inputs, and parts that have no word here."""
    parts = {part.name: part for part in layer.parts if part.name != "laurel"}
    first, titles, facts = None, [], []
    if altup := parts.pop("altup", None):
        streams = dict(altup.sizes).get("A", 0)
        first = Part("plain", f"AltUp: {streams:,} streams predicted, one computed")
        titles.append("AltUp: all streams corrected")
    if per_layer := parts.pop("per-layer", None):
        facts.append(f"per-layer input, {dict(per_layer.sizes).get('P', 0):,} wide, added")
    titles += [wording.extra(part) for part in parts.values()]
    if not titles and facts:
        titles.append("Per-layer input")
    return first, Part("plain", "; ".join(titles), tuple(facts)) if titles else None


# -- fewer frames -----------------------------------------------------------------------------------------------------


def told_once(kinds: list[Kind]) -> tuple[Kind, ...]:
    """The kinds, each part told by one of them: that which has most layers. Beyond MOST_WHOLE kinds, only the first of these
    is told whole, and those with the same norms in the same places are told against it.
    """
    order = sorted(range(len(kinds)), key=lambda i: (-len(kinds[i].layers), i))
    told: dict[Part, int] = {}
    result = {}
    for i in order:
        kind, whole = kinds[i], kinds[order[0]]
        known = {part: told[part] for _, part in kind.parts() if part.facts and part in told}
        against = order[0] if i != order[0] and len(kinds) > MOST_WHOLE and _frame(kind) == _frame(whole) else None
        altered = tuple(pair for pair in kind.parts() if pair[1].facts and pair not in list(whole.parts()))
        result[i] = replace(kind, known=known, model=against, altered=altered if against is not None else ())
        told = {part: i for _, part in kind.parts() if part.facts} | told
    return tuple(result[i] for i in range(len(kinds)))


def _frame(kind: Kind) -> list[tuple[str, Part]]:
    return [(place.replace("moe", "ffn"), part) for place, part in kind.parts() if not part.facts]


def merged(kinds: list[Kind]) -> list[Kind]:
    """Kinds of one form as one, with the ends of their numbers: "8,192 to 16,384 wide"."""
    groups: dict[object, list[Kind]] = {}
    for kind in kinds:
        form = tuple((place, part.form, len(part.facts)) for place, part in kind.parts())
        groups.setdefault(form, []).append(kind)
    return [_union(group) for group in groups.values()]


def _union(kinds: list[Kind]) -> Kind:
    first = kinds[0]
    words = [kind.name.split(", ") for kind in kinds]
    name = ", ".join(word for word in words[0] if all(word in others for others in words)) or words[0][0]
    layers = tuple(sorted(layer for kind in kinds for layer in kind.layers))
    united = [
        replace(branch, part=replace(branch.part, facts=_ends([kind.branches[i].part.facts for kind in kinds])))
        for i, branch in enumerate(first.branches)
    ]
    return replace(first, name=name, layers=layers, branches=tuple(united))


NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def _ends(facts: list[tuple[str, ...]]) -> tuple[str, ...]:
    """For each place the fact, with the least and the greatest where numbers differ; all there are where words do."""
    return tuple(_united(list(dict.fromkeys(same))) for same in zip(*facts, strict=True))


def _united(texts: list[str]) -> str:
    if len({NUMBER.sub("", text) for text in texts}) > 1:
        return " or ".join(texts)
    ranges = map(_range, zip(*(NUMBER.findall(text) for text in texts), strict=True))
    return NUMBER.sub(lambda _: next(ranges), texts[0])


def _range(numbers: tuple[str, ...]) -> str:
    least, *_, most = sorted([*numbers, numbers[0]], key=lambda number: float(number.replace(",", "")))
    return least if least == most else f"{least} to {most}"


def _cut(kinds: list[Kind]) -> list[Kind]:
    """The first MOST_FRAMES kinds; beyond, the last stands for all that are left and says how many these are."""
    if len(kinds) <= MOST_FRAMES:
        return kinds
    kept, rest = kinds[: MOST_FRAMES - 1], kinds[MOST_FRAMES - 1 :]
    layers = tuple(sorted(layer for kind in rest for layer in kind.layers))
    return [*kept, replace(rest[0], name=f"{len(rest)} more kinds, such as {rest[0].name}", layers=layers)]


# -- what stands below the name ---------------------------------------------------------------------------------------


def _facts(d: Description, names: list[str]) -> tuple[tuple[str, str], ...]:
    p = d.parameters
    looked_up = p["lookup"].total
    total = decimal(p.total)
    active = f", {decimal(p.active)} active per token" if p.active != p.total else ""
    lookup = f", {decimal(looked_up)} of them looked up" if looked_up else ""
    whole, growing = d.kv_bytes_per_token(), d.kv_growth_per_token()
    later = [] if growing == whole else [("", f"{binary(growing)} where windows are full")]
    return (
        ("parameters", f"{total}{active}{lookup}"),
        ("KV cache", f"{binary(whole)} per token in bf16"),
        *later,
        ("context", f"{d.context:,} tokens"),
        ("layers", f"{len(d.layers):,}{_pattern(d, names)}"),
    )


def spoken(sheet: Sheet) -> str:
    """The sheet as sentences, for those who cannot see the picture."""
    facts = "; ".join(f"{word} {content}".strip() for word, content in sheet.facts)
    kinds = [f"{len(kind.layers)} × {kind.name}: {'; '.join(map(_steps, kind.branches))}" for kind in sheet.kinds]
    return f"{sheet.name}: {facts}. {'. '.join(kinds)}."


def _steps(branch: Branch) -> str:
    """A branch in the order of computation."""
    parts = [part for part in (branch.before, branch.part, branch.after) if part is not None]
    told = [[*part.inside, *part.facts] for part in parts]
    return ", then ".join(
        f"{part.title} ({', '.join(more)})" if more else part.title for part, more in zip(parts, told, strict=True)
    )


def _pattern(d: Description, names: list[str]) -> str:
    if len(d.layers) == 1:
        return ""
    words = pattern(d.pattern, names)
    return f": {words}" if len(words) <= MOST_WORDS else f": {len(names)} kinds, in the order of the strip"
