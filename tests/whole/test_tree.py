"""The tests mirror the product: the test of a file is found by its path. What is said twice is the same."""

import re

from product import product
from repository import ROOT

BESIDE = {"whole", "building", "examples", "benchmarks"}  # of the whole product, and of what is no part of it


def test_each_test_lies_where_the_module_lies_that_it_tests() -> None:
    modules = product()
    strays = []
    for path in ROOT.glob("tests/**/test_*.py"):
        folder = path.relative_to(ROOT / "tests").parent
        if folder.parts[0] in BESIDE:
            continue
        package = ".".join(folder.parts if folder.parts[0] == "batchinfer" else ("batchinfer", *folder.parts))
        words = path.stem.removeprefix("test_").split("_")  # test_MODULE.py, or test_MODULE_topic.py
        if not any(f"{package}.{'_'.join(words[:count])}" in modules for count in range(1, len(words) + 1)):
            strays.append(path.relative_to(ROOT).as_posix())
    assert strays == []


def test_ruff_is_the_same_before_a_commit_and_in_make_check() -> None:
    hooks, constraints = (ROOT / ".pre-commit-config.yaml").read_text(), (ROOT / "constraints.txt").read_text()
    (rev,) = re.findall(r"ruff-pre-commit\n\s+rev: v(\S+)", hooks)
    assert f"ruff=={rev}" in constraints.splitlines()
