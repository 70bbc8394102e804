"""Mistral's `tekken.json` as a tokenizer of the `tokenizers` package, built in memory.

The file holds byte strings by rank (base64), the regular expression that cuts text into pieces, and the special tokens,
whose ids come first: id = number of special ids + rank. Ranks that `default_vocab_size` leaves no room for are not used.
A piece that is itself in the vocabulary is one token; else the neighbours whose union has the lowest rank are joined,
again and again. `tokenizers` wants a list of joins: every way to cut a byte string into two of lower standing, in the
order of the ranks of the whole.

Source: mistral-common 1.13 (tokens/tokenizers/tekken.py, instruct.py); the order of joins: tiktoken.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npllm.config import Reader, printable, read_json, shown
from npllm.errors import ConfigError, TokenizerError

# The special tokens of files up to version 7 that do not list them, by id.
UNLISTED = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip

ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

# More special ids or longer tokens, in bytes, are a damaged or hostile file, which would take minutes: the time of a token
# goes with the square of its length.
MOST_SPECIAL = 1 << 14
LONGEST_TOKEN = 1 << 12

# How every tekken.json cuts text, and how some of Mistral's tokenizer.json files do by mistake: Llama 3's expression,
# without the cut before a capital and with digits in threes.
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MISTAKEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Special tokens by whose ids Mistral's vocabularies are told from others that have such names.
MARKS = {"<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4}

# The form of version 7 and later for conversations without tools: nothing stands between the parts, not even a space.
CHAT_TOKENS = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]")
CHAT = """\
{%- macro text(content) -%}
    {%- if content is string -%}{{ content }}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type != "text" -%}{{ raise_exception("only text can be read, not " + part.type) }}{%- endif -%}
            {{ part.text }}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools -%}{{ raise_exception("tools need the template of the model's author") }}{%- endif -%}
{{ bos_token }}
{%- set ns = namespace(next="user") -%}
{%- for message in messages -%}
    {%- if message.role == "system" and loop.first -%}
        {{ "[SYSTEM_PROMPT]" + text(message.content) + "[/SYSTEM_PROMPT]" }}
    {%- elif message.role != ns.next -%}
        {{ raise_exception("after an optional system message, user and assistant must take turns, beginning with user") }}
    {%- elif message.role == "user" -%}
        {{ "[INST]" + text(message.content) + "[/INST]" }}
        {%- set ns.next = "assistant" -%}
    {%- else -%}
        {{ text(message.content) + eos_token }}
        {%- set ns.next = "user" -%}
    {%- endif -%}
{%- endfor -%}"""


@dataclass(frozen=True)
class Tekken:
    """What tekken.json says: `special[id]` are the special tokens, `ranks` the byte strings in the order of their ranks.

    `roles` gives the special tokens that have a role their text, by transformers' names; `chat_template` is the form that
    the file's version was trained with, or None.
    """

    special: list[str]
    ranks: list[bytes]
    pattern: str
    roles: dict[str, str]
    chat_template: str | None


def read(path: Path) -> Tekken:
    """Read and check `tekken.json`; TokenizerError says what does not fit."""
    values = read_json(path, TokenizerError)
    try:
        return _interpret(Reader(values, str(path)))
    except ConfigError as bad:
        raise TokenizerError(str(bad)) from None


def _interpret(reader: Reader) -> Tekken:
    config = reader.section("config")
    if config is None or not isinstance(config.raw("pattern"), str):
        raise TokenizerError(f"{reader.name}: not a tekken.json, its config section has no pattern")
    version = _version(config)
    special = _special(reader, config, version)
    entries = reader.raw("vocab")
    if not isinstance(entries, list):
        raise TokenizerError(f"{reader.name}: vocab must be a list of tokens")
    size = config.integer("default_vocab_size", len(entries) + len(special)) - len(special)
    if not 0 <= size <= len(entries):
        held = f"{len(entries)} tokens and {len(special)} special ids are there"
        raise config.fail("default_vocab_size", f"cannot be: {held}")
    roles = {role: text for role, text in ROLES.items() if text in special}
    talks = version >= 7 and {*CHAT_TOKENS, ROLES["bos_token"], ROLES["eos_token"]} <= set(special)
    ranks = _ranks(entries[:size], reader.name)
    if both := set(special).intersection(_spelled(ranks)):
        raise TokenizerError(f"{reader.name}: {printable(min(both), 80)} is a special token and also one of the vocabulary")
    return Tekken(special, ranks, config.raw("pattern"), roles, CHAT if talks else None)


def _version(config: Reader) -> int:
    """The number in `v7`; later marks (`v7m1`) do not matter here."""
    text = config.raw("version")
    digits = text[1:].partition("m")[0] if isinstance(text, str) and text.startswith("v") else ""
    if not digits.isdecimal() or len(digits) > 4:
        raise config.fail("version", "is not a version such as v7")
    return int(digits)


def _special(reader: Reader, config: Reader, version: int) -> list[str]:
    listed = reader.raw("special_tokens")
    if listed is None and version <= 7:
        listed = [{"rank": rank, "token_str": text} for rank, text in enumerate(UNLISTED)]
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise reader.fail("special_tokens", "must be a list of tokens")
    count = config.integer("default_num_special_tokens", len(listed), least=0, most=MOST_SPECIAL)
    texts = [f"<SPECIAL_{i}>" for i in range(count)]
    taken = set()
    for each in listed:
        rank, text = each.get("rank"), each.get("token_str")
        if type(rank) is not int or not 0 <= rank < count or rank in taken or not isinstance(text, str) or not text:
            what = f"special token {shown(text)} at rank {shown(rank)}"
            raise TokenizerError(f"{reader.name}: {what} does not fit {count} ids")
        taken.add(rank)
        texts[rank] = text
    if len(set(texts)) < count:
        raise TokenizerError(f"{reader.name}: two special tokens have one text")
    return texts


def _ranks(entries: list[Any], name: str) -> list[bytes]:
    ranks = []
    for rank, entry in enumerate(entries):
        try:
            if entry["rank"] != rank:
                raise ValueError(f"rank {shown(entry['rank'])} is out of its order")
            ranks.append(base64.b64decode(entry["token_bytes"], validate=True))
        except (ValueError, TypeError, KeyError, binascii.Error) as bad:
            raise TokenizerError(f"{name}: entry {rank} of vocab is not a token with rank and token_bytes ({bad})") from None
    held = set(ranks)
    if too_long := [rank for rank, token in enumerate(ranks) if len(token) > LONGEST_TOKEN]:
        raise TokenizerError(f"{name}: entry {too_long[0]} of vocab has more than {LONGEST_TOKEN} bytes")
    if len(held) < len(ranks) or b"" in held:
        raise TokenizerError(f"{name}: vocab has an empty token, or one twice")
    if any(bytes([byte]) not in held for byte in range(256)):
        raise TokenizerError(f"{name}: vocab lacks some of the 256 bytes, so not every text could be encoded")
    return ranks


def build(tekken: Tekken) -> Any:
    """A `tokenizers.Tokenizer` that puts BOS before a text, where the file has one.

    Errors of that package come out as they are.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    vocabulary, merges = vocabulary_and_merges(tekken)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = _pre_tokenizer(tekken.pattern)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in tekken.special])
    if (bos := tekken.roles.get("bos_token")) is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tekken.special.index(bos))]
        )
    return backend


