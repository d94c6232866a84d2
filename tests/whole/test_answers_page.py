"""The commands on docs/answers.md print what the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

PAGE = (ROOT / "docs" / "answers.md").read_text()
EXAMPLES = re.findall(r"```sh\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)


def test_each_command_has_its_lines() -> None:
    assert len(EXAMPLES) == PAGE.count("```sh") > 0


@pytest.mark.parametrize(("commands", "lines"), EXAMPLES)
def test_an_example_prints_its_lines(tmp_path: Path, commands: str, lines: str) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    program = tmp_path / "batchinfer"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m batchinfer "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    printed = " ".join(done.stdout.split())
    for line in lines.splitlines():
        _, found, printed = printed.partition(line)
        assert found, f"{line!r} is not printed there: {done.stdout}"
