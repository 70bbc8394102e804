"""`npllm generate`: one prompt, one answer.

The prompt goes through the model's chat template when it has one, as the only message of a user; `--raw` continues the
text itself. The answer streams to stdout. With `--json`, one document comes at the end instead:

    schema           "npllm.generate/1"
    model            str: folder or hub id as given, "npllm-shipped" for the default
    backend          str: its name
    chosen           str: why this backend
    dtype            str: the arithmetic, such as "float32"; "stored" goes by the weights' format (npllm doctor)
    kv_dtype         str: how keys and values were cached
    text             str: the answer, without stop strings and special tokens; reasoning included
    tokens           [int]: its token ids, a final stop id included
    finish_reason    "stop" (a stop id or string) or "length" (--max-tokens, or the context is full)
    stop             int, str or null: the stop id or string that ended it
    usage            {prompt_tokens, completion_tokens, cached_tokens, total_tokens: int}
    timings          {prompt_seconds, generation_seconds, prompt_per_second, generation_per_second: float}; the first token
                     of the answer counts with the prompt, whose last step draws it
    logprobs         null, or with --logprobs K one per token: {token: int, text: str, logprob: float (nats), alternatives:
                     [{token, text, logprob}], the K likeliest}
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from npllm.cli import options, output
from npllm.cli.options import UsageError
from npllm.errors import ArgumentError

if TYPE_CHECKING:
    from npllm.generation import Output
    from npllm.llm import LLM

HELP = "answer one prompt"
OPERANDS = "[PROMPT]"

EXAMPLES = """\
examples:
  npllm generate "How many experts does DeepSeek V3 activate per token?"
  npllm generate -m gpt2 --raw "Once upon a time" --temperature 0.8 --seed 1 -n 64
  cat question.txt | npllm generate -m Qwen/Qwen3-0.6B --template-arg enable_thinking=false --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_text(parser, "PROMPT", "the prompt")
    parser.add_argument("--raw", action="store_true", help="continue the text: no chat template")
    parser.add_argument("--json", action="store_true", help="one JSON document (python -m pydoc npllm.cli.generate)")
    parser.add_argument("--logprobs", type=int, metavar="K", help="with --json: log-probabilities, K alternatives each")
    options.add_template(parser)
    options.add_sampling(parser)
    options.add_model(parser)


def run(args: argparse.Namespace) -> int:
    if args.logprobs is not None and not args.json:
        raise UsageError("--logprobs needs --json")
    if args.raw and (args.system is not None or args.template_arg):
        raise UsageError("--raw leaves out the chat template, which --system and --template-arg are for")
    prompt = options.read_text(args)
    llm = options.load_model(args)
    ids = prompt_tokens(llm, prompt, args)
    if args.json:
        out = llm.generate(ids, logprobs=args.logprobs, **options.sampling(args))
        output.write_json(document(llm, out))
    else:
        stream(llm, ids, args)
    return 0


def prompt_tokens(llm: LLM, prompt: str, args: argparse.Namespace) -> list[int]:
    """The prompt as the model reads it: through its chat template, if it has one and --raw is not given."""
    if args.raw or llm.tokenizer.chat_template is None:
        if args.system is not None or args.template_arg:
            raise ArgumentError(f"{llm.name}: has no chat template, which --system and --template-arg are for")
        return llm.tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    return llm.chat_tokens(messages, template_args=dict(args.template_arg))


def stream(llm: LLM, ids: list[int], args: argparse.Namespace) -> None:
    """Write the answer as it comes, and a line break behind it however it ends."""
    with llm.stream(ids, **options.sampling(args)) as pieces:
        try:
            for piece in pieces:
                output.write(piece.text)
        finally:
            if pieces.usage.completion_tokens:
                output.write("\n")
        output.timings(output.speed(pieces), args.verbose)


def document(llm: LLM, out: Output) -> dict[str, Any]:
    """The JSON document described above."""
    return {
        "schema": "npllm.generate/1",
        **options.about(llm),
        "text": out.text,
        "tokens": out.tokens,
        "finish_reason": out.finish_reason,
        "stop": out.stop,
        "usage": {**asdict(out.usage), "total_tokens": out.usage.total_tokens},
        "timings": asdict(out.timings),
        "logprobs": None if out.logprobs is None else [_logprob(llm, *each) for each in out.logprobs],
    }


def _logprob(llm: LLM, token: int, logprob: float, alternatives: list[Any] | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"token": token, "text": options.token_text(llm, token), "logprob": logprob}
    if alternatives is not None:
        entry["alternatives"] = [_logprob(llm, *each) for each in alternatives]
    return entry
