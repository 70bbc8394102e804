"""The figures of docs/gallery, drawn from the published configurations: `python -m tools.gallery` writes them.

A test holds the committed files equal to what this makes now.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from npllm import describe, pictures
from npllm.saving import write_texts

FOLDER = Path(__file__).parent.parent / "docs" / "gallery"

# The pairs of the survey of architectures, by file name.
PAIRS = {
    "deepseek-v3-llama-4-maverick": ("deepseek-v3", "llama-4-maverick"),
    "olmo-2-llama-3": ("olmo-2-7b", "llama-3-8b"),
    "olmo-2-gemma-3": ("olmo-2-7b", "gemma-3-27b"),
    "gemma-3-mistral-small-3.1": ("gemma-3-27b", "mistral-small-3.1"),
    "qwen3-0.6b-llama-3.2-1b": ("qwen3-0.6b", "llama-3.2-1b"),
    "deepseek-v3-qwen3-235b": ("deepseek-v3", "qwen3-235b-a22b"),
}

# Whose keys and values are compared, and over which context.
LATENT = "deepseek-v3"
KEPT = ("gpt2-xl", "olmo-2-7b", "llama-3.1-8b", "mistral-small-3.1", "qwen3-8b", "qwen3-235b-a22b", "llama-4-maverick",
        "gemma-3-27b", "gemma-3n-e4b", "deepseek-v3")  # fmt: skip
GROWING = ("deepseek-v3", "llama-4-maverick", "qwen3-235b-a22b", "gemma-3-27b", "mistral-small-3.1")

HEADER = """\
# Gallery

Drawn by `python -m tools.gallery` from the published `config.json` of each model, by way of the code that computes it. For
other models, or your own: `npllm compare MODEL MODEL --svg OUT --curves OUT`.
"""


def files() -> dict[str, str]:
    """File name -> text: the figures, and a page that shows them all."""
    known = {name: describe(name) for name in {LATENT, *KEPT, *GROWING, *chain(*PAIRS.values())}}
    made, titles = {}, {}
    for name, pair in PAIRS.items():
        made[f"{name}.svg"] = pictures.diagram_svg([known[each] for each in pair])
        titles[f"{name}.svg"] = " and ".join(known[each].name for each in pair)
    made["kv-memory.svg"] = pictures.memory_svg(known[LATENT], [known[name] for name in KEPT])
    titles["kv-memory.svg"] = "What MHA, GQA, MQA and MLA keep of a token"
    made["context.svg"] = pictures.curves_svg([known[name] for name in GROWING])
    titles["context.svg"] = "Memory and work over the context"
    shown = [f"## {title}\n\n![{title}]({name})\n" for name, title in titles.items()]
    return made | {"README.md": "\n".join([HEADER, *shown])}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_texts({FOLDER / name: text for name, text in files().items()})
