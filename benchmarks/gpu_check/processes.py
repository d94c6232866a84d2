"""Parts of a stage in processes of their own: a kernel that breaks the device's context breaks one process, no more."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check.findings import DEVICE_LOST, Findings
from gpu_check.stages import Stage

RUN = Path(__file__).resolve().with_name("run.py")
LEAST = 8.0
"""Seconds: with less than that left, a process is not begun."""
LOOK = 1.0
"""Seconds between two looks at what processes have found so far."""
SIDE_BY_SIDE = {"OMP_NUM_THREADS": "1"}
Found = list[dict[str, Any]]


@dataclass(frozen=True)
class Child:
    """A process that runs parts one after the other, and writes what they have found so far into `file`."""

    process: subprocess.Popen[bytes]
    file: Path
    parts: tuple[str, ...]
    until: float


def run_parts(
    stage: Stage, smoke: bool, folder: Path, until: float, earlier: Path, progress: Callable[[Found], None]
) -> Found:
    """Return what each part of a stage has found, in their order; a part that did not end says why.

    `until` is a time of `time.monotonic()`. `progress` gets what has been found so far, about once a second.
    """
    groups = [(name,) for name in stage.parts] if stage.at_once and not smoke else [tuple(stage.parts)]
    children: dict[int, Child] = {}
    rest = dict(enumerate(groups))
    found: dict[int, Found] = {i: [] for i in rest}
    try:
        while rest or children:
            for i, parts in rest.items():
                if until - time.monotonic() < LEAST:
                    found[i] += [_not_run(part, "out of time") for part in parts]
                else:
                    children[i] = _start(stage, parts, smoke, folder / f"{i}.json", until, earlier)
            rest = {}
            for i, child in list(children.items()):
                if child.process.poll() is None and time.monotonic() < child.until:
                    continue
                found[i] = _after(children.pop(i))
                child.file.write_text(json.dumps(found[i]))
                done = {part["part"] for part in found[i]}
                if left := tuple(part for part in child.parts if part not in done):
                    rest[i] = left
            progress([part for i in found for part in (_read(children[i].file) if i in children else found[i])])
            if children and not rest:
                _wait(list(children.values()), min(LOOK, max(0.0, until - time.monotonic())))
    finally:
        for child in children.values():
            _end(child.process)
    return [part for i in found for part in found[i]]


def _start(stage: Stage, parts: tuple[str, ...], smoke: bool, file: Path, until: float, earlier: Path) -> Child:
    command = [sys.executable, str(RUN), "--child", stage.name, "--parts", json.dumps(parts), "--into", str(file)]
    command += ["--earlier", str(earlier), "--seconds", str(until - time.monotonic())]
    if smoke:
        command.append("--smoke")
    environment = {**os.environ, **(SIDE_BY_SIDE if stage.at_once else {})}
    return Child(subprocess.Popen(command, start_new_session=True, env=environment), file, parts, until)


def _wait(children: list[Child], seconds: float) -> None:
    """Until one of them ends, or for so long."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and all(child.process.poll() is None for child in children):
        time.sleep(0.02)


def _after(child: Child) -> Found:
    """What a process has found that ended or whose time is over; the first part that it did not end says why."""
    if (code := child.process.poll()) is None:
        why = "it was out of time, and its process was ended"
        _end(child.process)
    else:
        why = f"its process was killed by signal {-code}" if code < 0 else f"its process ended with code {code}"
    found = _read(child.file)
    for part in found:
        if part["status"] == "under way":
            part["faults"].append(_fault(part["part"], why))
            part["status"] = "failed"
            return found
    done = {part["part"] for part in found}
    missing = [part for part in child.parts if part not in done]
    # A process whose device was lost has written so, and ended before it began the next part.
    if missing and not (child.process.returncode == DEVICE_LOST and done & set(child.parts)):
        findings = Findings(faults=[_fault(missing[0], why)])
        found.append({"part": missing[0], "status": "failed", "seconds": None, **findings.as_dict()})
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """A process that we started, and those that it started."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _fault(part: str, why: str) -> dict[str, str]:
    findings = Findings()
    findings.fault(part, RuntimeError(why))
    return findings.faults[0]


def _not_run(part: str, why: str) -> dict[str, Any]:
    findings = Findings(notes=[f"{part} was not run: {why}"])
    return {"part": part, "status": "not run", "seconds": None, **findings.as_dict()}


def _read(file: Path) -> Found:
    if not file.exists():
        return []
    found: Found = json.loads(file.read_text())
    return found
