"""The command line in this process, with an engine that computes nothing."""

import sys
from functools import partial
from typing import Any

import pytest

from batchinfer.jobs import job
from batchinfer.jobs.cli.main import main

STUB = "batchinfer.jobs.process.stub_engine:StubEngine"


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    """(exit code, what is said of the error: one line, or nothing)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["batchinfer", *map(str, arguments)])
        patch.setattr(job, "run", partial(job.run, engine=STUB))
        with pytest.raises(SystemExit) as ended:
            main()
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("batchinfer: error: ")]
    assert len(lines) <= 1, errors
    return int(ended.value.code or 0), "".join(lines)
