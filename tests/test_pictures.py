"""Pictures say what the descriptions say, stand on their own, and look right where people see them."""

from __future__ import annotations

import os
import re
import stat
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllm import describe, pictures
from npllm.describing import Description, description_of
from npllm.errors import ArgumentError
from npllm.pictures import curves, metrics, sheets, theme
from npllm.pictures.diagram import arranged, ranges
from npllm.pictures.parts import Sheet
from npllm.pictures.svg import element, group, rect, render, text
from npllm.saving import write_texts
from tests import browser
from tests import strategies as our
from tests.geometry import faults
from tests.pictured import NAMES, inflated, many_kinds, random_descriptions
from tools import gallery

SVG = "{http://www.w3.org/2000/svg}"


@cache
def gallery_files() -> dict[str, str]:
    return gallery.files()


def sheet_of(name: str) -> Sheet:
    return sheets.sheet(describe(name), name)


# -- what is drawn ----------------------------------------------------------------------------------------------------

PRE, POST, BOTH = ("before",), ("after",), ("before", "after")
PER_HEAD, ACROSS, LATENTS = "RMSNorm per head: q, k", "RMSNorm across heads: q, k", "RMSNorm of both latents"
MHA, GQA, MQA = "Multi-head attention", "Grouped-query attention", "Multi-query attention"
MLA = "Multi-head latent attention"
SWIGLU, GEGLU, GELU, MOE = (
    {"Feed-forward, SwiGLU"}, {"Feed-forward, GeGLU"}, {"Feed-forward, GELU"}, {"Mixture of experts, SwiGLU"},
)  # fmt: skip

# From the papers' tables: norms around a branch, norms inside attention, attention, feed-forward parts, kinds of layers.
DRAWN: dict[str, tuple[Any, ...]] = {
    "gpt2": (PRE, None, MHA, GELU, 1),
    "llama-3-8b": (PRE, None, GQA, SWIGLU, 1),
    "llama-3.2-1b": (PRE, None, GQA, SWIGLU, 1),
    "olmo-2-7b": (POST, ACROSS, MHA, SWIGLU, 1),
    "olmo-2-32b": (POST, ACROSS, GQA, SWIGLU, 1),
    "mistral-small-3.1": (PRE, None, GQA, SWIGLU, 1),
    "mixtral-8x7b": (PRE, None, GQA, MOE, 1),
    "qwen2.5-7b": (PRE, None, GQA, SWIGLU, 1),
    "qwen3-0.6b": (PRE, PER_HEAD, GQA, SWIGLU, 1),
    "qwen3-235b-a22b": (PRE, PER_HEAD, GQA, MOE, 1),
    "gemma-2-9b": (BOTH, None, GQA, GEGLU, 2),
    "gemma-3-1b": (BOTH, PER_HEAD, MQA, GEGLU, 2),
    "gemma-3-27b": (BOTH, PER_HEAD, GQA, GEGLU, 2),
    "gemma-3n-e4b": (BOTH, f"{PER_HEAD} + unit RMSNorm per head: v", GQA, GEGLU, 6),
    "llama-4-maverick": (PRE, None, GQA, SWIGLU | MOE, 3),
    "llama-4-scout": (PRE, f"unit {PER_HEAD}", GQA, MOE, 2),
    "deepseek-v2-lite": (PRE, "RMSNorm of the latent", MLA, SWIGLU | MOE, 2),
    "deepseek-v3": (PRE, LATENTS, MLA, SWIGLU | MOE, 2),
    "mistral-large-3": (PRE, LATENTS, MLA, SWIGLU | MOE, 2),
}


@pytest.mark.parametrize("name", DRAWN)
def test_every_part_stands_where_the_papers_put_it(name: str) -> None:
    around, inside, attention, ffns, kinds = DRAWN[name]
    drawn = sheet_of(name)
    assert len(drawn.kinds) == kinds
    branches = [branch for kind in drawn.kinds for branch in kind.branches]
    for branch in branches:
        assert tuple(side for side in ("before", "after") if getattr(branch, side)) == around
    heads, wide = branches[::2], branches[1::2]
    assert {branch.part.title for branch in heads} == {attention}
    assert {branch.part.title for branch in wide} == ffns
    norms = {bar for branch in heads for bar in branch.part.inside if "Norm" in bar}
    assert norms == set(filter(None, (inside or "").split(" + ")))


