"""Parts of a stage in processes of their own: a kernel that breaks the device's context breaks one process, no more."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check.findings import DEVICE_LOST, Findings
from gpu_check.stages import Stage

RUN = Path(__file__).resolve().with_name("run.py")
LEFT_FOR_A_PART = 20.0
"""Seconds that each part leaves to every part after it; with less than that left, a part is not begun."""
SIDE_BY_SIDE = {"OMP_NUM_THREADS": "2"}


@dataclass(frozen=True)
class Child:
    """A process that runs parts one after the other, and after each writes what they have found into `file`."""

    process: subprocess.Popen[bytes]
    file: Path
    parts: tuple[str, ...]
    until: float


def run_parts(stage: Stage, smoke: bool, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """What each part of a stage has found, in their order; a part that did not end says why."""
    until = time.monotonic() + seconds
    if smoke or stage.how == "together":
        return _in_turn(stage, [tuple(stage.parts)], smoke, folder, until)
    groups = [(name,) for name in stage.parts]
    if stage.how == "apart":
        return _in_turn(stage, groups, smoke, folder, until)
    found: list[dict[str, Any]] = []
    children = [_start(stage, group, smoke, folder / f"{i}.json", until) for i, group in enumerate(groups)]
    for child in children:
        found += _after(child)
    return found


def _in_turn(
    stage: Stage, groups: Sequence[tuple[str, ...]], smoke: bool, folder: Path, until: float
) -> list[dict[str, Any]]:
    """One process for each group; for what is left of a group whose process died, another one."""
    file = folder / "parts.json"
    waiting = list(groups)
    while waiting:
        parts, *waiting = waiting
        left = until - time.monotonic()
        if left < LEFT_FOR_A_PART:
            found = [*_read(file), *(_not_run(part, "out of time") for part in parts)]
            file.write_text(json.dumps(found))
            continue
        ends = until - LEFT_FOR_A_PART * len(waiting) if left > LEFT_FOR_A_PART * (len(waiting) + 1) else until
        found = _after(_start(stage, parts, smoke, file, ends))
        file.write_text(json.dumps(found))
        done = {part["part"] for part in found}
        if rest := tuple(part for part in parts if part not in done):
            waiting.insert(0, rest)
    return _read(file)


def _start(stage: Stage, parts: tuple[str, ...], smoke: bool, file: Path, until: float) -> Child:
    command = [sys.executable, str(RUN), "--child", str(stage.number), "--parts", json.dumps(parts)]
    command += ["--into", str(file), "--seconds", str(until - time.monotonic())]
    if smoke:
        command.append("--smoke")
    environment = {**os.environ, **(SIDE_BY_SIDE if stage.how == "at once" else {})}
    return Child(subprocess.Popen(command, start_new_session=True, env=environment), file, parts, until)


def _after(child: Child) -> list[dict[str, Any]]:
    """Wait for a process, and end it when its time is over; the first part that it did not end says what happened."""
    why = ""
    try:
        code = child.process.wait(max(0.0, child.until - time.monotonic()))
        why = f"its process was killed by signal {-code}" if code < 0 else f"its process ended with code {code}"
    except subprocess.TimeoutExpired:
        why = "it was out of time, and its process was ended"
    finally:
        if child.process.poll() is None:
            _end(child.process)
    found = _read(child.file)
    done = {part["part"] for part in found}
    rest = [part for part in child.parts if part not in done]
    # A process whose device was lost has written so, and ended before it began the next part.
    if rest and not (child.process.returncode == DEVICE_LOST and done & set(child.parts)):
        found.append(_died(rest[0], why))
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """A process that we started, and those that it started."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _died(part: str, why: str) -> dict[str, Any]:
    findings = Findings()
    findings.fault(part, RuntimeError(why))
    return {"part": part, "status": "failed", "seconds": None, **findings.as_dict()}


def _not_run(part: str, why: str) -> dict[str, Any]:
    findings = Findings(notes=[f"{part} was not run: {why}"])
    return {"part": part, "status": "not run", "seconds": None, **findings.as_dict()}


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    found: list[dict[str, Any]] = json.loads(file.read_text())
    return found
