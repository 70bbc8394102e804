"""Colours by what they are for, in light and dark, and the style sheet that is made of them.

Nothing is told by colour alone: each kind of part has its title, each curve its dashes, what differs its frame. Each
colour stands in the sheet as itself and as a variable, for programs that know none, and print has the light ones.
"""

from __future__ import annotations

from npllm.pictures.metrics import FAMILY

# name: light, dark.
COLOURS = {
    "paper": ("#ffffff", "#14171b"),
    "ink": ("#16191d", "#eceef1"),
    "soft": ("#545b64", "#a9b1bb"),
    "line": ("#3d444c", "#c2c9d1"),
    "hair": ("#cdd2d8", "#474e57"),
    "plain": ("#f4f5f7", "#262b31"),
    "frame": ("#fbfbfc", "#1a1e23"),
    "band": ("#e9ecf0", "#2c323a"),
    "attention": ("#e1ecf9", "#1c3350"),
    "ffn": ("#e2f1e4", "#1c3a27"),
    "moe": ("#efe6f8", "#3a2a52"),
    "ends": ("#f5efdf", "#3b3420"),
    "norm": ("#ffffff", "#0f1215"),
    "mark": ("#fff0b8", "#57460f"),
    "strong": ("#9a3d00", "#ffb35c"),
    "curve0": ("#0b57a4", "#7db8f5"),
    "curve1": ("#a33b00", "#ff9f5a"),
    "curve2": ("#1f6b35", "#77cf8c"),
    "curve3": ("#6a3a9c", "#c79df0"),
    "curve4": ("#8a1f4b", "#f08fb5"),
    "curve5": ("#0f6671", "#6fd0da"),
}

DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "1 4")
CURVES = len(DASHES)


def styles() -> str:
    """The style sheet of a picture; the classes are named after colours and uses."""
    rules = [*_rules(), *(_curve(i) for i in range(CURVES))]
    return "\n".join([_root(0), f"@media screen and (prefers-color-scheme: dark) {{ {_root(1)} }}", *rules])


def _root(theme: int) -> str:
    declared = " ".join(f"--{name}: {pair[theme]};" for name, pair in COLOURS.items())
    return f":root {{ color-scheme: {('light', 'dark')[theme]}; {declared} }}"


def _of(what: str, name: str) -> str:
    return f"{what}: {COLOURS[name][0]}; {what}: var(--{name});"


def _rules() -> list[str]:
    fills = ("paper", "ink", "soft", "plain", "frame", "band", "attention", "ffn", "moe", "ends", "norm", "mark", "strong")
    return [
        f"text {{ font-family: {FAMILY}; }}",
        ".bold { font-weight: bold; }",
        *(f".{name} {{ {_of('fill', name)} }}" for name in fills),
        f".edge {{ {_of('stroke', 'line')} stroke-width: 1; }}",
        f".differs {{ {_of('stroke', 'strong')} stroke-width: 2.6; }}",
        f".flow {{ fill: none; {_of('stroke', 'line')} stroke-width: 1.3; }}",
        f".rule {{ fill: none; {_of('stroke', 'hair')} stroke-width: 1; }}",
        f".thin {{ fill: none; {_of('stroke', 'line')} stroke-width: 0.8; }}",
        f".tip {{ {_of('fill', 'line')} }}",
        f".halo {{ {_of('stroke', 'paper')} stroke-width: 1.2; }}",
    ]


def _curve(i: int) -> str:
    dashes = f" stroke-dasharray: {DASHES[i]};" if DASHES[i] else ""
    return (
        f".curve{i} {{ fill: none; {_of('stroke', f'curve{i}')} stroke-width: 2;{dashes} }} "
        f".dot{i} {{ {_of('fill', f'curve{i}')} }}"
    )
