"""Running the examples of a page of the documentation, as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

from repository import ROOT

EXAMPLE = re.compile(r"^```(sh|python)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
"""(language, code, lines that are printed in this order, if any)."""


def run_examples(page: str, there: Path) -> None:
    """Run all examples in this folder, one after the other, and look for the lines that the page says they print."""
    (there / "examples").symlink_to(ROOT / "examples")
    program = there / "batchinfer"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m batchinfer "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{there}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for language, code, lines in EXAMPLE.findall(page):
        command = ["bash", "-euc", code] if language == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=there, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}"
        printed = " ".join(done.stdout.split())
        for line in lines.splitlines():
            _, found, printed = printed.partition(line)
            assert found, f"{line!r} is not printed there: {done.stdout}"