def _pre_tokenizer(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def vocabulary_and_merges(tekken: Tekken) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Text -> id, and the joins in their order, with bytes spelled as `tokenizers` spells them."""
    rank_of = {text: rank for rank, text in enumerate(_spelled(tekken.ranks))}
    merges = []
    for text in rank_of:
        halves = ((text[:i], text[i:]) for i in range(1, len(text)))
        pairs = [pair for pair in halves if pair[0] in rank_of and pair[1] in rank_of]
        merges += sorted(pairs, key=lambda pair: (rank_of[pair[0]], rank_of[pair[1]]))
    vocabulary = {text: i for i, text in enumerate([*tekken.special, *rank_of])}
    return vocabulary, merges


def _spelled(ranks: list[bytes]) -> list[str]:
    table = dict(enumerate(_alphabet()))
    return [token.decode("latin-1").translate(table) for token in ranks]


def _alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies since GPT-2: itself, where it is visible."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def correct_split(backend: Any) -> bool:
    """Give a tokenizer.json of Mistral's the expression that its vocabulary was made with; whether there was need to.

    The file is known by what it holds: Mistral's special tokens at their ids, and Llama 3's expression before a byte-level
    step. Of the two, each alone is in order: Llama 3 has the expression, later files of Mistral have the right one.
    (transformers does this under the name `fix_mistral_regex`, and only where it is asked to.)
    """
    if backend.pre_tokenizer is None or any(backend.token_to_id(text) != i for text, i in MARKS.items()):
        return False
    steps = json.loads(backend.pre_tokenizer.__getstate__()).get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"] or steps[0]["pattern"] != {"Regex": MISTAKEN_SPLIT}:
        return False
    backend.pre_tokenizer = _pre_tokenizer(SPLIT)
    return True
