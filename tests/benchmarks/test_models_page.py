"""The page of models names every family that runs."""

import re

from repository import ROOT

from batchinfer.models.config import FAMILIES
from batchinfer.models.gguf_architectures import ARCHITECTURES
from batchinfer.models.wrappers import WRAPPERS


def test_the_page_lists_all_families_and_wrappers() -> None:
    rows = re.findall(r"^\| (\w+) \|", (ROOT / "docs" / "models.md").read_text(), re.M)
    assert [row for row in rows if row not in ("family", "wrapper")] == [*sorted(FAMILIES), *sorted(WRAPPERS)]


def test_the_page_says_which_families_gguf_files_hold() -> None:
    found = re.findall(r"^\| (\w+) \|.*\| yes \|$", (ROOT / "docs" / "models.md").read_text(), re.M)
    assert found == sorted(set[str]().union(*(architecture.families for architecture in ARCHITECTURES.values())))
