"""A job that is started at given times: by cron or by systemd, in the folder and with the command of now."""

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.launch.schedule import Schedule
from batchinfer.jobs.log import printable
from batchinfer.jobs.spec import JobSpec

UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and bytes of a name that are no UTF-8


@dataclass(frozen=True)
class RecurringJob:
    """What is started and when. Paths are absolute; everything is text without control characters."""

    name: str  # of letters, digits, '-', '_' and '.'; each output has another one
    output: Path
    schedule: Schedule
    folder: Path  # in which it is started
    command: tuple[str, ...]
    log: Path  # what the job prints is added to it
    grace: float  # seconds that the job takes to end when it is told to

    @classmethod
    def of(cls, spec: JobSpec, arguments: Sequence[str], schedule: Schedule, log: Path | None) -> "RecurringJob":
        """The job of `batchinfer run ARGUMENTS...`, here and with this interpreter; `log` is beside the output if None.

        Raises `UsageError` for what has no place in a crontab, and `Refused` where the log has no folder.
        """
        output = spec.output.absolute()
        log = output.with_suffix(".log") if log is None else log.absolute()
        if not log.parent.is_dir():
            raise Refused(f"log {log}: there is no folder {log.parent}; make it, or name another log with --log")
        job = cls(
            name=_name(output.resolve()),
            output=output,
            schedule=schedule,
            folder=Path.cwd(),
            command=(sys.executable, *_program(), "run", *arguments),
            log=log,
            grace=spec.grace,
        )
        for text in (str(output), str(job.folder), str(log), *job.command):
            if UNFIT.search(text):
                raise UsageError(
                    f"'{printable(text)}' holds a control character or is no UTF-8, and has no place in a crontab or a "
                    "unit: give another name, or put what is no name into a job file (--config)"
                )
        return job


def _program() -> tuple[str, ...]:
    """What this interpreter was started with: the script, or the package, which is not started by its file."""
    script = Path(sys.argv[0]).absolute()
    return ("-P", "-m", "batchinfer") if script.name == "__main__.py" else (str(script),)


def _name(output: Path) -> str:
    """Of an absolute path: its name, as far as a unit may be called so, and a digest of the whole path."""
    readable = re.sub(r"[^A-Za-z0-9_.-]", "-", output.stem)[:64]
    digest = hashlib.sha256(str(output).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"batchinfer-{readable}-{digest}"
