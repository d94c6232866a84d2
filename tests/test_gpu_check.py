"""The check that only a GPU can run: all its lines that need none, in Triton's interpreter, in small sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["1", "2", "3", "4", "5", "6"]


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu_check/run.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_to_its_end_without_a_device(tmp_path: Path, stage: str) -> None:
    done = check("--smoke", "--stages", stage, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [*results["stages"]] == [stage] and results["stages"][stage]["status"] == "ok"
    assert f"## {stage}. " in (tmp_path / "gpu_check.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so() -> None:
    done = check()
    assert done.returncode == 2 and done.stdout == ""
    assert "finds no CUDA device here; --smoke runs without one" in done.stderr


def test_a_stage_that_there_is_not_is_refused() -> None:
    done = check("--smoke", "--stages", "7")
    assert done.returncode == 2 and "7" in done.stderr
