"""The commands about outputs: status, report, merge, verify. Each imports large modules only when it runs."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from batchinfer.flag import Flag
from batchinfer.jobs.cli.flags import SectionedCommand, takes

app = typer.Typer()


@app.command(cls=SectionedCommand)
@takes()
def status(
    outputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="OUT",
            help="The output of the job, as its -o names it; of a job of shards also their outputs, or a pattern in "
            "quotes, as 'OUT-*-of-4.parquet'.",
        ),
    ],
    watch: Annotated[bool, Flag("Print it again every two seconds until the job is over.")] = False,
    as_json: Annotated[bool, Flag("Print a JSON object on one line.", name="json")] = False,
) -> None:
    """Tell how a job goes, from another shell or another machine: rows, rate, time left, and whether it is alive.

    Of a job of shards, tell how all go together, and each of them in a line.
    """
    from batchinfer.jobs.launch.slurm import submitted
    from batchinfer.jobs.shard_outputs import outputs_of
    from batchinfer.jobs.shard_status import print_shards
    from batchinfer.jobs.status import print_status

    found = outputs_of(outputs, submitted)
    with suppress(KeyboardInterrupt):  # the way to leave --watch
        if found == outputs[:1]:
            print_status(outputs[0], watch, as_json)
        else:
            print_shards(found, watch, as_json)


@app.command(cls=SectionedCommand)
@takes()
def report(
    outputs: Annotated[
        list[Path], typer.Argument(metavar="OUT [OUT]", help="The output of the job; two outputs are compared.")
    ],
    written_as: Annotated[
        str,
        Flag("Print it as a table, as JSON, or as a web page.", name="format", choices=("text", "json", "html")),
    ] = "text",
) -> None:
    """Print the report of a finished job again, or what changed from one job to another."""
    from batchinfer.errors import UsageError
    from batchinfer.jobs.report_forms import printed_comparison, printed_report

    match outputs:
        case [output]:
            print(printed_report(output, written_as))
        case [first, second]:
            print(printed_comparison(first, second, written_as))
        case _:
            raise UsageError(f"report compares two outputs, and {len(outputs)} are given; name one or two")


@app.command(cls=SectionedCommand)
@takes()
def merge(
    shards: Annotated[
        list[Path], typer.Argument(metavar="OUT-I-of-N", help="The outputs of all N shards, in any order.")
    ],
    output: Annotated[Path, Flag("Write the merged table here.", metavar="OUT", short="-o")],
    overwrite: Annotated[bool, Flag("Replace an earlier output.")] = False,
) -> None:
    """Merge the outputs of all shards of a job into one."""
    from batchinfer.jobs.amounts import count_of
    from batchinfer.jobs.merge_shards import merge_shards

    rows = merge_shards(shards, output, overwrite)
    print(f"{output}: {count_of(rows, 'row')} of {count_of(len(shards), 'shard')}")


@app.command(cls=SectionedCommand)
def verify(output: Annotated[Path, typer.Argument(metavar="OUT", help="The output of the job.")]) -> None:
    """Check the output of a finished job: count its rows, tokens and hashes again from its files alone."""
    from batchinfer.jobs import verify as verification

    print("\n".join(verification.verify(output)))
