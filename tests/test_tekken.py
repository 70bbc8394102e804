"""tekken.json against byte-pair encoding written down plainly, and what Mistral's tokenizer.json gets wrong."""

import base64
import json
import logging
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

import npllm
from npllm import tekken
from npllm.chat_template import render
from npllm.errors import TemplateError, TokenizerError
from npllm.tokenizer import Tokenizer as Ours
from tests.native import make_native
from tests.refusals import refused

SPECIAL = 30
NAMES = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<pad>"]
TEXTS = [
    "Hello, how are you?", "HELLOworld camelCase HTTPServer don't DON'T", "1234567 12 3,141", "naïve Straße ÉCOLE Ǆ",
    "日本語のテキスト 中文", "🙂👩‍👩‍👧 zero​width", "a\n\n\r\n  b\t \n", "    def f(x):\n        return x/y//z",
    "aaaaaaaaaaaaaaaa ababababab", "", " ", "  two  spaces  ", "/path/to//file\n", "x==y!=z...",
]  # fmt: skip


@cache
def ranks() -> tuple[bytes, ...]:
    """Byte strings of a byte-level BPE trained on this repository: bytes, two that SPLIT always cuts, then the learned."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tekken.SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    root = Path(npllm.__file__).parents[1]
    files = [*sorted((root / "npllm").glob("*.py")), root / "README.md", root / "CONTRIBUTING.md"]
    built.train_from_iterator([path.read_text(encoding="utf-8") for path in files] + TEXTS, trainer)
    bytes_of = {letters: byte for byte, letters in byte_letters().items()}
    by_id = sorted(built.get_vocab().items(), key=lambda item: item[1])
    learned = [bytes(bytes_of[letter] for letter in text) for text, _ in by_id]
    return (*(bytes([byte]) for byte in range(256)), b"12", b"lC", *(token for token in learned if len(token) > 1))


def byte_letters() -> dict[int, str]:
    """Byte -> its letter, learned from `tokenizers` itself: each byte in UTF-8 where it can stand, the rest in order."""
    step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters: dict[int, str] = {}
    for point in [*range(0x80), 0xFF, *range(0x80, 0x800, 7), *range(0x800, 0xD800, 64), *range(0x10000, 0x110000, 4096)]:
        text = chr(point)
        letters |= dict(zip(text.encode(), step.pre_tokenize_str(text)[0][0], strict=True))
    unseen = sorted(set(range(256)) - set(letters))  # bytes that UTF-8 never has
    left = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(letters.values()))
    visible = {letter for letter in left if ord(letter) < 256}
    letters |= {byte: chr(byte) for byte in unseen if chr(byte) in visible}
    rest = [byte for byte in unseen if byte not in letters]
    return letters | dict(zip(rest, sorted(set(left) - visible), strict=True))


def file_content(**changes: Any) -> dict[str, Any]:
    """tekken.json as an object; `changes` are of its config section, or of the whole where they name one of its keys."""
    special = [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(NAMES)]
    vocab: list[dict[str, Any]] = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None} for i, token in enumerate(ranks())
    ]
    config = {"pattern": tekken.SPLIT, "num_vocab_tokens": len(vocab), "default_vocab_size": SPECIAL + 1200}
    config |= {"default_num_special_tokens": SPECIAL, "version": "v7"}
    values = {"config": config, "vocab": vocab, "special_tokens": special}
    for key, value in changes.items():
        (values if key in values else config)[key] = value
    return values


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(file_content(**changes)))
    return folder


@cache
def made() -> Any:
    """The backend for the file as it is."""
    values = list(ranks()[:1200])
    special = NAMES + [f"<SPECIAL_{i}>" for i in range(len(NAMES), SPECIAL)]
    return tekken.build(tekken.Tekken(special, values, tekken.SPLIT, {"bos_token": "<s>"}, None))


def plain_encoding(text: str) -> list[int]:
    """Rank-based byte-pair encoding: of all neighbours, those whose union has the lowest rank, the leftmost first."""
    rank_of = {token: rank for rank, token in enumerate(ranks()[:1200])}
    split = pre_tokenizers.Split(Regex(tekken.SPLIT), behavior="isolated")
    ids = [1]
    for piece, _ in split.pre_tokenize_str(text) if text else []:
        whole = piece.encode()
        parts = [whole] if whole in rank_of else [bytes([byte]) for byte in whole]
        while True:
            unions = [(rank_of[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in rank_of]
            if not unions:
                break
            _, i = min(unions)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [SPECIAL + rank_of[part] for part in parts]
    return ids


# -- encoding --


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_is_rank_based_byte_pair_encoding(text: str) -> None:
    ids = made().encode(text).ids
    assert ids == plain_encoding(text)
    assert made().decode(ids) == text


@given(st.text(max_size=60) | st.text("ab =\n'1Aé", max_size=80))
def test_any_text_is_encoded_so(text: str) -> None:
    ids = made().encode(text).ids
    assert ids == plain_encoding(text)
    assert made().decode(ids) == text


def test_longer_pieces_than_single_bytes_are_used() -> None:
    text = "the tokenizer of a model folder"
    assert len(made().encode(text).ids) < len(text) // 2


def test_special_ids_come_first_and_fillers_fill_up(tmp_path: Path) -> None:
    ours = Ours(write(tmp_path))
    assert ours.size == SPECIAL + 1200
    assert [ours.token_id(text) for text in NAMES] == list(range(len(NAMES)))
    assert ours.token_id("<SPECIAL_29>") == 29
    assert ours.backend.id_to_token(SPECIAL + 65) == "A"
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    assert ours.encode("[INST]A[/INST]</s>") == [1, 3, SPECIAL + 65, 4, 2]
    assert ours.encode("<s>A") == [1, SPECIAL + 65]
    assert ours.encode("A", add_special_tokens=False) == [SPECIAL + 65]
    assert ours.decode([1, 3, SPECIAL + 65, 4, 29, 2]) == "A"


def test_without_a_size_all_ranks_are_used(tmp_path: Path) -> None:
    assert Ours(write(tmp_path, default_vocab_size=None)).size == SPECIAL + len(ranks())


def test_the_files_own_pattern_cuts(tmp_path: Path) -> None:
    bytewise = Ours(write(tmp_path, pattern="."))
    assert bytewise.encode("Hello", add_special_tokens=False) == [SPECIAL + byte for byte in b"Hello"]


def test_unlisted_special_tokens_have_their_places(tmp_path: Path) -> None:
    ours = Ours(write(tmp_path, special_tokens=None, version="v3"))
    assert [ours.token_id(text) for text in ("<unk>", "</s>", "[TOOL_CALLS]", "<pad>", "[TOOL_CONTENT]")] == [
        0,
        2,
        9,
        11,
        19,
    ]
    assert ours.chat_template is None
    assert Ours(write(tmp_path, special_tokens=None, version="v7m1")).chat_template is not None


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    made().save(str(write(tmp_path) / "tokenizer.json"))
    (tmp_path / "tekken.json").write_text("broken")
    ours = Ours(tmp_path)
    assert ours.path.name == "tokenizer.json"
    assert ours.chat_template is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": {}}, ["pattern"]),
        ({"config": None}, ["pattern"]),
        ({"pattern": 3}, ["pattern"]),
        ({"pattern": "("}, ["not a tokenizer"]),
        ({"version": "seven"}, ["version"]),
        ({"version": None}, ["version"]),
        ({"special_tokens": None, "version": "v11"}, ["special_tokens"]),
        ({"special_tokens": [3]}, ["special_tokens"]),
        ({"special_tokens": [{"rank": 0, "token_str": "a"}, {"rank": 0, "token_str": "b"}]}, ["'b'", "rank 0"]),
        ({"special_tokens": [{"rank": 30, "token_str": "a"}]}, ["rank 30", "30 ids"]),
        ({"special_tokens": [{"rank": 0, "token_str": "<SPECIAL_5>"}]}, ["two special tokens"]),
        ({"special_tokens": [{"rank": 0, "token_str": "A"}]}, ["A is a special token and also"]),
        ({"default_num_special_tokens": 5}, ["rank 5"]),
        ({"default_num_special_tokens": 1 << 40}, ["default_num_special_tokens"]),
        ({"default_num_special_tokens": 1 << 15}, ["default_num_special_tokens"]),
        ({"default_vocab_size": 1 << 20}, ["default_vocab_size"]),
        ({"default_vocab_size": 7}, ["default_vocab_size"]),
        ({"default_vocab_size": SPECIAL + 100}, ["256 bytes"]),
        ({"vocab": {}}, ["vocab"]),
        ({"vocab": [3] * 1200}, ["entry 0"]),
        ({"vocab": [{"rank": 0}] * 1200}, ["entry 0"]),
        ({"vocab": [{"rank": 1, "token_bytes": "AA=="}] * 1200}, ["entry 0", "order"]),
        ({"vocab": [{"rank": 0, "token_bytes": "!"}] * 1200}, ["entry 0"]),
        ({"vocab": [{"rank": i, "token_bytes": "AA=="} for i in range(1200)]}, ["twice"]),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    write(tmp_path, **change)
    refused(TokenizerError, lambda: Ours(tmp_path), str(tmp_path / "tekken.json"), *words)


def test_a_token_of_many_bytes_is_refused(tmp_path: Path) -> None:
    """The joins of a long token take time with the square of its length."""
    vocab = file_content()["vocab"]
    for size, place in ((4097, 0), (1 << 22, 700)):
        damaged = vocab.copy()
        damaged[place] = {"rank": place, "token_bytes": base64.b64encode(b"a" * size).decode()}
        write(tmp_path, vocab=damaged)
        refused(TokenizerError, lambda: Ours(tmp_path), str(tmp_path / "tekken.json"), f"entry {place} ", "4096 bytes")


def test_a_long_text_is_cut_in_errors(tmp_path: Path) -> None:
    vocab, text = file_content()["vocab"], "z" * 3000
    vocab[700]["token_bytes"] = base64.b64encode(text.encode()).decode()
    write(tmp_path, vocab=vocab, special_tokens=[{"rank": 1, "token_str": text}])
    refused(TokenizerError, lambda: Ours(tmp_path), "zzz... is a special token and also")


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_what_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tekken.json").write_text(text)
    refused(TokenizerError, lambda: Ours(tmp_path), str(tmp_path / "tekken.json"))


# -- chat --


def chat(ours: Ours, *messages: tuple[str, Any], **options: Any) -> list[int] | str:
    return ours.apply_chat_template([{"role": role, "content": content} for role, content in messages], **options)


def test_the_chat_form_has_no_spaces(tmp_path: Path) -> None:
    ours = Ours(write(tmp_path))
    conversation = [("system", " Be kind."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye")]
    text = chat(ours, *conversation, tokenize=False, add_generation_prompt=True)
    assert text == "<s>[SYSTEM_PROMPT] Be kind.[/SYSTEM_PROMPT][INST]Hi[/INST]Hello!</s>[INST]Bye[/INST]"
    parts = [" Be kind.", "Hi", "Hello!", "Bye"]
    sys, one, two, three = (ours.encode(part, add_special_tokens=False) for part in parts)
    assert chat(ours, *conversation) == [1, 5, *sys, 6, 3, *one, 4, *two, 2, 3, *three, 4]
    assert chat(ours, ("user", "Hi")) == [1, 3, *one, 4]


def test_parts_of_a_message_and_its_continuation(tmp_path: Path) -> None:
    ours = Ours(write(tmp_path))
    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]
    assert chat(ours, ("user", parts), tokenize=False) == "<s>[INST]AB[/INST]"
    begun = chat(ours, ("user", "A"), ("assistant", "The "), tokenize=False, continue_final_message=True)
    assert begun == "<s>[INST]A[/INST]The "


@pytest.mark.parametrize(
    ("messages", "options", "words"),
    [
        ([("assistant", "a")], {}, ["take turns"]),
        ([("user", "a"), ("user", "b")], {}, ["take turns"]),
        ([("user", "a"), ("system", "b")], {}, ["take turns"]),
        ([("tool", "a")], {}, ["take turns"]),
        ([("user", [{"type": "image"}])], {}, ["only text"]),
        ([("user", "a")], {"tools": [{"type": "function"}]}, ["tools"]),
    ],
)
def test_conversations_that_the_form_has_no_place_for(messages: Any, options: dict[str, Any], words: list[str]) -> None:
    conversation = [{"role": role, "content": content} for role, content in messages]
    refused(TemplateError, lambda: render(tekken.CHAT, conversation, **options), *words)


def test_the_folders_own_template_replaces_it(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}mine")
    assert chat(Ours(tmp_path), ("user", "a"), tokenize=False) == "<s>mine"


def test_a_native_folder_generates_and_chats(tmp_path: Path) -> None:
    make_native(write(tmp_path), "mistral")
    refused(TokenizerError, lambda: npllm.load(tmp_path), str(tmp_path / "tekken.json"), "97 rows")
    rows = np.random.default_rng(0).standard_normal((SPECIAL + 1200, 36), np.float32)
    weights = load_file(tmp_path / "consolidated.safetensors") | {"tok_embeddings.weight": rows, "output.weight": rows}
    save_file(weights, tmp_path / "consolidated.safetensors")
    params = json.loads((tmp_path / "params.json").read_text()) | {"vocab_size": len(rows)}
    (tmp_path / "params.json").write_text(json.dumps(params))
    llm = npllm.load(tmp_path)
    assert llm.defaults.stop_ids == (2,)
    prompt = chat(llm.tokenizer, ("user", "Hi"))
    assert isinstance(prompt, list)
    wanted = llm.generate(prompt, max_tokens=5, ignore_eos=True)
    assert llm.chat([{"role": "user", "content": "Hi"}], max_tokens=5, ignore_eos=True).tokens == wanted.tokens


# -- the mistaken split of some tokenizer.json --


def split_as(pattern: str, names: dict[str, int] | None = None) -> Tokenizer:
    """A tokenizer.json with this split; `names` are the ids of special tokens, Mistral's unless given."""
    backend = Tokenizer.from_str(made().to_str())
    if names is not None:
        backend = Tokenizer(models.BPE(vocab=names, merges=[]))
        backend.add_special_tokens([AddedToken(text, special=True) for text in names])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend


