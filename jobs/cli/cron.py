"""The command that makes cron or systemd run a job at given times."""

from pathlib import Path
from typing import Annotated

import typer

from batchinfer.flag import Flag
from batchinfer.jobs.cli.flags import RunArguments, SectionedCommand, takes
from batchinfer.jobs.cli.run import job_of

app = typer.Typer()


@app.command(cls=SectionedCommand)
@takes()
def cron(
    arguments: RunArguments,
    schedule: Annotated[
        str, Flag("Start the job at these times: the five fields of a crontab.", metavar="'M H D M W'")
    ],
    install: Annotated[
        bool, typer.Option("--install", help="Install the line or the units for the current user.")
    ] = False,
    systemd: Annotated[
        bool, typer.Option("--systemd", help="Make a systemd service and timer instead of a crontab line.")
    ] = False,
    log: Annotated[
        Path | None, Flag("Append what the job prints to this file; OUT.log beside the output if none is given.")
    ] = None,
) -> None:
    """Print the crontab line, or the systemd units, that start a job from this folder at given times."""
    from batchinfer.jobs.launch import cron as crontab
    from batchinfer.jobs.launch import systemd as units_of_systemd
    from batchinfer.jobs.launch.recurring import RecurringJob
    from batchinfer.jobs.launch.schedule import Schedule

    job = RecurringJob.of(job_of(arguments), arguments, Schedule.parse(schedule), log)
    if not systemd:
        line = crontab.crontab_line(job)
        if install:
            crontab.install(job)
        print(f"installed: {line}" if install else line)
    elif install:
        print("\n".join(units_of_systemd.install(job)))
    else:
        for name, text in units_of_systemd.units(job).items():
            print(f"# {units_of_systemd.unit_folder() / name}\n{text}")
