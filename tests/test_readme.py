"""The documents say what the code does: figures, paths, commands, names."""

import ast
import inspect
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import npllm
from npllm.backend import Backend
from npllm.cli import build_parser
from npllm.models import REGISTRY
from npllm.published import MODELS
from tests import readme

ROOT = readme.README.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
KIT = ROOT / "npllm" / "testing" / "README.md"
every_text = pytest.mark.parametrize("document", [*DOCUMENTS, KIT], ids=["README", "CONTRIBUTING", "testing"])

# A path of the repository that is named in backticks, or the target of a link.
FOLDERS = "npllm|tests|bench|tools|backends"
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`|\]\(((?!http)[^)#]+)\)")


# In a fenced block after the start of the line or `&&`, or in backticks.
COMMAND = re.compile(r"(?:^|&& |`)npllm ((?:\w+)(?: [^`\n]*)?)(?=`|\n)", re.MULTILINE)

# What `python -m bench` measures; agreement with PyTorch stands in the table of models, and `pytest -m full` has no table.
VERBS = sorted({path.name.partition("-")[0] for path in (ROOT / "bench" / "results").iterdir()} - {"truth", "full"})


def test_the_table_of_models() -> None:
    text = readme.README.read_text(encoding="utf-8")
    for line in [*readme.table().splitlines(), readme.summary()]:
        assert line in text.splitlines(), f"README.md differs from: {line}\nprint it all with: python -m tests.readme"


def test_rows_name_models_and_sizes_once() -> None:
    assert {row.file for row in readme.ROWS} <= set(REGISTRY.values())
    shown = [published for row in readme.ROWS for published in row.sizes.values()]
    assert len(set(shown)) == len(shown)
    assert set(shown) <= set(MODELS)


def test_what_the_table_measures() -> None:
    """Llama 3.1 8B has 8,030,261,248 parameters and 131,072 bytes of cache per token; Gemma 3n's table stays on disk."""
    size = readme.measure(MODELS["Llama 3.1 8B"].config, "")
    assert size == (None, 2 * 8_030_261_248, "bfloat16", 4 * 8_030_261_248, 8192 * 131_072, 8192)
    size = readme.measure(MODELS["Gemma 3n E4B"].config, "")
    assert size.prepared == 4 * (MODELS["Gemma 3n E4B"].parameters - 262_144 * 256 * 35)
    assert size.cache == 4 * 8192 * 2048 + 16 * 512 * 2048
    assert readme.measure(MODELS["gpt2"].config, "float32").tokens == 1024
    assert [
        readme.joined([value]) for value in (0.0421, 0.994, 0.996, 9.94, 9.96, 1234.5)
    ] == "0.04 0.99 1.0 9.9 10 1,234".split()
    assert Backend().array_dtype == "float32"


@pytest.mark.parametrize("verb", VERBS)
def test_measured_figures(verb: str) -> None:
    """The table of each bench is that of its newest file of figures."""
    figures = json.loads(readme.newest(verb).read_text())
    text = readme.README.read_text(encoding="utf-8").splitlines()
    assert [line for line in import_module(f"bench.{verb}").table(figures).splitlines()[2:] if line not in text] == []


@every_document
def test_paths_exist(document: Path) -> None:
    named = [path or link for path, link in PATH.findall(document.read_text(encoding="utf-8"))]
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


@every_text
def test_commands_can_be_read(document: Path) -> None:
    """Every `npllm ...` of a fenced block or a line of text parses; `npllm VERB` alone is a name."""
    commands = COMMAND.findall(document.read_text(encoding="utf-8"))
    for words in filter(lambda words: len(words) > 1, map(shlex.split, commands)):
        build_parser().parse_args(words)


def test_the_worked_example() -> None:
    """Each line of the diff is where it says: `-` in the first file only, `+` in the second only, others in both."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    before, after, *lines = diff.splitlines()
    old, new = ((ROOT / path[4:]).read_text(encoding="utf-8").splitlines() for path in (before, after))
    for line in lines:
        assert (line[1:] in old, line[1:] in new) == (line[0] != "+", line[0] != "-"), line


@every_text
def test_python_is_current(document: Path) -> None:
    """Every keyword of `load(...)` and every name of npllm that a fenced block of Python uses is there."""
    for source in re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "npllm":
                assert node.attr in npllm.__all__
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "npllm.load":
                assert {keyword.arg for keyword in node.keywords} <= set(inspect.signature(npllm.load).parameters)
