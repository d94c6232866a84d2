"""A process of its own for some parts of a stage."""

import json
import time
from pathlib import Path
from typing import Any

from gpu_check.findings import DEVICE_LOST, DeviceLost
from gpu_check.machine import conditions
from gpu_check.session import Session
from gpu_check.stages import Stage

EVERY = 0.5
"""Seconds between two writes of what a part has found so far."""
TO_STOP = 5.0
"""Seconds before its end at which a part begins nothing more."""


def run_child(stage: Stage, parts: list[str], smoke: bool, file: Path, seconds: float, earlier: Path) -> int:
    """Run the parts, and keep what each has found so far in the list in `file`; return the exit code.

    `earlier` is the JSON file with what stages before this one have found.
    """
    until, ran = time.monotonic() + seconds - TO_STOP, conditions(smoke)
    found: list[dict[str, Any]] = _read(file)
    before = [*_read(earlier), *found]
    for name in parts:
        session = Session(smoke, f"{stage.name} {name}", until, before, stage.share(name))
        part = _Part(file, found, name, session, ran)
        lost = _run(session, stage, name)
        part.end()
        found.append(part.result)
        before.append(part.result)
        session.say(f"{part.result['status']}, {len(session.findings.faults)} faults")
        if lost:
            return DEVICE_LOST
    return 0


class _Part:
    """Writes what a part has found, and what the parts before it had, as it goes."""

    def __init__(
        self, file: Path, found: list[dict[str, Any]], name: str, session: Session, conditions: dict[str, str]
    ) -> None:
        self.file, self.found, self.session, self.written = file, found, session, 0.0
        self.result: dict[str, Any] = {"part": name, "status": "under way", "conditions": conditions}
        session.findings.changed = self.changed
        self._write()

    def changed(self) -> None:
        """Write, but not too often."""
        if time.monotonic() - self.written > EVERY:
            self._write()

    def end(self) -> None:
        """Write how the part ended."""
        ended = "stopped at its time" if self.session.stopped else "ok"
        self.result["status"] = "failed" if self.session.findings.faults else ended
        self._write()

    def _write(self) -> None:
        self.result["seconds"] = round(time.monotonic() - self.session.began, 1)
        self.result |= self.session.findings.as_dict()
        whole = self.file.with_suffix(".new")
        whole.write_text(json.dumps([*self.found, self.result]))
        whole.rename(self.file)
        self.written = time.monotonic()


def _run(session: Session, stage: Stage, name: str) -> bool:
    """True if the device is lost afterwards."""
    try:
        with session.case(name):
            stage.part(name)(session)
            session.synchronize()
    except DeviceLost as error:
        session.say(str(error))
        return True
    return False


def _read(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    return found
