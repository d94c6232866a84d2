"""A process of its own for some parts of a stage."""

import json
import time
from pathlib import Path
from typing import Any

from gpu_check.findings import DEVICE_LOST, DeviceLost
from gpu_check.machine import conditions
from gpu_check.session import Session
from gpu_check.stages import Stage


def run_child(stage: Stage, parts: list[str], smoke: bool, file: Path, seconds: float) -> int:
    """Run the parts, and append what each has found to the list in `file`; the exit code."""
    until, ran = time.monotonic() + seconds, conditions(smoke)
    found: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    for name in parts:
        session = Session(smoke, f"{stage.number} {name}", until, found)
        lost = _run(session, stage, name)
        found.append(
            {
                "part": name,
                "status": "failed" if session.findings.faults else "ok",
                "seconds": round(time.monotonic() - session.began, 1),
                "conditions": ran,
                **session.findings.as_dict(),
            }
        )
        whole = file.with_suffix(".new")
        whole.write_text(json.dumps(found))
        whole.rename(file)
        session.say(f"{found[-1]['status']}, {len(session.findings.faults)} faults")
        if lost:
            return DEVICE_LOST
    return 0


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
