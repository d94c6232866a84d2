"""A job that cron or systemd starts at given times, with the current command, in the current folder."""

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

UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8


@dataclass(frozen=True)
class RecurringJob:
    """The command that is started, and when. Paths are absolute, and all texts are free of control characters."""

    name: str  # has letters, digits, '-', '_' and '.'; differs for each output
    output: Path
    schedule: Schedule
    folder: Path  # the command is started here
    command: tuple[str, ...]
    log: Path  # the job's output is appended to it
    grace: float  # seconds that the job may take to end after a signal

    @classmethod
    def of(cls, spec: JobSpec, arguments: Sequence[str], schedule: Schedule, log: Path | None) -> "RecurringJob":
        """Return the job that runs `batchinfer run ARGUMENTS...` in this folder with this Python.

        If `log` is None, the log is beside the output. Raises `UsageError` for a text that a crontab cannot hold, and
        `Refused` if the log's folder does not exist.
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
                    f"'{printable(text)}' has a control character or is not UTF-8, which a crontab or a unit cannot "
                    "hold: "
                    "choose another name, or put such a value into a job file (--config)"
                )
        return job


def _program() -> tuple[str, ...]:
    """Return Python's arguments to start batchinfer again: the script, or `-m batchinfer` if it was started so."""
    script = Path(sys.argv[0]).absolute()
    return ("-P", "-m", "batchinfer") if script.name == "__main__.py" else (str(script),)


def _name(output: Path) -> str:
    """Return a job's name from its output's absolute path: the path's last name, as far as a unit's name can have it,
    and a digest of the whole path."""
    readable = re.sub(r"[^A-Za-z0-9_.-]", "-", output.stem)[:64]
    digest = hashlib.sha256(str(output).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"batchinfer-{readable}-{digest}"
