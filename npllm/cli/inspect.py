"""`npllm inspect`: an architecture with its numbers, from config.json alone; no weights are read.

With `--json`, one document; all sizes are integers, of bytes, parameters or floating-point operations (2 to a multiply-add):

    schema           "npllm.inspect/1"
    name             str: of a published model, or as given
    model_type       str: that of config.json
    hidden_size, vocab_size, max_context, layers    int
    embedding        {rows, width: int, scale: float, positions: int or null (learned ones), parts: [...]}
    head             {norm: norm, tied: bool, softcap: float or null}
    kinds            [{layers: [int] (where it occurs, from 0), attention: {...}, ffn: {...}, pre_attention, post_attention,
                     pre_ffn, post_ffn: norm or null, parts: {name: {axis letter: int}}}]: the distinct layers; fields as in
                     npllm.describing.description
    pattern          [{times: int, kinds: [[index into kinds, how many in a row]]}]: how they follow each other
    parameters       {total, active, active_without_input_embedding, active_without_embedding_and_head,
                     total_without_input_embedding: int, parts: {name: {total, active: int}}, published: str or null}
    weight_bytes     {format: {total, per_token: int}} for f32, bf16, f8_e4m3, q8, q4; per_token: read per decoded token
    stored           str: the format of the published file
    kv_bytes_per_token_bf16    int: of all layers, whatever --kv-dtype is
    kv               {dtype: str, context: int, beyond_max_context: bool, bytes_per_token, bytes_per_token_windows_full,
                     bytes (at the context), bytes_allocated (by npllm), bytes_without_windows, bytes_per_token_as_mha,
                     bytes_per_token_as_gqa8: int}
    work             {context: int, weights: str, decode_flops (of a token at the context), prefill_flops (of a prompt of so
                     many tokens), decode_bytes: int, machine: {bandwidth, flops: float, name: str} or null, limit: {decode,
                     prefill: float (tokens per second), decode_bound, prefill_bound: "memory" or "arithmetic"} or null}

A norm is {kind: "RMSNorm" or "LayerNorm", width: int, gain: "w", "1 + w" or null, eps: float, bias: bool}.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from npllm.cli import output

if TYPE_CHECKING:
    from npllm.describing.description import Description
    from npllm.describing.limits import Machine

HELP = "an architecture with all its numbers, from config.json alone"
OPERANDS = "[MODEL]"

EXAMPLES = """\
examples:
  npllm inspect deepseek-v3
  npllm inspect ./config.json --context 32768 --kv-dtype float32
  npllm inspect llama-3.1-8b --weights q4 --machine 3350GB/s,989TFLOP/s
  npllm inspect Qwen/Qwen3-0.6B --machine here --json
"""

MODEL = "config.json, folder, hub id, or a published model's short name such as deepseek-v3"

# Without --context: a length that most models were made for.
CONTEXT = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL} (default: the shipped model)")
    parser.add_argument("--json", action="store_true", help="one JSON document (python -m pydoc npllm.cli.inspect)")
    add_conditions(parser)


def add_conditions(parser: argparse.ArgumentParser, *, machine: bool = True) -> None:
    """Options for what depends on a context, a storage format or a machine."""
    from npllm.cache import KV_BYTES

    group = parser.add_argument_group("conditions")
    group.add_argument(
        "--context", type=_tokens, metavar="N", help=f"tokens (default: {CONTEXT:,}, or the model's maximum if that is less)"
    )
    group.add_argument("--kv-dtype", default="bfloat16", choices=tuple(KV_BYTES), help="default bfloat16")
    group.add_argument("--weights", choices=FORMATS, help="storage of the weights (default: as published)")
    if machine:
        told = "bandwidth and arithmetic, such as 100GB/s,2TFLOP/s; here measures this machine"
        group.add_argument("--machine", metavar="RATES", help=told)
    group.add_argument("--revision", help="branch, tag or commit on the hub")


# Of npllm.describing.weights, which --help does not wait for.
FORMATS = ("f32", "bf16", "f8_e4m3", "q8", "q4")

# A context beyond this is a slip of the keyboard.
MOST_TOKENS = 10**12


def _tokens(text: str) -> int:
    try:
        value = int(text.replace(",", "").replace("_", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens") from None
    if not 1 <= value <= MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"{text} must lie between 1 and {MOST_TOKENS:,}")
    return value


def run(args: argparse.Namespace) -> int:
    from npllm.describing import describe
    from npllm.describing.document import document
    from npllm.describing.report import report

    described = describe(args.model, args.revision)
    conditions = context_of(args, described), args.kv_dtype, args.weights, machine_of(args)
    if args.json:
        output.write_json({"schema": "npllm.inspect/1"} | document(described, *conditions))
    else:
        output.write(report(described, *conditions))
    return 0


def context_of(args: argparse.Namespace, *described: Description) -> int:
    """The context that was asked for, or one that every model has."""
    return args.context or min(CONTEXT, *(each.context for each in described))


def machine_of(args: argparse.Namespace) -> Machine | None:
    if args.machine is None:
        return None
    from npllm.describing.limits import parse_machine

    return parse_machine(args.machine)
