"""The commands about outputs: report, merge, verify. Each imports for itself what is large."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def report(output: Annotated[Path, typer.Argument(metavar="OUT")]) -> None:
    """Print the report of a finished job again."""
    from batchinfer.jobs.report import read_report

    print(read_report(output).table())


@app.command()
def merge(
    shards: Annotated[list[Path], typer.Argument(metavar="OUT-I-of-N...")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the whole goes.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier file.")] = False,
) -> None:
    """Put the outputs of all shards of a job together."""
    from batchinfer.jobs.merge_shards import merge_shards

    print(f"{output}: {merge_shards(shards, output, overwrite):,} rows of {len(shards)} shards")


@app.command()
def verify(output: Annotated[Path, typer.Argument(metavar="OUT")]) -> None:
    """Count rows, tokens and hashes of a finished job again, from its files alone."""
    from batchinfer.jobs import verify as verification

    print("\n".join(verification.verify(output)))
