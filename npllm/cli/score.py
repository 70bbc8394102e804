"""`npllm score`: how likely a model finds a text, token by token.

The text is read as it is, without a chat template. A table goes to stdout, or with `--json` one document:

    schema           "npllm.score/1"
    model            str: folder or hub id as given, "npllm-shipped" for the default
    backend          str: its name
    chosen           str: why this backend
    dtype            str: the arithmetic, such as "float32"; "stored" goes by the weights' format (npllm doctor)
    kv_dtype         str: how keys and values were cached
    tokens           [{token: int, text: str, logprob: float (nats) or null}]: every token of the text with its
                     log-probability after all before it; the first has none
    total_logprob    float: their sum
    perplexity       float: exp of the mean negative log-probability; null for a single token
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from npllm.cli import options, output

if TYPE_CHECKING:
    from npllm.llm import LLM, Score

HELP = "log-probability of every token of a text, and its perplexity"
OPERANDS = "[TEXT]"

EXAMPLES = """\
examples:
  npllm score -m gpt2 "The quick brown fox jumps over the lazy dog."
  npllm score -m gpt2 --file chapter.txt --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_text(parser, "TEXT", "the text")
    parser.add_argument("--json", action="store_true", help="one JSON document (python -m pydoc npllm.cli.score)")
    options.add_model(parser)


def run(args: argparse.Namespace) -> int:
    text = options.read_text(args)
    llm = options.load_model(args)
    score = llm.score(text)
    if args.json:
        output.write_json(document(llm, score))
    else:
        output.write(table(llm, score))
    return 0


def document(llm: LLM, score: Score) -> dict[str, Any]:
    """The JSON document described above."""
    return {
        "schema": "npllm.score/1",
        **options.about(llm),
        "tokens": [
            {"token": token, "text": options.token_text(llm, token), "logprob": logprob}
            for token, logprob in zip(score.tokens, score.logprobs, strict=True)
        ],
        "total_logprob": score.total,
        "perplexity": score.perplexity,
    }


def table(llm: LLM, score: Score) -> str:
    """One line per token, then the sum and the perplexity."""
    lines = [f"{'logprob':>9}  {'token':>7}  text"]
    for token, logprob in zip(score.tokens, score.logprobs, strict=True):
        value = "" if logprob is None else f"{logprob:.4f}"
        lines.append(f"{value:>9}  {token:>7}  {options.token_text(llm, token)!r}")
    lines.append(f"{score.total:>9.4f}  total of {len(score.tokens)} tokens, perplexity {score.perplexity:.4f}")
    return "\n".join(lines) + "\n"
