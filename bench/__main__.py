"""python -m bench VERB [--out FILE]: every figure of the README that is measured."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

VERBS = {
    "canon": "the NumPy backend against np.matmul and the read bandwidth, in one run",
    "moe": "a mixture of experts against a dense model, on the NumPy backend, in one run",
    "truth": "how far the logits are from those of transformers, over tests/truth",
    "quality": "what narrower arithmetic and fewer bits cost: logits and perplexity, also in llama.cpp's formats",
    "detection": "the verification kit: seeded faults that it detects, and false alarms",
    "peers": "the Numba backend against other engines and the machine's limits, in one run",
    "numba": "the Numba backend: long contexts, mixtures, latent attention, memory, compile time, in one run",
    "gpu": "the CuPy backend on an NVIDIA GPU: decoding, prompts, layers, transformers beside it, in one run",
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    subparsers = made.add_subparsers(dest="verb", required=True)
    verbs = {name: subparsers.add_parser(name, help=text) for name, text in VERBS.items()}
    shape = "a published size, with random weights (default: %(default)s)"
    for name in ("canon", "peers", "quality"):
        verbs[name].add_argument("--shape", default="qwen3-0.6b", help=shape)
    for name, rounds in {"canon": 3, "moe": 3, "peers": 5, "numba": 3, "gpu": 3}.items():
        text = "rounds, of which the best counts (default: %(default)s)"
        verbs[name].add_argument("--rounds", type=int, default=rounds, help=text)
    verbs["detection"].add_argument("--only", default="", metavar="OPERATION", help="one operation (default: all)")
    verbs["detection"].add_argument("--seed", type=int, help="of the inputs (default: one that nobody has seen)")
    text = "a Python that has packages gguf and llama-cpp-python (default: this one)"
    verbs["quality"].add_argument("--python", default=sys.executable, help=text)
    add_peers(verbs["peers"])
    add_numba(verbs["numba"])
    text = "only the groups that have one of these words in their name, with commas between"
    verbs["gpu"].add_argument("--only", default="", metavar="WORDS", help=text)
    for name in ("peers", "numba"):
        verbs[name].add_argument("--threads", type=int, help="of everybody (default: all cores)")
        text = "a folder that keeps the weights for the next run (default: a temporary one)"
        verbs[name].add_argument("--work", type=Path, help=text)
    for verb in verbs.values():
        verb.add_argument("--out", type=Path, help="also write the figures as JSON to this file")
    return made


def add_peers(verb: argparse.ArgumentParser) -> None:
    text = "llama.cpp, transformers, or both with a comma between (default: npllm alone)"
    verb.add_argument("--with", dest="engines", default="", type=engines, metavar="ENGINES", help=text)
    text = "a Python that has these engines and package gguf (default: this one)"
    verb.add_argument("--python", default=sys.executable, help=text)
    verb.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="of a prompt (default: %(default)s)")
    verb.add_argument("--new-tokens", type=int, default=32, metavar="N", help="that are decoded (default: %(default)s)")


def add_numba(verb: argparse.ArgumentParser) -> None:
    text = "tiny shapes and short contexts, to see that everything runs: the figures mean nothing"
    verb.add_argument("--tiny", action="store_true", help=text)
    text = "only the groups that have one of these words in their name, with commas between"
    verb.add_argument("--only", default="", metavar="WORDS", help=text)


def engines(text: str) -> str:
    """The type of `--with`."""
    from bench.peers import ENGINES

    if unknown := [name for name in text.split(",") if name and name not in ENGINES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(ENGINES)}")
    return text


def main() -> None:
    args = parser().parse_args()
    bench = import_module(f"bench.{args.verb}")

    def keep(figures: dict[str, Any]) -> None:
        file = args.out or (bench.results_file(figures) if hasattr(bench, "results_file") else None)
        if file is not None:
            write(figures, file)

    options = {name: value for name, value in vars(args).items() if name not in ("verb", "out")}
    if args.verb == "gpu":
        options["keep"] = keep
    figures = bench.run(**options)
    keep(figures)
    print(bench.table(figures))


def write(figures: dict[str, Any], file: Path) -> None:
    """As JSON, whole or not at all: a run that writes several times may be ended while it does."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(figures, indent=2) + "\n")
    part.replace(file)


if __name__ == "__main__":
    main()
