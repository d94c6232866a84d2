"""The commands for Slurm."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from batchinfer.errors import UsageError
from batchinfer.flag import Flag
from batchinfer.jobs.cli.flags import RunArguments, SectionedCommand, takes
from batchinfer.jobs.cli.run import job_of

app = typer.Typer(help="Run a job on a Slurm cluster.")


@app.command(cls=SectionedCommand)
@takes()
def submit(
    arguments: RunArguments,
    array: Annotated[int, Flag("Divide the rows into N shards; each is a task of the array.", at_least=1)],
    time: Annotated[
        str | None, Flag("Limit each task to this time: minutes, or [DAYS-]HH:MM:SS.", metavar="TIME")
    ] = None,
    partition: Annotated[str | None, Flag("Submit to this partition of Slurm.", metavar="NAME")] = None,
    gres: Annotated[
        str | None, Flag("Request these generic resources for each shard, as in 'gpu:1'.", metavar="LIST")
    ] = None,
    sbatch: Annotated[
        tuple[str, ...],
        Flag(
            "Pass this option to sbatch, as in --sbatch=--account=me; give the flag again for each further one.",
            metavar="OPTION",
        ),
    ] = (),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be submitted, and submit nothing.")
    ] = False,
) -> None:
    """Submit a job as an array of shards, and a second job that merges them.

    Given again, the same command runs only what is left.
    """
    from batchinfer.jobs.launch import slurm
    from batchinfer.jobs.launch.shard_arguments import for_all_shards

    if wrong := [option for option in sbatch if not option.startswith("-")]:
        raise UsageError(f"--sbatch is {wrong[0]!r}; it must be an option of sbatch, as --sbatch=--account=me")
    spec = job_of(arguments)
    slurm.check_job(spec, time)
    options = {"--time": time, "--partition": partition}
    submission = slurm.Submission(
        command=[sys.executable, "-P", "-m", "batchinfer"],  # -P: import nothing from the current folder
        arguments=for_all_shards(spec, arguments, array),
        folder=Path.cwd(),
        output=Path.cwd() / spec.output,
        count=array,
        options=[*(f"{flag}={value}" for flag, value in options.items() if value is not None), *sbatch],
        shard_options=[] if gres is None else [f"--gres={gres}"],
    )
    if dry_run:
        print(slurm.dry_run(submission))
        return
    shards, merge = slurm.submit(submission)
    print(f"array {shards}: {array} shards; job {merge} merges them into {submission.output} when all are done")
    print(f"logs: {submission.scripts_folder}/shard-*.log and merge.log")
