"""Running a job by cron: its crontab line, and installing that line with the `crontab` program."""

import os
import re
import shlex
import subprocess

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.launch.recurring import RecurringJob

COMMAND_BYTES = 998  # most bytes that cron takes after the schedule of a line


def crontab_line(job: RecurringJob) -> str:
    """Return the job's crontab line, without a line end. A shell comment at its end names the job.

    Raises `UsageError` if it is longer than cron takes.
    """
    words = " ".join(map(_quoted, job.command))
    command = f"cd {_quoted(str(job.folder))} && {words} >> {_quoted(str(job.log))} 2>&1 {_marker(job)}"
    if len(command.encode()) > COMMAND_BYTES:
        raise UsageError(
            f"the crontab's line would have {len(command.encode())} bytes after the schedule, and cron takes at most "
            f"{COMMAND_BYTES}: put the flags into a job file (--config), or give --systemd"
        )
    return f"{job.schedule.text} {command}"


def _marker(job: RecurringJob) -> str:
    return f"# {job.name}"


def _quoted(word: str) -> str:
    """Quote a word for cron, which changes a line before it gives it to the shell.

    Cron replaces `%` by a line end and `\\%` by `%`, and some versions replace two backslashes by one. So quotes are
    closed and opened after each backslash that stands before another one or before `%`.
    """
    return re.sub(r"\\(?=[\\%])", r"\\''", shlex.quote(word)).replace("%", r"\%")


def install(job: RecurringJob) -> None:
    """Add the job's line to the end of the user's crontab, and remove its earlier line. Other lines are kept.

    Raises `Refused` if the `crontab` program is missing or fails.
    """
    before = _crontab("-l")
    if before.returncode and b"no crontab for" not in before.stderr:
        raise Refused(f"crontab -l failed, and nothing was changed: {_said(before)}")
    lines = before.stdout.split(b"\n") if before.returncode == 0 else []
    others = [line for line in lines if not line.endswith(_marker(job).encode())]
    if others and not others[-1]:  # the empty string after the last line end
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
            "the program crontab is not installed: install cron, give --systemd, or leave out --install and give the "
            "printed line to your own scheduler"
        ) from error


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    return done.stderr.decode("utf-8", "replace").strip() or f"it exited with {done.returncode}"