def test_a_mistaken_split_is_corrected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong = split_as(tekken.MISTAKEN_SPLIT)
    wrong.save(str(tmp_path / "tokenizer.json"))
    with caplog.at_level(logging.INFO, "npllm"):
        ours = Ours(tmp_path)
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(tmp_path / "tokenizer.json") in line
    assert "split" in line
    pieces = [text for text, _ in wrong.pre_tokenizer.pre_tokenize_str("HTTPServer 123")]
    assert pieces == ["HTTPServer", "Ġ", "123"]
    pieces = [text for text, _ in ours.backend.pre_tokenizer.pre_tokenize_str("HTTPServer 123")]
    assert pieces == ["HTTPServer", "Ġ", "1", "2", "3"]
    pieces = [text for text, _ in ours.backend.pre_tokenizer.pre_tokenize_str("camelCase don't")]
    assert pieces == ["camel", "Case", "Ġdon", "'t"]
    for text in TEXTS:
        assert ours.encode(text) == plain_encoding(text)
    assert any(wrong.encode(text).ids != plain_encoding(text) for text in TEXTS)


@pytest.mark.parametrize(
    "build",
    [
        lambda: split_as(tekken.SPLIT),
        lambda: split_as(tekken.MISTAKEN_SPLIT + "|x"),
        lambda: split_as(tekken.MISTAKEN_SPLIT, {"<|begin_of_text|>": 0, "[INST]": 1, "[/INST]": 2}),
        lambda: split_as(tekken.MISTAKEN_SPLIT, {"a": 0, "<s>": 5, "</s>": 2, "[INST]": 3, "[/INST]": 4}),
    ],
    ids=["right already", "another", "Llama 3", "other ids"],
)
def test_other_splits_are_left_as_they_are(tmp_path: Path, build: Callable[[], Tokenizer]) -> None:
    backend = build()
    before = backend.pre_tokenizer.__getstate__()
    assert not tekken.correct_split(backend)
    assert backend.pre_tokenizer.__getstate__() == before
    backend.pre_tokenizer = None
    assert not tekken.correct_split(backend)
