"""What arithmetic and fewer bits cost: logits of each policy against float32 arithmetic on the weights as they are stored.

shipped   the model that ships with npllm, on answers to questions of tools/shipped: half trained on, half held out;
shape     random bfloat16 weights of a real shape, its first layers, on random tokens.

error       distance of the logits from those of float32, as a share of their size;
kl          mean KL divergence of the next token's distribution from that of float32, in nats;
perplexity  of the answers.

Of 8 bits, a hundredth of the answers makes up half of the shipped model's KL. So what is decoded is compared with llama.cpp
answer by answer, and the ratio of both KL comes with what 95 % of RESAMPLES draws of as many answers make of it.

A policy is a dtype of the Numba backend, for weights as stored, in q8 or in q4. Texts are scored as prompts, and "decoded":
each token of the answer in a step of its own, where few bits mean that activations are rounded to 8 bits as well. "Q8_0" and
"Q4_0" are llama.cpp's formats of the same bits with all matrices in them, embedding and tied head too (llama-quantize
--pure): package `gguf` quantises the same weights, and the canon computes in float32 with what they stand for. "llama.cpp
Q8_0, decoded" is llama.cpp itself, which rounds activations to 8 bits and keeps keys and values in float16.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.canon import about
from bench.checkpoints import checkpoint
from bench.processes import ROOT, Contestant
from npllm.arrays import Array
from npllm.backend import Backend
from npllm.checkpoint import Checkpoint
from npllm.grouped import marked
from npllm.handles import Handle, Weight
from npllm.llm import LLM
from npllm.loading import locate
from npllm.machine import cores
from npllm.matching import match
from npllm.model import Model
from npllm.models import Described, read_config
from npllm.registry import get_backend
from npllm.sampling import log_softmax
from npllm.tokenizer import Tokenizer
from npllm.weights import build_tree

# Questions of each kind; random tokens; layers of the shape.
QUESTIONS, TOKENS, LAYERS = 500, 64, 4

# Name -> dtype and quantize of the Numba backend; or the llama.cpp format of the same bits as another's.
OURS = {
    "float32": ("float32", None), "bfloat16": ("bfloat16", None), "stored": ("stored", None),
    "q8 float32": ("float32", "q8"), "q8 stored": ("stored", "q8"),
    "q4 float32": ("float32", "q4"), "q4 stored": ("stored", "q4"),
}  # fmt: skip
DECODED = ("stored", "q8 stored", "q4 stored")
THEIRS = {"Q8_0": "q8", "Q4_0": "q4"}

# How often the answers are drawn anew to tell how far a ratio is chance.
RESAMPLES = 10_000

# Puts in the place of float32 matrices what they stand for after quantising; needs package gguf.
WORKER = """
import pathlib, sys
import numpy as np
from gguf import GGMLQuantizationType, quants
kind = GGMLQuantizationType[sys.argv[1]]
for path in pathlib.Path(sys.argv[2]).iterdir():
    np.save(path, quants.dequantize(quants.quantize(np.load(path), kind), kind).astype(np.float32))
