"""`npllm inspect`, `compare` and `explain`: what they print, their documents, and what they refuse."""

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from npllm import describe, published
from npllm.cli import main
from npllm.published import MODELS


class Result(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: str | Path) -> Result:
        capsys.readouterr()
        status = main([str(each) for each in argv])
        return Result(status, *capsys.readouterr())

    return call


def good(result: Result) -> str:
    assert (result.status, result.err) == (0, "")
    return result.out


def table(out: str) -> dict[str, str]:
    """Rows of a report by their labels; text that goes on in the next line is joined."""
    rows: dict[str, str] = {}
    label = ""
    for line in out.splitlines():
        if found := re.match(r"  (\S.*?)  +(\S.*)$", line):
            label, rows[found[1]] = found[1], found[2]
        elif line.startswith(" " * 10):
            rows[label] += " " + line.strip()
        else:
            label = ""
    return rows


# -- inspect ----------------------------------------------------------------------------------------------------------


def test_a_report(run: Run) -> None:
    out = good(run("inspect", "deepseek-v3", "--machine", "3350GB/s,989TFLOP/s"))
    assert out.splitlines()[:2] == [
        "DeepSeek V3 (deepseek_v3)",
        "671.03 B parameters, 37.55 B active per token; 68.6 KiB of keys and values per token in bf16",
    ]
    rows = table(out)
    assert rows["together"].split() == ["671,026,404,352", "37,552,282,624"]
    assert rows["without input embedding"].split()[1] == "36,625,603,584"
    assert rows["published"].startswith("671 B, 37 B active; 36.7 B in README_WEIGHTS")
    assert rows["per token"] == "70,272 B (68.6 KiB)"
    assert rows["heads as MHA, per token"] == "4,997,120 B (4.77 MiB)"
    assert "  experts                         none (3 layers); 8 of 256, shared 2,048 wide (58 layers)" in out.splitlines()
    assert rows["f8_e4m3 (as published)"].split() == ["627", "GiB", "35.1", "GiB"]
    assert rows["decode, tokens/s"].endswith("(memory)")
    assert "without windows" not in rows


@pytest.mark.parametrize(
    "name", ["gemma-3n-e4b", "llama-4-maverick", "gpt2", "gemma-2-2b", "qwen1.5-moe-a2.7b", "mistral-large-3"]
)
def test_reports_fit_100_columns(run: Run, name: str) -> None:
    out = good(run("inspect", name))
    assert max(map(len, out.splitlines())) <= 100
    assert "None" not in out
    assert table(out)["order"]


def test_conditions(run: Run) -> None:
    rows = table(good(run("inspect", "llama-3.1-8b", "--context", "1000", "--kv-dtype", "float32", "--weights", "q4")))
    assert rows["at 1,000"].startswith("262,144,000 B")
    assert rows["as npllm allocates"].startswith("268,435,456 B")
    assert rows["read per decoded token"].endswith("(q4 weights)")
    d = describe("llama-3.1-8b")
    assert rows["FLOPs per decoded token"] == f"{d.decode_flops(1000) / 1e9:.2f} B"


def test_a_context_beyond_the_model_is_computed_and_flagged(run: Run) -> None:
    out = good(run("inspect", "gpt2", "--context", "5000"))
    assert "beyond the model: 5,000 tokens are asked for, it was made for 1,024" in out.splitlines()
    assert table(out)["at 5,000"].startswith(f"{36_864 * 5000:,} B")
    document = json.loads(good(run("inspect", "gpt2", "--context", "5000", "--json")))
    assert document["kv"]["beyond_max_context"] is True
    assert "beyond the model" in good(run("explain", "gpt2", "--context", "5000"))
    result = run("compare", "gpt2", "llama-3.2-1b", "--context", "5000")
    assert (result.status, result.err) == (0, "gpt2 was made for 1,024 tokens, 5,000 are beyond it\n")


def test_a_document(run: Run) -> None:
    document = json.loads(good(run("inspect", "gemma-3-27b", "--json", "--kv-dtype", "float32", "--context", "2048")))
    assert document["schema"] == "npllm.inspect/1"
    assert document["parameters"]["total"] == 27_009_346_304
    assert document["kv_bytes_per_token_bf16"] == 507_904
    assert document["kv"]["bytes_per_token"] == 2 * 507_904
    assert document["kv"]["bytes_per_token_windows_full"] == 2 * 81_920
    assert document["pattern"] == [{"times": 10, "kinds": [[0, 5], [1, 1]]}, {"times": 2, "kinds": [[0, 1]]}]
    assert document["kinds"][0]["attention"]["mask"] == {"window": 1024, "chunk": None}
    assert document["kinds"][0]["post_ffn"] == {
        "kind": "RMSNorm",
        "width": 5376,
        "gain": "1 + w",
        "eps": 1e-6,
        "bias": False,
    }
    assert document["work"]["limit"] is None


