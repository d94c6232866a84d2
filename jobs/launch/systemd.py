"""Running a job by systemd: the user's service, and the timer that starts it."""

from pathlib import Path

from batchinfer.errors import UsageError
from batchinfer.jobs.launch.recurring import RecurringJob
from batchinfer.jobs.results.durable import write_whole

MORE_THAN_GRACE = 10  # seconds after the job's grace until systemd kills it


def units(job: RecurringJob) -> dict[str, str]:
    """Return the text of each unit, by file name. Raises `UsageError` for a path that a unit cannot hold."""
    # With ':' before the program, systemd does not replace variables ('$') in its arguments.
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
    """Quote a word for `ExecStart=`. It must not have control characters."""
    escaped = word.replace("\\", r"\\").replace('"', r"\"").replace("%", "%%")
    return f'"{escaped}"'


def _plain(path: Path) -> str:
    """Escape a path for the end of a line, where systemd knows no quotes.

    Raises `UsageError` for a path that ends in a space or a backslash.
    """
    text = str(path)
    if text != text.rstrip("\\ "):
        raise UsageError(f"'{text}' ends in a space or a backslash, which a unit cannot hold: choose another name")
    return text.replace("%", "%%")


def unit_folder() -> Path:
    """Return the folder of the user's units."""
    return Path.home() / ".config" / "systemd" / "user"


def install(job: RecurringJob) -> list[str]:
    """Write the units, replacing earlier ones. Returns the commands that start the timer. Raises `OSError`."""
    unit_folder().mkdir(parents=True, exist_ok=True)
    for name, text in units(job).items():
        write_whole(unit_folder() / name, text.encode())
    return [
        "systemctl --user daemon-reload",
        f"systemctl --user enable --now {job.name}.timer",
        "loginctl enable-linger  # lets the job run while you are logged out",
    ]