def test_the_numbers_of_a_model_are_in_its_picture() -> None:
    said = words(pictures.diagram_svg([describe("deepseek-v3"), describe("llama-4-maverick")]))
    for fact in (
        "671.03 B, 37.55 B active per token", "68.6 KiB per token in bf16", "163,840 tokens", "61: 3 dense, then 58 MoE",
        "58 × MoE", "layers 3–60", "128 heads", "keys 128 + 64 RoPE, values 128", "caches latent 512 + RoPE 64",
        "queries through 1,536", "RoPE base 10,000", "YaRN × 40", "8 of 256 experts", "each 2,048 wide",
        "shared expert 2,048 wide", "Router: sigmoid, 4 of 8 groups, bias", "18,432 wide", "129,280 × 7,168",
        "400.71 B, 17.18 B active per token", "192 KiB per token in bf16", "48 KiB where windows are full",
        "chunks of 8,192", "no RoPE (NoPE)", "queries grow with position", "1 of 128 experts", "24 × chunked, dense",
        "every 4th from 3", "12 × global, MoE", "RMSNorm", "202,048 × 5,120", "own matrix",
    ):  # fmt: skip
        assert fact in said


def test_repeat_patterns() -> None:
    gemma = dict(sheet_of("gemma-3-27b").facts)["layers"]
    assert gemma == "62: 10 × (5 sliding window, 1 global), then 2 sliding window"
    assert [ranges(layers) for layers in ((4,), (0, 1, 2), (4, 9), (1, 3, 5, 7), (0, 1, 2, 5))] == [
        "layer 4", "layers 0–2", "layers 4, 9", "every 2nd from 1", "from 0 on",
    ]  # fmt: skip


