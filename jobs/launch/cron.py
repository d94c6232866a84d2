"""A job in the user's crontab: its line, and the `crontab` program that puts it there."""

import os
import re
import shlex
import subprocess

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.launch.recurring import RecurringJob

COMMAND_BYTES = 998  # that cron takes of a line, behind the schedule


def crontab_line(job: RecurringJob) -> str:
    """The job's line, without a line end; the shell's comment at its end says whose it is.

    Raises `UsageError` where it is longer than cron takes.
    """
    words = " ".join(map(_quoted, job.command))
    command = f"cd {_quoted(str(job.folder))} && {words} >> {_quoted(str(job.log))} 2>&1 {_marker(job)}"
    if len(command.encode()) > COMMAND_BYTES:
        raise UsageError(
            f"the crontab's line would have {len(command.encode())} bytes behind the schedule, and cron takes "
            f"{COMMAND_BYTES}: put the flags into a job file (--config), or give --systemd"
        )
    return f"{job.schedule.text} {command}"


def _marker(job: RecurringJob) -> str:
    return f"# {job.name}"


def _quoted(word: str) -> str:
    """For the shell, as cron hands it over.

    Cron makes a line end of `%` and `%` of `\\%`; some make one backslash of two. So none stands before another one or
    before `%`: quotes are closed and opened between them.
    """
    return re.sub(r"\\(?=[\\%])", r"\\''", shlex.quote(word)).replace("%", r"\%")


def install(job: RecurringJob) -> None:
    """Put the job's line at the end of the user's crontab, in the place of an earlier one; the others stay.

    Raises `Refused` where the `crontab` program is missing or does not do it.
    """
    before = _crontab("-l")
    if before.returncode and b"no crontab for" not in before.stderr:
        raise Refused(f"crontab -l failed, and nothing was changed: {_said(before)}")
    lines = before.stdout.split(b"\n") if before.returncode == 0 else []
    others = [line for line in lines if not line.endswith(_marker(job).encode())]
    if others and not others[-1]:  # what is behind the last line's end
        others.pop()
    after = _crontab("-", stdin=b"\n".join([*others, crontab_line(job).encode(), b""]))
    if after.returncode:
        raise Refused(f"crontab refused the new table, and nothing was changed: {_said(after)}")


def _crontab(argument: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            ["crontab", argument], input=stdin, capture_output=True, env={**os.environ, "LC_ALL": "C"}, check=False
        )
    except FileNotFoundError as error:
        raise Refused(
            "there is no program crontab here: install cron, or give --systemd, or put the line that the command "
            "prints without --install where your scheduler wants it"
        ) from error


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    return done.stderr.decode("utf-8", "replace").strip() or f"it exited with {done.returncode}"
