"""The commands that tell before a job what it will be: plan and doctor. Each imports for itself what is large."""

from pathlib import Path
from typing import Annotated

import typer

from batchinfer.jobs.cli.options import Device
from batchinfer.jobs.cli.run import job_of

app = typer.Typer()


@app.command(context_settings={"ignore_unknown_options": True})
def plan(
    arguments: Annotated[
        list[str], typer.Argument(metavar="INPUT... --model MODEL [OPTION...]", help="What `batchinfer run` takes.")
    ],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the same here.")] = None,
) -> None:
    """Tell what a job will be, and take how long, before a weight is loaded. --output may be left out."""
    from batchinfer.jobs import outlook as planning
    from batchinfer.jobs.plan.histogram import terminal_width
    from batchinfer.jobs.results.durable import write_json

    outlook = planning.plan(job_of(arguments, output=planning.NOWHERE))
    print(outlook.text(terminal_width()))
    if json_file is not None:
        write_json(json_file, outlook.json())


@app.command()
def doctor(
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Measure the device, in two minutes; best while nothing else runs."),
    ] = False,
    device: Device = "auto",
) -> None:
    """Tell what this machine offers, and what is missing."""
    from batchinfer.jobs import doctor as examination

    print(examination.examine(device, calibrate))