def described_keys(module: str) -> set[str]:
    """The keys that the docstring of a verb names at the head of its lines."""
    text = __import__(f"npllm.cli.{module}", fromlist=["x"]).__doc__
    heads = re.findall(r"^    ((?:\w+, )*\w+) {2,}", text, re.MULTILINE)
    return {key for head in heads for key in head.split(", ")}


@pytest.mark.parametrize(
    ("module", "argv"),
    [("inspect", ["gpt2"]), ("explain", ["gpt2"]), ("compare", ["gpt2", "gpt2-xl"])],
)
def test_documents_are_documented(run: Run, module: str, argv: list[str]) -> None:
    document = json.loads(good(run(module, *argv, "--json")))
    assert set(document) == described_keys(module)
    assert document["schema"] == f"npllm.{module}/1"


def test_the_shipped_model_is_the_default(run: Run) -> None:
    assert good(run("inspect")).startswith("npllm-shipped (qwen3)\n1.5 M parameters")
    assert good(run("explain")).startswith("npllm-shipped (qwen3)")


def test_this_machine(run: Run) -> None:
    machine = json.loads(good(run("inspect", "gpt2", "--machine", "here", "--json")))["work"]["machine"]
    assert machine["name"].endswith("measured")
    assert machine["bandwidth"] > 1e8 < machine["flops"]


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["inspect", "deepsek-v3"], 1, r"deepsek-v3: no such file or folder, .* nearest: deepseek-v3, "),
        (["inspect", "./nothing"], 1, r"\./nothing: no such file or folder$"),
        (["inspect", ""], 1, "the model's name is empty"),
        (["inspect", "gpt2", "--context", "0"], 2, "0 must lie between 1 and"),
        (["inspect", "gpt2", "--context", "many"], 2, "'many' is not a number of tokens"),
        (["inspect", "gpt2", "--context", "1" + "0" * 13], 2, "must lie between 1 and"),
        (["inspect", "gpt2", "--kv-dtype", "int3"], 2, "invalid choice"),
        (["inspect", "gpt2", "--machine", "fast"], 1, "give bandwidth and arithmetic, such as"),
        (["compare", "gpt2"], 2, "compare needs at least two models"),
        (["compare"], 2, "compare needs at least two models"),
        (["compare", "gpt2", "nothing-of-the-kind"], 1, "nothing-of-the-kind: no such file or folder"),
        (["compare", "gpt2", "gpt2-xl", "--json", "--markdown"], 2, "not allowed with"),
        (["compare", "gpt2", "gpt2-xl", "--svg", "a", "--html", "a"], 2, "two of --html, --svg and --curves name a"),
        (["explain", "gpt3"], 1, "gpt3: no such file or folder"),
    ],
)
def test_bad_usage(run: Run, argv: list[str], status: int, message: str) -> None:
    result = run(*argv)
    assert (result.status, result.out) == (status, "")
    assert re.search(message, result.err)
    assert result.err.count("\n") == 1
    assert result.err.startswith("npllm: ")


def test_a_config_of_an_unsupported_type(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "mamba"}')
    for verb in ("inspect", "explain"):
        result = run(verb, path)
        assert result.status == 1
        assert "model_type 'mamba' is not supported; supported:" in result.err
    assert "model_type 'mamba' is not supported" in run("compare", "gpt2", path).err


# -- compare ----------------------------------------------------------------------------------------------------------


def test_differences_stand_out(run: Run) -> None:
    lines = good(run("compare", "olmo-2-7b", "llama-3.1-8b")).splitlines()
    assert "* norms                    RMSNorm after attention and FFN     RMSNorm before attention and FFN" in lines
    assert "  hidden size              4,096                               =" in lines
    same = [line for line in lines if line.endswith(" =")]
    assert not [line for line in same if line.startswith("*")]
    assert max(map(len, lines)) <= 100


def test_a_model_against_itself(run: Run) -> None:
    assert "\n* " not in good(run("compare", "gpt2", "gpt2")).rpartition("* differs")[0]
    document = json.loads(good(run("compare", "gpt2", "gpt2", "--json")))
    assert not any(fact["differs"] for fact in document["facts"])


def test_a_comparison_as_a_document(run: Run) -> None:
    document = json.loads(good(run("compare", "deepseek-v3", "qwen3-235b-a22b", "gpt2", "--json", "--context", "4096")))
    assert [model["name"] for model in document["models"]] == ["DeepSeek V3", "Qwen3 235B-A22B", "gpt2"]
    facts = {(fact["section"], fact["name"]): fact for fact in document["facts"]}
    assert facts["parameters", "total"]["values"] == [671_026_404_352, 235_093_634_560, 124_439_808]
    assert facts["layers", "attention"]["cells"] == ["MLA", "GQA", "MHA"]
    assert facts["parameters", "experts"]["cells"][2] == "-"
    assert facts["layers", "attention"]["differs"] is True
    single = json.loads(good(run("inspect", "gpt2", "--json", "--context", "4096")))
    del single["schema"]
    assert document["models"][2] == single