"""

# Token ids, and from which position on the next token counts.
Text = tuple[list[int], int]


def run(shape: str, python: str) -> dict[str, Any]:
    """All figures; `python` has packages gguf and llama-cpp-python."""
    with tempfile.TemporaryDirectory() as work:
        real = checkpoint(Path(work), shape, num_hidden_layers=LAYERS)
        tokens = np.random.default_rng(0).integers(0, read_config(real).config.vocab_size, TOKENS).tolist()
        figures = {
            "shipped": compare(locate(None), questions(), python),
            "shape": compare(real, [(tokens, 1)], python),
        }
    return {
        "schema": "npllm.bench.quality/2",
        "layers": f"{shape}, {LAYERS} layers",
        **about(),
        "answers": 2 * QUESTIONS,
        **figures,
    }


def compare(folder: Path, texts: Sequence[Text], python: str) -> dict[str, Any]:
    """Policy -> its figures, for the Qwen3 model in a folder."""
    described = read_config(folder)
    handles = match(described, Checkpoint(folder, described.block))
    reference = list(logits(made(described, handles, Backend()), texts))
    figures: dict[str, Any] = {"canon": measured(reference, reference, texts)}
    for name, (dtype, quantize) in OURS.items():
        llm = made(described, handles, get_backend("numba", dtype=dtype, quantize=quantize))
        figures[name] = measured(logits(llm, texts), reference, texts)
        if name in DECODED:
            figures[f"{name}, decoded"] = measured(decoded(llm, texts), reference, texts)
    for name, ours in THEIRS.items():
        llm = made(described, rounded(described, handles, name, ours, python), Backend())
        figures[name] = measured(logits(llm, texts), reference, texts)
        figures[f"llama.cpp {name}, decoded"] = measured(llama_cpp(folder, name, texts, python), reference, texts)
    for name, ours in THEIRS.items():
        mine, theirs = figures[f"{ours} stored, decoded"], figures[f"llama.cpp {name}, decoded"]
        mine["kl_against"] = {name: against(mine["kl_of_texts"], theirs["kl_of_texts"])}
    for each in figures.values():
        del each["kl_of_texts"]
    return figures


# -- models -----------------------------------------------------------------------------------------------------------


def made(described: Described, handles: dict[str, Handle], be: Backend) -> LLM:
    spec = described.architecture.weight_spec(described.config)
    if be.quantize is not None:
        handles = marked(spec, handles, be.quantize)
    tree = build_tree(spec, handles, be.prepare)
    return LLM(Model(described.architecture, described.config, tree, spec), be)


def rounded(described: Described, handles: dict[str, Handle], theirs: str, ours: str, python: str) -> dict[str, Handle]:
    """The handles with what llama.cpp's format makes of the matrices that `ours` quantises; no mixtures."""
    spec = described.architecture.weight_spec(described.config)
    chosen = {
        name: handle
        for name, handle in marked(spec, handles, ours).items()
        if isinstance(handle, Weight) and handle.quantisable
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, handle in chosen.items():
            np.save(Path(folder) / f"{name}.npy", handle.array("float32"))
        subprocess.run([python, "-c", WORKER, theirs, folder], check=True)
        return handles | {
            name: replace(handle.widened(), data=np.load(Path(folder) / f"{name}.npy"), quantisable=False)
            for name, handle in chosen.items()
        }


# -- texts ------------------------------------------------------------------------------------------------------------


def questions() -> list[Text]:
    """Questions with their answers as the model's chat has them, from where the answer begins."""
    sys.path.insert(0, str(ROOT / "tools" / "shipped"))
    from corpus import build  # type: ignore[import-not-found]

    tokenizer, dice, texts = Tokenizer(locate(None)), random.Random(0), []
    asked = build()
    for held_out in (False, True):
        kind = [question for question in asked if (question.split != "train") == held_out]
        texts += [text_of(tokenizer, question) for question in dice.sample(kind, QUESTIONS)]
    return texts


def text_of(tokenizer: Tokenizer, question: Any) -> Text:
    messages = [{"role": "user", "content": question.text}]
    prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    asked = tokenizer.encode(prompt, add_special_tokens=False)
    answered = tokenizer.encode(question.answer, add_special_tokens=False)
    return asked + answered, len(asked)


# -- figures ----------------------------------------------------------------------------------------------------------


def logits(llm: LLM, texts: Sequence[Text]) -> Iterator[Array]:
    """For each text the logits [T, N] that predict its tokens from the given position on."""
    for tokens, begin in texts:
        yield llm.forward([tokens])[0, begin - 1 : -1]


def decoded(llm: LLM, texts: Sequence[Text]) -> Iterator[Array]:
    """The same logits where the tokens from there on come one by one, as in generation."""
    be, cache = llm.backend, llm.new_cache()
    for tokens, begin in texts:
        slot, found = cache.add(), []
        for piece in [tokens[:begin], *([each] for each in tokens[begin:-1])]:
            rows = cache.plan([slot], [len(piece)], [True])
            found.append(be.to_numpy(llm.model.run(be, be.asarray(np.array(piece)), rows, cache))[0].copy())
        cache.free(slot)
        yield np.array(found)


def llama_cpp(folder: Path, kind: str, texts: Sequence[Text], python: str) -> Iterator[Array]:
    """The same of llama.cpp, on the weights of a Qwen3 folder in a format of its own."""
    with tempfile.TemporaryDirectory() as work:
        file, asked, answer = Path(work) / "model.gguf", Path(work) / "texts.json", Path(work) / "logits.npy"
        command = [python, "-m", "bench.contestants.gguf_file", str(folder), str(file), kind]
        subprocess.run(command, cwd=ROOT, check=True)
        asked.write_text(json.dumps(texts))
        settings = {"file": str(file), "threads": cores(), "context": 1024, "batch": 1024}
        one = Contestant("llama_cpp_model", settings, python, cores(), Path(work) / "log")
        try:
            one.ask("decoded", texts=str(asked), path=str(answer))
        finally:
            one.close()
        lengths = [len(tokens) - begin for tokens, begin in texts]
        yield from np.split(np.load(answer), np.cumsum(lengths)[:-1])


def measured(got: Iterable[Array], reference: Sequence[Array], texts: Sequence[Text]) -> dict[str, Any]:
    """error, kl and perplexity of a policy; and the sum of kl of each text."""
    distance = size = nats = 0.0
    count, divergences = 0, []
    for got_TN, want_TN, (tokens, begin) in zip(got, reference, texts, strict=True):
        divergence = 0.0
        distance += float(np.sum((got_TN - want_TN).astype(np.float64) ** 2))
        size += float(np.sum(want_TN.astype(np.float64) ** 2))
        for got_N, want_N, token in zip(got_TN, want_TN, tokens[begin:], strict=True):
            mine, theirs = log_softmax(got_N[None].astype(np.float64))[0], log_softmax(want_N[None].astype(np.float64))[0]
            divergence += float(np.sum(np.exp(theirs) * (theirs - mine)))
            nats -= float(mine[token])
            count += 1
        divergences.append(divergence)
    return {
        "error": (distance / size) ** 0.5,
        "kl": max(0.0, sum(divergences) / count),
        "perplexity": float(np.exp(nats / count)),
        "kl_of_texts": divergences,
    }


def against(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """The ratio of two sums over the same texts, and between what 95 % of draws of as many texts have it."""
    dice, both = np.random.default_rng(0), np.array([mine, theirs])
    drawn = [both[:, dice.integers(0, len(mine), len(mine))].sum(axis=1) for _ in range(RESAMPLES)]
    ratios = [float(x / y) for x, y in drawn]
    return [float(np.sum(mine) / np.sum(theirs)), *(float(each) for each in np.quantile(ratios, [0.025, 0.975]))]


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| policy | shipped: logit error | KL, nats | perplexity | real shape: logit error | KL, nats |",
        "|---|---|---|---|---|---|",
    ]
    for name, mine in figures["shipped"].items():
        other = figures["shape"][name]
        cells = [f"{mine['error']:.1e}", f"{mine['kl']:.1e}", f"{mine['perplexity']:.4f}"]
        cells += [f"{other['error']:.1e}", f"{other['kl']:.1e}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, mine in figures["shipped"].items():
        for format, (ratio, low, high) in mine.get("kl_against", {}).items():
            lines.append(f"\n{name}: {ratio:.2f} of the KL of llama.cpp's {format}, 95 % between {low:.2f} and {high:.2f}.")
    return "\n".join(lines)
