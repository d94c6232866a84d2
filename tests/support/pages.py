"""The pages of the documentation: running their examples as they stand there, and reading the commands they name."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from repository import ROOT

EXAMPLE = re.compile(r"^```(sh|python)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
"""(language, code, lines that are printed in this order, if any)."""
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
HERE_DOCUMENT = re.compile(r"<<'(\w+)'\n.*?^\1$", re.DOTALL | re.MULTILINE)
MOST_SECONDS = 600  # of one example: none waits forever for what does not come


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
            command,
            cwd=there,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=MOST_SECONDS,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}"
        printed = " ".join(done.stdout.split())
        for line in lines.splitlines():
            _, found, printed = printed.partition(" ".join(line.split()))
            assert found, f"{line!r} is not printed there: {done.stdout}"


def commands(page: str, program: str) -> Iterator[list[str]]:
    """Yield the words behind this program's name in each command of a page, inline or in a block of commands."""
    inline = INLINE.findall(BLOCK.sub("", page))
    blocks = [HERE_DOCUMENT.sub("", code) for language, code in BLOCK.findall(page) if language in ("", "sh")]
    for code in [*inline, *blocks]:
        if re.search(rf"^\W*(\S*/)?{program} ", code, re.MULTILINE):
            for words in _commands_of(code):
                names = [Path(word).name for word in words]
                if program in names[:-1]:
                    yield words[names.index(program) + 1 :]


def _commands_of(code: str) -> Iterator[list[str]]:
    """Yield the words of each command in a piece of shell, without its comments."""
    lexer = shlex.shlex(code.replace("\\\n", " "), posix=True, punctuation_chars=";&|<>()\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    comment = False
    for word in lexer:
        if word[0] in ";&|<>()\n":
            comment = comment and "\n" not in word
            yield words
            words = []
        elif comment := comment or word == "#":
            continue
        else:
            words.append(word)
    yield words
