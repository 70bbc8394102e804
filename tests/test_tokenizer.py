"""The tokenizer of a folder, its special tokens and templates, and the text of tokens that come one by one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from npllm.errors import TemplateError, TokenizerError
from npllm.tokenizer import StopStrings, TextStream, Tokenizer
from tests.models import CHATML, END, IM_END, IM_START, make_tokenizer, tokenizer
from tests.refusals import refused

BOS = 0


def made(folder: Path, adds_bos: bool = False, **settings: Any) -> Tokenizer:
    """The tokenizer with settings of tokenizer_config.json; `adds_bos`: tokenizer.json itself puts END before a text."""
    make_tokenizer(folder, **{"chat_template": False} | settings)
    if adds_bos:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        template = processors.TemplateProcessing(single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, BOS)])
        backend.post_processor = template
        backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return made(tmp_path_factory.mktemp("plain"))


# -- BOS and EOS --

HELLO = tokenizer().encode("Hello").ids


@pytest.mark.parametrize(
    ("adds_bos", "settings", "wanted"),
    [
        (False, {}, HELLO),
        (False, {"bos_token": END}, HELLO),
        (False, {"bos_token": "nowhere"}, HELLO),
        (False, {"bos_token": END, "eos_token": IM_END, "add_bos_token": True, "add_eos_token": True}, HELLO),
        (True, {}, [BOS, *HELLO]),
        (True, {"bos_token": END}, [BOS, *HELLO]),
        (True, {"bos_token": END, "add_bos_token": True}, [BOS, *HELLO]),
        (True, {"bos_token": END, "add_bos_token": False}, [BOS, *HELLO]),
        (True, {"bos_token": END, "eos_token": IM_END, "add_eos_token": True}, [BOS, *HELLO]),
    ],
)
def test_what_is_put_around_a_text(tmp_path: Path, adds_bos: bool, settings: dict[str, Any], wanted: list[int]) -> None:
    """tokenizer.json says it; transformers 5.23 drops add_bos_token and add_eos_token where that file is there."""
    found = made(tmp_path, adds_bos, **settings)
    assert found.encode("Hello") == wanted
    assert found.encode("Hello", add_special_tokens=False) == HELLO


def test_no_text_gets_two_bos(tmp_path: Path) -> None:
    found = made(tmp_path, adds_bos=True, bos_token=END)
    assert found.encode(END + "Hello") == [BOS, *HELLO]
    assert found.encode("") == [BOS]
    assert found.encode(END) == [BOS]


def test_a_rendered_conversation_gets_no_bos_but_its_own(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    found = made(tmp_path, adds_bos=True, bos_token=END, chat_template=template)
    messages = [{"role": "user", "content": "Hello"}]
    assert found.apply_chat_template(messages) == [BOS, *HELLO]
    assert found.apply_chat_template(messages, tokenize=False) == END + "Hello"


# -- special tokens --


def test_special_tokens_are_strings_or_objects(tmp_path: Path) -> None:
    found = made(tmp_path, bos_token={"content": END, "lstrip": False}, eos_token=IM_END, pad_token=None, unk_token=5)
    assert found.special_tokens == {"bos_token": END, "eos_token": IM_END}


def test_tokenizer_config_outranks_the_special_tokens_map(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, eos_token=IM_END)
    special = {"eos_token": END, "bos_token": {"content": IM_START}, "additional_special_tokens": ["x"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    assert Tokenizer(tmp_path).special_tokens == {"eos_token": IM_END, "bos_token": IM_START, "pad_token": END}
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer(tmp_path).special_tokens == {"eos_token": END, "bos_token": IM_START}


def test_a_malformed_map_of_special_tokens_is_refused(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text("[")
    refused(TokenizerError, lambda: Tokenizer(tmp_path), "special_tokens_map.json", "JSON")


def test_a_special_token_that_is_no_unicode_is_refused_when_needed(tmp_path: Path) -> None:
    found = made(tmp_path, bos_token="\ud800")
    refused(TokenizerError, lambda: found.encode("Hello"), "cannot be encoded")


# -- chat templates --

MESSAGES = [{"role": "user", "content": "Hello"}]
RENDERED = f"{IM_START}user\nHello{IM_END}\n"


def test_a_template_from_each_place(tmp_path: Path) -> None:
    assert made(tmp_path / "string", chat_template=CHATML).apply_chat_template(MESSAGES, tokenize=False) == RENDERED
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "tools!"}]
    found = made(tmp_path / "list", chat_template=named)
    assert found.apply_chat_template(MESSAGES, tokenize=False) == RENDERED
    assert found.apply_chat_template(MESSAGES, tools=[{"name": "f"}], tokenize=False) == "tools!"
    assert found.apply_chat_template(MESSAGES, chat_template="tool_use", tokenize=False) == "tools!"
    assert found.apply_chat_template(MESSAGES, chat_template="{{ messages[0].role }}", tokenize=False) == "user"


def test_template_files_and_their_rank(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, chat_template=False)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert Tokenizer(tmp_path).chat_template == "json"
    make_tokenizer(tmp_path, chat_template=True)
    assert Tokenizer(tmp_path).chat_template == CHATML
    (tmp_path / "chat_template.jinja").write_text("jinja ä", encoding="utf-8")
    assert Tokenizer(tmp_path).chat_template == "jinja ä"


def test_ids_of_a_conversation_are_those_of_its_text(tmp_path: Path) -> None:
    found = made(tmp_path, chat_template=CHATML)
    ids = found.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert ids == found.encode(RENDERED + f"{IM_START}assistant\n", add_special_tokens=False)
    assert ids[0] == 1


def test_without_a_template_a_conversation_is_refused(plain: Tokenizer) -> None:
    refused(TokenizerError, lambda: plain.apply_chat_template(MESSAGES), str(plain.folder), "no chat template")


@pytest.mark.parametrize(
    "value", [5, [], [1], ["name", "template"], [{"name": "default"}], {"default": CHATML}, [[["x"] * 500]], True]
)
def test_a_template_of_another_form_is_refused(tmp_path: Path, value: Any) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    refused(TokenizerError, lambda: Tokenizer(tmp_path), str(tmp_path), "chat_template")


def test_a_template_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    refused(TokenizerError, lambda: Tokenizer(tmp_path), "chat_template.jinja")


@pytest.mark.parametrize("messages", [[], "Hello", [5], [{"role": "user"}, 5], None])
def test_what_is_no_conversation_is_refused(tmp_path: Path, messages: Any) -> None:
    found = made(tmp_path, chat_template=CHATML)
    with pytest.raises(TemplateError):
        found.apply_chat_template(messages)


# -- text --


def test_text_that_cannot_be_encoded_is_refused(plain: Tokenizer, tmp_path: Path) -> None:
    for text in ("\ud800", "a\udfff", 5, None, b"x", ["Hello"]):
        refused(TokenizerError, lambda text=text: plain.encode(text), "cannot be encoded")
    refused(TokenizerError, lambda: plain.encode("a\udcff"), "character 1 is half of a surrogate pair")
    found = made(tmp_path, chat_template=CHATML)
    refused(TokenizerError, lambda: found.apply_chat_template([{"role": "user", "content": "\ud800"}]), "cannot be encoded")


def test_ids_that_stand_for_nothing_have_no_text(plain: Tokenizer) -> None:
    assert plain.decode([*HELLO, 300, 10_000, 2**32 - 1]) == "Hello"
    assert plain.decode(np.array(HELLO)) == "Hello"
    assert plain.decode([]) == ""
    for ids in ([-1], [2**32], [10**5000], ["x"], [None], 5, [[1]], [float("nan")]):
        refused(TokenizerError, lambda ids=ids: plain.decode(ids), "cannot be decoded")


def test_special_tokens_are_no_text_unless_asked_for(plain: Tokenizer) -> None:
    assert plain.decode([1, *HELLO, 2]) == "Hello"
    assert plain.decode([1, *HELLO, 2], skip_special_tokens=False) == f"{IM_START}Hello{IM_END}"


@given(st.text(max_size=30))
def test_any_text_survives_there_and_back(plain: Tokenizer, text: str) -> None:
    ids = plain.encode(text)
    assert plain.decode(ids) == text
    assert max(ids, default=0) < plain.size == 300


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    refused(TokenizerError, lambda: Tokenizer(tmp_path), str(tmp_path / "tokenizer.json"), "no such file")


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}},
    ],
)
def test_a_tokenizer_that_fails_inside_the_package_is_reported(
    tmp_path: Path, change: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    found = Tokenizer(tmp_path)
    refused(TokenizerError, lambda: found.encode("Hello"), "cannot be encoded")
    capfd.readouterr()  # the package prints its own account


# -- streams of tokens --


def streamed(found: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    stream = TextStream(found, skip_special_tokens)
    return [*(stream.push(token) for token in ids), stream.finish()]


@given(st.lists(st.integers(0, 299), max_size=40), st.booleans())
def test_pieces_of_any_tokens_joined_are_their_text(plain: Tokenizer, ids: list[int], skip: bool) -> None:
    pieces = streamed(plain, ids, skip)
    text = plain.decode(ids, skip)
    assert "".join(pieces) == text
    for size in range(len(pieces)):
        assert text.startswith("".join(pieces[:size]))


BYTES = [tokenizer().token_to_id(each) for each in sorted(pre_tokenizers.ByteLevel.alphabet())]
GARBAGE = [token for token in BYTES if "\ufffd" in tokenizer().decode([token])]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=12), st.integers(0, 2))
def test_pieces_are_whole_characters_though_tokens_are_bytes(plain: Tokenizer, text: str, cut: int) -> None:
    ids = single_bytes(plain, text)
    pieces = streamed(plain, ids[: len(ids) - cut] if cut else ids)
    assert "\ufffd" not in "".join(pieces[:-1])
    assert text.startswith("".join(pieces[:-1]))
    if not cut:
        assert "".join(pieces) == text


def single_bytes(found: Tokenizer, text: str) -> list[int]:
    """One token per byte, whatever merges would make of them."""
    unmerged = json.loads(found.backend.to_str())
    unmerged["model"]["merges"] = []
    return Backend.from_str(json.dumps(unmerged)).encode(text).ids


ANY_BYTES = st.lists(st.sampled_from(BYTES), max_size=30)
LONG_GARBAGE = st.lists(st.sampled_from(GARBAGE), min_size=100, max_size=300)


@given(st.one_of(ANY_BYTES, LONG_GARBAGE))
def test_bytes_that_are_no_text_come_out_as_they_are_decoded(plain: Tokenizer, ids: list[int]) -> None:
    assert "".join(streamed(plain, ids)) == plain.decode(ids)


@pytest.mark.parametrize("text", ["Hello you " * 50, "\ufffd" * 200, "\x80"])
def test_the_work_per_token_does_not_grow(plain: Tokenizer, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    decoded: list[int] = []
    decode = plain.decode

    def counting(ids: list[int], skip_special_tokens: bool = True) -> str:
        decoded.append(len(ids))
        return decode(ids, skip_special_tokens)

    ids = GARBAGE * 4 if text == "\x80" else plain.encode(text)
    monkeypatch.setattr(plain, "decode", counting)
    streamed(plain, ids)
    assert max(decoded) < 100


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer like Llama 2's: a blank becomes U+2581, unknown characters become byte tokens, the first blank is cut."""
    letters = ["\u2581", *"abcdehlo", "\u2581he", "llo"]
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocab |= {letter: 257 + i for i, letter in enumerate(letters)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder = tmp_path_factory.mktemp("sentencepiece")
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@given(st.text("abc helo\u00e9\u4e2d\U0001f600", max_size=15))
def test_the_first_blank_is_cut_once_and_others_stay(sentencepiece: Tokenizer, text: str) -> None:
    ids = sentencepiece.encode(text)
    pieces = streamed(sentencepiece, ids)
    assert "".join(pieces) == sentencepiece.decode(ids)
    assert "\ufffd" not in "".join(pieces)


@given(st.lists(st.integers(0, 267), max_size=25))
def test_any_byte_tokens_can_be_streamed(sentencepiece: Tokenizer, ids: list[int]) -> None:
    assert len("".join(streamed(sentencepiece, ids))) <= 4 * len(ids) + 10


# -- stop strings --


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What comes before the stop string that is complete first (of two, the longer), by trying every end."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(
    st.lists(st.text("ab<", max_size=4), max_size=12),
    st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_the_same_however_the_text_comes(pieces: list[str], stops: list[str]) -> None:
    wanted, stop = first_stop("".join(pieces), stops)
    cutter, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += cutter.push(piece)
        assert wanted.startswith(shown)
    shown += cutter.push("", final=True)
    assert (shown, cutter.found) == (wanted, stop)
    assert stop is None or cutter.push("more") == ""


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    cutter = StopStrings(["<end>", "</s>"])
    pieces = ["a<", "b<e", "nd", "!", "<", "/s", ">x"]
    assert [cutter.push(piece) for piece in pieces] == ["a", "<b", "", "<end!", "", "", ""]
    assert cutter.found == "</s>"