def words(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


# -- what differs -----------------------------------------------------------------------------------------------------


def marked(svg: str) -> list[tuple[set[str], set[str]]]:
    """Of each column: first words of the boxes with a thick frame, and what is set in bold on a tint."""
    columns = []
    for column in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        if column.get("class") != "column":
            continue
        thick, tinted = set(), set()
        for box in column.iter(f"{SVG}g"):
            nodes = list(box)
            if box.get("class") == "box" and "differs" in (nodes[0].get("class") or ""):
                thick.add(next(node.text or "" for node in nodes if node.tag == f"{SVG}text"))
            for mark, told in pairwise(nodes):
                if "mark" in (mark.get("class") or "").split():
                    assert "bold" in (told.get("class") or "").split()
                    tinted.add(told.text or "")
        columns.append((thick, tinted))
    return columns


def test_differences_and_nothing_else_are_marked() -> None:
    olmo, llama = marked(pictures.diagram_svg([describe("olmo-2-7b"), describe("llama-3-8b")]))
    assert olmo == ({"RMSNorm", "Multi-head attention"}, {ACROSS, "11,008 wide", "100,352 × 4,096"})
    assert llama == ({"RMSNorm", "Grouped-query attention"}, {"8 key/value heads", "14,336 wide", "128,256 × 4,096"})


def test_a_model_beside_itself_is_the_same() -> None:
    assert marked(pictures.diagram_svg([describe("gemma-3-4b")] * 3)) == [(set(), set())] * 3


def test_of_three_models_the_odd_one_out_is_marked() -> None:
    one, two, other = marked(pictures.diagram_svg([describe(n) for n in ("qwen3-8b", "qwen3-8b", "llama-3.1-8b")]))
    assert one == two == (set(), set())
    assert other[0] == {"Grouped-query attention"}
    assert {"RoPE, Llama 3 scaling", "14,336 wide"} <= other[1]


def test_kinds_that_are_most_alike_share_a_row() -> None:
    mistral, gemma = sheet_of("mistral-small-3.1"), sheet_of("gemma-3-27b")
    assert [[kind and kind.name for kind in row] for row in arranged([gemma, mistral])] == [
        ["sliding window", None],
        ["global", "plain"],
    ]


def test_a_part_is_told_whole_once_and_by_the_kind_with_most_layers() -> None:
    dense, sparse = sheet_of("deepseek-v3").kinds
    assert [part.title for part in dense.known] == ["Multi-head latent attention"]
    assert not sparse.known


def test_many_kinds_are_few_frames_that_account_for_every_layer() -> None:
    drawn = sheets.sheet(many_kinds(describe("llama-4-maverick"), 60), "many")
    assert len(drawn.kinds) <= sheets.MOST_FRAMES
    assert sorted(layer for kind in drawn.kinds for layer in kind.layers) == list(range(60))
    facts = [fact for kind in drawn.kinds for _, part in kind.parts() for fact in part.facts]
    assert "17 to 75 wide" in facts


def test_kinds_that_share_a_frame_tell_the_ends_of_their_numbers() -> None:
    same = [("2 of 8 experts", "1,000 wide", "scale 0.5"), ("2 of 16 experts", "90 wide", "full context")]
    assert sheets._ends(same) == ("2 of 8 to 16 experts", "90 to 1,000 wide", "scale 0.5 or full context")


# -- files that stand on their own ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random() -> list[list[Description]]:
    return random_descriptions(2)


def rows_for(models: list[Description]) -> list[pictures.Row]:
    """A table with cells that would do harm if they were not escaped."""
    cells = [f"<b onclick='x()'>{i} & {each.name}" for i, each in enumerate(models)]
    return [pictures.Row("</table><script>", tuple(cells), "a & b"), pictures.Row("same", ("1",) * len(models))]


def test_svg_files_are_well_formed_and_refer_to_nothing_outside(random: list[list[Description]]) -> None:
    for models in random:
        for svg in (pictures.diagram_svg(models), pictures.curves_svg(models)):
            alone(svg)
            root = ElementTree.fromstring(svg.encode("utf-8"))
            assert {node.tag for node in root.iter()} <= {f"{SVG}{name}" for name in ALLOWED}
            assert root[0].tag == f"{SVG}title"
            assert root[1].tag == f"{SVG}desc"
            assert root.get("aria-labelledby") == f"{root[0].get('id')} {root[1].get('id')}"
            assert len(root[0].text or "") > 5 < len(root[1].text or "")


ALLOWED = "svg title desc style defs pattern g rect path circle text".split()


def alone(document: str) -> None:
    """Nothing is fetched, run or opened: the namespace is the only address, ids of the document the only references."""
    text = document.replace('xmlns="http://www.w3.org/2000/svg"', "")
    visible = re.sub(r">[^<]*<", "><", text)
    assert not re.search(
        r"(?i)https?:|//|data:|javascript|@import|\bon\w+=|<script|<foreignObject|<image|<use|href", visible
    )
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in re.findall(r'\bid="([^"]*)"', text)}


class Tags(HTMLParser):
    """Which elements a page has, how many of each are open at its end, and its text."""

    VOID = ("meta", "rect", "path", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.ids, self.open, self.text = set[str](), list[str](), list[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_pages_need_nothing_else_and_say_what_they_were_given(random: list[list[Description]]) -> None:
    for models in random[::4]:
        page = pictures.page_html(models, rows_for(models))
        alone(page)
        tags = Tags()
        tags.feed(page)
        assert not tags.open
        assert not tags.seen & {"script", "link", "img", "iframe", "object", "b"}
        assert len(tags.ids) == len(set(tags.ids))
        assert "</table><script>" in "".join(tags.text)


def test_both_themes_are_in_the_file_and_print_is_light() -> None:
    svg = pictures.diagram_svg([describe("gpt2")])
    assert "@media screen and (prefers-color-scheme: dark)" in svg
    for light, dark in theme.COLOURS.values():
        assert light in svg
        assert dark in svg


def test_the_gallery_is_what_the_code_draws_now() -> None:
    made = gallery_files()
    assert {path.name for path in gallery.FOLDER.iterdir()} == set(made), "run python -m tools.gallery"
    stale = [name for name, text in made.items() if (gallery.FOLDER / name).read_text(encoding="utf-8") != text]
    assert not stale, "run python -m tools.gallery"


def test_the_readme_shows_a_figure_of_the_gallery() -> None:
    readme = (gallery.FOLDER.parent.parent / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]+\]\(docs/gallery/([^)]+)\)", readme)
    assert shown
    assert all((gallery.FOLDER / name).is_file() for name in shown)


