"""The README tells the truth: its example runs, its table of rules is the catalogue's."""

import doctest
import re
from pathlib import Path

from fastweights.cli import markdown_table

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs():
    assert doctest.testfile(str(README), module_relative=False).failed == 0


def test_the_example_is_eight_lines():
    first = README.read_text(encoding="utf-8").split("```python")[1].split("```")[0]
    code = [line for line in first.splitlines() if line.startswith((">>> ", "... ")) and "import" not in line]
    assert len(code) <= 8


def test_the_table_of_rules_is_that_of_the_catalogue():
    found = re.search(r"<!-- rules -->\n(.*?)\n<!-- /rules -->", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    assert found[1] == markdown_table(), "run: fastweights rules --markdown"
