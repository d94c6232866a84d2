"""A job as a systemd service of the user, and the timer that starts it."""

from pathlib import Path

from batchinfer.errors import UsageError
from batchinfer.jobs.launch.recurring import RecurringJob
from batchinfer.jobs.results.durable import write_whole

MORE_THAN_GRACE = 10  # seconds until systemd kills a job that it told to stop


def units(job: RecurringJob) -> dict[str, str]:
    """The text of each unit, by the name of its file. Raises `UsageError` for a path that a unit cannot hold."""
    # ':' before the program: '$' in its arguments is no variable.
    service = f"""\
[Unit]
Description=batchinfer run: {_plain(job.output)}

[Service]
Type=oneshot
WorkingDirectory={_plain(job.folder)}
ExecStart=:{" ".join(map(quoted, job.command))}
StandardOutput=append:{_plain(job.log)}
StandardError=append:{_plain(job.log)}
TimeoutStopSec={job.grace + MORE_THAN_GRACE:.0f}
"""
    calendars = "".join(f"OnCalendar={calendar}\n" for calendar in job.schedule.calendars())
    timer = f"""\
[Unit]
Description=batchinfer run, {job.schedule.text}: {_plain(job.output)}

[Timer]
{calendars}AccuracySec=1s

[Install]
WantedBy=timers.target
"""
    return {f"{job.name}.service": service, f"{job.name}.timer": timer}


def quoted(word: str) -> str:
    """A word of `ExecStart=`, free of control characters."""
    escaped = word.replace("\\", r"\\").replace('"', r"\"").replace("%", "%%")
    return f'"{escaped}"'


def _plain(path: Path) -> str:
    """A path to a line's end, which knows no quotes. Raises `UsageError` for one that would not end there."""
    text = str(path)
    if text != text.rstrip("\\ "):
        raise UsageError(f"'{text}' ends in a space or a backslash, which a unit cannot hold: give another name")
    return text.replace("%", "%%")


def unit_folder() -> Path:
    """Where the units of the user lie."""
    return Path.home() / ".config" / "systemd" / "user"


def install(job: RecurringJob) -> list[str]:
    """Write the units, in the place of earlier ones; the commands that start the timer. Raises `OSError`."""
    unit_folder().mkdir(parents=True, exist_ok=True)
    for name, text in units(job).items():
        write_whole(unit_folder() / name, text.encode())
    return [
        "systemctl --user daemon-reload",
        f"systemctl --user enable --now {job.name}.timer",
        "loginctl enable-linger  # it runs while you are logged out too",
    ]