# -- curves and widths ------------------------------------------------------------------------------------------------


def test_a_curve_goes_from_1k_to_the_longest_context() -> None:
    d = describe("gemma-3-27b")
    at = curves.contexts(d)
    assert at[0] == 1024
    assert at[-1] == d.context == 131072
    assert curves.contexts(describe("gpt2")) == [1024]


def test_axes_hold_what_they_are_made_for() -> None:
    for least, most in ((1, 1), (3, 5), (1024, 163840), (36864, 5e13), (7e10, 7.1e10)):
        for make in (curves.bytes_axis, curves.counts_axis, curves.tokens_axis):
            axis = make(least, most)
            assert axis.least <= least
            assert axis.most >= most
            assert 2 <= sum(bool(label) for _, label in axis.marks) <= 13
            assert [value for value, _ in axis.marks] == sorted({value for value, _ in axis.marks})


def test_text_is_cut_to_its_room_and_not_before() -> None:
    assert metrics.fitted("narrow", 10, 100) == "narrow"
    for most in (5, 12, 45):
        cut = metrics.fitted("a wide title", 10, most)
        assert cut.endswith("…")
        assert metrics.width(cut, 10) <= max(most, metrics.width("…", 10))
    assert metrics.fitted_name("/folder/of/models/qwen3", 10, 50) == "…s/qwen3"
    assert metrics.fitted_name("a model of long name", 10, 50) == "a model…"
    assert metrics.width("模型", 10) == 20
    assert metrics.width("e\u0301", 10) == metrics.width("e", 10) == metrics.width("é", 10)


def test_content_is_escaped() -> None:
    made = render(group([text(0, 0, "a<b>&\"'\x00\x1f\ud800", 10)], '"><'))
    assert ElementTree.fromstring(made)[0].text == "a<b>&\"'" + "\N{REPLACEMENT CHARACTER}" * 3


# -- where files go ---------------------------------------------------------------------------------------------------


def test_files_are_written_whole_and_replace_what_was_there(tmp_path: Path) -> None:
    first, second = tmp_path / "a.svg", tmp_path / "b.html"
    first.write_text("before")
    write_texts({first: "é", second: "2"})
    assert first.read_bytes() == "é".encode()
    assert second.read_text() == "2"
    assert stat.S_IMODE(second.stat().st_mode) == 0o666 & ~umask()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.html"]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("bad", ["folder", "missing/file.svg", "file/below.svg", "x" * 300, "zero\x00byte", "/dev/full"])
def test_one_that_cannot_be_written_leaves_no_other_behind(tmp_path: Path, bad: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("as it was")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArgumentError) as error:
        write_texts({tmp_path / "good.html": "1", tmp_path / bad: "2"})
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "as it was"


def test_two_files_in_one_place_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(ArgumentError, match="two files"):
        write_texts({tmp_path / "file": "1", tmp_path / "link": "2"})
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_link_is_followed_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("before")
    link.symlink_to(target)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_texts({link: "after", pipe: "through"})
    assert link.is_symlink()
    assert target.read_text() == "after"
    assert os.read(reader, 100) == b"through"
    os.close(reader)


# -- without a browser ------------------------------------------------------------------------------------------------


@given(st.lists(our.tiny_config(), min_size=1, max_size=4), st.booleans())
def test_words_fit_and_nothing_overlaps(described: list[Any], large: bool) -> None:
    models = [description_of(each, name) for each, name in zip(described, NAMES, strict=False)]
    models = [inflated(each) for each in models] if large else models
    assert faults(pictures.diagram_svg(models)) == []
    assert faults(pictures.curves_svg(models)) == []


