"""The example from Python: it runs, and README shows it."""

import subprocess
import sys

from repository import ROOT

EXAMPLE = ROOT / "examples" / "api" / "complete.py"


def test_the_example_completes_its_prompts() -> None:
    done = subprocess.run([sys.executable, EXAMPLE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for beginning in (
        "def is_even(n):\n    return ",
        "def exists(path):\n",
        "class Stack:\n    def push(self, item):\n",
    ):
        assert beginning in done.stdout
    assert "prompt 0:" not in done.stdout


def test_readme_shows_the_example() -> None:
    code = EXAMPLE.read_text().partition("\n\n")[2]
    assert f"```python\n{code}```\n" in (ROOT / "README.md").read_text()
