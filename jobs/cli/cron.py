"""The command that has a job run at given times."""

from pathlib import Path
from typing import Annotated

import typer

from batchinfer.jobs.cli.run import job_of

app = typer.Typer()


@app.command()
def cron(
    arguments: Annotated[
        list[str], typer.Argument(metavar="ARGUMENT", help="Behind '--': what would follow 'batchinfer run'.")
    ],
    schedule: Annotated[str, typer.Option(metavar="'M H D M W'", help="When: the five fields of a crontab.")],
    install: Annotated[bool, typer.Option("--install", help="Put it in place, for you alone.")] = False,
    systemd: Annotated[bool, typer.Option("--systemd", help="A service and a timer, no crontab line.")] = False,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the job's lines go; else OUT.log beside the output.")
    ] = None,
) -> None:
    """Print the crontab line, or the systemd units, that start this job, from this folder."""
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