def test_in_the_gallery_words_fit_and_nothing_overlaps() -> None:
    assert [faults(text) for name, text in gallery_files().items() if name.endswith(".svg")] == [[]] * (
        len(gallery.PAIRS) + 2
    )


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawings(random: list[list[Description]]) -> str:
    """All pictures that a browser looks at, in one page: the gallery, random models, and the worst numbers and names."""
    worst = [[inflated(each) for each in models] for models in random[::5]]
    many = [many_kinds(each, 41) for each in (describe("llama-4-maverick"), describe("gemma-3n-e4b"))]
    made = [pictures.diagram_svg(models) for models in (*random, *worst, many)]
    made += [pictures.curves_svg(models) for models in random[::2]]
    return "".join([*(text for name, text in gallery_files().items() if name.endswith(".svg")), *made])


@browser.needs_browser
@pytest.mark.parametrize("scheme", browser.THEMES)
def test_in_a_browser_words_fit_and_nothing_overlaps(scheme: str, drawings: str, tmp_path: Path) -> None:
    seen = browser.measure(drawings, scheme, tmp_path)
    assert seen["faults"] == []
    assert seen["texts"] > 3000
    assert seen["boxes"] > 800
    assert seen["dark"] == (scheme == "dark")
    assert seen["background"] == browser.colour(theme.COLOURS["paper"][scheme == "dark"])


@browser.needs_browser
def test_in_a_browser_a_page_does_not_scroll_sideways(tmp_path: Path) -> None:
    models = [describe("deepseek-v3"), describe("qwen3-235b-a22b")]
    seen = browser.measure(pictures.page_html(models, rows_for(models)), "light", tmp_path)
    assert seen["faults"] == []
    assert seen["scroll"] <= 0


def faulty(*children: Any, **attributes: str) -> str:
    paper = rect(0, 0, 400, 300, "paper")
    return render(element("svg", element("style", theme.styles()), paper, *children, width=400, height=300, **attributes))


FAULTS = {
    "outside its box": [group([rect(10, 10, 50, 20, "ends edge"), text(15, 24, "much too long for it", 12)], "box")],
    "outside the picture": [text(390, 100, "beyond", 12)],
    "text on text": [text(10, 50, "one", 12), text(15, 54, "another", 12)],
    "box on box": [group([rect(10, 10, 50, 20, "ends edge")], "box"), group([rect(40, 20, 50, 20, "ends edge")], "box")],
    "a box leaves its box": [
        group([rect(10, 10, 50, 20, "ends edge"), group([rect(20, 20, 20, 20, "norm edge")], "box")], "box"),
    ],
    "text on a box": [group([rect(10, 10, 50, 20, "ends edge")], "box"), text(20, 25, "words", 12)],
    "a line through text": [text(10, 50, "words", 12), element("path", d="M0 46 100 46", class_="flow")],
    "a line through a box": [
        group([rect(10, 10, 50, 20, "ends edge")], "box"), element("path", d="M30 0 30 100", class_="flow"),
    ],
    "text on a drawing": [text(10, 50, "words", 12), group([rect(15, 40, 20, 20, "norm edge")], "glyph")],
    "an arrow ends nowhere": [element("path", d="M30 40 26 46 34 46Z", class_="tip")],
    "contrast": [text(10, 50, "pale", 12, "mark")],
}  # fmt: skip


FOUND_IN_THE_FILE = (
    "outside its box", "outside the picture", "text on text", "box on box", "a box leaves its box", "text on a box",
)  # fmt: skip


def test_every_fault_that_a_file_shows_is_found() -> None:
    for kind in FOUND_IN_THE_FILE:
        assert len(faults(faulty(*FAULTS[kind], xmlns="http://www.w3.org/2000/svg"))) == 1, kind
    assert not faults(faulty(text(10, 50, "fine", 12), xmlns="http://www.w3.org/2000/svg"))


@browser.needs_browser
def test_in_a_browser_every_fault_is_found(tmp_path: Path) -> None:
    pages = "".join(faulty(*children) for children in FAULTS.values()) + faulty(text(10, 50, "fine", 12))
    found = [
        (int(fault.split("[")[1].split("]")[0]), fault) for fault in browser.measure(pages, "light", tmp_path)["faults"]
    ]
    for i, kind in enumerate(FAULTS):
        assert any(kind in fault for number, fault in found if number == i), kind
    assert not [fault for number, fault in found if number == len(FAULTS)]
