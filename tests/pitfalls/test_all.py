"""Every pitfall of the list has a test of its number."""

import re
from pathlib import Path

PITFALLS = 46


def test_every_pitfall_has_its_test() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    found = re.findall(r"^def test_pitfall_(\d\d)_\w+\(", sources, re.MULTILINE)
    assert sorted(set(map(int, found))) == list(range(1, PITFALLS + 1))