def test_markdown(run: Run, tmp_path: Path) -> None:
    odd = tmp_path / "a|b*.json"
    odd.write_text(json.dumps(MODELS["gpt2"].config))
    lines = good(run("compare", odd, "gpt2-xl", "--markdown")).splitlines()
    assert lines[0].endswith(r"a\|b\*.json | gpt2-xl |")
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}
    assert "| layers | **12** | **48** |" in lines
    assert "| vocabulary | 50,257 | 50,257 |" in lines


def test_pictures_are_written(run: Run, tmp_path: Path) -> None:
    html, svg, curves = (tmp_path / name for name in ("a.html", "a.svg", "c.svg"))
    out = good(run("compare", "gpt2", "qwen3-0.6b", "--html", html, "--svg", svg, "--curves", curves))
    assert out.startswith(" ")
    assert {path.name for path in tmp_path.iterdir()} == {"a.html", "a.svg", "c.svg"}
    assert "<html" in html.read_text(encoding="utf-8")
    assert all(
        path.read_text(encoding="utf-8").startswith("<svg") or "<svg" in path.read_text(encoding="utf-8")
        for path in (svg, curves)
    )
    assert "124,439,808" in html.read_text(encoding="utf-8")


def test_output_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    """A folder, a folder that is not there or closed: one line, nothing on stdout, nothing left, nothing changed."""
    folder, closed, old = tmp_path / "folder", tmp_path / "closed", tmp_path / "old.svg"
    folder.mkdir()
    closed.mkdir()
    old.write_text("old")
    outs = [(folder, "is a folder"), (tmp_path / "none" / "a.html", "cannot be written")]
    if os.geteuid():
        closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
        outs.append((closed / "a.html", "cannot be written"))
    for out, message in outs:
        result = run("compare", "gpt2", "gpt2-xl", "--svg", old, "--html", out)
        assert (result.status, result.out) == (1, "")
        assert message in result.err
        assert result.err.count("\n") == 1
        assert old.read_text() == "old"
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["closed", "folder", "old.svg"]


# -- explain ----------------------------------------------------------------------------------------------------------


def test_an_explanation(run: Run) -> None:
    out = good(run("explain", "deepseek-v3", "--context", "4096"))
    assert out.startswith("DeepSeek V3 (deepseek_v3): one token at a context of 4,096, weights in f8_e4m3")
    d = describe("deepseek-v3")
    for expected in (
        "before the layers", "layers 0–2: dense", "layers 3–60: MoE", "after the layers",
        "route mlp.gate.e_score_correction_bias", "eps = 1e-06", "scale = 0.1352", "npllm/blocks/norms.py",
        "arXiv 1910.07467", "base 10,000, YaRN x 40", f"{d.parameters.total:,} parameters",
    ):  # fmt: skip
        assert expected in out
    ids = [line for line in out.splitlines() if re.match(r" +\d+  \S", line)]
    assert len(ids) > 35


def test_an_explanation_as_a_document(run: Run) -> None:
    document: dict[str, Any] = json.loads(good(run("explain", "gemma-2-2b", "--json", "--context", "100")))
    total = sum(
        max(1, len(section["layers"])) * sum(step["flops"] for step in section["steps"]) for section in document["sections"]
    )
    assert total == document["flops"] == describe("gemma-2-2b").decode_flops(100)
    layers = [i for section in document["sections"] for i in section["layers"]]
    assert sorted(layers) == list(range(26))
    attention = next(
        step for section in document["sections"] for step in section["steps"] if step["operation"] == "attention"
    )
    assert attention["numbers"]["mask"] == {"window": 4096, "chunk": None}
    assert attention["numbers"]["softcap"] == 50
    assert attention["reads"] == [[8, 256], [4, 256], [4, 256]]


@pytest.mark.parametrize("name", ["gemma-3n-e2b", "llama-4-scout", "olmo-2-1b", "qwen1.5-moe-a2.7b", "mixtral-8x7b"])
def test_explanations_of_other_models(run: Run, name: str) -> None:
    out = good(run("explain", name))
    assert max(map(len, out.splitlines())) <= 100
    assert "= None" not in out
    assert published.NAMES[name] in out


def test_help_lists_them(run: Run) -> None:
    assert all(verb in run("--help").out for verb in ("inspect", "compare", "explain"))
    for verb in ("inspect", "compare", "explain"):
        text = run(verb, "--help").out
        assert "short name" in text
        assert "examples:" in text
