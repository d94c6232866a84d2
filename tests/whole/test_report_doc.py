"""The examples of docs/report.md run as they stand, and print what the page says."""

import json
from html import unescape
from pathlib import Path

from pages import EXAMPLE, run_examples
from repository import ROOT

PAGE = (ROOT / "docs" / "report.md").read_text()


def test_all_blocks_of_code_are_examples() -> None:
    assert len(EXAMPLE.findall(PAGE)) == PAGE.count("```sh")
    assert sum(bool(lines) for *_, lines in EXAMPLE.findall(PAGE)) == PAGE.count("```text")


def test_the_examples_give_what_the_page_says(tmp_path: Path) -> None:
    run_examples(PAGE, tmp_path)
    assert json.loads((tmp_path / "words.json").read_text())["rows"] == 20
    page = (tmp_path / "words.run" / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "Against the device's ceilings" in unescape(page)
    assert (tmp_path / "words.run" / "timeline.json").exists()
