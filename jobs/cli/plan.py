"""The commands before a job: plan and doctor. Each imports large modules only when it runs."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from batchinfer.flag import Flag
from batchinfer.jobs.cli.flags import SectionedCommand, takes
from batchinfer.jobs.cli.run import job_of

app = typer.Typer()


@app.command(cls=SectionedCommand, context_settings={"ignore_unknown_options": True})
@takes()
def plan(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT... --model MODEL [OPTION...]",
            help="The arguments that `batchinfer run` would be given; --output may be left out.",
        ),
    ],
    json_file: Annotated[Path | None, Flag("Write the plan to this JSON file too.", name="json")] = None,
) -> None:
    """Tell what a job will be and how long it will take, without loading the model's weights."""
    from batchinfer.jobs import outlook as planning
    from batchinfer.jobs.plan.histogram import terminal_width
    from batchinfer.jobs.results.durable import write_json

    job = job_of(arguments, output=planning.NOWHERE)
    outlook = planning.plan(job)
    print(outlook.text(terminal_width()))
    if outlook.comparison is not None and (better := outlook.comparison.better) is not None:
        output = ["-o", "OUT.parquet"] if job.output == planning.NOWHERE else []
        command = shlex.join(["batchinfer", "run", *arguments, *output, *better.flags])
        print(f"\nThe fastest way of known quality:\n  {command}")
    if json_file is not None:
        write_json(json_file, outlook.json())


@app.command(cls=SectionedCommand)
@takes()
def init(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="TABLE...", help="Files of the table, or folders of such files.")
    ],
    output: Annotated[Path, Flag("Write the job file here.", metavar="FILE.toml", short="-o")] = Path("job.toml"),
    overwrite: Annotated[bool, Flag("Replace an earlier job file.")] = False,
) -> None:
    """Write a job file for a table, with comments, from what the table holds and which models are here."""
    from batchinfer.errors import Refused, UsageError
    from batchinfer.jobs import outlook as planning
    from batchinfer.jobs.init import add_plan, write_job_file

    planned = ""
    if write_job_file(inputs, output, overwrite):
        try:
            add_plan(output, planning.plan(job_of(["--config", str(output)], output=planning.NOWHERE)))
        except (Refused, UsageError) as error:
            add_plan(output, str(error))
            planned = f" No plan can be made yet: {error}."
    print(f"{output} is written.{planned} Read it and change what is wrong, then:")
    print(f"  batchinfer plan --config {output}\n  batchinfer run --config {output}")


@app.command(cls=SectionedCommand)
@takes("device", "cpu_path")
def doctor(
    device: str,
    cpu_path: str,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure the device first, so that `batchinfer plan` can predict times. This takes some minutes, "
            "during which nothing else should run.",
        ),
    ] = False,
) -> None:
    """Tell what this machine offers to jobs, and what is missing."""
    from batchinfer.jobs import doctor as examination

    print(examination.examine(device, calibrate, cpu_path))
