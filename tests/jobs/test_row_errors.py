"""The table of error codes: every code that the code gives to a row, and no other."""

import ast
from collections.abc import Iterator

from product import product
from repository import ROOT

from batchinfer.errors import EXIT_CODES
from batchinfer.jobs.row_errors import EXITS, ROW_ERRORS, page

GIVE_CODES = {"RowError", "BadPrompt"}
MADE_UP = {"bad_messages", "bad_tools", "bad_chat_template_kwargs"}  # of "bad_" and what a column holds


def codes_given() -> Iterator[str]:
    """The codes of all calls that make an error of a row, in the product's own files."""
    for source in product().values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in GIVE_CODES and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    yield first.value


def test_every_code_is_explained_and_no_other() -> None:
    assert set(codes_given()) | MADE_UP == set(ROW_ERRORS)


def test_every_exit_code_is_explained() -> None:
    assert EXITS.keys() == {0, *EXIT_CODES.values()}


def test_the_page_is_up_to_date() -> None:
    """After a change: make reference"""
    assert (ROOT / "docs" / "errors.md").read_text("utf-8") == page()
