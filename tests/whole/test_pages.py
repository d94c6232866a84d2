"""The pages of the documentation: their examples run as they stand, and what they name exists."""

import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest
import typer
from chat_models import CHATML, save
from pages import BLOCK, EXAMPLE, INLINE, commands, run_examples
from repository import ROOT, TARGET

from batchinfer.jobs.cli.main import app

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
WITH_EXAMPLES = [  # but those of answers.md, which need a model of their own: test_answers_page.py
    page.stem for page in ROOT.glob("docs/*.md") if "```text" in page.read_text() and page.stem != "answers"
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)

command_line: Any = typer.main.get_command(app)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_page_print_what_it_says(name: str, tmp_path: Path) -> None:
    run_examples((ROOT / "docs" / f"{name}.md").read_text(), tmp_path)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_all_blocks_of_code_are_examples(name: str) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert len(EXAMPLE.findall(page)) == page.count("```sh") + page.count("```python")
    assert sum(bool(lines) for *_, lines in EXAMPLE.findall(page)) == page.count("```text")


def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    """A folder with the name of the model that it takes from the Hub is the model of this repository."""
    model = tmp_path / "Qwen" / "Qwen2.5-0.5B-Instruct"
    shutil.copytree(TARGET, model)
    save(model, CHATML)
    pq.write_table(csv.read_csv(ROOT / "examples" / "reviews" / "reviews.csv")[:8], tmp_path / "reviews.parquet")
    run_examples((ROOT / "README.md").read_text(), tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_have_the_flags_that_a_page_gives_them(page: Path) -> None:
    for words in commands(page.read_text(), "batchinfer"):
        parse(words)


@pytest.mark.parametrize(
    "wrong", ["runn t.csv", "run t.csv --limits 3", "slurm submit -- t.csv --no", "plan --shart 1"]
)
def test_a_command_that_does_not_exist_is_found(wrong: str) -> None:
    (words,) = commands(f"Give `batchinfer {wrong}` for that.", "batchinfer")
    with pytest.raises((KeyError, typer.TyperException)):
        parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_exist_that_a_page_names_alone(page: Path) -> None:
    named = re.findall(r"`(--[a-z][a-z-]*)", BLOCK.sub("", page.read_text()))
    assert set(named) <= flags_below(command_line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_targets_of_make_exist(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(page.read_text(), "make"):
        assert next(word for word in words if not word.startswith("-") and "=" not in word) in targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(INLINE.sub("", BLOCK.sub("", page.read_text()))):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link


def anchors(page: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = (heading.lower() for heading in HEADING.findall(BLOCK.sub("", page)))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def flags_below(command: Any) -> set[str]:
    """The flags of a command and of those below it."""
    own = {name for flag in command.params for name in (*flag.opts, *flag.secondary_opts)}
    return own.union({"--help"}, *map(flags_below, getattr(command, "commands", {}).values()))


def parse(words: list[str]) -> None:
    """Have the command line read these words; optional ones may stand in square brackets.

    Raises typer's exception for an unknown flag, and `KeyError` for an unknown command.
    """
    words = [word.strip("[]") if word.startswith("[-") else word for word in words]
    command, name = command_line, "batchinfer"
    while hasattr(command, "commands"):
        words = parsed(command, name, words)[1]
        if not words:
            return
        name, *words = words
        command = command.commands[name]
    options, rest = parsed(command, name, words)
    if "arguments" in options:  # those of `batchinfer run`
        parsed(command_line.commands["run"], "run", [*(options["arguments"] or []), *rest])


def parsed(command: Any, name: str, words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(values by parameter, words that are left over)."""
    context = command.context_class(command, info_name=name, **command.context_settings)
    options, rest, _ = command.make_parser(context).parse_args(args=list(words))
    return options, rest
