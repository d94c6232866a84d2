"""The example from Python: docs/python.md shows it, and the test of that page runs it."""

from repository import ROOT

EXAMPLE = ROOT / "examples" / "api" / "complete.py"


def test_the_page_shows_the_example() -> None:
    code = EXAMPLE.read_text().partition("\n\n")[2]
    assert f"```python\n{code}```\n" in (ROOT / "docs" / "python.md").read_text()
