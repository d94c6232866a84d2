"""NVIDIA's tools over cases in a process of their own: compute-sanitizer looks for errors, ncu counts.

A tool that is not on the machine, or may not do its work there, is skipped, and a note says so.
"""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from gpu_check.session import Session
from gpu_check.speed import slowest

RUN = Path(__file__).resolve().with_name("run.py")
SANITIZER = "compute-sanitizer"
CHECKED = "Small cases under compute-sanitizer"
FOUND = 9
"""The exit code that compute-sanitizer is told to end with if it has found something."""
FAULTY = ("= Invalid ", "= Uninitialized ", "Race reported")
"""What it prints for an error: a run that is cut has no exit code."""
REFUSED = ("Device not supported", "LibraryNotLoaded", "ERR_NVGPUCTRPERM", "Failed to initialize", "not supported on")
"""What the tools say where they may not do their work."""
COUNTED = "The slowest kernels, by ncu"
SLOWEST = 3
METRICS = {
    "gpu__time_duration.sum": "time, us",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "memory, %",
    "sm__inst_executed_pipe_tensor.sum": "tensor instructions",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessors, %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps, %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots, %",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
}


def run_memcheck(session: Session) -> None:
    """Reads and writes out of bounds."""
    _sanitize(session, "memcheck")


def run_initcheck(session: Session) -> None:
    """Reads of memory that nothing has written."""
    _sanitize(session, "initcheck")


def run_racecheck(session: Session) -> None:
    """Races in shared memory."""
    _sanitize(session, "racecheck")


def _sanitize(session: Session, tool: str) -> None:
    command = _watched(session, ["small"])
    if session.smoke and tool != "memcheck":
        session.findings.note(f"{tool} was skipped: one run of the cases without a tool is enough")
        return
    if not session.smoke:
        if (found := shutil.which(SANITIZER)) is None:
            _skip(session, f"{SANITIZER}, {tool}", "it is not on this machine")
            return
        command = [found, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", *command]
    code, said = _ran(session, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if any(words in said for words in REFUSED):
        _skip(session, f"{SANITIZER}, {tool}", f"it may not do its work here: {_line(said, REFUSED)}")
        return
    cases = [line.removeprefix("case ") for line in said.splitlines() if line.startswith("case ")]
    ended = "out of time" if code is None else f"exit code {code}"
    session.row(CHECKED, tool=tool if not session.smoke else "none: no device", cases=len(cases), ended=ended)
    session.stopped = code is None
    assert not code and not any(words in said for words in FAULTY), f"after {len(cases)} cases:\n{said[-3000:]}"
    assert cases or session.stopped, f"no case was run:\n{said[-3000:]}"


def run_ncu(session: Session) -> None:
    """Counters of the kernels that are farthest from what the device can do."""
    names = slowest(session, SLOWEST)
    if not names:
        session.findings.note("ncu: nothing was timed before")
        return
    if session.smoke:
        code, said = _ran(session, _watched(session, names[:1]))
        assert code == 0, said
        session.row(COUNTED, case=names[0], device="not counted: no device")
        return
    if (found := shutil.which("ncu")) is None:
        _skip(session, "ncu", f"it is not on this machine; the slowest are {'; '.join(names)}")
        return
    # Clocks stay as they are: the machine is others' too.
    command = [found, "--clock-control", "none", "--csv", "--page", "raw", "--metrics", ",".join(METRICS)]
    command += ["--kernel-name", "regex:_kernel$"]
    code, said = _ran(session, [*command, *_watched(session, names)])
    session.findings.note(f"ncu: the slowest are {'; '.join(names)}")
    if any(words in said for words in REFUSED):
        _skip(session, "ncu", f"it may not count here: {_line(said, REFUSED)}")
        return
    for row in counted(said):
        session.row(COUNTED, **row)
    session.stopped = code is None
    assert not code, said[-2000:]


def counted(said: str) -> list[dict[str, object]]:
    """The last launch of each kernel in ncu's CSV, whose second line has the units."""
    lines = [line for line in said.splitlines() if line.startswith('"')]
    found: dict[str, dict[str, object]] = {}
    for row in list(csv.DictReader(io.StringIO("\n".join(lines))))[1:]:
        figures = {short: _number(row[name]) for name, short in METRICS.items() if row.get(name)}
        found[row["Kernel Name"]] = {"kernel": row["Kernel Name"], "grid": row.get("Grid Size", ""), **figures}
    return list(found.values())


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def _watched(session: Session, cases: list[str]) -> list[str]:
    return [sys.executable, str(RUN), "--cases", json.dumps(cases), *(["--smoke"] if session.smoke else [])]


def _ran(session: Session, command: list[str], **environment: str) -> tuple[int | None, str]:
    """(exit code, all that it said); no code where it took longer than there was time, and was ended."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=max(session.left, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool and the process that it watches
            return None, process.communicate()[0]
        return process.returncode, said


def _skip(session: Session, what: str, why: str) -> None:
    session.findings.note(f"{what} was skipped: {why}")
    session.say(f"{what} was skipped: {why}")


def _line(said: str, words: Iterable[str]) -> str:
    return next(line for line in said.splitlines() if any(word in line for word in words)).strip()[:200]
